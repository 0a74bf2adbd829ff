//! Writes the objects of an OpenAI stream.

use engine::TokenLogprob;
use serde_json::{Map, Value, json};
use wire::proto::{Chunk, Endpoint, chunk::Kind};

use crate::text::{Text, think::Parted};

/// A token with its log probability and alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The token.
    pub id: u32,
    /// `None` only for the first token of a prompt, which nothing precedes.
    pub logprob: Option<TokenLogprob>,
}

/// New text of a choice, and the tokens that it came from.
#[derive(Debug, Clone, Default)]
pub struct Delta {
    /// Index of the choice.
    pub choice: u32,
    /// The text.
    pub text: Parted,
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Of the same tokens, if asked for.
    pub scored: Vec<Scored>,
    /// Characters of the choice before this piece, counted by tokens; completions only.
    pub offset: usize,
    /// `stop` or `length` if this is the last piece.
    pub finish: Option<&'static str>,
}

/// What is the same in all objects of an answer.
#[derive(Debug, Clone)]
pub struct Writer {
    /// Which shape.
    pub endpoint: Endpoint,
    /// `id` of every object.
    pub id: String,
    /// `created` of every object.
    pub created: i64,
    /// `model` of every object.
    pub model: String,
    /// Whether log probabilities were asked for.
    pub logprobs: bool,
}

impl Writer {
    /// The first piece of a conversation's choice: who speaks.
    pub fn role(&self, choice: u32) -> Chunk {
        let delta = json!({"role": "assistant", "content": ""});
        let choices = json!([{"index": choice, "delta": delta, "logprobs": null, "finish_reason": null}]);
        self.chunk(Kind::Delta, choice, Vec::new(), choices, None)
    }

    /// A piece of a choice.
    pub fn delta(&self, text: &Text, delta: Delta) -> Chunk {
        let choices = match self.endpoint {
            Endpoint::ChatCompletions => self.chat(text, &delta),
            Endpoint::Completions | Endpoint::Unspecified => self.completion(text, &delta),
        };
        let ends_choice = delta.finish.is_some();
        let chunk = self.chunk(Kind::Delta, delta.choice, delta.tokens, json!([choices]), None);
        Chunk { ends_choice, ..chunk }
    }

    /// The last piece of a good answer.
    pub fn usage(&self, prompt: usize, completion: usize) -> Chunk {
        let usage =
            json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion});
        self.chunk(Kind::Usage, 0, Vec::new(), json!([]), Some(usage))
    }

    fn chunk(&self, kind: Kind, choice: u32, token_ids: Vec<u32>, choices: Value, usage: Option<Value>) -> Chunk {
        let object = match self.endpoint {
            Endpoint::ChatCompletions => "chat.completion.chunk",
            Endpoint::Completions | Endpoint::Unspecified => "text_completion",
        };
        let mut json = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
        });
        if let Some(usage) = usage {
            json["usage"] = usage;
        }
        Chunk { kind: kind.into(), json: json.to_string().into(), choice, token_ids, ends_choice: false }
    }

    fn chat(&self, text: &Text, delta: &Delta) -> Value {
        let mut fields = Map::new();
        if !delta.text.reasoning.is_empty() {
            fields.insert("reasoning_content".into(), delta.text.reasoning.clone().into());
        }
        if !delta.text.content.is_empty() {
            fields.insert("content".into(), delta.text.content.clone().into());
        }
        let logprobs = match self.logprobs && !delta.scored.is_empty() {
            true => {
                json!({"content": delta.scored.iter().map(|scored| chat_logprob(text, scored)).collect::<Vec<_>>()})
            }
            false => Value::Null,
        };
        json!({"index": delta.choice, "delta": fields, "logprobs": logprobs, "finish_reason": delta.finish})
    }

    fn completion(&self, text: &Text, delta: &Delta) -> Value {
        let logprobs = match self.logprobs && !delta.scored.is_empty() {
            true => completion_logprobs(text, &delta.scored, delta.offset),
            false => Value::Null,
        };
        let content = &delta.text.content;
        json!({"index": delta.choice, "text": content, "logprobs": logprobs, "finish_reason": delta.finish})
    }
}

fn chat_logprob(text: &Text, scored: &Scored) -> Value {
    let entry = |id: u32, logprob: Option<f32>| json!({"token": text.token(id), "logprob": logprob, "bytes": text.token_bytes(id)});
    let logprob = scored.logprob.as_ref();
    let mut value = entry(scored.id, logprob.map(|logprob| logprob.logprob));
    let top = logprob.map_or(&[][..], |logprob| &logprob.top);
    value["top_logprobs"] = top.iter().map(|&(id, logprob)| entry(id, Some(logprob))).collect();
    value
}

/// Four lists with an entry a token. The alternatives always have the token itself among them.
fn completion_logprobs(text: &Text, scored: &[Scored], mut offset: usize) -> Value {
    let (mut tokens, mut own, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for Scored { id, logprob } in scored {
        let token = text.token(*id);
        offsets.push(offset);
        offset += token.chars().count();
        own.push(logprob.as_ref().map(|logprob| logprob.logprob));
        tops.push(logprob.as_ref().map(|logprob| {
            let mut top: Map<String, Value> =
                logprob.top.iter().map(|&(id, logprob)| (text.token(id), logprob.into())).collect();
            top.entry(token.clone()).or_insert(logprob.logprob.into());
            top
        }));
        tokens.push(token);
    }
    json!({"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets})
}
