//! Reads and checks the bodies of the OpenAI endpoints.
//!
//! The router has checked size, depth, UTF-8, `model`, `stream` and `n`; all the rest is checked here. A field that is
//! documented by OpenAI or vLLM but not honoured is refused by its name, unless it has its default value; a field that
//! nobody documents passes and is never acted on.

use serde_json::{Map, Value};
use wire::openai::{ErrorObject, MAX_CHOICES, MAX_STOPS};

use crate::chat::Message;

mod chat;
pub mod chunk;
mod completion;
pub mod defaults;
mod field;
mod unsupported;

pub use defaults::Defaults;
use field::Fields;

/// Most sequences of one request: prompts times choices.
pub const MAX_SEQUENCES: usize = 256;
/// Most entries of `logit_bias`, as OpenAI has it.
const MAX_BIAS: usize = 1024;
/// Most alternatives of a token.
const MAX_LOGPROBS: i64 = 20;

/// Why a request is not run: shown to the client as an OpenAI error object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// HTTP status, 4xx.
    pub status: u16,
    /// What is wrong and what is accepted.
    pub message: String,
    /// The field.
    pub param: Option<String>,
    /// A stable word for programs.
    pub code: Option<&'static str>,
}

impl Refusal {
    /// A value that is not accepted: 400.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status: 400, message: message.into(), param: Some(param.into()), code: Some("invalid_value") }
    }

    /// The error object as clients read it.
    pub fn to_json(&self) -> Vec<u8> {
        let mut error = ErrorObject::invalid_request(&self.message);
        error.param.clone_from(&self.param);
        error.code = self.code.map(str::to_owned);
        error.to_json()
    }
}

/// What the model continues.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A conversation.
    Chat(Vec<Message>),
    /// Texts or tokens, each with its own choices.
    Prompts(Vec<Prompt>),
}

/// A prompt of the completions endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Token ids, not yet checked against the vocabulary.
    Ids(Vec<u32>),
}

/// One request, checked; what depends on the model's vocabulary and context is not.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// What the model continues.
    pub input: Input,
    /// Choices of each prompt.
    pub n: usize,
    /// As the client asks.
    pub max_tokens: Option<usize>,
    /// The field in which the client asks for it: refusals name that one.
    pub max_tokens_field: &'static str,
    /// Where the client does not ask, as far as the context reaches; `None`: up to the context.
    pub default_max_tokens: Option<usize>,
    /// `seed` and `stream` are set when the sequences are made.
    pub sampling: engine::Sampling,
    /// `None`: chosen when the sequences are made.
    pub seed: Option<u64>,
    /// Text ends before any of these.
    pub stop: Vec<String>,
    /// Generation ends with any of these.
    pub stop_token_ids: Vec<u32>,
    /// Goes on after the model's end token.
    pub ignore_eos: bool,
    /// Alternatives wanted for each token.
    pub logprobs: Option<usize>,
    /// The prompt is part of the answer.
    pub echo: bool,
}

/// Reads a body of `/v1/chat/completions`.
///
/// # Errors
/// With the field, the value and what is accepted.
pub fn chat(body: &[u8], defaults: &Defaults) -> Result<Call, Refusal> {
    chat::call(&Fields::of(&object(body)?), defaults)
}

/// Reads a body of `/v1/completions`.
///
/// # Errors
/// With the field, the value and what is accepted.
pub fn completion(body: &[u8], defaults: &Defaults) -> Result<Call, Refusal> {
    completion::call(&Fields::of(&object(body)?), defaults)
}

fn object(body: &[u8]) -> Result<Map<String, Value>, Refusal> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(not_json("the body is JSON, but no object".into())),
        Err(error) => Err(not_json(format!("the body is not JSON: {error}"))),
    }
}

fn not_json(message: String) -> Refusal {
    Refusal { status: 400, message, param: None, code: Some("invalid_json") }
}

/// What both endpoints have in common.
fn common(fields: &Fields<'_>, defaults: &Defaults, input: Input) -> Result<Call, Refusal> {
    unsupported::check_common(fields)?;
    fields.boolean("stream")?;
    stream_options(fields)?;
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned);
    let sampling = sampling(fields, defaults)?;
    Ok(Call {
        input,
        n: fields.integer("n", 1..=i64::from(MAX_CHOICES))?.map_or(1, field::count),
        max_tokens: None,
        max_tokens_field: "max_tokens",
        default_max_tokens: None,
        sampling,
        seed,
        stop: stop(fields)?,
        stop_token_ids: fields.token_ids("stop_token_ids")?.unwrap_or_default(),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        logprobs: None,
        echo: false,
    })
}

fn stream_options(fields: &Fields<'_>) -> Result<(), Refusal> {
    let Some(value) = fields.get("stream_options") else {
        return Ok(());
    };
    let Some(options) = value.as_object() else {
        return Err(fields.wrong("stream_options", "an object"));
    };
    unsupported::check_stream_options(&Fields::of(options))?;
    match options.get("include_usage") {
        None | Some(Value::Bool(_) | Value::Null) => Ok(()),
        Some(value) => Err(field::wrong_value("stream_options.include_usage", value, "true or false")),
    }
}

fn sampling(fields: &Fields<'_>, defaults: &Defaults) -> Result<engine::Sampling, Refusal> {
    let number = |name, range, default: f32| fields.number(name, range).map(|value| value.unwrap_or(default));
    // -1 means all tokens in vLLM, 0 in Hugging Face
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| field::count(k.max(0)));
    Ok(engine::Sampling {
        temperature: number("temperature", 0.0..=2.0, defaults.temperature)?,
        top_k: top_k.unwrap_or(defaults.top_k),
        top_p: fields.above_zero("top_p", 1.0)?.unwrap_or(defaults.top_p),
        min_p: number("min_p", 0.0..=1.0, defaults.min_p)?,
        repetition_penalty: fields.above_zero("repetition_penalty", 2.0)?.unwrap_or(defaults.repetition_penalty),
        presence_penalty: number("presence_penalty", -2.0..=2.0, 0.0)?,
        frequency_penalty: number("frequency_penalty", -2.0..=2.0, 0.0)?,
        logit_bias: logit_bias(fields)?,
        seed: 0,
        stream: 0,
    })
}

fn logit_bias(fields: &Fields<'_>) -> Result<Vec<(u32, f32)>, Refusal> {
    let Some(value) = fields.get("logit_bias") else {
        return Ok(Vec::new());
    };
    let accepted = format!("an object of at most {MAX_BIAS} token ids, each with a number from -100 to 100");
    let Some(entries) = value.as_object().filter(|entries| entries.len() <= MAX_BIAS) else {
        return Err(fields.wrong("logit_bias", &accepted));
    };
    let mut bias = Vec::with_capacity(entries.len());
    for (id, value) in entries {
        let name = || format!("logit_bias.{}", field::shortened(id));
        let id: u32 = id.parse().map_err(|_| Refusal::invalid(name(), format!("{} is no token id", name())))?;
        let by = value.as_f64().filter(|by| (-100.0..=100.0).contains(by));
        bias.push((id, by.ok_or_else(|| field::wrong_value(&name(), value, "a number from -100 to 100"))? as f32));
    }
    bias.sort_by_key(|&(id, _)| id);
    Ok(bias)
}

fn stop(fields: &Fields<'_>) -> Result<Vec<String>, Refusal> {
    let accepted = format!("a string, or at most {MAX_STOPS} strings that are not empty");
    let wrong = || fields.wrong("stop", &accepted);
    match fields.get("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(string)) if string.is_empty() => Ok(Vec::new()),
        Some(Value::String(string)) => Ok(vec![string.clone()]),
        Some(Value::Array(strings)) if strings.len() <= MAX_STOPS => strings
            .iter()
            .map(|string| string.as_str().filter(|s| !s.is_empty()).map(str::to_owned).ok_or_else(wrong))
            .collect(),
        Some(Value::Array(strings)) => {
            Err(Refusal::invalid("stop", format!("stop has {} strings; use at most {MAX_STOPS}", strings.len())))
        }
        Some(_) => Err(wrong()),
    }
}

#[cfg(test)]
mod tests;
