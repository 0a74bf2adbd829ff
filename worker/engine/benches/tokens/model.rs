//! The models that `tests/bench/bits` compares: tiny-r1 and a wide one of random weights, in bf16 and widened to f32.

use std::fs;
use std::path::Path;

use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use serde_json::json;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const HIDDEN: usize = 1024;
const HEADS: usize = 16;
const QUERY_RANK: usize = 512;
const RANK: usize = 256;
const NOPE: usize = 64;
const ROPE: usize = 32;
const VALUE: usize = 64;
const DENSE_INNER: usize = 4096;
const EXPERT_INNER: usize = 512;
const EXPERTS: usize = 16;
const VOCABULARY: usize = 2048;
const LAYERS: usize = 3;

/// Writes `tiny-r1-bf16`, `tiny-r1-f32`, `wide-bf16` and `wide-f32`, 0.5 GB together.
pub(crate) fn write_all(tiny_r1: &Path, folder: &Path) -> Outcome {
    let of = |name: &str| folder.join(name);
    for name in ["tiny-r1-bf16", "tiny-r1-f32", "wide-bf16", "wide-f32"] {
        fs::create_dir_all(of(name))?;
    }
    for file in ["config.json", "model.safetensors"] {
        fs::copy(tiny_r1.join(file), of("tiny-r1-bf16").join(file))?;
    }
    write_wide(&of("wide-bf16"))?;
    widen(&of("tiny-r1-bf16"), &of("tiny-r1-f32"))?;
    widen(&of("wide-bf16"), &of("wide-f32"))
}

fn widen(from: &Path, to: &Path) -> Outcome {
    fs::copy(from.join("config.json"), to.join("config.json"))?;
    let bytes = fs::read(from.join("model.safetensors"))?;
    let wide = |view: TensorView<'_>| match view.dtype() {
        Dtype::BF16 => {
            let values = view.data().as_chunks::<2>().0.iter();
            values.flat_map(|value| bf16::from_le_bytes(*value).to_f32().to_le_bytes()).collect()
        }
        _ => view.data().to_vec(),
    };
    let tensors = SafeTensors::deserialize(&bytes)?;
    let tensors = tensors.iter().map(|(name, view)| (name.to_owned(), view.shape().to_vec(), wide(view)));
    save(&tensors.collect::<Vec<_>>(), Dtype::F32, to)
}

fn write_wide(folder: &Path) -> Outcome {
    let config = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": DENSE_INNER, "moe_intermediate_size": EXPERT_INNER,
        "vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "first_k_dense_replace": 1, "n_routed_experts": EXPERTS,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "norm_topk_prob": true,
        "routed_scaling_factor": 2.5, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "q_lora_rank": QUERY_RANK, "kv_lora_rank": RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE, "rope_theta": 10000.0, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "tie_word_embeddings": false, "attention_bias": false, "rope_interleave": true,
    });
    fs::write(folder.join("config.json"), config.to_string())?;

    let mut tensors = Vec::new();
    let mut state = 1u32;
    let mut tensor = |name: &str, shape: &[usize]| {
        let count = shape.iter().product();
        let [.., inputs] = *shape else { return };
        let spread = 2.0 * (3.0 / inputs as f32).sqrt(); // so that rows keep their length
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 24) as f32 - 0.5) * spread
        };
        let mut value = || match name {
            _ if name.ends_with("norm.weight") => 1.0,
            _ if name.ends_with("bias") => 0.0,
            _ => random(),
        };
        let bytes: Vec<u8> = (0..count).flat_map(|_: usize| bf16::from_f32(value()).to_le_bytes()).collect();
        tensors.push((name.to_owned(), shape.to_vec(), bytes));
    };
    tensor("model.embed_tokens.weight", &[VOCABULARY, HIDDEN]);
    tensor("model.norm.weight", &[HIDDEN]);
    tensor("lm_head.weight", &[VOCABULARY, HIDDEN]);
    for layer in 0..LAYERS {
        let at = format!("model.layers.{layer}");
        tensor(&format!("{at}.input_layernorm.weight"), &[HIDDEN]);
        tensor(&format!("{at}.post_attention_layernorm.weight"), &[HIDDEN]);
        let at = format!("{at}.self_attn");
        tensor(&format!("{at}.q_a_proj.weight"), &[QUERY_RANK, HIDDEN]);
        tensor(&format!("{at}.q_a_layernorm.weight"), &[QUERY_RANK]);
        tensor(&format!("{at}.q_b_proj.weight"), &[HEADS * (NOPE + ROPE), QUERY_RANK]);
        tensor(&format!("{at}.kv_a_proj_with_mqa.weight"), &[RANK + ROPE, HIDDEN]);
        tensor(&format!("{at}.kv_a_layernorm.weight"), &[RANK]);
        tensor(&format!("{at}.kv_b_proj.weight"), &[HEADS * (NOPE + VALUE), RANK]);
        tensor(&format!("{at}.o_proj.weight"), &[HIDDEN, HEADS * VALUE]);
    }
    let mut mlp = |at: &str, inner: usize| {
        tensor(&format!("{at}.gate_proj.weight"), &[inner, HIDDEN]);
        tensor(&format!("{at}.up_proj.weight"), &[inner, HIDDEN]);
        tensor(&format!("{at}.down_proj.weight"), &[HIDDEN, inner]);
    };
    mlp("model.layers.0.mlp", DENSE_INNER);
    for layer in 1..LAYERS {
        let at = format!("model.layers.{layer}.mlp");
        mlp(&format!("{at}.shared_experts"), EXPERT_INNER);
        (0..EXPERTS).for_each(|expert| mlp(&format!("{at}.experts.{expert}"), EXPERT_INNER));
    }
    for layer in 1..LAYERS {
        let at = format!("model.layers.{layer}.mlp.gate");
        tensor(&format!("{at}.weight"), &[EXPERTS, HIDDEN]);
        tensor(&format!("{at}.e_score_correction_bias"), &[EXPERTS]);
    }
    save(&tensors, Dtype::BF16, folder)
}

/// `tensors`: names, shapes and bytes.
fn save(tensors: &[(String, Vec<usize>, Vec<u8>)], dtype: Dtype, folder: &Path) -> Outcome {
    let views = tensors.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(dtype, shape.clone(), bytes)?)));
    let views: Vec<_> = views.collect::<Result<_, safetensors::SafeTensorError>>()?;
    Ok(serialize_to_file(views, None, &folder.join("model.safetensors"))?)
}
