//! The typed interface, health and reflection.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::uri::PathAndQuery;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::{net::TcpStream, sync::Semaphore};
use tonic::{Code, Request, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use wire::proto::{
    Conversation, GenerateRequest, Message, Sampling, Usage, generate_request::Input,
    inference_client::InferenceClient, model_snapshot::Availability,
};

use crate::{
    fake::{FakeWorker, Step, words},
    rig::{Rig, in_time, model},
};

fn client(rig: &Rig) -> InferenceClient<Channel> {
    InferenceClient::new(wire::connect(&rig.grpc))
}

fn prompt(text: &str) -> GenerateRequest {
    GenerateRequest { model: "m".into(), input: Some(Input::Prompt(text.into())), ..Default::default() }
}

/// What the call ends with, wherever it ends.
async fn refused(rig: &Rig, request: GenerateRequest) -> tonic::Status {
    match in_time(client(rig).generate(request)).await {
        Err(status) => status,
        Ok(response) => {
            let mut responses = response.into_inner();
            loop {
                match in_time(responses.message()).await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("it ended well"),
                    Err(status) => return status,
                }
            }
        }
    }
}

#[tokio::test]
async fn a_conversation_is_answered_in_typed_pieces() {
    let script = vec![
        Step::Head(200, Value::Null),
        Step::Thought(0, "carry 1"),
        Step::Text(0, "132"),
        Step::Finish(0, "stop"),
        Step::Usage(7, 3),
    ];
    let worker = FakeWorker::start("w", move |_| Ok(script.clone())).await;
    let rig = Rig::start(vec![model(&[&worker])]).await;
    let message = Message { role: "user".into(), content: "47 + 85?".into() };
    let mut request = Request::new(GenerateRequest {
        input: Some(Input::Messages(Conversation { messages: vec![message] })),
        sampling: Some(Sampling { temperature: Some(0.5), ..Default::default() }),
        ..prompt("")
    });
    request.metadata_mut().insert("x-request-id", "mine".parse().unwrap());
    let response = client(&rig).generate(request).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "mine");
    let mut responses = response.into_inner();
    let mut pieces = Vec::new();
    while let Some(piece) = in_time(responses.message()).await.unwrap() {
        assert_eq!(piece.request_id, "mine");
        pieces.push(piece);
    }
    assert_eq!((&*pieces[0].reasoning, &*pieces[1].text, &pieces[1].token_ids[..]), ("carry 1", "132", &[5][..]));
    assert_eq!(pieces[2].finish_reason, "stop");
    assert_eq!(pieces[3].usage, Some(Usage { prompt_tokens: 7, completion_tokens: 3 }));
    assert_eq!(pieces.len(), 4);
    let call = worker.seen.calls.lock().unwrap()[0].clone();
    let sent: Value = serde_json::from_slice(&call.body).unwrap();
    let messages = json!([{"role": "user", "content": "47 + 85?"}]);
    assert_eq!(sent, json!({"model": "m", "stream": true, "messages": messages, "temperature": 0.5}));
    rig.idle().await;
}

#[tokio::test]
async fn each_refusal_has_its_code() {
    let worker = FakeWorker::start("w", |call| {
        let body = String::from_utf8_lossy(&call.body);
        if body.contains("break") {
            return Ok(vec![Step::Head(200, Value::Null), Step::Text(0, "a"), Step::Fail(Code::Unavailable)]);
        }
        let error = json!({"message": "top_p is 7; use at most 1", "type": "invalid_request_error",
            "param": "top_p", "code": null});
        Ok(vec![Step::Head(400, json!({"error": error}))])
    })
    .await;
    let called = |name: &str| {
        let mut empty = model(&[]);
        (empty.model, empty.served_names) = (name.into(), Vec::new());
        empty
    };
    let (mut asleep, mut off, mut full) = (called("ns/asleep"), called("ns/off"), called("ns/full"));
    (asleep.availability, asleep.max_wait_ms) = (Availability::Asleep.into(), 50);
    off.availability = Availability::Off.into();
    full.max_pending = 0;
    let rig = Rig::start(vec![model(&[&worker]), asleep, off, full]).await;
    let named = |model: &str| GenerateRequest { model: model.into(), ..prompt("a") };
    let large = "y".repeat((4 << 20) + 1);
    for (request, code, message) in [
        (named("none"), Code::NotFound, "The model `none` does not exist"),
        (named(""), Code::InvalidArgument, "model is an empty string; use a string that is not empty"),
        (
            GenerateRequest { n: Some(65), ..prompt("a") },
            Code::InvalidArgument,
            "n is 65; use a whole number from 1 to 64",
        ),
        (
            GenerateRequest { stop: vec!["x".into(); 17], ..prompt("a") },
            Code::InvalidArgument,
            "stop has 17 entries; use at most 16",
        ),
        (prompt("a"), Code::InvalidArgument, "top_p is 7; use at most 1"),
        (prompt("break"), Code::Unavailable, "The model could not answer; try again later"),
        (named("ns/full"), Code::ResourceExhausted, "Too many requests wait for this model; try again later"),
        (named("ns/off"), Code::Unavailable, "This model is switched off"),
        (named("ns/asleep"), Code::DeadlineExceeded, "No worker was free in time; try again later"),
        (prompt(&large), Code::ResourceExhausted, "The message is too large"),
    ] {
        let status = refused(&rig, request).await;
        assert_eq!((status.code(), status.message()), (code, message));
    }
    rig.idle().await;
}

#[tokio::test]
async fn a_cut_message_is_the_callers_fault_and_an_unknown_method_is_unimplemented() {
    let rig = Rig::start(vec![model(&[])]).await;
    let call = |path: &'static str, bytes: Vec<u8>| {
        let mut grpc = tonic::client::Grpc::new(wire::connect(&rig.grpc));
        async move {
            grpc.ready().await.unwrap();
            let codec = tonic_prost::ProstCodec::<Raw, Raw>::default();
            let path = PathAndQuery::from_static(path);
            grpc.unary(Request::new(Raw { bytes }), path, codec).await.unwrap_err().code()
        }
    };
    // field 1 of Raw is field 1, model, of a request: text that is not UTF-8
    let generate = "/modelfleet.v1.Inference/Generate";
    assert_eq!(call(generate, vec![0xff, 0xfe]).await, Code::InvalidArgument);
    assert_eq!(call("/modelfleet.v1.Inference/Nothing", vec![]).await, Code::Unimplemented);
    assert_eq!(call("/modelfleet.v1.Worker/Generate", vec![]).await, Code::Unimplemented);
}

#[derive(Clone, PartialEq, prost::Message)]
struct Raw {
    #[prost(bytes = "vec", tag = "1")]
    bytes: Vec<u8>,
}

/// The status that the router gives; tonic's own client would give one first.
async fn status_of(rig: &Rig, request: &GenerateRequest, timeout: &str) -> Code {
    let message = request.encode_to_vec();
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend(message);
    let request = http::Request::post(format!("http://{}/modelfleet.v1.Inference/Generate", rig.grpc))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", timeout)
        .body(Full::new(Bytes::from(frame)))
        .unwrap();
    let stream = TokioIo::new(TcpStream::connect(&rig.grpc).await.unwrap());
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let response = in_time(sender.send_request(request)).await.unwrap();
    let (head, body) = response.into_parts();
    let trailers = in_time(body.collect()).await.unwrap().trailers().cloned().unwrap_or_default();
    let status = head.headers.get("grpc-status").or_else(|| trailers.get("grpc-status")).unwrap();
    Code::from_bytes(status.as_bytes())
}

#[tokio::test]
async fn the_clients_deadline_holds_in_the_queue_and_at_the_worker() {
    let gate = Arc::new(Semaphore::new(0));
    let worker = FakeWorker::start("w", move |_| {
        Ok(vec![Step::Head(200, Value::Null), Step::Text(0, "a"), Step::Await(gate.clone())])
    })
    .await;
    let mut empty = model(&[]);
    empty.model = "ns/empty".into();
    let rig = Rig::start(vec![model(&[&worker]), empty]).await;
    for name in ["ns/empty", "ns/m"] {
        let request = GenerateRequest { model: name.into(), ..prompt("a") };
        assert_eq!(status_of(&rig, &request, "300m").await, Code::DeadlineExceeded, "{name}");
        rig.idle().await;
    }
    let remaining = worker.seen.calls.lock().unwrap()[0].remaining_ms;
    assert!((1..=300).contains(&remaining), "{remaining}");
}

#[tokio::test]
async fn health_follows_readiness() {
    let mut rig = Rig::start_unsynced().await;
    let mut health = HealthClient::new(wire::connect(&rig.grpc));
    for service in ["", "modelfleet.v1.Inference"] {
        let request = HealthCheckRequest { service: service.into() };
        let mut statuses = health.watch(request).await.unwrap().into_inner();
        let mut next = async || in_time(statuses.message()).await.unwrap().unwrap().status();
        if service.is_empty() {
            while next().await != ServingStatus::NotServing {}
            rig.tell(wire::proto::instruction::Instruction::Synced(wire::proto::Synced {}));
        }
        while next().await != ServingStatus::Serving {}
    }
    let worker = FakeWorker::start("w", |_| Ok(words("fine"))).await;
    rig.tell_model(model(&[&worker]));
    let mut statuses = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(in_time(statuses.message()).await.unwrap().unwrap().status(), ServingStatus::Serving);
    rig.router.retire();
    assert_eq!(in_time(statuses.message()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
    drop((statuses, health));
    rig.end.take();
    tokio::time::timeout(Duration::from_secs(20), rig.served).await.unwrap().unwrap();
}

#[tokio::test]
async fn reflection_shows_what_clients_may_call_and_nothing_else() {
    let rig = Rig::start(Vec::new()).await;
    let mut reflection = ServerReflectionClient::new(wire::connect(&rig.grpc));
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let response = reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap();
    let response = in_time(response.into_inner().message()).await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = response.message_response else { panic!() };
    let mut names: Vec<&str> = list.service.iter().map(|service| &*service.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "modelfleet.v1.Inference"]);
}
