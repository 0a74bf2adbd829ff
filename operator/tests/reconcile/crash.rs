//! A crash at every write: before it, after it, and with its reply lost. The end is always the same.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures::{StreamExt, stream};
use serde_json::{Value, json};

use crate::{
    api::Fault,
    world::{World, model},
};

/// Writes of an undisturbed install, and the objects at its end.
async fn reference() -> (usize, Value) {
    let (world, _operator) = World::installed().await;
    (world.api().writes().len(), world.objects())
}

/// Installs, and crashes the operator at write `at` with `fault`.
async fn crash(at: usize, fault: Fault) -> Value {
    let world = World::with(1).await;
    let bitten = Arc::new(AtomicBool::new(false));
    let bites = bitten.clone();
    world.api().break_by(move |call| {
        (call.write == at).then(|| {
            bites.store(true, Ordering::Relaxed);
            fault
        })
    });
    let operator = world.operator(0).await;
    world.api().apply(model());
    let over = |world: &World| bitten.load(Ordering::Relaxed) || world.status()["summary"] == "Ready";
    world.until("the fault bites", over).await;
    operator.kill().await;
    world.api().mend();
    let _operator = world.operator(0).await;
    world.ready().await;
    world.objects()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_write_ends_in_the_same_place() {
    let (writes, wanted) = reference().await;
    assert!(writes >= 10, "{writes} writes");
    let faults = (1..=writes).flat_map(|at| [(at, Fault::Hang), (at, Fault::LoseReply)]);
    let runs = stream::iter(faults).map(|(at, fault)| async move { (at, fault, crash(at, fault).await) });
    let mut runs = std::pin::pin!(runs.buffer_unordered(4));
    while let Some((at, fault, objects)) = runs.next().await {
        assert_eq!(objects, wanted, "crash at write {at} ({fault:?})");
    }
}

/// A model whose pods have room for each number of workers.
fn roomy() -> Value {
    let mut model = model();
    model["spec"]["resources"] = json!({"requests": {"memory": "256Mi"}});
    model
}

/// The model with three workers in place of two, and with copies.
async fn widen(world: &World) {
    world.edit(|spec| spec["parallelism"]["expert"] = json!({"shards": 3, "redundancy": 1}));
    let printed = |world: &World| world.status()["printed"]["shards"] == "3/3" && world.status()["summary"] == "Ready";
    world.until("three workers", printed).await;
    world.ready().await;
}

/// Changes the number of workers, and crashes the operator at write `at` of that with `fault`. Without: how many writes
/// it took, and the objects at the end.
async fn crash_while_experts_move(crash: Option<(usize, Fault)>) -> (usize, Value) {
    let world = World::with(1).await;
    let operator = world.operator(0).await;
    world.api().apply(roomy());
    world.ready().await;
    let begun = world.api().writes().len();
    let Some((at, fault)) = crash else {
        widen(&world).await;
        return (world.api().writes().len() - begun, world.objects());
    };
    let bitten = Arc::new(AtomicBool::new(false));
    let bites = bitten.clone();
    world.api().break_by(move |call| {
        (call.write == begun + at).then(|| {
            bites.store(true, Ordering::Relaxed);
            fault
        })
    });
    world.edit(|spec| spec["parallelism"]["expert"] = json!({"shards": 3, "redundancy": 1}));
    let over = |world: &World| bitten.load(Ordering::Relaxed) || world.status()["printed"]["shards"] == "3/3";
    world.until("the fault bites", over).await;
    operator.kill().await;
    world.api().mend();
    let _operator = world.operator(0).await;
    widen(&world).await;
    assert!(world.cluster.stage.lock().unwrap().held.iter().all(|held| *held), "asked for what was not loaded");
    (0, world.objects())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_write_while_experts_move_ends_in_the_same_place() {
    let (writes, wanted) = crash_while_experts_move(None).await;
    assert!(writes >= 5, "{writes} writes");
    let faults = (1..=writes).flat_map(|at| [(at, Fault::Hang), (at, Fault::LoseReply)]);
    let run = |(at, fault)| async move { (at, fault, crash_while_experts_move(Some((at, fault))).await.1) };
    let mut runs = std::pin::pin!(stream::iter(faults).map(run).buffer_unordered(4));
    while let Some((at, fault, objects)) = runs.next().await {
        assert_eq!(objects, wanted, "crash at write {at} ({fault:?})");
    }
}
