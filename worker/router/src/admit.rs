//! What the router reads of a body, and the limits that it sets. Pure.
//!
//! One pass finds `model`, `stream`, `n` and what bounds need, in place; the rest is only skipped over, and goes to the
//! worker as it came. A routing key that comes twice is refused: router and worker might each believe another one.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use wire::openai::{MAX_CHOICES, MAX_MESSAGES, MAX_STOPS};

use crate::{pick::SEQUENCES_PER_WORKER, refusal::Refusal};

/// The largest body, in bytes.
pub const BODY_BYTES: usize = 4 << 20;
/// The most that the sequences of one request weigh, so that it does not hold up the line until a worker has nothing
/// else; a worker lets them in by and by.
pub const BATCH: u32 = SEQUENCES_PER_WORKER / 4;
/// The deepest nesting of arrays and objects.
pub const DEPTH: usize = 64;

/// What routing needs of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan<'a> {
    /// `model`, as the client wrote it.
    pub model: Cow<'a, str>,
    /// `stream`.
    pub stream: bool,
    /// `stream_options.include_usage`.
    pub include_usage: bool,
    /// What it weighs: its sequences, `n` for each prompt, up to [`BATCH`].
    pub choices: u32,
}

/// Reads a body of at most [`BODY_BYTES`].
///
/// # Errors
/// A refusal with status 400 that names the place, or the field and its range.
pub fn scan(body: &[u8]) -> Result<Scan<'_>, Refusal> {
    let text = std::str::from_utf8(body)
        .map_err(|error| Refusal::invalid(None, format!("The body is not UTF-8 at byte {}", error.valid_up_to())))?;
    check_depth(body)?;
    let keys: Keys<'_> = serde_json::from_str(text).map_err(|error| not_json(&error))?;
    keys.check()
}

fn not_json(error: &serde_json::Error) -> Refusal {
    Refusal::invalid(None, format!("The body is not a JSON object as expected: {error}"))
}

/// Refuses nesting deeper than [`DEPTH`] before anything recurses into it. Brackets in strings do not count.
fn check_depth(body: &[u8]) -> Result<(), Refusal> {
    let (mut depth, mut at) = (0_usize, 0);
    while let Some(&byte) = body.get(at) {
        at += 1;
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'"' => at = after_string(body, at),
            _ => {}
        }
        if depth > DEPTH {
            let message = format!("The body is nested deeper than {DEPTH} at byte {}", at - 1);
            return Err(Refusal::invalid(None, message));
        }
    }
    Ok(())
}

/// The position after the string whose content begins at `at`, or the end of `body`.
fn after_string(body: &[u8], mut at: usize) -> usize {
    while let Some(found) = body.get(at..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest)) {
        match body[at + found] {
            b'"' => return at + found + 1,
            _ => at += found + 2, // an escape, and what it escapes
        }
    }
    body.len()
}

/// What was found of the keys that we read. `None`: absent or null.
#[derive(Default)]
struct Keys<'a> {
    model: Option<Kind<'a>>,
    stream: Option<Kind<'a>>,
    include_usage: Option<Kind<'a>>,
    n: Option<Kind<'a>>,
    stop: Option<Kind<'a>>,
    messages: Option<Kind<'a>>,
    stream_options: Option<Kind<'a>>,
    prompt: Option<Kind<'a>>,
}

impl<'a> Keys<'a> {
    fn check(self) -> Result<Scan<'a>, Refusal> {
        let model = match self.model {
            Some(Kind::Text(model)) if !model.is_empty() => model,
            None => {
                return Err(Refusal::invalid(Some("model"), "model is missing; name one of /v1/models"));
            }
            Some(other) => return Err(wrong("model", &other, "a string that is not empty")),
        };
        let n = match self.n {
            None => 1,
            Some(Kind::Whole(n)) if (1..=u64::from(MAX_CHOICES)).contains(&n) => n as u32,
            Some(other) => {
                return Err(wrong("n", &other, &format!("a whole number from 1 to {MAX_CHOICES}")));
            }
        };
        match self.stop {
            Some(Kind::List { length: stops, .. }) if stops > MAX_STOPS => {
                let message = format!("stop has {stops} entries; use at most {MAX_STOPS}");
                return Err(Refusal::invalid(Some("stop"), message));
            }
            None | Some(Kind::List { .. } | Kind::Text(_)) => {}
            Some(other) => return Err(wrong("stop", &other, "a string or a list of strings")),
        }
        match self.messages {
            Some(Kind::List { length: messages, .. }) if messages > MAX_MESSAGES => {
                let message = format!("messages has {messages} entries; use at most {MAX_MESSAGES}");
                return Err(Refusal::invalid(Some("messages"), message));
            }
            None | Some(Kind::List { .. }) => {}
            Some(other) => return Err(wrong("messages", &other, "a list")),
        }
        if let Some(other) = self.stream_options.filter(|options| !matches!(options, Kind::Object)) {
            return Err(wrong("stream_options", &other, "an object"));
        }
        let prompts = match self.prompt {
            Some(Kind::List { length, has_numbers: false }) => u32::try_from(length.max(1)).unwrap_or(u32::MAX),
            _ => 1, // one text, or the tokens of one
        };
        let choices = n.saturating_mul(prompts).min(BATCH);
        let stream = flag("stream", self.stream)?;
        let include_usage = flag("stream_options.include_usage", self.include_usage)?;
        Ok(Scan { model, stream, include_usage, choices })
    }
}

fn flag(name: &str, found: Option<Kind<'_>>) -> Result<bool, Refusal> {
    match found {
        None => Ok(false),
        Some(Kind::Flag(flag)) => Ok(flag),
        Some(other) => Err(wrong(name, &other, "true or false")),
    }
}

fn wrong(name: &str, found: &Kind<'_>, wanted: &str) -> Refusal {
    Refusal::invalid(Some(name), format!("{name} is {found}; use {wanted}"))
}

impl<'de: 'a, 'a> Deserialize<'de> for Keys<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(KeysVisitor::default())
    }
}

#[derive(Default)]
struct KeysVisitor<'a>(Keys<'a>);

impl<'de: 'a, 'a> Visitor<'de> for KeysVisitor<'a> {
    type Value = Keys<'a>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(mut self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut seen = [false; 7];
        while let Some(Name(name)) = map.next_key()? {
            let keys = &mut self.0;
            let (index, slot) = match &*name {
                "model" => (0, &mut keys.model),
                "stream" => (1, &mut keys.stream),
                "n" => (2, &mut keys.n),
                "stop" => (3, &mut keys.stop),
                "messages" => (4, &mut keys.messages),
                "stream_options" => (5, &mut keys.stream_options),
                "prompt" => (6, &mut keys.prompt),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            if std::mem::replace(&mut seen[index], true) {
                return Err(M::Error::custom(format_args!("`{name}` comes twice")));
            }
            if index == 5 {
                let Options { kind, include_usage } = map.next_value()?;
                (keys.stream_options, keys.include_usage) = (kind, include_usage);
            } else {
                *slot = map.next_value::<Found<'_>>()?.0;
            }
        }
        Ok(self.0)
    }
}

/// A key, borrowed unless it has escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

/// A value, as far as we look at it.
enum Kind<'a> {
    Text(Cow<'a, str>),
    Flag(bool),
    Whole(u64),
    OtherNumber(String),
    List { length: usize, has_numbers: bool },
    Object,
}

impl fmt::Display for Kind<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) if text.is_empty() => f.write_str("an empty string"),
            Self::Text(_) => f.write_str("a string"),
            Self::Flag(flag) => flag.fmt(f),
            Self::Whole(number) => number.fmt(f),
            Self::OtherNumber(number) => f.write_str(number),
            Self::List { .. } => f.write_str("a list"),
            Self::Object => f.write_str("an object"),
        }
    }
}

/// `None`: null.
struct Found<'a>(Option<Kind<'a>>);

impl<'de: 'a, 'a> Deserialize<'de> for Found<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KindVisitor).map(Self)
    }
}

struct KindVisitor;

impl<'de> Visitor<'de> for KindVisitor {
    type Value = Option<Kind<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Some(Kind::Flag(value)))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(Kind::Whole(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(Kind::OtherNumber(value.to_string())))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Some(Kind::OtherNumber(format!("{value:?}"))))
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
        Ok(Some(Kind::Text(Cow::Borrowed(value))))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Some(Kind::Text(Cow::Owned(value.to_owned()))))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let (mut length, mut has_numbers) = (0, false);
        while let Some(item) = list.next_element::<Found<'_>>()? {
            length += 1;
            has_numbers |= matches!(item.0, Some(Kind::Whole(_) | Kind::OtherNumber(_)));
        }
        Ok(Some(Kind::List { length, has_numbers }))
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Some(Kind::Object))
    }
}

/// `stream_options`.
struct Options<'a> {
    kind: Option<Kind<'a>>,
    include_usage: Option<Kind<'a>>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Options<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OptionsVisitor)
    }
}

struct OptionsVisitor;

impl<'de> Visitor<'de> for OptionsVisitor {
    type Value = Options<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Options { kind: None, include_usage: None })
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut include_usage = None;
        while let Some(Name(name)) = map.next_key()? {
            if name != "include_usage" {
                map.next_value::<IgnoredAny>()?;
            } else if include_usage.replace(map.next_value::<Found<'_>>()?.0).is_some() {
                return Err(M::Error::custom("`include_usage` comes twice"));
            }
        }
        Ok(Options { kind: Some(Kind::Object), include_usage: include_usage.flatten() })
    }
}

#[cfg(test)]
mod tests;
