//! Typed requests to OpenAI's JSON, and its pieces back. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use wire::proto::{Chunk, Endpoint, GenerateRequest, GenerateResponse, TokenLogprob, Usage, generate_request::Input};

use crate::refusal::Refusal;

/// The most alternatives that log probabilities are given for.
const LOGPROBS: u32 = 20;

#[derive(Default, Serialize)]
struct Body<'a> {
    model: &'a str,
    stream: bool,
    #[serde(flatten)]
    input: Prompt<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    n: Option<u32>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stop: &'a [String],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stop_token_ids: &'a [u32],
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Logprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repetition_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<i64>,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "snake_case")]
enum Prompt<'a> {
    #[default]
    #[serde(skip)]
    None,
    #[serde(rename = "prompt")]
    Text(&'a str),
    #[serde(rename = "prompt")]
    Ids(&'a [u32]),
    Messages(Vec<Message<'a>>),
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'a str,
    content: &'a str,
}

/// A flag for conversations, a number for prompts.
#[derive(Serialize)]
#[serde(untagged)]
enum Logprobs {
    Flag(bool),
    Alternatives(u32),
}

/// The endpoint and the body that `request` means.
///
/// # Errors
/// What JSON or OpenAI's fields cannot carry, by field.
pub(super) fn body(request: &GenerateRequest) -> Result<(Endpoint, Vec<u8>), Refusal> {
    check(request)?;
    let (endpoint, input) = match &request.input {
        Some(Input::Prompt(text)) => (Endpoint::Completions, Prompt::Text(text)),
        Some(Input::PromptTokenIds(tokens)) => (Endpoint::Completions, Prompt::Ids(&tokens.ids)),
        Some(Input::Messages(conversation)) => {
            let messages = conversation.messages.iter();
            let messages = messages.map(|message| Message { role: &message.role, content: &message.content });
            (Endpoint::ChatCompletions, Prompt::Messages(messages.collect()))
        }
        None => {
            let message = "input is missing; use prompt, prompt_token_ids or messages";
            return Err(Refusal::invalid(Some("input"), message));
        }
    };
    let is_chat = endpoint == Endpoint::ChatCompletions;
    let logprobs = request.logprobs.map(|n| if is_chat { Logprobs::Flag(true) } else { Logprobs::Alternatives(n) });
    let sampling = request.sampling.unwrap_or_default();
    let body = Body {
        model: &request.model,
        stream: true,
        input,
        max_tokens: request.max_tokens,
        n: request.n,
        stop: &request.stop,
        stop_token_ids: &request.stop_token_ids,
        logprobs,
        top_logprobs: request.logprobs.filter(|_| is_chat),
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        seed: sampling.seed,
    };
    let body = serde_json::to_vec(&body).map_err(|_| Refusal::broken())?;
    Ok((endpoint, body))
}

fn check(request: &GenerateRequest) -> Result<(), Refusal> {
    if let Some(logprobs) = request.logprobs.filter(|&n| n > LOGPROBS) {
        let message = format!("logprobs is {logprobs}; use at most {LOGPROBS}");
        return Err(Refusal::invalid(Some("logprobs"), message));
    }
    let sampling = request.sampling.unwrap_or_default();
    let numbers = [
        ("temperature", sampling.temperature),
        ("top_p", sampling.top_p),
        ("min_p", sampling.min_p),
        ("repetition_penalty", sampling.repetition_penalty),
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ];
    for (name, number) in numbers {
        if let Some(number) = number.filter(|number| !number.is_finite()) {
            let field = format!("sampling.{name}");
            return Err(Refusal::invalid(Some(&field), format!("{field} is {number}; use a finite number")));
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Piece {
    #[serde(default)]
    choices: Vec<Part>,
    usage: Option<Counts>,
}

#[derive(Deserialize)]
struct Part {
    delta: Option<Delta>,
    text: Option<String>,
    logprobs: Option<PartLogprobs>,
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
}

/// Those of conversations have `content`, those of prompts the rest.
#[derive(Deserialize)]
struct PartLogprobs {
    content: Option<Vec<Logprob>>,
    #[serde(default)]
    tokens: Vec<String>,
    #[serde(default)]
    token_logprobs: Vec<Option<f32>>,
    #[serde(default)]
    top_logprobs: Option<Vec<Option<BTreeMap<String, f32>>>>,
}

#[derive(Deserialize)]
struct Logprob {
    token: String,
    logprob: f32,
    #[serde(default)]
    top_logprobs: Vec<Logprob>,
}

#[derive(Deserialize)]
struct Counts {
    prompt_tokens: u32,
    completion_tokens: u32,
}

/// One piece of the answer, typed.
///
/// # Errors
/// The worker's JSON is not a piece.
pub(super) fn response(request_id: &str, endpoint: Endpoint, chunk: Chunk) -> serde_json::Result<GenerateResponse> {
    let piece: Piece = serde_json::from_slice(&chunk.json)?;
    let mut response = GenerateResponse {
        request_id: request_id.to_owned(),
        choice: chunk.choice,
        token_ids: chunk.token_ids,
        usage: piece
            .usage
            .map(|counts| Usage { prompt_tokens: counts.prompt_tokens, completion_tokens: counts.completion_tokens }),
        ..Default::default()
    };
    let Some(part) = piece.choices.into_iter().next() else {
        return Ok(response);
    };
    let delta = part.delta.unwrap_or_default();
    let text = if endpoint == Endpoint::ChatCompletions { delta.content } else { part.text };
    response.text = text.unwrap_or_default();
    response.reasoning = delta.reasoning_content.unwrap_or_default();
    response.finish_reason = part.finish_reason.unwrap_or_default();
    response.logprobs = part.logprobs.map(typed).unwrap_or_default();
    Ok(response)
}

fn typed(logprobs: PartLogprobs) -> Vec<TokenLogprob> {
    if let Some(content) = logprobs.content {
        return content.into_iter().map(TokenLogprob::from).collect();
    }
    let mut tops = logprobs.top_logprobs.unwrap_or_default().into_iter();
    let tokens = logprobs.tokens.into_iter().zip(logprobs.token_logprobs);
    tokens
        .map(|(token, logprob)| {
            let top = tops.next().flatten().unwrap_or_default().into_iter();
            let mut top: Vec<TokenLogprob> =
                top.map(|(token, logprob)| TokenLogprob { token, logprob, top: Vec::new() }).collect();
            top.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
            TokenLogprob { token, logprob: logprob.unwrap_or_default(), top }
        })
        .collect()
}

impl From<Logprob> for TokenLogprob {
    fn from(logprob: Logprob) -> Self {
        let top = logprob.top_logprobs.into_iter().map(TokenLogprob::from).collect();
        Self { token: logprob.token, logprob: logprob.logprob, top }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use wire::proto::{Conversation, Message as ProtoMessage, Sampling, TokenIds};

    use super::*;

    fn json_of(request: &GenerateRequest) -> (Endpoint, Value) {
        let (endpoint, body) = body(request).unwrap();
        (endpoint, serde_json::from_slice(&body).unwrap())
    }

    #[test]
    fn a_typed_request_is_the_openai_body_that_means_the_same() {
        let message = ProtoMessage { role: "user".into(), content: "47 + 85?".into() };
        let request = GenerateRequest {
            model: "m".into(),
            input: Some(Input::Messages(Conversation { messages: vec![message] })),
            max_tokens: Some(9),
            stop: vec!["x".into()],
            logprobs: Some(2),
            sampling: Some(Sampling { temperature: Some(0.7), seed: Some(-3), ..Default::default() }),
            ..Default::default()
        };
        let expected = json!({
            "model": "m", "stream": true, "messages": [{"role": "user", "content": "47 + 85?"}], "max_tokens": 9,
            "stop": ["x"], "logprobs": true, "top_logprobs": 2, "temperature": 0.7, "seed": -3,
        });
        assert_eq!(json_of(&request), (Endpoint::ChatCompletions, expected));

        let input = Some(Input::PromptTokenIds(TokenIds { ids: vec![1, 2] }));
        let request = GenerateRequest { model: "m".into(), input, logprobs: Some(0), ..Default::default() };
        let expected = json!({"model": "m", "stream": true, "prompt": [1, 2], "logprobs": 0});
        assert_eq!(json_of(&request), (Endpoint::Completions, expected));
    }

    #[test]
    fn what_json_cannot_carry_is_refused_by_field() {
        let sampling = Sampling { top_p: Some(f32::NAN), ..Default::default() };
        let input = Some(Input::Prompt("a".into()));
        let request = GenerateRequest { model: "m".into(), input, sampling: Some(sampling), ..Default::default() };
        let error = body(&request).unwrap_err().error;
        assert_eq!(error.message, "sampling.top_p is NaN; use a finite number");
        let request = GenerateRequest { logprobs: Some(21), sampling: None, ..request };
        assert_eq!(body(&request).unwrap_err().error.message, "logprobs is 21; use at most 20");
        let request = GenerateRequest { input: None, logprobs: None, ..request };
        assert_eq!(body(&request).unwrap_err().error.param.as_deref(), Some("input"));
    }

    fn typed(endpoint: Endpoint, json: Value) -> GenerateResponse {
        let chunk = Chunk { json: json.to_string().into(), choice: 1, token_ids: vec![7], ..Default::default() };
        response("r", endpoint, chunk).unwrap()
    }

    #[test]
    fn pieces_of_both_endpoints_become_the_same_type() {
        let logprob = |top| TokenLogprob { token: "13".into(), logprob: -0.5, top };
        let top = TokenLogprob { token: "14".into(), logprob: -1.0, top: Vec::new() };
        let expected = GenerateResponse {
            request_id: "r".into(),
            choice: 1,
            text: "13".into(),
            token_ids: vec![7],
            logprobs: vec![logprob(vec![top])],
            finish_reason: "stop".into(),
            ..Default::default()
        };
        let chat = json!({"choices": [{"index": 1, "delta": {"content": "13"}, "finish_reason": "stop", "logprobs":
            {"content": [{"token": "13", "logprob": -0.5, "top_logprobs": [{"token": "14", "logprob": -1.0}]}]}}]});
        assert_eq!(typed(Endpoint::ChatCompletions, chat), expected);
        let prompt = json!({"choices": [{"index": 1, "text": "13", "finish_reason": "stop", "logprobs":
            {"tokens": ["13"], "token_logprobs": [-0.5], "top_logprobs": [{"14": -1.0}], "text_offset": [0]}}]});
        assert_eq!(typed(Endpoint::Completions, prompt), expected);

        let thought = json!({"choices": [{"index": 1, "delta": {"reasoning_content": "carry"}}]});
        assert_eq!(typed(Endpoint::ChatCompletions, thought).reasoning, "carry");
        let usage = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}});
        let counts = Usage { prompt_tokens: 3, completion_tokens: 2 };
        assert_eq!(typed(Endpoint::Completions, usage).usage, Some(counts));
    }
}
