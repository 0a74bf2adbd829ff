//! `/v1/chat/completions`.

use serde_json::Value;
use wire::openai::MAX_MESSAGES;

use super::{Call, Defaults, Fields, Input, MAX_LOGPROBS, Refusal, common, field, unsupported};
use crate::chat::Message;

pub(super) fn call(fields: &Fields<'_>, defaults: &Defaults) -> Result<Call, Refusal> {
    unsupported::check_chat(fields)?;
    let messages = messages(fields)?;
    let mut call = common(fields, defaults, Input::Chat(messages))?;
    (call.max_tokens, call.max_tokens_field) = max_tokens(fields)?;
    call.default_max_tokens = defaults.max_new_tokens;
    call.logprobs = logprobs(fields)?;
    Ok(call)
}

/// How many, and the field that says so.
fn max_tokens(fields: &Fields<'_>) -> Result<(Option<usize>, &'static str), Refusal> {
    let old = fields.integer("max_tokens", 1..=i64::MAX)?;
    let new = fields.integer("max_completion_tokens", 1..=i64::MAX)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(Refusal::invalid(
            "max_completion_tokens",
            format!("max_completion_tokens is {new}; max_tokens is {old}, so use one of them"),
        )),
        (_, Some(new)) => Ok((Some(field::count(new)), "max_completion_tokens")),
        (old, None) => Ok((old.map(field::count), "max_tokens")),
    }
}

fn logprobs(fields: &Fields<'_>) -> Result<Option<usize>, Refusal> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=MAX_LOGPROBS)?;
    if let (Some(1..), false) = (top, wanted) {
        return Err(fields.wrong("top_logprobs", "it only with logprobs: true"));
    }
    Ok(wanted.then(|| field::count(top.unwrap_or(0))))
}

fn messages(fields: &Fields<'_>) -> Result<Vec<Message>, Refusal> {
    let accepted = "an array of at least one message";
    let Some(value) = fields.get("messages") else {
        return Err(Refusal::invalid("messages", "messages is missing; use an array of at least one message"));
    };
    let list = value.as_array().filter(|list| !list.is_empty()).ok_or_else(|| fields.wrong("messages", accepted))?;
    if list.len() > MAX_MESSAGES {
        let message = format!("messages has {} messages; use at most {MAX_MESSAGES}", list.len());
        return Err(Refusal::invalid("messages", message));
    }
    list.iter().enumerate().map(|(index, value)| message(&format!("messages[{index}]"), value)).collect()
}

fn message(path: &str, value: &Value) -> Result<Message, Refusal> {
    let object = value.as_object().ok_or_else(|| field::wrong_value(path, value, "an object"))?;
    let fields = Fields::of(object);
    let at = |name: &str| format!("{path}.{name}");
    let wrong =
        |name: &str, accepted: &str| field::wrong_value(&at(name), fields.get(name).unwrap_or(&Value::Null), accepted);
    let text = |name: &'static str| match fields.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(wrong(name, "a string")),
    };
    for name in ["tool_calls", "function_call", "tool_call_id", "audio", "refusal"] {
        let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
        if fields.get(name).is_some_and(|value| !empty(value)) {
            return Err(unsupported::refuse(&at(name)));
        }
    }
    let role = match fields.get("role").and_then(Value::as_str) {
        // OpenAI's newer name for system, which templates do not know
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant")) => role,
        Some("tool" | "function") => return Err(unsupported::refuse(&at("role"))),
        _ => return Err(wrong("role", "system, developer, user or assistant")),
    };
    let content = match fields.get("content") {
        None if role == "assistant" => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => content_parts(&at("content"), parts)?,
        _ => return Err(wrong("content", "a string or an array of text parts")),
    };
    // vLLM's newer name for an earlier thought
    let reasoning_content = text("reasoning_content")?.or(text("reasoning")?);
    Ok(Message { role: role.to_owned(), content, name: text("name")?, reasoning_content })
}

/// Text parts stand on lines of their own, as in vLLM.
fn content_parts(path: &str, parts: &[Value]) -> Result<String, Refusal> {
    let text = |(index, part): (usize, &Value)| {
        let path = format!("{path}[{index}]");
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => Ok(text.to_owned()),
            (Some("image_url" | "input_audio" | "file" | "video_url" | "audio_url" | "refusal"), _) => {
                Err(unsupported::refuse(&format!("{path}.type")))
            }
            _ => Err(field::wrong_value(&path, part, "a part of type text with its text")),
        }
    };
    Ok(parts.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
}
