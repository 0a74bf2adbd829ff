//! The body that is not streamed, put together from the pieces of a stream. Pure.

use std::{borrow::Cow, collections::BTreeMap};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, value::RawValue};
use wire::proto::Endpoint;

/// The longest answer that is put together, in bytes of its pieces.
const MOST_BYTES: usize = 64 << 20;

/// A piece or an end that is not what OpenAI's streams are made of, or too much of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not the JSON that was expected.
    #[error("reading a piece of the answer")]
    Json(#[from] serde_json::Error),
    /// No piece came.
    #[error("the answer has no pieces")]
    Empty,
    /// More than is put together.
    #[error("the answer is longer than {MOST_BYTES} bytes")]
    TooLong,
}

/// An answer as it grows.
#[derive(Debug)]
pub struct Whole {
    endpoint: Endpoint,
    head: Option<Head>,
    choices: BTreeMap<u32, Choice>,
    bytes: usize,
}

#[derive(Debug)]
struct Head {
    id: String,
    created: i64,
    model: String,
    system_fingerprint: Option<String>,
}

#[derive(Debug, Default)]
struct Choice {
    role: Option<String>,
    text: String,
    reasoning: Option<String>,
    logprobs: Option<Value>,
    finish_reason: Option<String>,
}

impl Whole {
    /// Nothing yet.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, head: None, choices: BTreeMap::new(), bytes: 0 }
    }

    /// Adds a piece.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn add(&mut self, json: &[u8]) -> Result<(), Error> {
        self.bytes += json.len();
        if self.bytes > MOST_BYTES {
            return Err(Error::TooLong);
        }
        let piece: Piece<'_> = serde_json::from_slice(json)?;
        for part in piece.choices {
            self.choices.entry(part.index).or_default().add(part);
        }
        self.head.get_or_insert_with(|| Head {
            id: piece.id.into_owned(),
            created: piece.created,
            model: piece.model.into_owned(),
            system_fingerprint: piece.system_fingerprint.map(Text::into_owned),
        });
        Ok(())
    }

    /// The whole body, with the `usage` of the last piece.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn finish(self, last: &[u8]) -> Result<Vec<u8>, Error> {
        let head = self.head.ok_or(Error::Empty)?;
        let last: Last<'_> = serde_json::from_slice(last)?;
        let is_chat = self.endpoint == Endpoint::ChatCompletions;
        let choices = self.choices.into_iter();
        let body = Body {
            id: head.id,
            object: if is_chat { "chat.completion" } else { "text_completion" },
            created: head.created,
            model: head.model,
            system_fingerprint: head.system_fingerprint,
            choices: choices.map(|(index, choice)| choice.whole(index, is_chat)).collect(),
            usage: last.usage,
        };
        Ok(serde_json::to_vec(&body)?)
    }
}

impl Choice {
    fn add(&mut self, part: Part<'_>) {
        let delta = part.delta.unwrap_or_default();
        self.role = self.role.take().or_else(|| delta.role.map(Text::into_owned));
        for text in [delta.content, part.text].into_iter().flatten() {
            self.text.push_str(&text.0);
        }
        if let Some(reasoning) = delta.reasoning_content {
            self.reasoning.get_or_insert_default().push_str(&reasoning.0);
        }
        if let Some(logprobs) = part.logprobs {
            join(self.logprobs.get_or_insert_with(|| Value::Object(Map::new())), logprobs);
        }
        self.finish_reason = part.finish_reason.map(Text::into_owned).or(self.finish_reason.take());
    }

    fn whole(self, index: u32, is_chat: bool) -> WholeChoice {
        let (text, message) = if is_chat {
            let message = Message {
                role: self.role.unwrap_or_else(|| "assistant".to_owned()),
                content: self.text,
                reasoning_content: self.reasoning,
            };
            (None, Some(message))
        } else {
            (Some(self.text), None)
        };
        WholeChoice { index, message, text, logprobs: self.logprobs, finish_reason: self.finish_reason }
    }
}

/// Appends the lists of one logprobs object to those of another.
fn join(whole: &mut Value, part: Value) {
    let (Value::Object(whole), Value::Object(part)) = (whole, part) else {
        return;
    };
    for (key, value) in part {
        match (whole.get_mut(&key), value) {
            (Some(Value::Array(list)), Value::Array(more)) => list.extend(more),
            (_, value) => {
                whole.insert(key, value);
            }
        }
    }
}

#[derive(Deserialize)]
struct Piece<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    created: i64,
    #[serde(borrow)]
    model: Cow<'a, str>,
    #[serde(borrow)]
    system_fingerprint: Option<Text<'a>>,
    #[serde(borrow, default)]
    choices: Vec<Part<'a>>,
}

#[derive(Deserialize)]
struct Part<'a> {
    index: u32,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    text: Option<Text<'a>>,
    logprobs: Option<Value>,
    #[serde(borrow)]
    finish_reason: Option<Text<'a>>,
}

#[derive(Default, Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    role: Option<Text<'a>>,
    #[serde(borrow)]
    content: Option<Text<'a>>,
    #[serde(borrow)]
    reasoning_content: Option<Text<'a>>,
}

/// Borrowed unless it has escapes, in an `Option` too.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Text<'_> {
    fn into_owned(self) -> String {
        self.0.into_owned()
    }
}

#[derive(Deserialize)]
struct Last<'a> {
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct Body<'a> {
    id: String,
    object: &'static str,
    created: i64,
    model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<String>,
    choices: Vec<WholeChoice>,
    usage: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct WholeChoice {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    logprobs: Option<Value>,
    finish_reason: Option<String>,
}

#[derive(Serialize)]
struct Message {
    role: String,
    content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn whole(endpoint: Endpoint, pieces: &[Value]) -> Value {
        let mut whole = Whole::new(endpoint);
        for choices in pieces {
            let piece = json!({"id": "x-1", "object": "o", "created": 7, "model": "m", "choices": choices});
            whole.add(piece.to_string().as_bytes()).unwrap();
        }
        let body = whole.finish(br#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#).unwrap();
        serde_json::from_slice(&body).unwrap()
    }

    #[test]
    fn a_thought_and_an_answer_become_one_message() {
        let logprob = |token: &str| json!({"content": [{"token": token, "logprob": -0.5}]});
        let body = whole(
            Endpoint::ChatCompletions,
            &[
                json!([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]),
                json!([{"index": 0, "delta": {"reasoning_content": "carry "}}]),
                json!([{"index": 0, "delta": {"reasoning_content": "1"}, "logprobs": logprob("1")}]),
                json!([{"index": 0, "delta": {"content": "13"}, "logprobs": logprob("13")}]),
                json!([{"index": 0, "delta": {"content": "2"}}]),
                json!([{"index": 0, "delta": {}, "finish_reason": "stop"}]),
            ],
        );
        let content = [json!({"token": "1", "logprob": -0.5}), json!({"token": "13", "logprob": -0.5})];
        assert_eq!(
            body,
            json!({
                "id": "x-1", "object": "chat.completion", "created": 7, "model": "m",
                "choices": [{
                    "index": 0,
                    "message": {"role": "assistant", "content": "132", "reasoning_content": "carry 1"},
                    "logprobs": {"content": content},
                    "finish_reason": "stop",
                }],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2},
            })
        );
    }

    #[test]
    fn choices_that_come_mixed_are_parted() {
        let body = whole(
            Endpoint::Completions,
            &[
                json!([{"index": 1, "text": "b", "logprobs": {"tokens": ["b"], "text_offset": [0]}}]),
                json!([{"index": 0, "text": "a", "logprobs": null}]),
                json!([{"index": 1, "text": "c", "logprobs": {"tokens": ["c"], "text_offset": [1]},
                        "finish_reason": "length"}]),
                json!([{"index": 0, "text": "", "finish_reason": "stop"}]),
            ],
        );
        assert_eq!(
            body["choices"],
            json!([
                {"index": 0, "text": "a", "logprobs": null, "finish_reason": "stop"},
                {"index": 1, "text": "bc", "logprobs": {"tokens": ["b", "c"], "text_offset": [0, 1]},
                 "finish_reason": "length"},
            ])
        );
        assert_eq!(body["object"], "text_completion");
    }

    #[test]
    fn what_is_no_piece_is_an_error() {
        assert!(matches!(Whole::new(Endpoint::Completions).add(b"{}"), Err(Error::Json(_))));
        assert!(matches!(Whole::new(Endpoint::Completions).finish(b"{}"), Err(Error::Empty)));
    }
}
