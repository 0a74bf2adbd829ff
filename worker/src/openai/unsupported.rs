//! Fields that OpenAI or vLLM document and that are not honoured: only their default values are accepted.
//!
//! Not among them are labels that ask nothing of an answer: `user`, `safety_identifier`, `metadata`, `session_id` and
//! `prompt_cache_key`.

use serde_json::{Value, json};

use super::{Fields, Refusal};

/// Default values besides `null`; everything else is refused.
type Table = &'static [(&'static str, fn() -> Vec<Value>)];

fn absent() -> Vec<Value> {
    Vec::new()
}

fn off() -> Vec<Value> {
    vec![json!(false)]
}

fn on() -> Vec<Value> {
    vec![json!(true)]
}

fn empty_list() -> Vec<Value> {
    vec![json!([])]
}

fn empty_object() -> Vec<Value> {
    vec![json!({})]
}

const COMMON: Table = &[
    ("response_format", || vec![json!({"type": "text"})]),
    ("use_beam_search", off),
    ("length_penalty", || vec![json!(1), json!(1.0)]),
    ("min_tokens", || vec![json!(0)]),
    ("include_stop_str_in_output", off),
    ("skip_special_tokens", on),
    ("spaces_between_special_tokens", on),
    ("truncate_prompt_tokens", absent),
    ("prompt_logprobs", absent),
    ("allowed_token_ids", absent),
    ("bad_words", empty_list),
    ("structured_outputs", absent),
    ("guided_json", absent),
    ("guided_regex", absent),
    ("guided_choice", absent),
    ("guided_grammar", absent),
    ("guided_decoding_backend", absent),
    ("guided_whitespace_pattern", absent),
    ("logits_processors", empty_list),
    ("return_tokens_as_token_ids", off),
    ("return_token_ids", off),
    ("priority", || vec![json!(0)]),
    ("cache_salt", absent),
    ("kv_transfer_params", absent),
    ("vllm_xargs", empty_object),
    ("prompt_embeds", absent),
    ("store", off),
    ("service_tier", || vec![json!("auto"), json!("default")]),
    ("moderation", absent),
    ("prompt_cache_options", absent),
    ("prompt_cache_retention", absent),
    ("request_id", absent),
    ("truncation_side", absent),
    ("logprob_token_ids", absent),
    ("watermarking", off),
    ("repetition_detection", absent),
    ("return_prompt_text", off),
    ("routed_experts_prompt_start", || vec![json!(0)]),
    ("ec_transfer_params", absent),
    ("stream_interval", || vec![json!(1)]),
];

const CHAT: Table = &[
    ("tools", empty_list),
    ("tool_choice", || vec![json!("none"), json!("auto")]),
    ("parallel_tool_calls", on),
    ("functions", empty_list),
    ("function_call", || vec![json!("none"), json!("auto")]),
    ("audio", absent),
    ("modalities", || vec![json!(["text"])]),
    ("prediction", absent),
    ("reasoning_effort", absent),
    ("verbosity", || vec![json!("medium")]),
    ("web_search_options", absent),
    ("chat_template", absent),
    ("chat_template_kwargs", empty_object),
    ("documents", empty_list),
    ("media_io_kwargs", empty_object),
    ("mm_processor_kwargs", empty_object),
    ("add_generation_prompt", on),
    ("continue_final_message", off),
    ("add_special_tokens", off),
    ("include_reasoning", on),
    ("thinking_token_budget", absent),
    ("echo", off),
    ("best_of", || vec![json!(1)]),
];

const COMPLETION: Table = &[("suffix", || vec![json!("")]), ("add_special_tokens", on), ("top_logprobs", absent)];

/// Of `stream_options`.
const STREAM: Table = &[("continuous_usage_stats", off)];

pub(super) fn check_common(fields: &Fields<'_>) -> Result<(), Refusal> {
    check(fields, COMMON)
}

pub(super) fn check_chat(fields: &Fields<'_>) -> Result<(), Refusal> {
    check(fields, CHAT)
}

pub(super) fn check_completion(fields: &Fields<'_>) -> Result<(), Refusal> {
    check(fields, COMPLETION)
}

pub(super) fn check_stream_options(options: &Fields<'_>) -> Result<(), Refusal> {
    find(options, STREAM).map_or(Ok(()), |name| Err(refuse(&format!("stream_options.{name}"))))
}

fn check(fields: &Fields<'_>, table: Table) -> Result<(), Refusal> {
    find(fields, table).map_or(Ok(()), |name| Err(refuse(name)))
}

/// The first field with another value than a default.
fn find(fields: &Fields<'_>, table: Table) -> Option<&'static str> {
    let asks =
        |name: &str, defaults: fn() -> Vec<Value>| fields.get(name).is_some_and(|value| !defaults().contains(value));
    table.iter().find(|&&(name, defaults)| asks(name, defaults)).map(|&(name, _)| name)
}

/// The refusal of a documented field or value that is not honoured.
pub(super) fn refuse(name: &str) -> Refusal {
    let message = format!("{name} is not supported here; leave it out");
    Refusal { status: 400, message, param: Some(name.to_owned()), code: Some("unsupported_parameter") }
}
