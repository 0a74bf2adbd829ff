//! Experts and the load that comes: told, advised, moved.

use planner::Placement;
use serde_json::{Value, json};

use crate::world::{World, model};

/// The model whose pods have room for experts that move.
async fn installed(rebalance: &str) -> (World, crate::world::Operator) {
    let world = World::with(1).await;
    let operator = world.operator(0).await;
    let mut model = model();
    model["spec"]["resources"] = json!({"requests": {"memory": "256Mi"}});
    model["spec"]["parallelism"]["expert"]["rebalance"] = json!(rebalance);
    world.api().apply(model);
    world.ready().await;
    (world, operator)
}

/// The record of the only replica.
fn record(world: &World) -> Value {
    let set = world.names("statefulsets").remove(0);
    world.api().get("configmaps", &set).unwrap()["data"].clone()
}

fn placement(world: &World) -> Placement {
    let plan: Value = serde_json::from_str(record(world)["plan.json"].as_str().unwrap()).unwrap();
    serde_json::from_value(plan["placement"].clone()).unwrap()
}

/// From now on the experts of worker 0 get all rows, each of both workers gives the half.
fn favour_the_first_worker(world: &World) {
    let layer = placement(world).layers.remove(0);
    let rows: Vec<u64> = layer.experts.iter().map(|holders| if holders == &[0] { 50 } else { 0 }).collect();
    assert_eq!(rows.iter().sum::<u64>(), 100, "two experts are on worker 0");
    world.cluster.stage.lock().unwrap().routed = Some((layer.layer, rows));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_skew_is_told_and_a_better_placement_only_advised() {
    let (world, _operator) = installed("Disabled").await;
    let (pods, before) = (world.uids("pods"), record(&world));
    favour_the_first_worker(&world);
    world.until("the skew", |world| world.status()["experts"]["skewPercent"] == 100).await;
    assert_eq!(world.condition("Planned")["reason"], "Planned", "nobody asked for advice");
    world.edit(|spec| spec["parallelism"]["expert"]["rebalance"] = json!("Advise"));
    world.until("advice", |world| world.condition("Planned")["reason"] == "RebalanceAdvised").await;
    let message = world.condition("Planned")["message"].clone();
    assert!(message.as_str().unwrap().contains("experts would be 100% faster elsewhere"), "{message}");
    world.ready().await;
    assert_eq!((world.uids("pods"), record(&world)), (pods, before), "nothing moves");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applied_a_better_placement_moves_experts_and_replaces_nothing() {
    let (world, _operator) = installed("Apply").await;
    let revision = world.status()["plan"]["revision"].clone();
    let (pods, sets, before) = (world.uids("pods"), world.uids("statefulsets"), placement(&world));
    favour_the_first_worker(&world);
    let moved = |world: &World| {
        let record = record(world);
        placement(world) != before && record["next.json"].is_null() && record["last.json"].is_null()
    };
    world.until("the experts have moved", moved).await;
    world.until("the skew is gone", |world| world.status()["experts"]["skewPercent"] == 0).await;
    world.ready().await;
    assert_eq!(world.condition("Planned")["reason"], "Planned");
    assert_eq!((world.uids("pods"), world.uids("statefulsets")), (pods, sets));
    assert_eq!(world.status()["plan"]["revision"], revision);
    let stage = world.cluster.stage.lock().unwrap();
    assert!(stage.held.iter().all(|held| *held), "an expert was asked for that its holder had not loaded");
}
