//! What a request means where it does not say: the model's `generation_config.json`, or else OpenAI's defaults.
//!
//! As in vLLM, the values count whether or not the file sets `do_sample`: a request for greedy tokens says
//! `temperature: 0`.

use std::path::Path;

use serde_json::Value;

use crate::text::{self, read_capped};

/// Largest configuration file that is read.
const CONFIG_BYTES: u64 = 4 << 20;

/// Sampling where a request does not say, and the tokens that end an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Defaults {
    /// 1 if the model does not say.
    pub temperature: f32,
    /// 0, all tokens, if the model does not say.
    pub top_k: usize,
    /// 1 if the model does not say.
    pub top_p: f32,
    /// 0 if the model does not say.
    pub min_p: f32,
    /// 1, none, if the model does not say.
    pub repetition_penalty: f32,
    /// `None`: OpenAI's rule for the endpoint.
    pub max_new_tokens: Option<usize>,
    /// Any of these ends an answer.
    pub end_tokens: Vec<u32>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_new_tokens: None,
            end_tokens: Vec::new(),
        }
    }
}

impl Defaults {
    /// Reads `generation_config.json` and, for the end tokens, `config.json`.
    ///
    /// # Errors
    /// If a file is there but cannot be read.
    pub fn load(dir: &Path) -> Result<Self, text::Error> {
        let generation = json(dir, "generation_config.json")?;
        let mut defaults = Self::from_json(&generation);
        if defaults.end_tokens.is_empty() {
            defaults.end_tokens = end_tokens(&json(dir, "config.json")?["eos_token_id"]);
        }
        Ok(defaults)
    }

    /// From the content of `generation_config.json`; values out of range count as not given.
    pub fn from_json(config: &Value) -> Self {
        let number = |name: &str, low: f64, high: f64, default: f32| {
            config[name].as_f64().filter(|value| (low..=high).contains(value)).map_or(default, |value| value as f32)
        };
        let count = |name: &str| config[name].as_u64().and_then(|value| usize::try_from(value).ok());
        Self {
            temperature: number("temperature", 0.0, 2.0, 1.0),
            top_k: count("top_k").unwrap_or(0),
            top_p: number("top_p", f64::MIN_POSITIVE, 1.0, 1.0),
            min_p: number("min_p", 0.0, 1.0, 0.0),
            repetition_penalty: number("repetition_penalty", f64::MIN_POSITIVE, 2.0, 1.0),
            max_new_tokens: count("max_new_tokens").filter(|&tokens| tokens > 0),
            end_tokens: end_tokens(&config["eos_token_id"]),
        }
    }
}

fn json(dir: &Path, file: &'static str) -> Result<Value, text::Error> {
    match read_capped(dir, file, CONFIG_BYTES) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| text::Error::Read { file, source: error.into() }),
        Err(text::Error::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(error),
    }
}

fn end_tokens(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}
