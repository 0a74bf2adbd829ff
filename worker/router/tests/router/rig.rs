//! A router that serves, a snapshot for it, and a client.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use opentelemetry::metrics::MeterProvider as _;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::{Registry, TextEncoder};
use router::{Ending, Listeners, Patience, Router, serve};
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};
use wire::proto::{Instruction, ModelSnapshot, Synced, Version, instruction, model_snapshot::Availability};

use crate::fake::FakeWorker;

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
pub(crate) const CHAT: &str = "/v1/chat/completions";

/// A router under test.
pub(crate) struct Rig {
    pub(crate) router: Router,
    pub(crate) http: String,
    pub(crate) grpc: String,
    pub(crate) end: Option<oneshot::Sender<()>>,
    pub(crate) served: JoinHandle<()>,
    registry: Registry,
}

impl Rig {
    /// With all models known: the ones in `snapshots`.
    pub(crate) async fn start(snapshots: Vec<ModelSnapshot>) -> Self {
        Self::start_with(snapshots, Patience::default()).await
    }

    /// As [`Rig::start`], with other bounds.
    pub(crate) async fn start_with(snapshots: Vec<ModelSnapshot>, patience: Patience) -> Self {
        let rig = Self::listening(patience).await;
        for snapshot in snapshots {
            rig.tell(instruction::Instruction::Model(snapshot));
        }
        rig.tell(instruction::Instruction::Synced(Synced {}));
        rig
    }

    /// That has heard of no operator.
    pub(crate) async fn start_unsynced() -> Self {
        Self::listening(Patience::default()).await
    }

    async fn listening(patience: Patience) -> Self {
        let registry = Registry::new();
        let reader = opentelemetry_prometheus::exporter().with_registry(registry.clone()).build().unwrap();
        let provider = SdkMeterProvider::builder().with_reader(reader).build();
        let router = Router::with_patience(&provider.meter("test"), patience);
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = (http.local_addr().unwrap().to_string(), grpc.local_addr().unwrap().to_string());
        let (end, ended) = oneshot::channel::<()>();
        let ending = Ending { linger: Duration::ZERO, grace: DEADLINE };
        let serving = router.clone();
        let served = tokio::spawn(async move {
            let _provider = provider;
            let shutdown = async { drop(ended.await) };
            serve(Listeners { http, grpc }, serving, shutdown, ending).await.unwrap();
        });
        Self { router, http: addresses.0, grpc: addresses.1, end: Some(end), served, registry }
    }

    pub(crate) fn tell(&self, instruction: instruction::Instruction) {
        self.router.apply(Instruction { instruction: Some(instruction) });
    }

    pub(crate) fn tell_model(&self, snapshot: ModelSnapshot) {
        self.tell(instruction::Instruction::Model(snapshot));
    }

    /// Queued and running requests of all models.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let models = self.router.load().models;
        (models.iter().map(|model| model.queued).sum(), models.iter().map(|model| model.running).sum())
    }

    /// Until nothing waits or runs.
    pub(crate) async fn idle(&self) {
        eventually("all counters are zero", || self.counts() == (0, 0)).await;
        let table = self.router.table();
        for line in table.lines() {
            assert!(line.model().workers.iter().all(|worker| worker.load.outstanding() == 0));
        }
    }

    pub(crate) fn metrics(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Response<Incoming> {
        self.send(post(path, body)).await
    }

    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        send(&self.http, request).await
    }

    /// Status and whole body.
    pub(crate) async fn ask(&self, body: &str) -> (StatusCode, String) {
        let response = self.post(CHAT, body).await;
        (response.status(), text(response).await)
    }
}

/// A model `ns/m`, also called `m`, with these workers.
pub(crate) fn model(workers: &[&FakeWorker]) -> ModelSnapshot {
    ModelSnapshot {
        model: "ns/m".into(),
        version: Some(Version { epoch: 1, sequence: 1 }),
        served_names: vec!["m".into()],
        created: 1_700_000_000,
        availability: Availability::Serving.into(),
        max_pending: 100,
        max_wait_ms: 20_000,
        workers: workers.iter().map(|worker| worker.entry()).collect(),
        max_context_tokens: 0,
        migration_attempts: 0,
    }
}

pub(crate) fn post(path: &str, body: &str) -> Request<Full<Bytes>> {
    let request = Request::builder().method(Method::POST).uri(path).header(header::HOST, "router");
    let request = request.header(header::CONTENT_TYPE, "application/json");
    request.body(Full::new(Bytes::copy_from_slice(body.as_bytes()))).unwrap()
}

pub(crate) fn get(path: &str) -> Request<Full<Bytes>> {
    Request::builder().uri(path).header(header::HOST, "router").body(Full::default()).unwrap()
}

/// On a connection of its own, which ends with the response.
pub(crate) async fn send(address: &str, request: Request<Full<Bytes>>) -> Response<Incoming> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    in_time(sender.send_request(request)).await.unwrap()
}

pub(crate) async fn text(response: Response<Incoming>) -> String {
    let body = in_time(response.into_body().collect()).await.unwrap().to_bytes();
    String::from_utf8(body.to_vec()).unwrap()
}

pub(crate) async fn json(response: Response<Incoming>) -> Value {
    serde_json::from_str(&text(response).await).unwrap()
}

/// The `data` of each event; comments are left out.
pub(crate) fn events(text: &str) -> Vec<String> {
    let blocks = text.split("\n\n").filter(|block| !block.is_empty() && !block.starts_with(':'));
    blocks.map(|block| block.lines().find_map(|line| line.strip_prefix("data: ")).unwrap().to_owned()).collect()
}

pub(crate) async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("it took too long")
}

pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < DEADLINE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await; // polls
    }
}
