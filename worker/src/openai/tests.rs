//! One case a refusal, and what is read of good bodies.

use serde_json::{Value, json};

use super::*;

fn chat_body(extra: Value) -> Vec<u8> {
    with(json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]}), extra)
}

fn completion_body(extra: Value) -> Vec<u8> {
    with(json!({"model": "m", "prompt": "hi"}), extra)
}

fn with(mut body: Value, extra: Value) -> Vec<u8> {
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body.to_string().into_bytes()
}

fn refused_chat(extra: Value) -> Refusal {
    chat(&chat_body(extra.clone()), &Defaults::default()).expect_err(&extra.to_string())
}

fn refused_completion(extra: Value) -> Refusal {
    completion(&completion_body(extra.clone()), &Defaults::default()).expect_err(&extra.to_string())
}

/// Extra field, the param that is named, and a part of the message.
fn table() -> Vec<(Value, &'static str, &'static str)> {
    vec![
        (json!({"temperature": 2.5}), "temperature", "temperature is 2.5; use a number from 0 to 2"),
        (json!({"temperature": "hot"}), "temperature", "temperature is a string of 3 bytes"),
        (json!({"top_p": 0}), "top_p", "top_p is 0; use a number above 0, at most 1"),
        (json!({"top_p": 1.5}), "top_p", "top_p is 1.5; use a number above 0, at most 1"),
        (json!({"top_k": -2}), "top_k", "top_k is -2"),
        (json!({"top_k": 1.5}), "top_k", "top_k is 1.5; use an integer"),
        (json!({"min_p": 2}), "min_p", "min_p is 2"),
        (json!({"repetition_penalty": 0}), "repetition_penalty", "a number above 0, at most 2"),
        (json!({"presence_penalty": 3}), "presence_penalty", "from -2 to 2"),
        (json!({"frequency_penalty": -3}), "frequency_penalty", "from -2 to 2"),
        (json!({"seed": 1.5}), "seed", "seed is 1.5; use an integer"),
        (json!({"n": 65}), "n", "n is 65; use an integer from 1 to 64"),
        (json!({"n": 0}), "n", "n is 0"),
        (json!({"max_tokens": -1}), "max_tokens", "max_tokens is -1"),
        (json!({"stop": vec!["x"; 17]}), "stop", "stop has 17 strings; use at most 16"),
        (json!({"stop": 3}), "stop", "stop is 3; use a string"),
        (json!({"stop": ["a", ""]}), "stop", "not empty"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids", "an array of token ids"),
        (json!({"stream": 1}), "stream", "true or false"),
        (json!({"stream_options": true}), "stream_options", "an object"),
        (json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage", "true or false"),
        (json!({"logit_bias": []}), "logit_bias", "an object"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias.x", "no token id"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias.1", "from -100 to 100"),
        (json!({"ignore_eos": "yes"}), "ignore_eos", "true or false"),
        (json!({"response_format": {"type": "json_object"}}), "response_format", "not supported"),
        (json!({"min_tokens": 5}), "min_tokens", "not supported"),
        (json!({"use_beam_search": true}), "use_beam_search", "not supported"),
        (json!({"guided_json": {}}), "guided_json", "not supported"),
        (json!({"structured_outputs": {}}), "structured_outputs", "not supported"),
        (json!({"logits_processors": ["x"]}), "logits_processors", "not supported"),
        (json!({"prompt_embeds": "AA=="}), "prompt_embeds", "not supported"),
        (json!({"include_stop_str_in_output": true}), "include_stop_str_in_output", "not supported"),
        (json!({"bad_words": ["x"]}), "bad_words", "not supported"),
        (json!({"store": true}), "store", "not supported"),
        (json!({"service_tier": "flex"}), "service_tier", "not supported"),
        (json!({"request_id": "x"}), "request_id", "not supported"),
        (json!({"logprob_token_ids": [1]}), "logprob_token_ids", "not supported"),
        (
            json!({"stream_options": {"continuous_usage_stats": true}}),
            "stream_options.continuous_usage_stats",
            "not supported",
        ),
    ]
}

#[test]
fn every_refusal_names_field_value_and_range() {
    for (extra, param, message) in table() {
        for refusal in [refused_chat(extra.clone()), refused_completion(extra.clone())] {
            assert_eq!(refusal.param.as_deref(), Some(param), "{extra}: {refusal}");
            assert!(refusal.message.contains(message), "{extra}: {refusal}");
            assert_eq!(refusal.status, 400);
        }
    }
}

#[test]
fn chat_refusals_name_the_message() {
    let message = |value: Value| json!({"messages": [{"role": "user", "content": "a"}, value]});
    let table = [
        (json!({"messages": null}), "messages", "messages is missing"),
        (json!({"messages": []}), "messages", "at least one message"),
        (
            json!({"messages": vec![json!({"role": "user", "content": "x"}); 1025]}),
            "messages",
            "1025 messages; use at most 1024",
        ),
        (message(json!(3)), "messages[1]", "messages[1] is 3; use an object"),
        (message(json!({"role": "alien", "content": "x"})), "messages[1].role", "system, developer, user or assistant"),
        (message(json!({"role": "tool", "content": "x"})), "messages[1].role", "not supported"),
        (message(json!({"role": "user"})), "messages[1].content", "a string or an array of text parts"),
        (message(json!({"role": "user", "content": 3})), "messages[1].content", "a string"),
        (
            message(json!({"role": "user", "content": [{"type": "image_url"}]})),
            "messages[1].content[0].type",
            "not supported",
        ),
        (
            message(json!({"role": "user", "content": [{"type": "text"}]})),
            "messages[1].content[0]",
            "part of type text",
        ),
        (message(json!({"role": "user", "content": ["x"]})), "messages[1].content[0]", "part of type text"),
        (message(json!({"role": "assistant", "tool_calls": [{}]})), "messages[1].tool_calls", "not supported"),
        (message(json!({"role": "user", "content": "x", "name": 3})), "messages[1].name", "a string"),
        (json!({"tools": [{}]}), "tools", "not supported"),
        (json!({"tool_choice": "required"}), "tool_choice", "not supported"),
        (json!({"functions": [{}]}), "functions", "not supported"),
        (json!({"chat_template": "{{ x }}"}), "chat_template", "not supported"),
        (json!({"chat_template_kwargs": {"a": 1}}), "chat_template_kwargs", "not supported"),
        (json!({"reasoning_effort": "high"}), "reasoning_effort", "not supported"),
        (json!({"modalities": ["text", "audio"]}), "modalities", "not supported"),
        (json!({"echo": true}), "echo", "not supported"),
        (json!({"max_tokens": 0}), "max_tokens", "max_tokens is 0"),
        (json!({"max_tokens": 3, "max_completion_tokens": 4}), "max_completion_tokens", "use one of them"),
        (json!({"logprobs": 3}), "logprobs", "true or false"),
        (json!({"top_logprobs": 3}), "top_logprobs", "with logprobs: true"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "from 0 to 20"),
    ];
    for (extra, param, message) in table {
        let refusal = refused_chat(extra.clone());
        assert_eq!(refusal.param.as_deref(), Some(param), "{extra}: {refusal}");
        assert!(refusal.message.contains(message), "{extra}: {refusal}");
    }
}

#[test]
fn completion_refusals_name_the_prompt() {
    let table = [
        (json!({"prompt": null}), "prompt", "prompt is missing"),
        (json!({"prompt": []}), "prompt", "an array of 0 items"),
        (json!({"prompt": [1, "x"]}), "prompt", "an array of 2 items"),
        (json!({"prompt": ["x", 1]}), "prompt", "an array of 2 items"),
        (json!({"prompt": [-1]}), "prompt", "an array of 1 items"),
        (json!({"prompt": {}}), "prompt", "an object"),
        (json!({"prompt": vec!["x"; 5], "n": 64}), "prompt", "use at most 256 choices"),
        (json!({"suffix": "x"}), "suffix", "not supported"),
        (json!({"best_of": 4}), "best_of", "not supported"),
        (json!({"logprobs": true}), "logprobs", "an integer from 0 to 20"),
        (json!({"logprobs": 21}), "logprobs", "from 0 to 20"),
        (json!({"echo": 1}), "echo", "true or false"),
    ];
    for (extra, param, message) in table {
        let refusal = refused_completion(extra.clone());
        assert_eq!(refusal.param.as_deref(), Some(param), "{extra}: {refusal}");
        assert!(refusal.message.contains(message), "{extra}: {refusal}");
    }
}

#[test]
fn what_is_no_object_is_refused_with_its_place() {
    for body in [&b"{\"a\": "[..], b"\xFF", b"[]", b"", &vec![b'['; 100_000]] {
        assert_eq!(chat(body, &Defaults::default()).unwrap_err().code, Some("invalid_json"));
    }
    assert!(chat(b"{\"a\" 1}", &Defaults::default()).unwrap_err().message.contains("line 1 column"));
}

#[test]
fn default_values_and_unknown_fields_pass() {
    let extra = json!({
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": true,
        "use_beam_search": false, "min_tokens": 0, "chat_template_kwargs": {}, "temperature": null, "n": 1,
        "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto", "nobody_knows_this": [1, 2],
        "stream_options": {"include_usage": true, "continuous_usage_stats": false}, "best_of": 1, "logprobs": false,
    });
    chat(&chat_body(extra), &Defaults::default()).unwrap();
    let extra = json!({"suffix": "", "best_of": 1, "echo": false, "logprobs": null, "logit_bias": {}});
    completion(&completion_body(extra), &Defaults::default()).unwrap();
}

#[test]
fn a_conversation_is_read() {
    let body = json!({
        "messages": [
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "reasoning": "c"},
        ],
        "max_completion_tokens": 7, "logprobs": true, "top_logprobs": 2, "seed": -1, "stop": "x", "top_k": -1,
        "logit_bias": {"9": 1, "3": -2.5},
    });
    let call = chat(body.to_string().as_bytes(), &Defaults::default()).unwrap();
    let Input::Chat(messages) = &call.input else { panic!("no conversation") };
    let read: Vec<_> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
    assert_eq!(read, [("system", "be short"), ("user", "a\nb"), ("assistant", "")]);
    assert_eq!(messages[2].reasoning_content.as_deref(), Some("c"));
    assert_eq!((call.max_tokens, call.logprobs, call.seed), (Some(7), Some(2), Some(u64::MAX)));
    assert_eq!((call.stop, call.sampling.top_k), (vec!["x".to_owned()], 0));
    assert_eq!(call.sampling.logit_bias, [(3, -2.5), (9, 1.0)]);
    assert_eq!(call.sampling.temperature, 1.0);
}

#[test]
fn prompts_are_texts_or_tokens_one_or_many() {
    let read = |prompt: Value| match completion(&completion_body(json!({"prompt": prompt})), &Defaults::default())
        .unwrap()
        .input
    {
        Input::Prompts(prompts) => prompts,
        Input::Chat(_) => panic!("no prompts"),
    };
    let text = |text: &str| Prompt::Text(text.to_owned());
    assert_eq!(read(json!("a")), [text("a")]);
    assert_eq!(read(json!(["a", "b"])), [text("a"), text("b")]);
    assert_eq!(read(json!([1, 2])), [Prompt::Ids(vec![1, 2])]);
    assert_eq!(read(json!([[1], [2, 3]])), [Prompt::Ids(vec![1]), Prompt::Ids(vec![2, 3])]);
}

#[test]
fn the_model_says_what_a_request_leaves_open() {
    let config = json!({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 99, "eos_token_id": [1, 7]});
    let defaults = Defaults::from_json(&config);
    assert_eq!(defaults.end_tokens, [1, 7]);
    let call = chat(&chat_body(json!({})), &defaults).unwrap();
    assert_eq!((call.sampling.temperature, call.sampling.top_p, call.sampling.top_k), (0.6, 0.95, 20));
    assert_eq!((call.max_tokens, call.default_max_tokens), (None, Some(99)));
    let call = chat(&chat_body(json!({"temperature": 0, "top_p": 1, "top_k": 0})), &defaults).unwrap();
    assert_eq!((call.sampling.temperature, call.sampling.top_p, call.sampling.top_k), (0.0, 1.0, 0));
    let odd = Defaults::from_json(&json!({"temperature": 9, "top_p": -1, "eos_token_id": "x"}));
    assert_eq!(odd, Defaults::default());
}

#[test]
fn a_refusal_is_an_openai_error() {
    let body: Value = serde_json::from_slice(&refused_chat(json!({"n": 65})).to_json()).unwrap();
    assert_eq!(body["error"]["type"], "invalid_request_error");
    assert_eq!(body["error"]["param"], "n");
}

#[test]
fn a_clients_words_are_not_repeated() {
    let refusal = refused_chat(json!({"temperature": "my secret"}));
    assert!(!refusal.message.contains("secret"), "{refusal}");
}
