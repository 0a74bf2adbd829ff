//! Instructions in, reports out, without an operator.

use std::path::PathBuf;

use tokio_stream::wrappers::ReceiverStream;
use wire::proto::{self, MeshSnapshot};

use super::*;
use crate::serve::state::Serving;

fn options() -> Options {
    Options {
        model: "default/tiny".into(),
        model_dir: PathBuf::new(),
        revision: String::new(),
        content_hash: String::new(),
        replica: 0,
        ordinal: 0,
        placement: Vec::new(),
        kv_cache_tokens: 16,
        max_context_tokens: None,
        max_sequences: 1,
        advertise: String::new(),
        operators: Vec::new(),
        id: "me".into(),
        drain_timeout: Duration::ZERO,
    }
}

async fn until<T>(heard: &mut mpsc::Receiver<Report>, mut wanted: impl FnMut(report::Report) -> Option<T>) -> T {
    loop {
        let report =
            tokio::time::timeout(Duration::from_secs(20), heard.recv()).await.expect("it is reported").unwrap();
        if let Some(found) = report.report.and_then(&mut wanted) {
            return found;
        }
    }
}

#[tokio::test]
async fn suspects_are_told_at_each_change_and_the_load_of_each_expert_again_and_again() {
    let state = State::new(Mesh::default(), &options());
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1");
    let engine = engine::Options { kv_cache_tokens: 64, max_context_tokens: None, max_sequences: 1, prefill_chunk: 16 };
    let (engine, experts) = engine::load(&folder, &engine::Held::all(), &engine, &mut |_, _| {}).unwrap();
    let metrics = crate::metrics::Metrics::new(&opentelemetry::global::meter("test"));
    let (suspects, doubted) = tokio::sync::watch::channel(std::collections::BTreeSet::new());
    let driver = crate::drive::Driver::start(engine, engine::NoPeers, metrics).unwrap();
    state.serving(Serving { driver, experts: Some(experts), asked: Arc::default(), dense_bytes: 1, suspects: doubted });
    let (_instructions, incoming) = mpsc::channel(8);
    let (reports, mut heard) = mpsc::channel(64);
    tokio::spawn(follow(ReceiverStream::new(incoming), state.clone(), reports));
    let load = until(&mut heard, |report| match report {
        report::Report::ExpertLoad(load) => Some(load),
        _ => None,
    });
    let layers: Vec<(u32, usize)> = load.await.layers.iter().map(|layer| (layer.layer, layer.rows.len())).collect();
    assert_eq!(layers, [(1, 16), (2, 16), (3, 16)]);
    let of_suspects = |report| match report {
        report::Report::Suspects(suspects) => Some(suspects.ids),
        _ => None,
    };
    for ids in [vec![String::from("a"), String::from("b")], vec![String::from("b")], Vec::new()] {
        suspects.send_replace(ids.iter().cloned().collect());
        assert_eq!(until(&mut heard, of_suspects).await, ids);
    }
}

fn mesh(sequence: u64) -> Instruction {
    let version = Some(Version { epoch: 1, sequence });
    let snapshot = MeshSnapshot { model: "default/tiny".into(), version, ..MeshSnapshot::default() };
    Instruction { instruction: Some(instruction::Instruction::Mesh(snapshot)) }
}

#[tokio::test]
async fn a_snapshot_is_acknowledged_once_no_step_runs_on_an_older_one() {
    let state = State::new(Mesh::default(), &options());
    let (instructions, incoming) = mpsc::channel(8);
    let (reports, mut heard) = mpsc::channel(64);
    tokio::spawn(follow(ReceiverStream::new(incoming), state.clone(), reports));
    let mut acknowledged = async || loop {
        let report: Report = heard.recv().await.unwrap();
        if let Some(report::Report::Acknowledgement(said)) = report.report {
            return said.version.unwrap().sequence;
        }
    };
    instructions.send(mesh(1)).await.unwrap();
    assert_eq!(acknowledged().await, 1);
    state.meshes.begin_step();
    for sequence in [2, 3] {
        instructions.send(mesh(sequence)).await.unwrap();
    }
    let mut newest = state.meshes.follow();
    newest.wait_for(|mesh| mesh.version.sequence == 3).await.unwrap();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let early = tokio::time::timeout(Duration::from_millis(1), acknowledged()).await;
    assert!(early.is_err(), "a step still runs on the first");
    state.meshes.end_step();
    assert_eq!(acknowledged().await, 3);
}

#[tokio::test(start_paused = true)]
async fn a_worker_is_unneeded_once_others_hold_what_it_holds() {
    let state = State::new(Mesh::default(), &options());
    let copies = |ordinals: &[u32]| {
        let experts = vec![proto::Holders { ordinals: ordinals.to_vec() }];
        Some(proto::Placement { shards: 2, layers: vec![proto::LayerPlacement { layer: 1, experts }] })
    };
    let peer = proto::Peer { id: "peer".into(), ordinal: 1, loaded: true, running: true, ..proto::Peer::default() };
    let snapshot = |sequence, ordinals: &[u32], peer: &proto::Peer| {
        let version = Some(Version { epoch: 1, sequence });
        let (placement, peers) = (copies(ordinals), vec![peer.clone()]);
        state.meshes.take(MeshSnapshot { version, placement, peers, ..MeshSnapshot::default() }).unwrap();
    };
    let needed = async || tokio::time::timeout(Duration::from_secs(60), state.unneeded()).await.is_err();
    snapshot(1, &[0], &peer);
    assert!(needed().await, "a peer runs, and nobody else has the expert");
    snapshot(2, &[0, 1], &peer);
    assert!(!needed().await);
    snapshot(3, &[0, 1], &proto::Peer { leaving: true, ..peer.clone() });
    assert!(needed().await, "the other one leaves too");
    snapshot(4, &[0], &proto::Peer { running: false, ..peer.clone() });
    assert!(!needed().await, "nothing runs");
}
