//! Nodes: the failure domains that they are, the room that they have, and one that is lost.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use serde_json::{Value, json};

use crate::world::{World, model};

/// The model with so many workers, and a copy of each expert.
fn copied(shards: u32) -> Value {
    let mut model = model();
    model["spec"]["parallelism"]["expert"] = json!({"shards": shards, "redundancy": 1});
    model
}

/// The zone of the node that each worker of the first replica is on, by ordinal.
fn zones(world: &World) -> Vec<Value> {
    let mut pods = world.api().list("pods");
    pods.retain(|pod| pod["metadata"]["name"] != "router");
    let node = |pod: &Value| world.api().get("nodes", pod["spec"]["nodeName"].as_str().unwrap()).unwrap();
    pods.iter().map(|pod| node(pod)["metadata"]["labels"][ZONE].clone()).collect()
}

const ZONE: &str = "topology.kubernetes.io/zone";

fn label(world: &World, node: &str, zone: &str) {
    assert!(world.api().edit("nodes", node, |node| node["metadata"]["labels"][ZONE] = zone.into()));
}

/// The holders of each expert, as workers are told.
fn holders(world: &World) -> Vec<Vec<u64>> {
    let config = world.api().list("configmaps").into_iter().find(|config| !config["data"]["plan.json"].is_null());
    let plan: Value = serde_json::from_str(config.unwrap()["data"]["plan.json"].as_str().unwrap()).unwrap();
    serde_json::from_value(plan["placement"]["layers"][0]["experts"].clone()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_are_in_different_zones_whatever_the_nodes() {
    let world = World::with(1).await;
    for (node, zone) in [("node-0", "a"), ("node-1", "a"), ("node-2", "b")] {
        label(&world, node, zone);
    }
    // the only worker in zone b holds all experts, more than an even share, and must ask for that much memory
    world.cluster.describe(|description| description["moeLayers"][0]["expertBytes"] = json!(50_000_000));
    let _operator = world.operator(0).await;
    let mut model = copied(3);
    model["spec"]["scheduling"] = json!({"topology": {"spreadAcross": ZONE}});
    world.api().apply(model);
    world.ready().await;
    // a worker that had loaded before all of them had a node is replaced, by one that asks for enough
    world.until("one replica", |world| world.names("pods").len() == 4 && world.names("statefulsets").len() == 1).await;
    world.ready().await;
    let set = &world.api().list("statefulsets")[0];
    assert_eq!(set["spec"]["template"]["spec"]["topologySpreadConstraints"][0]["topologyKey"], ZONE);
    let zones = zones(&world);
    assert_eq!(zones, ["a", "a", "b"]);
    for holders in holders(&world) {
        let of: BTreeSet<String> = holders.iter().map(|ordinal| zones[*ordinal as usize].to_string()).collect();
        assert_eq!(of.len(), 2, "{holders:?} are in {of:?}");
    }
    let sets = world.uids("statefulsets");
    world.edit(|spec| spec["rollout"]["progressDeadline"] = json!("1h"));
    world.ready().await;
    assert_eq!(world.uids("statefulsets"), sets, "looked at again, it is as it should be");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_that_the_zones_cannot_hold_are_told_and_what_runs_goes_on() {
    let world = World::with(1).await;
    for node in ["node-0", "node-1", "node-2"] {
        label(&world, node, "a");
    }
    let _operator = world.operator(0).await;
    let mut model = copied(2);
    model["spec"]["scheduling"] = json!({"topology": {"spreadAcross": ZONE}});
    world.api().apply(model);
    world.says("Unschedulable: 2 copies of 4 experts need 2 workers of").await;
    world.until("it serves", |world| world.status()["printed"]["ready"] == "1/1").await;
    let (sets, message) = (world.uids("statefulsets"), world.condition("Scheduled")["message"].clone());
    assert!(message.as_str().unwrap().ends_with("on 2 zones, 1 zone has room"), "{message}");
    label(&world, "node-1", "b");
    world.ready().await;
    assert_eq!(world.uids("statefulsets"), sets);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_hangs_on_a_lost_node_is_deleted_and_replaced_elsewhere() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    world.api().apply(copied(3));
    world.ready().await;
    let pod = |ordinal: &str| world.names("pods").into_iter().find(|name| name.ends_with(ordinal)).unwrap();
    let (lost, slow) = (pod("-0-1"), pod("-0-2"));
    let uid = |name: &str| world.api().get("pods", name).map(|pod| pod["metadata"]["uid"].clone());
    let (twin, waits) = (uid(&lost), uid(&slow));
    world.cluster.terminate(&slow);
    world.cluster.lose("node-1");
    world.says("Degraded: workers 1, 2 lost").await;
    world.until("another pod", |world| world.api().get("pods", &lost).is_some() && uid(&lost) != twin).await;
    assert_ne!(world.api().get("pods", &lost).unwrap()["spec"]["nodeName"], "node-1");
    assert_eq!(uid(&slow), waits, "one whose node lives has its time to end");
    world.api().delete("pods", &slow);
    world.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_without_a_node_keeps_nobody_from_going_on_without_it() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    let mut model = model();
    model["spec"]["parallelism"]["expert"] = json!({"shards": 3});
    model["spec"]["resources"] = json!({"requests": {"memory": "256Mi"}});
    world.api().apply(model);
    world.ready().await;
    world.cluster.full.store(true, Ordering::Relaxed);
    let pod = world.names("pods").into_iter().find(|name| name.ends_with("-0-2")).unwrap();
    world.api().delete("pods", &pod);
    world.says("Unschedulable").await;
    world.edit(|spec| spec["parallelism"]["expert"]["shards"] = json!(2));
    world.until("two workers", |world| world.status()["printed"]["shards"] == "2/2").await;
    world.ready().await;
}
