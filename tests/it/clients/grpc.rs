//! gRPC clients of the real processes: health, reflection, a sum, and everything that can be wrong with a call.

use std::{collections::BTreeMap, time::Duration};

use hyper::http::uri::PathAndQuery;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use wire::proto::{
    Conversation, Dtype, GenerateRequest, Message, RunCall, Sampling, TokenIds, experts_client::ExpertsClient,
    generate_request::Input, inference_client::InferenceClient, refusal::Reason,
};

use super::Served;

fn prompt(text: &str) -> GenerateRequest {
    let input = Some(Input::Prompt(text.into()));
    GenerateRequest { model: "tiny".into(), input, max_tokens: Some(2), ..Default::default() }
}

fn conversation(messages: usize, content: &str) -> GenerateRequest {
    let message = Message { role: "user".into(), content: content.into() };
    let input = Some(Input::Messages(Conversation { messages: vec![message; messages] }));
    GenerateRequest { model: "tiny".into(), input, ..Default::default() }
}

fn sampled(sampling: Sampling) -> GenerateRequest {
    GenerateRequest { sampling: Some(sampling), ..prompt("a") }
}

/// Text of the first choice, or what the call ended with.
async fn generate(grpc: &str, request: Request<GenerateRequest>) -> Result<String, Status> {
    let call = async {
        let mut responses = InferenceClient::new(wire::connect(grpc)).generate(request).await?.into_inner();
        let mut text = String::new();
        while let Some(response) = responses.message().await? {
            text += &response.text;
        }
        Ok(text)
    };
    tokio::time::timeout(Duration::from_secs(120), call).await.expect("no call hangs")
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_call_has_its_code() {
    let served = Served::start(1).await;
    let ids = |ids: Vec<u32>| GenerateRequest { input: Some(Input::PromptTokenIds(TokenIds { ids })), ..prompt("") };
    let cases: Vec<(&str, GenerateRequest, Code)> = vec![
        ("no such model", GenerateRequest { model: "nobody".into(), ..prompt("a") }, Code::NotFound),
        ("no model", GenerateRequest { model: String::new(), ..prompt("a") }, Code::InvalidArgument),
        ("no input", GenerateRequest { input: None, ..prompt("a") }, Code::InvalidArgument),
        ("n", GenerateRequest { n: Some(65), ..prompt("a") }, Code::InvalidArgument),
        ("stop", GenerateRequest { stop: vec!["x".into(); 17], ..prompt("a") }, Code::InvalidArgument),
        ("logprobs", GenerateRequest { logprobs: Some(21), ..prompt("a") }, Code::InvalidArgument),
        ("max_tokens", GenerateRequest { max_tokens: Some(u32::MAX), ..prompt("a") }, Code::InvalidArgument),
        ("messages", conversation(1025, "a"), Code::InvalidArgument),
        ("no messages", conversation(0, "a"), Code::InvalidArgument),
        ("context", conversation(1, &"9".repeat(20_000)), Code::InvalidArgument),
        ("vocabulary", ids(vec![1, 512]), Code::InvalidArgument),
        ("no ids", ids(vec![]), Code::InvalidArgument),
        ("NaN", sampled(Sampling { temperature: Some(f32::NAN), ..Default::default() }), Code::InvalidArgument),
        ("infinity", sampled(Sampling { top_p: Some(f32::INFINITY), ..Default::default() }), Code::InvalidArgument),
        ("range", sampled(Sampling { temperature: Some(-1.0), ..Default::default() }), Code::InvalidArgument),
        ("size", prompt(&"y".repeat((4 << 20) + 1)), Code::ResourceExhausted),
    ];
    for (what, request, code) in cases {
        let status = generate(&served.grpc, Request::new(request)).await.expect_err(what);
        assert_eq!(status.code(), code, "{what}: {status}");
        assert!(!status.message().is_empty(), "{what}");
    }
    let mut hurried = Request::new(GenerateRequest { max_tokens: Some(900), ..prompt("1") });
    hurried.set_timeout(Duration::from_millis(1));
    let late = generate(&served.grpc, hurried).await.unwrap_err().code();
    assert!([Code::DeadlineExceeded, Code::Cancelled].contains(&late), "tonic's own deadline says Cancelled: {late}");
    served.end().await;
}

/// A message of bytes that need not be one of ours.
#[derive(Clone, PartialEq, prost::Message)]
struct Raw {
    #[prost(bytes = "vec", tag = "1")]
    bytes: Vec<u8>,
}

async fn raw(grpc: &str, path: &'static str, bytes: Vec<u8>, header: &str) -> Status {
    let mut client = tonic::client::Grpc::new(wire::connect(grpc));
    client.ready().await.unwrap();
    let mut request = Request::new(Raw { bytes });
    request.metadata_mut().insert("x-header", header.parse().unwrap());
    let codec = tonic_prost::ProstCodec::<Raw, Raw>::default();
    client.unary(request, PathAndQuery::from_static(path), codec).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_call_is_refused_and_what_is_internal_is_not_there() {
    let served = Served::start(1).await;
    const GENERATE: &str = "/modelfleet.v1.Inference/Generate";
    // field 1 of both is bytes to one and text to the other
    assert_eq!(raw(&served.grpc, GENERATE, vec![0xff, 0xfe], "a").await.code(), Code::InvalidArgument, "not UTF-8");
    for path in [
        "/modelfleet.v1.Inference/Nothing",
        "/modelfleet.v1.Nothing/Generate",
        "/modelfleet.v1.Worker/Generate",
        "/modelfleet.v1.Experts/Run",
        "/modelfleet.v1.Fleet/Watch",
    ] {
        assert_eq!(raw(&served.grpc, path, Vec::new(), "a").await.code(), Code::Unimplemented, "{path}");
    }
    let large = raw(&served.grpc, GENERATE, Vec::new(), &"y".repeat(17 << 10)).await;
    assert_eq!(large.code(), Code::ResourceExhausted, "metadata of 17 KiB: {large}");
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_tell_what_a_client_may_call() {
    let served = Served::start(1).await;
    let mut health = HealthClient::new(wire::connect(&served.grpc));
    for service in ["", "modelfleet.v1.Inference"] {
        let request = HealthCheckRequest { service: service.into() };
        assert_eq!(health.check(request).await.unwrap().into_inner().status(), ServingStatus::Serving);
    }
    let unknown = health.check(HealthCheckRequest { service: "nobody".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);

    let MessageResponse::ListServicesResponse(list) =
        reflected(&served.grpc, MessageRequest::ListServices(String::new())).await
    else {
        panic!("a list was asked for")
    };
    let mut names: Vec<&str> = list.service.iter().map(|service| &*service.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "modelfleet.v1.Inference"]);
    let symbol = "modelfleet.v1.Inference".to_owned();
    let MessageResponse::FileDescriptorResponse(files) =
        reflected(&served.grpc, MessageRequest::FileContainingSymbol(symbol)).await
    else {
        panic!("a file was asked for")
    };
    let text = String::from_utf8_lossy(&files.file_descriptor_proto[0]).into_owned();
    assert!(text.contains("GenerateRequest") && !text.contains("WorkerLoad"), "{text}");
    let nobody = MessageRequest::FileContainingSymbol("modelfleet.v1.Worker".to_owned());
    assert!(matches!(reflected(&served.grpc, nobody).await, MessageResponse::ErrorResponse(_)));

    let request = conversation(1, "What is 47 + 85?");
    let greedy = Sampling { temperature: Some(0.0), ..Default::default() };
    let request = GenerateRequest { sampling: Some(greedy), ..request };
    assert_eq!(generate(&served.grpc, Request::new(request)).await.unwrap().trim(), "132");
    served.end().await;
}

async fn reflected(grpc: &str, request: MessageRequest) -> MessageResponse {
    let mut client = ServerReflectionClient::new(wire::connect(grpc));
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let answered = client.server_reflection_info(tokio_stream::once(request)).await;
    match answered {
        Ok(responses) => match responses.into_inner().message().await {
            Ok(response) => response.unwrap().message_response.unwrap(),
            Err(status) => refused(&status),
        },
        Err(status) => refused(&status),
    }
}

/// tonic ends the stream where the protocol has a message for it.
fn refused(status: &Status) -> MessageResponse {
    assert_eq!(status.code(), Code::NotFound, "{status}");
    MessageResponse::ErrorResponse(Default::default())
}

/// The content hash of the model that all these tests serve.
fn content_hash() -> String {
    let source = format!("file://{}", tests::root().join("manifests/models/tiny-r1").display());
    let described = tests::command("modelfleet-worker").args(["describe", &source]).output().unwrap();
    let description: serde_json::Value = serde_json::from_slice(&described.stdout).unwrap();
    description["contentHash"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_calls_wrongly_is_refused_and_the_stream_lives() {
    let served = Served::start(2).await;
    let worker = served.fleet.workers()[0].clone();
    assert_eq!(worker.experts, "0-7");
    let good = RunCall {
        sequence: 1,
        layer: 1,
        content_hash: content_hash(),
        dtype: Dtype::Bf16.into(),
        rows: vec![0; 512].into(),
        pair_rows: vec![0],
        pair_experts: vec![3],
        ..RunCall::default()
    };
    let cases = [
        (RunCall { rows: vec![0; 511].into(), ..good.clone() }, Some(Reason::Malformed)),
        (RunCall { rows: Vec::new().into(), ..good.clone() }, Some(Reason::Malformed)),
        (RunCall { pair_rows: vec![1], ..good.clone() }, Some(Reason::Malformed)),
        (RunCall { pair_rows: vec![0, 0], ..good.clone() }, Some(Reason::Malformed)),
        (RunCall { dtype: Dtype::F32.into(), ..good.clone() }, Some(Reason::Malformed)),
        (RunCall { dtype: 99, ..good.clone() }, Some(Reason::Malformed)),
        (RunCall { pair_experts: vec![8], ..good.clone() }, Some(Reason::NotHeld)),
        (RunCall { pair_experts: vec![u32::MAX], ..good.clone() }, Some(Reason::NotHeld)),
        (RunCall { layer: 99, ..good.clone() }, Some(Reason::NotHeld)),
        (RunCall { content_hash: "other".into(), ..good.clone() }, Some(Reason::OtherContent)),
        (
            RunCall { pair_rows: vec![0; 1 << 20], pair_experts: vec![3; 1 << 20], ..good.clone() },
            Some(Reason::Malformed),
        ),
        (good, None),
    ];
    let numbered = || cases.iter().zip(1..).map(|((call, _), sequence)| RunCall { sequence, ..call.clone() });
    let calls: Vec<RunCall> = numbered().collect();
    let mut client: ExpertsClient<Channel> =
        ExpertsClient::new(wire::connect(&worker.address)).max_encoding_message_size(wire::MAX_MESSAGE_BYTES);
    let calls = tokio_stream::iter(calls).chain(tokio_stream::pending()); // the end of the calls would end the stream
    let mut replies = client.run(calls).await.unwrap().into_inner();
    let mut answers = BTreeMap::new();
    while answers.len() < cases.len() {
        let reply = tokio::time::timeout(Duration::from_secs(120), replies.message()).await.unwrap().unwrap().unwrap();
        answers.insert(reply.sequence, reply);
    }
    for ((call, reason), sequence) in cases.iter().zip(1..) {
        let reply = &answers[&sequence];
        assert_eq!(reply.refusal.as_ref().map(|refusal| refusal.reason()), *reason, "call {sequence}: {reply:?}");
        assert_eq!(reply.rows.len(), if reason.is_none() { call.rows.len() } else { 0 });
    }
    served.end().await;
}
