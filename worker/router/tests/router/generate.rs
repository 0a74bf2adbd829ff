//! Good requests: streams, whole bodies, models.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use router::Patience;
use serde_json::{Value, json};

use crate::{
    fake::{FakeWorker, Step, words},
    rig::{CHAT, Rig, events, get, in_time, json, model, post, text},
};

const STREAM: &str = r#"{"model":"m","stream":true}"#;

#[tokio::test]
async fn a_stream_is_the_workers_pieces_and_done() {
    let worker = FakeWorker::start("w", |_| Ok(words("one two"))).await;
    let rig = Rig::start(vec![model(&[&worker])]).await;
    let body = r#"{"model":"m","stream":true, "messages":[],  "unknown":{"kept":[1.0]}}"#;
    let response = rig.post(CHAT, body).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
    let events = events(&text(response).await);
    let pieces: Vec<Value> = events[..3].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    assert_eq!(pieces[0]["choices"][0]["delta"]["content"], "one ");
    assert_eq!(pieces[2]["choices"][0]["finish_reason"], "stop");
    assert!(pieces.iter().all(|piece| piece.get("usage").is_none()), "nobody asked for it");
    assert_eq!(events[3..], ["[DONE]"]);

    let calls = worker.seen.calls.lock().unwrap();
    assert_eq!(calls[0].body, body.as_bytes(), "every byte untouched");
    assert_eq!((&*calls[0].model, &*calls[0].content_hash, calls[0].remaining_ms), ("m", "hash", 0));
    assert!(calls[0].request_id.starts_with("chatcmpl-"));
}

#[tokio::test]
async fn usage_is_streamed_to_those_who_ask() {
    let worker = FakeWorker::start("w", |_| Ok(words("one two"))).await;
    let rig = Rig::start(vec![model(&[&worker])]).await;
    let body = r#"{"model":"m","stream":true,"stream_options":{"include_usage":true}}"#;
    let events = events(&text(rig.post("/v1/completions", body).await).await);
    let pieces: Vec<Value> = events[..4].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    assert!(pieces[..3].iter().all(|piece| piece["usage"] == Value::Null && piece.get("usage").is_some()));
    assert_eq!(pieces[3]["usage"]["completion_tokens"], 2);
    assert_eq!(events[4..], ["[DONE]"]);
}

#[tokio::test]
async fn without_stream_the_pieces_come_as_one_body() {
    let script = vec![
        Step::Head(200, Value::Null),
        Step::Thought(0, "carry "),
        Step::Text(1, "1"),
        Step::Thought(0, "1"),
        Step::Text(0, "132"),
        Step::Finish(0, "stop"),
        Step::Text(1, "33"),
        Step::Finish(1, "length"),
        Step::Usage(7, 5),
    ];
    let worker = FakeWorker::start("w", move |_| Ok(script.clone())).await;
    let rig = Rig::start(vec![model(&[&worker])]).await;
    let mut request = post(CHAT, r#"{"model":"ns/m","n":2,"messages":[]}"#);
    request.headers_mut().insert("x-request-id", "mine".parse().unwrap());
    let response = rig.send(request).await;
    assert_eq!((response.status().as_u16(), &response.headers()["x-request-id"]), (200, &"mine".parse().unwrap()));
    assert!(response.headers().contains_key(header::CONTENT_LENGTH));
    let mut body = json(response).await;
    assert!(body["created"].take().as_i64().unwrap() > 1_700_000_000);
    assert_eq!(
        body,
        json!({
            "id": "chatcmpl-mine", "object": "chat.completion", "created": null, "model": "ns/m",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "132", "reasoning_content": "carry 1"},
                 "logprobs": null, "finish_reason": "stop"},
                {"index": 1, "message": {"role": "assistant", "content": "133"},
                 "logprobs": null, "finish_reason": "length"},
            ],
            "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
        })
    );
    rig.idle().await;
    let metrics = rig.metrics();
    for line in [
        "gen_ai_server_request_duration_seconds_count{",
        "gen_ai_server_time_to_first_token_seconds_count{",
        "gen_ai_server_time_per_output_token_seconds_count{",
        "gen_ai_client_token_usage_sum{",
        "modelfleet_router_queued_requests{model=\"ns/m\"",
        "modelfleet_router_running_requests{model=\"ns/m\"",
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    assert!(!metrics.contains("carry"), "no text in metrics");
}

#[tokio::test]
async fn what_the_worker_refuses_is_passed_on_with_its_status() {
    for stream in [true, false] {
        let worker = FakeWorker::start("w", |_| {
            let error = json!({"message": "max_tokens is -1; use at least 1", "type": "invalid_request_error",
                "param": "max_tokens", "code": null});
            Ok(vec![Step::Head(400, json!({"error": error}))])
        })
        .await;
        let rig = Rig::start(vec![model(&[&worker])]).await;
        let response = rig.post(CHAT, &format!(r#"{{"model":"m","stream":{stream}}}"#)).await;
        assert_eq!(response.status(), 400);
        assert_eq!(json(response).await["error"]["param"], "max_tokens");
        assert_eq!(worker.calls(), 1, "another worker would say the same");
        rig.idle().await;
    }
}

#[tokio::test]
async fn models_are_listed_under_all_their_names() {
    let mut other = model(&[]);
    other.model = "ns/other".into();
    other.created += 1; // younger, so `m` is not its
    let rig = Rig::start(vec![other, model(&[])]).await;
    let list = json(rig.send(get("/v1/models")).await).await;
    let ids: Vec<&str> = list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["m", "ns/m", "ns/other"]);
    for path in ["/v1/models/m", "/v1/models/ns/m", "/v1/models/ns%2Fm"] {
        let shown = json(rig.send(get(path)).await).await;
        assert_eq!((&shown["object"], &shown["created"]), (&json!("model"), &json!(1_700_000_000)), "{path}");
    }
    let missing = rig.send(get("/v1/models/none")).await;
    assert_eq!(missing.status(), 404);
    assert_eq!(json(missing).await["error"]["code"], "model_not_found");
}

#[tokio::test]
async fn http2_clients_are_served_at_the_same_port() {
    let worker = FakeWorker::start("w", |_| Ok(words("one"))).await;
    let rig = Rig::start(vec![model(&[&worker])]).await;
    let mut sender = http2_client(&rig).await;
    let response = sender.send_request(over_http2(STREAM)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(text(response).await.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn an_http2_client_that_grants_no_window_is_cut_and_its_other_streams_are_not() {
    let words = words(Box::leak("many ".repeat(100).into_boxed_str()));
    let worker = FakeWorker::start("w", move |_| Ok(words.clone())).await;
    let patience = Patience { reader: Duration::from_secs(2), ..Patience::default() };
    let rig = Rig::start_with(vec![model(&[&worker])], patience).await;
    let mut sender = http2_client(&rig).await;
    let unread = sender.send_request(over_http2(STREAM)).await.unwrap();
    assert_eq!(unread.status(), 200);
    rig.idle().await;
    let read = sender.send_request(over_http2(STREAM)).await.unwrap();
    assert!(text(read).await.ends_with("data: [DONE]\n\n"));
    assert!(in_time(unread.into_body().collect()).await.is_err(), "it does not look whole");
}

async fn http2_client(rig: &Rig) -> SendRequest<Full<Bytes>> {
    let stream = tokio::net::TcpStream::connect(&rig.http).await.unwrap();
    let mut client = http2::Builder::new(TokioExecutor::new());
    client.initial_stream_window_size(1 << 10); // a few pieces
    let (sender, connection) = client.handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn over_http2(body: &str) -> Request<Full<Bytes>> {
    let mut request = post(CHAT, body);
    *request.uri_mut() = format!("http://router{CHAT}").parse().unwrap();
    request.headers_mut().remove(header::HOST);
    request
}
