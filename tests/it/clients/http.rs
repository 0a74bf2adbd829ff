//! Bad input over HTTP: each row a clear 4xx that names what is wrong.

use serde_json::{Value, json};

use super::Served;
use crate::http::client;

/// A chat with these fields more, or others.
fn chat(change: Value) -> String {
    with(json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}), change)
}

/// A completion with these fields more, or others.
fn completion(change: Value) -> String {
    with(json!({"model": "tiny", "prompt": "1+1=", "max_tokens": 2}), change)
}

fn with(mut body: Value, change: Value) -> String {
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    body.to_string()
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_cannot_be_honoured_are_refused_by_name() {
    let served = Served::start(1).await;
    let message = json!({"role": "user", "content": "hi"});
    let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
    let media = json!({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}});
    let cases: Vec<(&str, String, u16, &str)> = vec![
        (CHAT, "not JSON".into(), 400, ""),
        (CHAT, "[]".into(), 400, ""),
        (CHAT, format!(r#"{{"model":"tiny","messages":{deep}}}"#), 400, ""),
        (CHAT, r#"{"model":"tiny","messages":[],"temperature":NaN}"#.into(), 400, ""),
        (CHAT, chat(json!({"model": "nobody"})), 404, "model"),
        (CHAT, chat(json!({"model": 7})), 400, "model"),
        (CHAT, chat(json!({"n": 65})), 400, "n"),
        (CHAT, chat(json!({"n": 1.5})), 400, "n"),
        (CHAT, chat(json!({"stop": vec!["x"; 17]})), 400, "stop"),
        (CHAT, chat(json!({"messages": vec![message.clone(); 1025]})), 400, "messages"),
        (CHAT, chat(json!({"messages": [{"role": "user", "content": [media]}]})), 400, "messages"),
        (CHAT, chat(json!({"messages": [{"role": "user", "content": "9".repeat(20_000)}]})), 400, "messages"),
        (CHAT, chat(json!({"max_tokens": 1_000_000})), 400, "max_tokens"),
        (CHAT, chat(json!({"temperature": "warm"})), 400, "temperature"),
        (CHAT, chat(json!({"top_logprobs": 21, "logprobs": true})), 400, "top_logprobs"),
        (CHAT, chat(json!({"logit_bias": {"5": 1000}})), 400, "logit_bias"),
        (CHAT, chat(json!({"chat_template": "{{ 7 * 7 }}"})), 400, "chat_template"),
        (CHAT, chat(json!({"chat_template_kwargs": {"x": 1}})), 400, "chat_template_kwargs"),
        (CHAT, chat(json!({"logits_processors": ["os.system"]})), 400, "logits_processors"),
        (CHAT, chat(json!({"guided_regex": "(a+)+$"})), 400, "guided_regex"),
        (CHAT, chat(json!({"response_format": {"type": "json_schema", "json_schema": {}}})), 400, "response_format"),
        (CHAT, chat(json!({"tools": [{"type": "mcp", "server_url": "http://10.0.0.1/"}]})), 400, "tools"),
        (COMPLETIONS, completion(json!({"prompt": [1, 2, 512]})), 400, "prompt"),
        (COMPLETIONS, completion(json!({"prompt": [-1]})), 400, "prompt"),
        (COMPLETIONS, completion(json!({"prompt": [1.5]})), 400, "prompt"),
        (COMPLETIONS, completion(json!({"prompt": []})), 400, "prompt"),
        (COMPLETIONS, completion(json!({"prompt": vec!["a"; 65], "n": 64})), 400, "prompt"),
        (COMPLETIONS, completion(json!({"prompt_embeds": "gASV"})), 400, "prompt_embeds"),
        (COMPLETIONS, completion(json!({"best_of": 3})), 400, "best_of"),
        (COMPLETIONS, completion(json!({"suffix": "x"})), 400, "suffix"),
    ];
    for (path, body, status, parameter) in cases {
        let request = client().post(format!("{}{path}", served.url)).header("content-type", "application/json");
        let response = request.body(body.clone()).send().await.unwrap();
        let got = response.status().as_u16();
        let reply: Value = response.json().await.unwrap();
        assert_eq!(got, status, "{body:.200}: {reply}");
        let named = reply["error"]["param"].as_str().unwrap_or_default();
        assert!(named.starts_with(parameter), "{body:.200} should name {parameter:?}: {reply}");
        assert!(!reply["error"]["message"].as_str().unwrap_or_default().is_empty(), "{reply}");
    }
    let unknown = chat(json!({"max_tokens": 1, "x_of_tomorrow": {"deep": [1, 2]}}));
    let request = client().post(format!("{}{CHAT}", served.url)).header("content-type", "application/json");
    assert_eq!(request.body(unknown).send().await.unwrap().status(), 200, "other unknown fields pass");
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_no_api_calls_are_refused_at_the_door() {
    let served = Served::start(1).await;
    let post = |path: &str, kind: &str, body: Vec<u8>| {
        client().post(format!("{}{path}", served.url)).header("content-type", kind).body(body)
    };
    let json = "application/json";
    let good = || chat(json!({"max_tokens": 1})).into_bytes();
    let cases = [
        (post("/v1/nothing", json, good()), 404),
        (post("/v1/chat%2fcompletions", json, good()), 404),
        (post("/metrics", json, good()), 404),
        (client().get(format!("{}{CHAT}", served.url)), 405),
        (client().delete(format!("{}/v1/models/tiny", served.url)), 405),
        (client().get(format!("{}/v1/models/nobody", served.url)), 404),
        (post(CHAT, json, b"{\"model\":\"\xff\"}".to_vec()), 400),
        (post(CHAT, json, vec![b' '; (4 << 20) + 1]), 413),
        (post(CHAT, json, good()).header("x-long", "y".repeat(17 << 10)), 431),
        (post(CHAT, "multipart/form-data; boundary=b", good()), 415),
        (post(CHAT, json, good()).header("content-encoding", "gzip"), 415),
    ];
    for (at, (request, status)) in cases.into_iter().enumerate() {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "case {at}: {}", response.text().await.unwrap_or_default());
    }
    served.end().await;
}
