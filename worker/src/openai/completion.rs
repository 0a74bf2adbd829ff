//! `/v1/completions`.

use serde_json::Value;
use wire::openai::MAX_CHOICES;

use super::{Call, Defaults, Fields, Input, MAX_LOGPROBS, MAX_SEQUENCES, Prompt, Refusal, common, field, unsupported};

/// What OpenAI generates where `max_tokens` is not given.
const MAX_TOKENS: usize = 16;
const ACCEPTED: &str = "a string, an array of strings, an array of token ids, or an array of such arrays";

pub(super) fn call(fields: &Fields<'_>, defaults: &Defaults) -> Result<Call, Refusal> {
    unsupported::check_completion(fields)?;
    let prompts = prompts(fields)?;
    let count = prompts.len();
    let mut call = common(fields, defaults, Input::Prompts(prompts))?;
    if count * call.n > MAX_SEQUENCES {
        let message =
            format!("prompt has {count} prompts and n is {}; use at most {MAX_SEQUENCES} choices together", call.n);
        return Err(Refusal::invalid("prompt", message));
    }
    call.echo = fields.boolean("echo")?.unwrap_or(false);
    call.max_tokens = fields.integer("max_tokens", 0..=i64::MAX)?.map(field::count);
    call.default_max_tokens = Some(defaults.max_new_tokens.unwrap_or(MAX_TOKENS));
    call.logprobs = fields.integer("logprobs", 0..=MAX_LOGPROBS)?.map(field::count);
    let best_of = fields.integer("best_of", 1..=i64::from(MAX_CHOICES))?.map(field::count);
    if best_of.is_some_and(|best_of| best_of != 1 && best_of != call.n) {
        return Err(unsupported::refuse("best_of"));
    }
    Ok(call)
}

fn prompts(fields: &Fields<'_>) -> Result<Vec<Prompt>, Refusal> {
    let Some(value) = fields.get("prompt") else {
        return Err(Refusal::invalid("prompt", format!("prompt is missing; use {ACCEPTED}")));
    };
    let wrong = || fields.wrong("prompt", ACCEPTED);
    match value {
        Value::String(text) => Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(items) if items.first().is_some_and(Value::is_number) => {
            Ok(vec![Prompt::Ids(field::ids(value).ok_or_else(wrong)?)])
        }
        Value::Array(items) if !items.is_empty() => items.iter().map(|item| one(item).ok_or_else(wrong)).collect(),
        _ => Err(wrong()),
    }
}

fn one(item: &Value) -> Option<Prompt> {
    match item {
        Value::String(text) => Some(Prompt::Text(text.clone())),
        Value::Array(_) => field::ids(item).map(Prompt::Ids),
        _ => None,
    }
}
