//! Experts move between workers at any time of a generation: the answers are those of a run in which nothing moved.

use std::{collections::BTreeMap, sync::Arc};

use engine::Experts;
use tokio::{
    sync::{mpsc, watch},
    time::Duration,
};
use tracing::Span;
use wire::proto::{self, Holders, LayerPlacement, MeshSnapshot, Peer, Version};

use super::{
    exchange::MeshExchange,
    faults::{gather, load, metrics, own, requests, undisturbed},
    keep::{Keeper, Keeping},
    sim::{Fault, Net, Plan},
    standing::Board,
};
use crate::{
    drive::{Driver, Progress},
    mesh::{Mesh, Meshes, Placement},
};

/// Workers of the replica; the first runs the sequences.
const WORKERS: [&str; 3] = ["zero:1", "one:1", "two:1"];

/// Where each expert is: dealt out like cards, a different hand for each `turn`.
fn hand(turn: u32) -> proto::Placement {
    let ordinals = |layer: u32, expert: u32| vec![(expert * (1 + turn) + layer * turn + turn) % 3];
    let experts = |layer| (0..16).map(|expert| Holders { ordinals: ordinals(layer, expert) }).collect();
    proto::Placement {
        shards: 3,
        layers: (1..4).map(|layer| LayerPlacement { layer, experts: experts(layer) }).collect(),
    }
}

fn snapshot(sequence: u64, placement: proto::Placement, also_hold: Option<proto::Placement>) -> MeshSnapshot {
    let peer = |(ordinal, address): (u32, &str)| Peer {
        id: address.into(),
        address: address.into(),
        ordinal,
        loaded: true,
        running: true,
        ..Peer::default()
    };
    MeshSnapshot {
        version: Some(Version { epoch: 1, sequence }),
        placement: Some(placement),
        also_hold,
        peers: (0..).zip(WORKERS).map(peer).collect(),
        max_wait_ms: 600_000,
        ..MeshSnapshot::default()
    }
}

struct Worker {
    meshes: Meshes,
    experts: Arc<Experts>,
    loaded: watch::Receiver<Option<Version>>,
}

/// Three workers that follow snapshots, and the answers of the first.
struct World {
    workers: Vec<Worker>,
    net: Net,
    answers: Vec<Vec<Progress>>,
    took: Duration,
}

/// Runs the sequences while `operator` does what it does with the workers' meshes.
fn run<F>(plan: Plan, operator: impl FnOnce(Vec<Meshes>, Vec<watch::Receiver<Option<Version>>>, Net) -> F) -> World
where
    F: Future<Output = ()>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let first = snapshot(1, hand(0), None);
        let placement = Placement::from(first.placement.as_ref().unwrap());
        let (mut workers, mut engines, mut exchanges) = (Vec::new(), Vec::new(), Vec::new());
        for ordinal in 0..3 {
            let (engine, experts) = load(&placement.held(ordinal));
            let meshes = Meshes::new(Mesh::default());
            meshes.take(first.clone()).unwrap();
            let (loaded, receiver) = watch::channel(None);
            let (wanted, unheld) = mpsc::channel(16);
            let board = Board::new(metrics());
            exchanges.push((wanted, board.clone()));
            let keeping = Keeping {
                replica: 0,
                ordinal,
                meshes: meshes.clone(),
                experts: experts.clone(),
                loaded,
                board,
                wanted: unheld,
                room: Box::new(|| u64::MAX),
                metrics: metrics(),
            };
            tokio::spawn(Keeper::new(keeping).follow());
            workers.push(Worker { meshes, experts, loaded: receiver });
            engines.push(engine);
        }
        let holders: Vec<_> = WORKERS.into_iter().zip(workers.iter().map(|worker| worker.experts.clone())).collect();
        let net = Net::new(&holders, plan);
        let (wanted, board) = exchanges.remove(0);
        let own = own(&workers[0].experts);
        let meshes = workers[0].meshes.clone();
        let exchange = MeshExchange::over(Arc::new(net.clone()), own, meshes, board, Some(wanted), metrics());
        let (driver, steps) = Driver::apart(engines.remove(0), exchange, metrics());
        let begun = tokio::time::Instant::now();
        let told = operator(
            workers.iter().map(|worker| worker.meshes.clone()).collect(),
            workers.iter().map(|worker| worker.loaded.clone()).collect(),
            net.clone(),
        );
        let asked = async {
            let sequences = driver.submit(requests(), Span::none()).await.unwrap();
            (gather(sequences).await, begun.elapsed())
        };
        let ((answers, took), ()) = tokio::select! {
            biased;
            both = async { tokio::join!(asked, told) } => both,
            () = steps.run() => panic!("the engine ended"),
        };
        World { workers, net, answers, took }
    })
}

impl World {
    fn ends_with(&self, placement: &proto::Placement) {
        let placement = Placement::from(placement);
        for (ordinal, worker) in (0..).zip(&self.workers) {
            let held = placement.held(ordinal);
            assert!(worker.experts.missing(&held).is_empty() && worker.experts.beyond(&held).is_empty());
        }
    }
}

/// Waits until so many calls of rows were made, or the run stands still.
async fn calls(net: &Net, count: usize) {
    for _ in 0..2000 {
        if net.calls() >= count {
            return;
        }
        tokio::time::sleep(Duration::from_micros(100)).await; // polls in virtual time
    }
}

async fn settled(workers: &[Meshes]) {
    for meshes in workers {
        meshes.in_use_everywhere(&meshes.newest()).await;
    }
    tokio::time::sleep(Duration::from_millis(20)).await; // polls nothing: virtual time for keepers to forget
}

/// The three phases of a live change, as an operator goes through them.
async fn change(
    from: u32,
    to: u32,
    sequence: u64,
    workers: &[Meshes],
    loaded: &mut [watch::Receiver<Option<Version>>],
) {
    // each hears of it a little later than the one before
    let publish = async |sequence, placement, also: Option<u32>| {
        for meshes in workers {
            meshes.take(snapshot(sequence, hand(placement), also.map(hand))).unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await; // polls nothing: virtual time
        }
    };
    publish(sequence, from, Some(to)).await;
    for loaded in loaded {
        loaded.wait_for(|loaded| loaded.is_some_and(|version| version.sequence >= sequence)).await.unwrap();
    }
    publish(sequence + 1, to, Some(from)).await;
    settled(workers).await;
    publish(sequence + 2, to, None).await;
    settled(workers).await;
}

#[test]
fn a_change_at_any_moment_of_a_generation_is_not_noticed() {
    let still = run(Box::new(|_| None), async |_, _, _| {});
    assert!(still.answers == undisturbed().answers);
    still.ends_with(&hand(0));
    for at in 0..still.net.calls() {
        let world = run(Box::new(|_| None), async move |workers, mut loaded, net| {
            calls(&net, at).await;
            change(0, 1, 2, &workers, &mut loaded).await;
            change(1, 2, 5, &workers, &mut loaded).await;
        });
        assert!(world.answers == still.answers, "moved after call {at}");
        assert!(
            world.took < still.took + Duration::from_millis(5),
            "after call {at} somebody waited: {:?}",
            world.took
        );
        world.ends_with(&hand(2));
    }
}

#[test]
fn snapshots_that_skip_phases_or_come_to_some_only_cost_time_and_no_bit() {
    for at in 0..12 {
        let world = run(Box::new(|_| None), async move |workers, _, net| {
            calls(&net, at * 2).await;
            // each worker jumps when it hears of it: late ones ask for what is gone, early ones for what is not there yet
            for (meshes, late) in workers.iter().zip([2, 0, 1]) {
                calls(&net, at * 2 + late * 3).await;
                assert!(meshes.take(snapshot(9, hand(1), None)).is_some());
                assert!(meshes.take(snapshot(4, hand(2), None)).is_none(), "an old one counts for nothing");
            }
            tokio::time::sleep(Duration::from_secs(3)).await; // polls nothing: virtual time for the last to settle
        });
        assert!(world.answers == undisturbed().answers, "jumped after call {}", at * 2);
        world.ends_with(&hand(1));
    }
}

#[test]
fn an_expert_whose_only_holder_is_gone_is_loaded_by_who_needs_it() {
    for fault in [Fault::KillBefore(3_600_000), Fault::Freeze(3_600_000)] {
        let world = run(Box::new(move |call| (call == 5).then_some(fault)), async |_, _, _| {});
        assert_eq!(world.net.bitten(), BTreeMap::from([(fault.name(), 1)]));
        assert!(world.answers == undisturbed().answers, "{fault:?}");
        assert!(world.took < Duration::from_secs(10), "{fault:?} cost {:?}", world.took);
        assert!(world.workers[0].experts.weight().0 > 16, "some were loaded");
    }
}
