//! What a model weighs: a value that `modelfleet-worker describe` prints, made by the engine's own loader from config
//! and headers alone. Only the engine knows families; here they are numbers.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Tokens};

/// What a model weighs, as `modelfleet-worker describe` prints it in JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelDescription {
    /// As `config.json` names it, such as `DeepseekV3ForCausalLM`.
    pub architecture: String,
    /// Type of the weights in the files, such as `bf16`.
    pub dtype: String,
    /// Number of parameters.
    pub parameters: u64,
    /// Weights that every worker holds: all but the routed experts.
    pub dense_bytes: Bytes,
    /// Memory of one token in the key-value cache, all layers together.
    pub kv_bytes_per_token: Bytes,
    /// The longest prompt plus answer that the model was made for.
    pub max_context_tokens: Tokens,
    /// Size of the vocabulary.
    pub vocab_size: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Number of transformer layers.
    pub layers: u32,
    /// Routed experts of each MoE layer; 0 for a dense model.
    pub experts: u32,
    /// Experts that each token visits.
    pub experts_per_token: u32,
    /// The layers that have routed experts, in order.
    pub moe_layers: Vec<MoeLayer>,
    /// The commit that the asked revision means; empty where the source has none.
    #[serde(default)]
    pub resolved_revision: String,
    /// SHA-256 over the list of files.
    #[serde(default)]
    pub content_hash: String,
    /// The files that workers need.
    #[serde(default)]
    pub files: Vec<ModelFile>,
}

/// A layer with routed experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MoeLayer {
    /// Index of the transformer layer.
    pub layer: u32,
    /// Weights of one of its experts.
    pub expert_bytes: Bytes,
}

/// A file of the model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelFile {
    /// Path inside the model.
    pub path: String,
    /// Size in bytes.
    pub size: Bytes,
    /// SHA-256 of the content, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The hub's git object id, where that is all it gives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git_oid: Option<String>,
}

impl ModelDescription {
    /// Whether experts can be parted at all.
    pub fn is_dense(&self) -> bool {
        self.experts == 0 || self.moe_layers.is_empty()
    }

    /// Weights of all files together.
    pub fn file_bytes(&self) -> Bytes {
        self.files.iter().map(|file| file.size).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_worker_prints() {
        let text = r#"{"architecture":"DeepseekV3ForCausalLM","dtype":"bf16","parameters":3600000,"denseBytes":123,
            "kvBytesPerToken":123,"maxContextTokens":1024,"vocabSize":512,"hiddenSize":256,"layers":4,"experts":16,
            "expertsPerToken":4,"moeLayers":[{"layer":1,"expertBytes":98304}],"resolvedRevision":"","contentHash":"ab",
            "files":[{"path":"config.json","size":1169,"sha256":"cd"}]}"#;
        let description: ModelDescription = serde_json::from_str(text).unwrap();
        assert_eq!(description.moe_layers[0].expert_bytes, Bytes(98304));
        assert_eq!(description.file_bytes(), Bytes(1169));
        assert!(!description.is_dense());
        let again = serde_json::from_str(&serde_json::to_string(&description).unwrap()).unwrap();
        assert_eq!(description, again);
    }
}
