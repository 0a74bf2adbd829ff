//! The configuration of a DeepSeek-V3 model, in the spellings of transformers 4 and 5.

use serde_json::{Value, json};

use crate::error::Error;
use crate::layers::mla::MlaShape;
use crate::layers::moe::GateShape;
use crate::layers::rope::Yarn;
use crate::load::{Fields, Shelf, refuse};
use crate::models::Shape;

/// A configuration whose numbers fit each other. That they fit the weights is for the loader to see.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Config {
    pub(crate) shape: Shape,
    pub(crate) attention: MlaShape,
    pub(crate) gate: GateShape,
    /// Inner width of the feed-forward part of a dense layer.
    pub(crate) dense_inner: usize,
    /// Inner width of a routed expert.
    pub(crate) expert_inner: usize,
    /// Inner width of the shared experts together.
    pub(crate) shared_inner: usize,
    pub(crate) theta: f64,
    pub(crate) yarn: Option<Yarn>,
    pub(crate) interleave: bool,
    pub(crate) epsilon: f32,
    /// Whether the head is the embedding.
    pub(crate) tied: bool,
    /// Layers for multi-token prediction that may follow in the file.
    predicting: usize,
}

/// Most of anything that is counted in values of one row.
const WIDE: usize = 1 << 20;

/// Most of anything that is counted in tokens.
const LONG: usize = 1 << 28;

impl Config {
    /// # Errors
    /// [`Error::Config`] with the field, its value and what is accepted.
    pub(crate) fn read(fields: &Fields) -> Result<Self, Error> {
        only_what_is_known(fields)?;
        let layers = fields.size("num_hidden_layers", 1..=4096)?;
        let dense = fields.size_or("first_k_dense_replace", 0..=4096, 3)?;
        let moe_layers: Vec<usize> = (dense.min(layers)..layers).collect();
        let attention = attention(fields)?;
        let gate = gate(fields)?;
        let expert_inner = fields.size("moe_intermediate_size", 1..=WIDE)?;
        let shared = fields.size_or("n_shared_experts", 1..=256, 1)?;
        let max_context = fields.size("max_position_embeddings", 1..=LONG)?;
        let (theta, yarn) = rope(fields, max_context)?;
        Ok(Config {
            shape: Shape {
                vocab_size: fields.size("vocab_size", 1..=1 << 24)?,
                hidden: attention.hidden,
                layers,
                max_context,
                cache_width: attention.width(),
                experts: if moe_layers.is_empty() { 0 } else { gate.experts },
                experts_per_token: if moe_layers.is_empty() { 0 } else { gate.top_k },
                moe_layers,
            },
            attention,
            gate,
            dense_inner: fields.size("intermediate_size", 1..=WIDE)?,
            expert_inner,
            shared_inner: expert_inner * shared,
            theta,
            yarn,
            interleave: fields.flag("rope_interleave", true)?,
            epsilon: fields.optional_positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            tied: fields.flag("tie_word_embeddings", false)?,
            predicting: fields.optional_size("num_nextn_predict_layers", 0..=64)?.unwrap_or(0),
        })
    }

    /// What attention scores are multiplied by.
    pub(crate) fn softmax_scale(&self) -> f32 {
        let head = (self.attention.nope + self.attention.rope) as f64;
        (self.yarn.as_ref().map_or(1.0, Yarn::softmax_scale) / head.sqrt()) as f32
    }

    /// Refuses a file with more layers than the configuration tells of.
    pub(crate) fn check(&self, shelf: &Shelf) -> Result<(), Error> {
        let layer =
            |name: &str| -> Option<usize> { name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok() };
        let (layers, predicting) = (self.shape.layers, self.predicting);
        match shelf.tensors().filter_map(layer).max() {
            Some(last) if last >= layers + predicting => Err(refuse(format!(
                "num_hidden_layers is {layers} and num_nextn_predict_layers {predicting}; \
                 the weight files have a layer {last}, counted from 0"
            ))),
            _ => Ok(()),
        }
    }
}

/// Refuses variants whose arithmetic is another.
fn only_what_is_known(fields: &Fields) -> Result<(), Error> {
    if let Some(quantization) = fields.object("quantization_config")? {
        return Err(quantization.wrong("quant_method", "absent: weights of bf16, f16 or f32 are read"));
    }
    let dtypes = ["bfloat16", "float16", "float32"].map(|name| json!(name));
    fields.expect("dtype", &dtypes)?;
    fields.expect("torch_dtype", &dtypes)?;
    fields.expect("hidden_act", &[json!("silu")])?;
    fields.expect("scoring_func", &[json!("sigmoid")])?;
    fields.expect("topk_method", &[json!("noaux_tc")])?;
    fields.expect("moe_layer_freq", &[json!(1)])
}

fn attention(fields: &Fields) -> Result<MlaShape, Error> {
    let heads = fields.size("num_attention_heads", 1..=4096)?;
    fields.expect("num_key_value_heads", &[json!(heads)])?;
    let rope = fields.size("qk_rope_head_dim", 2..=4096)?;
    if !rope.is_multiple_of(2) {
        return Err(fields.wrong("qk_rope_head_dim", "even"));
    }
    fields.expect("head_dim", &[json!(rope)])?;
    Ok(MlaShape {
        hidden: fields.size("hidden_size", 1..=WIDE)?,
        heads,
        query_rank: fields.optional_size("q_lora_rank", 1..=WIDE)?,
        rank: fields.size("kv_lora_rank", 1..=WIDE)?,
        nope: fields.size("qk_nope_head_dim", 1..=4096)?,
        rope,
        value: fields.size("v_head_dim", 1..=4096)?,
        bias: fields.flag("attention_bias", false)?,
    })
}

fn gate(fields: &Fields) -> Result<GateShape, Error> {
    let experts = fields.size("n_routed_experts", 2..=1 << 16)?;
    let groups = fields.size_or("n_group", 1..=experts / 2, 8)?;
    if !experts.is_multiple_of(groups) {
        let accepted = format!("a divisor of n_routed_experts, which is {experts}");
        return Err(fields.wrong("n_group", &accepted));
    }
    let groups_kept = fields.size_or("topk_group", 1..=groups, 4.min(groups))?;
    let choosable = experts / groups * groups_kept;
    Ok(GateShape {
        experts,
        top_k: fields.size("num_experts_per_tok", 1..=choosable)?,
        groups,
        groups_kept,
        normalise: fields.flag("norm_topk_prob", true)?,
        scale: fields.optional_positive("routed_scaling_factor")?.unwrap_or(2.5) as f32,
    })
}

/// The base of the frequencies and how they are stretched: in `rope_parameters`, or as older
/// releases wrote it, in `rope_theta` and `rope_scaling`.
fn rope(fields: &Fields, max_context: usize) -> Result<(f64, Option<Yarn>), Error> {
    let scaling = match fields.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => fields.object("rope_scaling")?,
    };
    let outer = fields.optional_positive("rope_theta")?;
    let inner = scaling.as_ref().map(|scaling| scaling.optional_positive("rope_theta")).transpose()?;
    let theta = inner.flatten().or(outer).unwrap_or(10_000.0);
    let Some(scaling) = scaling else {
        return Ok((theta, None));
    };
    fields.expect("partial_rotary_factor", &[json!(1.0), json!(1)])?;
    scaling.expect("partial_rotary_factor", &[json!(1.0), json!(1)])?;
    let name = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    match scaling.get(name).map(Value::as_str) {
        None | Some(Some("default")) => Ok((theta, None)),
        Some(Some("yarn")) => Ok((theta, Some(yarn(&scaling, max_context)?))),
        Some(_) => Err(scaling.wrong(name, "\"default\" or \"yarn\"")),
    }
}

fn yarn(scaling: &Fields, max_context: usize) -> Result<Yarn, Error> {
    let original = scaling.optional_size("original_max_position_embeddings", 1..=LONG)?;
    // a multiplier of 0 is as good as absent
    let multiplier = |name: &str| match scaling.get(name).and_then(Value::as_f64) {
        Some(0.0) => Ok(None),
        _ => scaling.optional_positive(name),
    };
    Ok(Yarn {
        factor: scaling.positive("factor")?,
        original_context: original.unwrap_or(max_context) as f64,
        beta_fast: scaling.optional_positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: scaling.optional_positive("beta_slow")?.unwrap_or(1.0),
        mscale: multiplier("mscale")?,
        mscale_all_dim: multiplier("mscale_all_dim")?,
        attention_factor: scaling.optional_positive("attention_factor")?,
        truncate: scaling.flag("truncate", true)?,
    })
}
