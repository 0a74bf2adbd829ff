//! Workers with a share of the small model each, over loopback: their tokens are those of one worker alone.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use engine::{Exchange as _, ExpertBatch, Experts, Held, ModelEngine, Request, Sampling};
use opentelemetry::metrics::MeterProvider as _;
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::service::Routes;
use tracing::Span;
use wire::{
    Services,
    proto::{self, experts_server::ExpertsServer},
};

use super::{
    exchange::{MeshExchange, Own},
    pool::Pool,
    service::ExpertsService,
    standing::Board,
};
use crate::{
    drive::{Driver, Progress, Sequence},
    mesh::{Mesh, Meshes, Placement},
    metrics::Metrics,
};

pub(super) const HASH: &str = "the content";

pub(super) fn metrics() -> Arc<Metrics> {
    Metrics::new(&opentelemetry::metrics::noop::NoopMeterProvider::new().meter("test"))
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1")
}

fn load(held: &Held) -> (ModelEngine, Arc<Experts>) {
    let options =
        engine::Options { kv_cache_tokens: 4096, max_context_tokens: None, max_sequences: 16, prefill_chunk: 16 };
    engine::load(&folder(), held, &options, &mut |_, _| {}).unwrap()
}

/// Experts dealt out to `shards` workers like cards: layers 1 to 3 of 16 experts.
pub(super) fn placement(shards: u32) -> proto::Placement {
    let experts = || (0..16).map(|expert| proto::Holders { ordinals: vec![expert % shards] }).collect();
    let layers = (1..4).map(|layer| proto::LayerPlacement { layer, experts: experts() }).collect();
    proto::Placement { shards, layers }
}

/// How experts are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Grpc,
    Frames,
}

/// A worker that serves its experts, and can run sequences.
pub(super) struct Worker {
    pub(super) address: String,
    pub(super) experts: Arc<Experts>,
    pub(super) engine: Option<ModelEngine>,
    server: JoinHandle<()>,
}

impl Worker {
    pub(super) async fn start(placement: &proto::Placement, ordinal: u32, hash: &str) -> Self {
        Self::start_with(placement, ordinal, hash, Way::Frames).await
    }

    async fn start_with(placement: &proto::Placement, ordinal: u32, hash: &str, way: Way) -> Self {
        let (engine, experts) = load(&Placement::from(placement).held(ordinal));
        let (server, address) = serve(&experts, hash, way).await;
        Self { address, experts, engine: Some(engine), server }
    }

    fn driver(&mut self, ordinal: u32, meshes: &Meshes) -> Driver {
        let own = Own {
            replica: 0,
            ordinal,
            content_hash: HASH.into(),
            hidden: self.experts.hidden(),
            dtype: self.experts.dtype(),
        };
        Driver::start(self.engine.take().unwrap(), exchange(own, meshes.clone()), metrics()).unwrap()
    }
}

pub(super) async fn serve(experts: &Arc<Experts>, hash: &str, way: Way) -> (JoinHandle<()>, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let pool = Pool::start(experts, 1, metrics()).unwrap();
    let service = ExpertsService::new(experts.clone(), pool, hash);
    let frames = Arc::new(service.frames());
    let service = ExpertsServer::new(service).max_decoding_message_size(wire::MAX_MESSAGE_BYTES);
    let grpc = Services::from(Routes::new(service));
    let services = if way == Way::Frames { grpc.with_frames(frames) } else { grpc };
    let server = tokio::spawn(async move { wire::serve(listener, services, std::future::pending()).await.unwrap() });
    (server, address)
}

pub(super) fn mesh(placement: &proto::Placement, addresses: &[String], sequence: u64) -> proto::MeshSnapshot {
    let peer = |(ordinal, address): (u32, &String)| proto::Peer {
        id: format!("id-{ordinal}"),
        address: address.clone(),
        ordinal,
        loaded: true,
        running: true,
        ..proto::Peer::default()
    };
    proto::MeshSnapshot {
        version: Some(proto::Version { epoch: 1, sequence }),
        placement: Some(placement.clone()),
        peers: (0..).zip(addresses).map(peer).collect(),
        ..proto::MeshSnapshot::default()
    }
}

/// Who the worker 0 is.
pub(super) fn own() -> Own {
    Own { replica: 0, ordinal: 0, content_hash: HASH.into(), hidden: 256, dtype: engine::WireDtype::Bf16 }
}

fn exchange(own: Own, meshes: Meshes) -> MeshExchange {
    MeshExchange::new(own, meshes, Board::new(metrics()), None, metrics())
}

pub(super) fn following(snapshot: proto::MeshSnapshot) -> Meshes {
    let meshes = Meshes::new(Mesh::default());
    meshes.take(snapshot).unwrap();
    meshes
}

fn request(prompt: &str, seed: u64, tokens: usize) -> Request {
    let text = crate::text::Text::load(&folder(), 512).unwrap();
    Request {
        prompt: text.encode(prompt, false).unwrap(),
        generated: Vec::new(),
        max_tokens: tokens,
        stop_tokens: Vec::new(),
        sampling: Sampling { temperature: 0.8, seed, ..Sampling::default() },
        logprobs: Some(2),
        prompt_logprobs: false,
    }
}

pub(super) fn requests(count: u64, tokens: usize) -> Vec<Request> {
    (0..count)
        .map(|seed| request(&format!("<｜User｜>What is {seed}7 + 85?<｜Assistant｜><think>\n"), seed, tokens))
        .collect()
}

pub(super) async fn all(mut sequences: Vec<Sequence>) -> Vec<Vec<Progress>> {
    let mut answers = Vec::new();
    for sequence in &mut sequences {
        let mut answer = Vec::new();
        while let Some(progress) = sequence.recv().await {
            answer.push(progress);
        }
        answers.push(answer);
    }
    answers
}

/// Tokens and log probabilities of one worker that holds everything.
pub(super) async fn alone(requests: Vec<Request>) -> Vec<Vec<Progress>> {
    let driver = Driver::start(load(&Held::all()).0, engine::NoPeers, metrics()).unwrap();
    all(driver.submit(requests, Span::none()).await.unwrap()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_give_the_bits_of_one_worker_alone_and_in_company() {
    let wanted = alone(requests(4, 12)).await;
    assert!(wanted.iter().all(|answer| answer.len() == 13), "{wanted:?}");
    for (shards, way) in [(2, Way::Frames), (2, Way::Grpc), (4, Way::Frames)] {
        let placement = placement(shards);
        let mut workers = Vec::new();
        for ordinal in 0..shards {
            workers.push(Worker::start_with(&placement, ordinal, HASH, way).await);
        }
        let addresses: Vec<_> = workers.iter().map(|worker| worker.address.clone()).collect();
        let meshes = following(mesh(&placement, &addresses, 1));
        let driver = workers[0].driver(0, &meshes);
        let one = driver.submit(requests(1, 12), Span::none()).await.unwrap();
        assert_eq!(all(one).await[0], wanted[0], "{shards} shards, {way:?}, alone");
        let company = driver.submit(requests(4, 12), Span::none()).await.unwrap();
        assert_eq!(all(company).await, wanted, "{shards} shards, {way:?}, in company");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_is_killed_and_comes_back_elsewhere_changes_no_token() {
    let wanted = alone(requests(2, 40)).await;
    let placement = placement(2);
    let mut workers = [Worker::start(&placement, 0, HASH).await, Worker::start(&placement, 1, HASH).await];
    let addresses = workers.each_ref().map(|worker| worker.address.clone());
    let meshes = following(mesh(&placement, &addresses, 1));
    let board = Board::new(metrics());
    let mut suspects = board.suspects();
    let exchange = MeshExchange::new(own(), meshes.clone(), board, None, metrics());
    let driver = Driver::start(workers[0].engine.take().unwrap(), exchange, metrics()).unwrap();
    let mut sequences = driver.submit(requests(2, 40), Span::none()).await.unwrap();
    let mut first = Vec::new();
    for _ in 0..5 {
        first.push(sequences[0].recv().await.unwrap());
    }
    workers[1].server.abort();
    let missed = suspects.wait_for(|suspects| suspects.contains("id-1"));
    tokio::time::timeout(Duration::from_secs(20), missed).await.expect("it is missed").unwrap();
    // nothing but what was on its way arrives while the holder is away
    assert!(sequences[0].len() < 35, "the killing bit");

    let (_server, address) = serve(&workers[1].experts, HASH, Way::Frames).await;
    meshes.take(mesh(&placement, &[addresses[0].clone(), address], 2)).unwrap();
    let mut answers = all(sequences).await;
    first.append(&mut answers[0]);
    answers[0] = first;
    assert_eq!(answers, wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_for_a_holder_of_other_files_stay_missing() {
    let placement = placement(2);
    let worker = Worker::start(&placement, 1, "other content").await;
    let meshes = following(mesh(&placement, &[String::from("127.0.0.1:1"), worker.address], 1));
    let own = Own { replica: 0, ordinal: 0, content_hash: HASH.into(), hidden: 256, dtype: engine::WireDtype::Bf16 };
    let mut exchange = exchange(own, meshes);
    exchange.begin_step(Span::none());
    let rows = vec![0; 512].into();
    let batch = ExpertBatch { layer: 1, rows: &rows, pair_rows: &[0, 0], pair_experts: &[1, 3] };
    for _ in 0..3 {
        exchange.changed().await;
        let ticket = exchange.send(&batch);
        let replies = exchange.join(ticket).await;
        assert_eq!((replies.missing, replies.rows.len()), (vec![0, 1], 1024));
        if exchange.end_step().is_some() {
            return;
        }
    }
    panic!("missing rows were not noticed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_rests_misses_who_is_there_and_forgets_who_is_gone() {
    let placement = placement(2);
    let mut worker = Worker::start(&placement, 0, HASH).await;
    let (meshes, board) = (Meshes::new(Mesh::default()), Board::new(metrics()));
    let mut suspects = board.suspects();
    let exchange = MeshExchange::new(own(), meshes.clone(), board, None, metrics());
    let _driver = Driver::start(worker.engine.take().unwrap(), exchange, metrics()).unwrap();
    let (here, nowhere) = (worker.address.clone(), String::from("127.0.0.1:1"));
    for (sequence, addresses, suspected) in [(1, vec![here.clone(), nowhere], vec!["id-1"]), (2, vec![here], vec![])] {
        meshes.take(mesh(&placement, &addresses, sequence)).unwrap();
        let told = suspects.wait_for(|suspects| suspects.iter().eq(suspected.iter()));
        tokio::time::timeout(Duration::from_secs(20), told).await.expect("nothing runs here").unwrap();
    }
}

/// Two copies of each expert, at the workers 1 and 2, none here.
fn copies() -> proto::Placement {
    let experts = || (0..16).map(|_| proto::Holders { ordinals: vec![1, 2] }).collect();
    let layers = (1..4).map(|layer| proto::LayerPlacement { layer, experts: experts() }).collect();
    proto::Placement { shards: 3, layers }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_holder_with_a_copy_is_not_missed_and_is_a_suspect() {
    let wanted = alone(requests(2, 30)).await;
    let placement = copies();
    let mut workers = Vec::new();
    for ordinal in 0..3 {
        workers.push(Worker::start(&placement, ordinal, HASH).await);
    }
    let addresses: Vec<String> = workers.iter().map(|worker| worker.address.clone()).collect();
    let meshes = following(mesh(&placement, &addresses, 1));
    let board = Board::new(metrics());
    let mut suspects = board.suspects();
    let exchange = MeshExchange::new(own(), meshes.clone(), board, None, metrics());
    let driver = Driver::start(workers[0].engine.take().unwrap(), exchange, metrics()).unwrap();
    let mut sequences = driver.submit(requests(2, 30), Span::none()).await.unwrap();
    let mut first = vec![sequences[0].recv().await.unwrap(), sequences[0].recv().await.unwrap()];
    workers[2].server.abort();
    let mut answers = all(sequences).await;
    first.append(&mut answers[0]);
    answers[0] = first;
    assert_eq!(answers, wanted);
    let lost = suspects.wait_for(|suspects| suspects.contains("id-2"));
    tokio::time::timeout(Duration::from_secs(20), lost).await.expect("the operator hears of it").unwrap();
}
