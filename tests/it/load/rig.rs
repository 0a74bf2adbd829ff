//! A whole fleet in this process, over loopback: control plane, router, and workers with an engine that echoes.

use std::{sync::Arc, time::Duration};

use anyhow::ensure;
use engine::{Echo, Limits, NoPeers};
use opentelemetry::metrics::{Meter, MeterProvider as _};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use operator::control::{Availability, Fleet, Identity, ModelFacts, ReplicaFacts, WorkerFacts};
use prometheus::{Registry, TextEncoder};
use router::{Ending, Listeners, Router};
use tokio::{net::TcpListener, sync::mpsc};
use tonic::service::Routes;
use wire::proto::{Hello, hello::Role, worker_server::WorkerServer};
use worker::{
    drive::Driver,
    experts::standing::Board,
    mesh::Mesh,
    metrics::Metrics,
    prepare::Model,
    serve::{
        Options, control,
        generate::GenerateService,
        state::{Serving, State},
    },
};

use super::{ROUTER_GAUGES, WORKER_GAUGES, all_zero, eventually};

const MODEL: &str = "default/echo";
const REVISION: &str = "r1";
const HASH: &str = "hash";
/// Few, so that requests wait: in the workers, and in the router.
const SLOTS: usize = 4;

/// Instruments, and where they are read.
struct Measured {
    registry: Registry,
    provider: SdkMeterProvider,
}

impl Measured {
    fn new() -> Self {
        let registry = Registry::new();
        let reader = opentelemetry_prometheus::exporter().with_registry(registry.clone()).build().unwrap();
        Self { registry, provider: SdkMeterProvider::builder().with_reader(reader).build() }
    }

    fn meter(&self) -> Meter {
        self.provider.meter("test")
    }

    fn text(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap()
    }
}

/// A worker whose engine echoes.
struct EchoWorker {
    state: Arc<State>,
    driver: Driver,
    measured: Measured,
}

impl EchoWorker {
    async fn start(replica: u32, operator: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let folder = tests::root().join("manifests/models/tiny-r1"); // its tokenizer
        let options = Options {
            model: MODEL.into(),
            model_dir: folder.clone(),
            revision: REVISION.into(),
            content_hash: HASH.into(),
            replica,
            ordinal: 0,
            placement: Vec::new(),
            kv_cache_tokens: 0,
            max_context_tokens: None,
            max_sequences: SLOTS,
            advertise: listener.local_addr().unwrap().to_string(),
            operators: vec![operator.to_owned()],
            id: id(replica),
            drain_timeout: Duration::from_secs(1),
        };
        let limits = Limits { max_context_tokens: 1024, vocab_size: 512 };
        let measured = Measured::new();
        let metrics = Metrics::new(&measured.meter());
        let state = State::new(Mesh::default(), &options);
        let (reports, receiver) = mpsc::channel(64);
        tokio::spawn(control::follow(control::stream(&options, receiver), state.clone(), reports));
        let driver = Driver::start(Echo::new(limits, SLOTS), NoPeers, metrics.clone()).unwrap();
        let model = Model::load(&folder, limits).unwrap();
        let service = GenerateService::new(model, driver.clone(), state.clone(), metrics.clone());
        state.serving(Serving {
            driver: driver.clone(),
            experts: None,
            asked: Arc::default(),
            dense_bytes: 0,
            suspects: Board::new(metrics.clone()).suspects(),
        });
        let routes = Routes::new(WorkerServer::new(service).max_decoding_message_size(wire::MAX_MESSAGE_BYTES));
        tokio::spawn(wire::serve(listener, routes, std::future::pending()));
        Self { state, driver, measured }
    }

    fn at_rest(&self) -> anyhow::Result<()> {
        let load = self.driver.load();
        ensure!((load.waiting, load.running, load.kv_tokens_used) == (0, 0, 0), "a worker has {load:?}");
        ensure!(self.state.running() == 0, "a worker has {} requests", self.state.running());
        all_zero(&self.measured.text(), &WORKER_GAUGES)
    }
}

/// The fleet.
pub(super) struct Rig {
    pub(super) http: String,
    pub(super) grpc: String,
    fleet: Fleet,
    router: Router,
    measured: Measured,
    workers: Vec<EchoWorker>,
}

impl Rig {
    /// With so many replicas of one worker, once the router knows them all.
    pub(super) async fn start(replicas: u32) -> Self {
        let fleet = Fleet::new();
        let operator = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let operator_address = operator.local_addr().unwrap().to_string();
        let serving = fleet.clone();
        tokio::spawn(async move { serving.serve(operator, std::future::pending()).await });
        let ids = (0..replicas).map(id).chain(["router".to_owned()]);
        fleet.expect(ids.map(|id| Identity { id, ip: None }));
        fleet.lead(1);
        fleet.publish(MODEL, facts(replicas));
        fleet.synced([MODEL.to_owned()]);
        let mut workers = Vec::new();
        for replica in 0..replicas {
            workers.push(EchoWorker::start(replica, &operator_address).await);
        }
        let measured = Measured::new();
        let router = Router::new(&measured.meter());
        let (http, grpc) = serve(&router, operator_address).await;
        let rig = Self { http, grpc, fleet, router, measured, workers };
        eventually("the router knows all workers", async || {
            let known: usize = rig.router.table().lines().map(|line| line.model().workers.len()).sum();
            ensure!(known == replicas as usize && rig.router.is_synced(), "it knows {known}");
            Ok(())
        })
        .await;
        rig
    }

    /// Whether nothing waits and nothing runs, by every counter that there is.
    pub(super) fn at_rest(&self) -> anyhow::Result<()> {
        for load in self.router.load().models {
            ensure!((load.queued, load.running) == (0, 0), "the router has {load:?}");
        }
        for line in self.router.table().lines() {
            let outstanding: Vec<_> = line.model().workers.iter().map(|worker| worker.load.outstanding()).collect();
            ensure!(outstanding.iter().all(|count| *count == 0), "the router counts {outstanding:?}");
        }
        all_zero(&self.measured.text(), &ROUTER_GAUGES)?;
        self.workers.iter().try_for_each(EchoWorker::at_rest)?;
        let seen = self.fleet.seen(MODEL);
        let idle = seen.load.as_ref().is_some_and(|load| (load.queued, load.running) == (0, 0));
        let loads = || seen.workers.iter().map(|worker| worker.load.as_ref());
        let workers_idle =
            loads().all(|load| load.is_some_and(|load| load.running + load.waiting + load.kv_tokens_used == 0));
        ensure!(idle && workers_idle && seen.workers.len() == self.workers.len(), "the operator sees {seen:?}");
        Ok(())
    }
}

/// Serves both doors, and follows the operator.
async fn serve(router: &Router, operator: String) -> (String, String) {
    let listeners = Listeners {
        http: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        grpc: TcpListener::bind("127.0.0.1:0").await.unwrap(),
    };
    let http = listeners.http.local_addr().unwrap().to_string();
    let grpc = listeners.grpc.local_addr().unwrap().to_string();
    let hello = Hello {
        role: Role::Router.into(),
        id: "router".into(),
        process: "router 1".into(),
        address: grpc.clone(),
        http_address: http.clone(),
        ..Hello::default()
    };
    let (reports, receiver) = mpsc::channel(64);
    let instructions = wire::fleet::watch(vec![operator], move || hello.clone(), receiver);
    tokio::spawn(router::control::follow(router.clone(), instructions, reports));
    let ending = Ending { linger: Duration::ZERO, grace: Duration::from_secs(1) };
    tokio::spawn(router::serve(listeners, router.clone(), std::future::pending(), ending));
    (http, grpc)
}

fn id(replica: u32) -> String {
    format!("worker-{replica}")
}

fn facts(replicas: u32) -> ModelFacts {
    let worker = |replica| WorkerFacts {
        id: id(replica),
        address: String::new(),
        dns_name: String::new(),
        ordinal: 0,
        ready: false,
        leaves: false,
    };
    let replica = |replica| ReplicaFacts {
        replica,
        revision: REVISION.into(),
        content_hash: HASH.into(),
        placement: planner::Placement { shards: 1, layers: Vec::new() },
        also_hold: None,
        draining: false,
        workers: vec![worker(replica)],
    };
    ModelFacts {
        served_names: vec!["echo".into()],
        created: 1,
        availability: Availability::Serving,
        max_pending: 10_000,
        max_wait: super::PATIENCE,
        max_context_tokens: 1024,
        migration_attempts: 3,
        expert_wait: None,
        replicas: (0..replicas).map(replica).collect(),
    }
}
