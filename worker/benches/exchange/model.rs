//! A model whose rows are as wide as DeepSeek-V3's and whose experts compute next to nothing.

use std::{fs, path::Path, sync::Arc};

use engine::{Experts, Held, Options};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;

/// Values of a row.
pub(crate) const HIDDEN: usize = 7168;
/// The layer with experts.
pub(crate) const LAYER: usize = 1;
/// Experts of that layer.
pub(crate) const EXPERTS: usize = 2;

/// All other widths.
const NARROW: usize = 2;
const VOCABULARY: usize = 4;

/// Writes the model's files.
pub(crate) fn folder() -> anyhow::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let config = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": NARROW, "moe_intermediate_size": 1, "vocab_size": VOCABULARY,
        "num_hidden_layers": 2, "first_k_dense_replace": LAYER, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
        "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.0,
        "num_attention_heads": 1, "num_key_value_heads": 1, "q_lora_rank": null, "kv_lora_rank": NARROW,
        "qk_nope_head_dim": NARROW, "qk_rope_head_dim": NARROW, "v_head_dim": NARROW, "rope_theta": 10000.0,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": true,
        "attention_bias": false, "rope_interleave": true,
    });
    fs::write(folder.path().join("config.json"), config.to_string())?;

    let mut tensors = Vec::new();
    let mut tensor = |name: &str, shape: &[usize]| {
        let values = shape.iter().product::<usize>();
        let bytes: Vec<u8> = std::iter::repeat_n(bf16::from_f32(0.01).to_le_bytes(), values).flatten().collect();
        tensors.push((name.to_owned(), shape.to_vec(), bytes));
    };
    tensor("model.embed_tokens.weight", &[VOCABULARY, HIDDEN]);
    tensor("model.norm.weight", &[HIDDEN]);
    for layer in 0..2 {
        let at = format!("model.layers.{layer}");
        tensor(&format!("{at}.input_layernorm.weight"), &[HIDDEN]);
        tensor(&format!("{at}.post_attention_layernorm.weight"), &[HIDDEN]);
        tensor(&format!("{at}.self_attn.q_proj.weight"), &[2 * NARROW, HIDDEN]);
        tensor(&format!("{at}.self_attn.kv_a_proj_with_mqa.weight"), &[2 * NARROW, HIDDEN]);
        tensor(&format!("{at}.self_attn.kv_a_layernorm.weight"), &[NARROW]);
        tensor(&format!("{at}.self_attn.kv_b_proj.weight"), &[2 * NARROW, NARROW]);
        tensor(&format!("{at}.self_attn.o_proj.weight"), &[HIDDEN, NARROW]);
    }
    let mut mlp = |at: &str, inner: usize| {
        tensor(&format!("{at}.gate_proj.weight"), &[inner, HIDDEN]);
        tensor(&format!("{at}.up_proj.weight"), &[inner, HIDDEN]);
        tensor(&format!("{at}.down_proj.weight"), &[HIDDEN, inner]);
    };
    mlp("model.layers.0.mlp", NARROW);
    mlp("model.layers.1.mlp.shared_experts", 1);
    (0..EXPERTS).for_each(|expert| mlp(&format!("model.layers.1.mlp.experts.{expert}"), 1));
    tensor("model.layers.1.mlp.gate.weight", &[EXPERTS, HIDDEN]);
    tensor("model.layers.1.mlp.gate.e_score_correction_bias", &[EXPERTS]);

    let views: Result<Vec<_>, _> = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::BF16, shape.clone(), bytes)?)))
        .collect();
    let views: Result<Vec<_>, safetensors::SafeTensorError> = views;
    serialize_to_file(views?, None, &folder.path().join("model.safetensors"))?;
    Ok(folder)
}

/// All experts of the model in `folder`.
pub(crate) fn experts(folder: &Path) -> anyhow::Result<Arc<Experts>> {
    let options = Options { kv_cache_tokens: 64, max_context_tokens: None, max_sequences: 1, prefill_chunk: 1 };
    Ok(engine::load(folder, &Held::all(), &options, &mut |_, _| {})?.1)
}
