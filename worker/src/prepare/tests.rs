//! Calls on the tokenizer and template of the small model.

use std::path::Path;

use serde_json::{Value, json};

use super::*;

fn model() -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1");
    Model::load(&dir, Limits { max_context_tokens: 64, vocab_size: 512 }).unwrap()
}

fn call(endpoint: Endpoint, body: Value) -> GenerateCall {
    GenerateCall {
        endpoint: endpoint.into(),
        body: body.to_string().into_bytes().into(),
        request_id: "r-1".into(),
        ..GenerateCall::default()
    }
}

fn chat(extra: Value) -> Result<Prepared, Refusal> {
    let mut body = json!({"messages": [{"role": "user", "content": "1+1?"}]});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    model().prepare(&call(Endpoint::ChatCompletions, body))
}

fn completion(body: Value) -> Result<Prepared, Refusal> {
    model().prepare(&call(Endpoint::Completions, body))
}

#[test]
fn a_conversation_is_rendered_and_may_fill_the_context() {
    let prepared = chat(json!({"n": 2, "seed": 5})).unwrap();
    let prompt = &prepared.prompts[0];
    assert!(prompt.text.ends_with("<｜Assistant｜><think>\n"));
    assert_eq!(prompt.ids[..2], [0, 3]);
    assert_eq!(prepared.requests.len(), 2);
    let [first, second] = &prepared.requests[..] else { panic!() };
    assert_eq!(first.max_tokens, 64 - prompt.ids.len());
    assert_eq!((first.sampling.seed, first.sampling.stream), (5, 0));
    assert_eq!((second.sampling.seed, second.sampling.stream), (5, 1));
    assert_eq!(first.stop_tokens, [1]);
}

#[test]
fn the_end_token_is_ignored_on_request() {
    let prepared = chat(json!({"ignore_eos": true, "stop_token_ids": [9]})).unwrap();
    assert_eq!(prepared.requests[0].stop_tokens, [9]);
}

#[test]
fn a_request_without_a_seed_gets_one_that_follows_from_its_id() {
    let seed = chat(json!({})).unwrap().requests[0].sampling.seed;
    assert_eq!(seed, chat(json!({})).unwrap().requests[0].sampling.seed);
    assert_ne!(seed, seed_of("r-2"));
}

#[test]
fn prompts_make_their_choices_in_order() {
    let prepared = completion(json!({"prompt": [[7, 8], [9]], "n": 2})).unwrap();
    let prompts: Vec<_> = prepared.requests.iter().map(|request| request.prompt.clone()).collect();
    assert_eq!(prompts, [vec![7, 8], vec![7, 8], vec![9], vec![9]]);
    assert_eq!(prepared.requests[3].sampling.stream, 3);
    assert_eq!(prepared.requests[0].max_tokens, 16);
}

#[test]
fn what_does_not_fit_is_refused_with_both_numbers() {
    let long = "x".repeat(3_000_000);
    let table = [
        (completion(json!({"prompt": long})), "prompt", "the context is 64 tokens"),
        (completion(json!({"prompt": vec![7; 65]})), "prompt", "at least 65 tokens; the context is 64"),
        (completion(json!({"prompt": [7], "max_tokens": 64})), "max_tokens", "use at most 63"),
        (completion(json!({"prompt": [7], "max_tokens": i64::MAX})), "max_tokens", "use at most 63"),
        (completion(json!({"prompt": [600]})), "prompt", "token 600; the vocabulary has 512"),
        (completion(json!({"prompt": vec![7; 64]})), "prompt", "64 tokens, as many as the context"),
        (completion(json!({"prompt": ""})), "prompt", "the prompt has no tokens"),
        (chat(json!({"max_tokens": 64})), "max_tokens", "the context is 64 tokens"),
        (chat(json!({"max_completion_tokens": 64})), "max_completion_tokens", "max_completion_tokens is 64"),
        (chat(json!({"logit_bias": {"512": 1}})), "logit_bias", "512"),
    ];
    for (result, param, message) in table {
        let refusal = result.err().unwrap();
        assert_eq!(refusal.param.as_deref(), Some(param), "{refusal}");
        assert!(refusal.message.contains(message), "{refusal}");
    }
}

#[test]
fn nothing_need_be_generated_to_score_a_prompt() {
    let prepared = completion(json!({"prompt": [7, 8], "max_tokens": 0, "echo": true, "logprobs": 1})).unwrap();
    let request = &prepared.requests[0];
    assert!(request.prompt_logprobs && request.max_tokens == 0 && request.logprobs == Some(1));
}

#[test]
fn a_model_without_a_template_says_which_endpoint_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1/tokenizer.json");
    std::fs::copy(from, dir.path().join("tokenizer.json")).unwrap();
    let model = Model::load(dir.path(), Limits { max_context_tokens: 64, vocab_size: 512 }).unwrap();
    let body = json!({"messages": [{"role": "user", "content": "x"}]});
    let refusal = model.prepare(&call(Endpoint::ChatCompletions, body)).err().unwrap();
    assert!(refusal.message.contains("/v1/completions"), "{refusal}");
}
