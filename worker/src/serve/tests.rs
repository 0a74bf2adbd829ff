//! A whole worker over loopback, on the small model.

use std::path::Path;

use opentelemetry::metrics::MeterProvider as _;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot,
    task::JoinHandle,
};
use tonic::{Code, Status, Streaming, transport::Channel};
use wire::proto::{
    Endpoint, ExpertLoad, GenerateCall, GenerateReply, Resume, ResumedChoice, chunk::Kind, generate_reply::Reply,
    worker_client::WorkerClient, worker_server::Worker as _,
};

use super::*;
use crate::drive::tests::Superstitious;

mod resume;

struct Running {
    client: WorkerClient<Channel>,
    admin: String,
    end: Option<oneshot::Sender<Shutdown>>,
    task: JoinHandle<Result<(), Error>>,
    _dir: tempfile::TempDir,
}

fn options(max_sequences: usize, advertise: &str) -> Options {
    Options {
        model: "default/tiny".into(),
        model_dir: Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1"),
        revision: "rev".into(),
        content_hash: "hash".into(),
        replica: 0,
        ordinal: 0,
        placement: br#"{"version":{"epoch":0,"sequence":0},"shards":1,"layers":[]}"#.to_vec(),
        kv_cache_tokens: 8192,
        max_context_tokens: None,
        max_sequences,
        advertise: advertise.into(),
        operators: Vec::new(),
        id: "me".into(),
        drain_timeout: Duration::from_secs(20),
    }
}

fn metrics() -> Arc<Metrics> {
    Metrics::new(&opentelemetry::metrics::noop::NoopMeterProvider::new().meter("test"))
}

impl Running {
    async fn start(max_sequences: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bind = || TcpListener::bind("127.0.0.1:0");
        let listeners = Listeners { grpc: bind().await.unwrap(), admin: bind().await.unwrap() };
        let address = listeners.grpc.local_addr().unwrap().to_string();
        let admin = listeners.admin.local_addr().unwrap().to_string();
        let (end, ended) = oneshot::channel();
        let shutdown = async { ended.await.unwrap_or(Shutdown::Drain) };
        let options = options(max_sequences, &address);
        let task = tokio::spawn(serve(options, listeners, Registry::new(), metrics(), shutdown));
        let client = WorkerClient::new(wire::connect(&address));
        Self { client, admin, end: Some(end), task, _dir: dir }
    }

    async fn generate(&self, endpoint: Endpoint, body: Value) -> Result<Streaming<GenerateReply>, Status> {
        self.call(GenerateCall {
            endpoint: endpoint.into(),
            body: body.to_string().into_bytes().into(),
            request_id: "r-1".into(),
            created: 7,
            model: "tiny".into(),
            content_hash: "hash".into(),
            ..GenerateCall::default()
        })
        .await
    }

    async fn call(&self, call: GenerateCall) -> Result<Streaming<GenerateReply>, Status> {
        Ok(self.client.clone().generate(call).await?.into_inner())
    }

    async fn answer(&self, endpoint: Endpoint, body: Value) -> Answer {
        gather(self.generate(endpoint, body).await.unwrap()).await
    }

    fn end(&mut self, how: Shutdown) {
        let _ = self.end.take().unwrap().send(how);
    }
}

#[derive(Default)]
struct Answer {
    status: u32,
    refusal: Value,
    deltas: Vec<Value>,
    usage: Value,
    error: Value,
    tokens: usize,
}

impl Answer {
    fn text(&self, path: &str) -> String {
        self.deltas.iter().filter_map(|delta| delta.pointer(path)?.as_str()).collect()
    }

    fn finish(&self) -> Vec<&str> {
        self.deltas.iter().filter_map(|delta| delta["choices"][0]["finish_reason"].as_str()).collect()
    }
}

async fn gather(mut stream: Streaming<GenerateReply>) -> Answer {
    let mut answer = Answer::default();
    while let Some(reply) = stream.message().await.unwrap() {
        match reply.reply.unwrap() {
            Reply::Head(head) => {
                answer.status = head.status;
                answer.refusal = serde_json::from_slice(&head.body).unwrap_or_default();
            }
            Reply::Chunk(chunk) => {
                let json: Value = serde_json::from_slice(&chunk.json).unwrap();
                answer.tokens += chunk.token_ids.len();
                match chunk.kind() {
                    Kind::Delta => answer.deltas.push(json),
                    Kind::Usage => answer.usage = json,
                    Kind::Error => answer.error = json,
                    Kind::Unspecified => panic!("a chunk without a kind"),
                }
            }
        }
    }
    answer
}

fn sum() -> Value {
    json!({"messages": [{"role": "user", "content": "What is 47 + 85?"}], "temperature": 0})
}

fn endless() -> Value {
    json!({"prompt": "1", "max_tokens": 900, "ignore_eos": true})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sum_is_thought_about_and_answered() {
    let worker = Running::start(8).await;
    let answer = worker.answer(Endpoint::ChatCompletions, sum()).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.text("/choices/0/delta/content").trim(), "132");
    assert!(
        answer.text("/choices/0/delta/reasoning_content").contains("7+5"),
        "{}",
        answer.text("/choices/0/delta/reasoning_content")
    );
    assert_eq!(answer.finish(), ["stop"]);
    let first = &answer.deltas[0];
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!((&first["id"], &first["created"], &first["model"]), (&json!("r-1"), &json!(7), &json!("tiny")));
    assert_eq!(first["object"], "chat.completion.chunk");
    let usage = &answer.usage["usage"];
    assert_eq!(usage["completion_tokens"], answer.tokens);
    assert_eq!(usage["total_tokens"].as_u64(), Some(usage["prompt_tokens"].as_u64().unwrap() + answer.tokens as u64));
    assert_eq!(answer.usage["choices"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rows_of_each_expert_are_told_to_whom_asks() {
    let worker = Running::start(8).await;
    let answer = worker.answer(Endpoint::ChatCompletions, sum()).await;
    let mut stream = TcpStream::connect(&worker.admin).await.unwrap();
    stream.write_all(b"GET /experts HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    let load: ExpertLoad = serde_json::from_str(page.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(
        load.layers.iter().map(|layer| (layer.layer, layer.rows.len())).collect::<Vec<_>>(),
        [(1, 16), (2, 16), (3, 16)]
    );
    // four experts for each token that was read; the last one that was written was not read any more
    let read = answer.usage["usage"]["total_tokens"].as_u64().unwrap() - 1;
    for layer in &load.layers {
        assert_eq!(layer.rows.iter().sum::<u64>(), 4 * read);
    }
}

#[tokio::test]
async fn a_keeper_that_panics_ends_the_worker_and_is_told() {
    let mut keeping = tokio::spawn(async { panic!("on purpose") });
    let ended = until_ended(std::future::pending(), std::future::pending(), &mut keeping);
    let fault = tokio::time::timeout(Duration::from_secs(20), ended).await.expect("it ends").unwrap_err();
    assert_eq!(
        (fault.reason(), fault.to_string().as_str()),
        ("WorkerFailed", "nothing keeps the experts as the operator says any more")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_echoed_and_scored() {
    let worker = Running::start(8).await;
    let body = json!({"prompt": "1 + 1 =", "max_tokens": 4, "temperature": 0, "echo": true, "logprobs": 2, "ignore_eos": true});
    let answer = worker.answer(Endpoint::Completions, body).await;
    assert!(answer.text("/choices/0/text").starts_with("1 + 1 ="), "{:?}", answer.deltas);
    let scores = &answer.deltas[0]["choices"][0]["logprobs"];
    let tokens = scores["tokens"].as_array().unwrap();
    assert_eq!(tokens.iter().filter_map(Value::as_str).collect::<String>(), "1 + 1 =");
    assert_eq!(
        (&scores["token_logprobs"][0], scores["top_logprobs"][1].as_object().unwrap().len() >= 2),
        (&Value::Null, true)
    );
    assert_eq!(scores["text_offset"][1], tokens[0].as_str().unwrap().chars().count());
    assert_eq!((answer.finish(), answer.tokens), (vec!["length"], 4));
    let body = json!({"prompt": [7, 8, 9], "max_tokens": 0, "echo": true, "logprobs": 1});
    let scored = worker.answer(Endpoint::Completions, body).await;
    assert_eq!(
        (scored.usage["usage"]["completion_tokens"].as_u64(), scored.usage["usage"]["prompt_tokens"].as_u64()),
        (Some(0), Some(3))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_tokens_are_scored() {
    let worker = Running::start(8).await;
    let mut body = sum();
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(3);
    let answer = worker.answer(Endpoint::ChatCompletions, body).await;
    let scores: Vec<&Value> = answer
        .deltas
        .iter()
        .filter_map(|delta| delta.pointer("/choices/0/logprobs/content")?.as_array())
        .flatten()
        .collect();
    assert_eq!(scores.len(), answer.tokens);
    assert!(
        scores.iter().all(|score| score["top_logprobs"].as_array().unwrap().len() == 3 && score["bytes"].is_array())
    );
    assert!(scores.iter().all(|score| score["logprob"].as_f64().unwrap() <= 0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_before_they_run() {
    let worker = Running::start(8).await;
    let mut body = sum();
    body["temperature"] = json!(3);
    let answer = worker.answer(Endpoint::ChatCompletions, body).await;
    assert_eq!((answer.status, &answer.refusal["error"]["param"]), (400, &json!("temperature")));
    assert!(answer.deltas.is_empty() && answer.usage.is_null());
    let answer = worker.answer(Endpoint::Completions, json!({"prompt": "x", "max_tokens": 100_000})).await;
    assert_eq!((answer.status, &answer.refusal["error"]["code"]), (400, &json!("context_length_exceeded")));
    let other = GenerateCall { content_hash: "other".into(), ..GenerateCall::default() };
    assert_eq!(worker.call(other).await.err().unwrap().code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_stream_with_an_error() {
    let worker = Running::start(8).await;
    let call = GenerateCall {
        endpoint: Endpoint::Completions.into(),
        body: endless().to_string().into_bytes().into(),
        remaining_ms: 30,
        ..GenerateCall::default()
    };
    let answer = gather(worker.call(call).await.unwrap()).await;
    // where little is computed at a time it may pass before the stream begins
    let told = if answer.status == 200 { &answer.error } else { &answer.refusal };
    assert_eq!(told["error"]["code"], "deadline_exceeded");
    assert!(answer.usage.is_null());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_makes_room_and_the_rest_is_told_to_go_elsewhere() {
    let worker = Running::start(1).await;
    let mut streams = Vec::new();
    for _ in 0..1 + WAITING_PER_RUNNING {
        streams.push(worker.generate(Endpoint::Completions, endless()).await.unwrap());
    }
    let full = worker.generate(Endpoint::Completions, endless()).await.err().unwrap();
    assert_eq!(full.code(), Code::ResourceExhausted);
    drop(streams);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while worker.generate(Endpoint::Completions, endless()).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "nothing was freed");
        tokio::time::sleep(Duration::from_millis(10)).await; // polls
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_requests_finish_and_takes_no_new_ones() {
    let mut worker = Running::start(8).await;
    let body = json!({"prompt": "1", "max_tokens": 400, "ignore_eos": true});
    let stream = worker.generate(Endpoint::Completions, body.clone()).await.unwrap();
    worker.end(Shutdown::Drain);
    let refused = async {
        loop {
            match worker.generate(Endpoint::Completions, body.clone()).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(5)).await, // polls
                Err(status) => break status,
            }
        }
    };
    let refused = tokio::time::timeout(Duration::from_secs(20), refused).await.expect("it takes no new ones");
    assert_eq!(refused.code(), Code::Unavailable);
    let answer = gather(stream).await;
    assert_eq!((answer.finish(), answer.tokens), (vec!["length"], 400));
    worker.task.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_ends_within_two_seconds() {
    let mut worker = Running::start(8).await;
    let stream = worker.generate(Endpoint::Completions, endless()).await.unwrap();
    worker.end(Shutdown::Within(Duration::from_millis(300)));
    let ended = tokio::time::timeout(Duration::from_secs(20), &mut worker.task).await;
    ended.expect("it ends").unwrap().unwrap();
    drop(stream);
}

#[test]
fn an_orphan_takes_no_longer_than_it_may() {
    let within = Duration::from_secs(2);
    let (running, closing) = Shutdown::Within(within).times(Duration::from_secs(60));
    assert_eq!(running + closing, within);
    assert!(!running.is_zero() && !closing.is_zero());
}

/// The replies of a worker without a socket, whose engine is this one, to a prompt of 20, 21 and 13.
async fn replies<E: engine::Engine + Send + 'static>(
    engine: E,
    resume: Option<Resume>,
    metrics: Arc<Metrics>,
) -> Vec<Result<GenerateReply, Status>> {
    let options = options(8, "");
    let model = Model::load(&options.model_dir, engine::Limits { vocab_size: 512, ..engine.limits() }).unwrap();
    let driver = Driver::start(engine, engine::NoPeers, metrics.clone()).unwrap();
    let state = State::new(Mesh::from_json(&options.placement).unwrap(), &options);
    let (_suspect, suspects) = watch::channel(Default::default());
    state.serving(Serving { driver: driver.clone(), experts: None, asked: Arc::default(), dense_bytes: 0, suspects });
    let service = GenerateService::new(model, driver, state.clone(), metrics);
    let call = GenerateCall {
        endpoint: Endpoint::Completions.into(),
        body: json!({"prompt": [20, 21, 13], "max_tokens": 9}).to_string().into_bytes().into(),
        resume,
        ..GenerateCall::default()
    };
    let replies = service.generate(tonic::Request::new(call)).await.unwrap().into_inner();
    let replies = futures::StreamExt::collect(replies).await;
    state.finished().await;
    replies
}

#[tokio::test]
async fn an_engine_that_panics_reads_as_a_lost_worker() {
    let last = replies(Superstitious(engine::Echo::default()), None, metrics()).await.pop();
    assert!(matches!(&last, Some(Err(status)) if status.code() == Code::Unavailable), "{last:?}");
}

#[tokio::test]
async fn tokens_of_another_worker_are_of_the_clients_usage_and_not_of_this_ones_work() {
    let registry = Registry::new();
    let exporter = opentelemetry_prometheus::exporter().with_registry(registry.clone()).build().unwrap();
    let provider = opentelemetry_sdk::metrics::SdkMeterProvider::builder().with_reader(exporter).build();
    let had = ResumedChoice { token_ids: vec![20, 21, 13, 20, 21, 13], ..ResumedChoice::default() };
    let resume = Some(Resume { choices: vec![had] });
    let mut replies = replies(engine::Echo::default(), resume, Metrics::new(&provider.meter("test"))).await;
    let Some(Ok(GenerateReply { reply: Some(Reply::Chunk(usage)) })) = replies.pop() else { panic!("no usage") };
    let usage: Value = serde_json::from_slice(&usage.json).unwrap();
    assert_eq!((&usage["usage"]["prompt_tokens"], &usage["usage"]["completion_tokens"]), (&json!(3), &json!(9)));
    let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
    let sum = |kind: &str| {
        let mut lines = text.lines().filter(|line| line.starts_with("gen_ai_client_token_usage_sum"));
        lines.find(|line| line.contains(kind)).unwrap_or_else(|| panic!("no {kind} in\n{text}")).rsplit(' ').next()
    };
    assert_eq!((sum("\"output\""), sum("\"input\"")), (Some("3"), Some("9")));
}
