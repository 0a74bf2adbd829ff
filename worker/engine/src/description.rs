//! What a model weighs, known from its configuration and the headers of its weight files alone.

use serde::{Deserialize, Serialize};

/// What a model is and what it needs. The worker fills in what only the source knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Description {
    /// The first entry of `architectures`.
    pub architecture: String,
    /// How most weights are stored: `bf16`, `f16` or `f32`.
    pub dtype: String,
    /// Weights of the model, not counting those that are never loaded.
    pub parameters: u64,
    /// Bytes that every worker holds: all but the routed experts.
    pub dense_bytes: u64,
    /// Bytes of cache for one token, all layers together, as the engine stores them.
    pub kv_bytes_per_token: u64,
    /// Most tokens of a sequence.
    pub max_context_tokens: u64,
    /// Tokens in the vocabulary.
    pub vocab_size: u64,
    /// Width of the hidden state.
    pub hidden_size: u64,
    /// Layers of the model.
    pub layers: u64,
    /// Routed experts of a layer; 0 if the model is dense.
    pub experts: u64,
    /// Experts that a token is given to.
    pub experts_per_token: u64,
    /// The layers that have routed experts.
    pub moe_layers: Vec<MoeLayer>,
    /// The commit that the source's revision stands for; empty where there is none.
    #[serde(default)]
    pub resolved_revision: String,
    /// SHA-256 over the list of files, in hexadecimal.
    #[serde(default)]
    pub content_hash: String,
    /// The files that the model consists of.
    #[serde(default)]
    pub files: Vec<DescribedFile>,
}

/// One layer with routed experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MoeLayer {
    /// Its place, counted from the first layer of the model.
    pub layer: u64,
    /// Bytes of one expert.
    pub expert_bytes: u64,
}

/// One file of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DescribedFile {
    /// Path from the top of the source.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 in hexadecimal, where the source knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Git object id in hexadecimal, where the source knows only that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git_oid: Option<String>,
}
