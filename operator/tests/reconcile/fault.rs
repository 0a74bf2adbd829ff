//! Answers that an API server gives on bad days, two leaders, and objects that harm only themselves.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use serde_json::json;

use crate::{
    api::Fault,
    world::{MODEL, World, model},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_of_every_second_write_delay_and_do_no_harm() {
    let (reference, _operator) = World::installed().await;
    for code in [409, 500] {
        let world = World::with(1).await;
        world.api().break_by(move |call| (call.write % 2 == 1).then_some(Fault::Answer(code)));
        let _operator = world.operator(0).await;
        world.api().apply(model());
        world.ready().await;
        assert_eq!(world.objects(), reference.objects(), "{code}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_is_forbidden_is_told_and_tried_again() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    let forbidden = |call: &crate::api::Call| call.write > 0 && call.resource == "statefulsets";
    world.api().break_by(move |call| forbidden(call).then_some(Fault::Answer(403)));
    world.api().apply(model());
    world.until("told", |world| world.condition("Degraded")["reason"] == "Forbidden").await;
    world.api().mend();
    world.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_leaders_make_what_one_makes() {
    let (reference, _operator) = World::installed().await;
    let world = World::with(2).await;
    // two Leases: both are sure that they lead
    let _one = world.operator_with(0, "one").await;
    let _other = world.operator_with(1, "other").await;
    world.api().apply(model());
    world.ready().await;
    assert_eq!(world.objects(), reference.objects());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_operator_takes_over_when_the_first_is_gone() {
    let world = World::with(2).await;
    let first = world.operator(0).await;
    world.api().apply(model());
    world.ready().await;
    let _second = world.operator(1).await;
    first.kill().await;
    world.edit(|spec| spec["replicas"] = json!(2));
    world.until("the second acts", |world| world.status()["printed"]["ready"] == "2/2").await;
    let lease = &world.api().list("leases")[0];
    assert_eq!(
        (&lease["spec"]["holderIdentity"], &lease["spec"]["leaseTransitions"]),
        (&json!("operator-1"), &json!(1))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_cannot_be_read_harms_only_itself() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    let mut bad = model();
    bad["metadata"]["name"] = json!("bad");
    bad["spec"] = json!({"model": 5});
    world.api().apply(bad);
    world.api().apply(model());
    world.ready().await;
    let summary = |world: &World| world.api().get("modeldeployments", "bad").unwrap()["status"]["summary"].clone();
    world.until("told", |world| summary(world).as_str().is_some_and(|text| text.starts_with("Refused: "))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_made_again_under_its_name_has_a_status_of_its_own() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    let mut bad = model();
    bad["spec"]["model"]["source"] = json!("file:///models/tiny");
    world.api().apply(bad.clone());
    world.says("Refused: ").await;
    // too fast for anyone to see that it was gone
    world.api().delete("modeldeployments", "tiny");
    world.api().apply(bad);
    world.says("Refused: ").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_is_silent_makes_no_second_replica_and_loses_none() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    world.api().silence(Some("statefulsets"));
    world.api().apply(model());
    world.until("pods", |world| world.names("pods").iter().filter(|name| name.contains("-0-")).count() == 2).await;
    // looks that do not see the StatefulSet, but its pods
    for deadline in ["1h", "2h"] {
        world.edit(|spec| spec["rollout"]["progressDeadline"] = json!(deadline));
        let looked = |world: &World| {
            let md = world.api().get("modeldeployments", "tiny").unwrap();
            md["status"]["observedGeneration"] == md["metadata"]["generation"]
        };
        world.until("looked at", looked).await;
    }
    let records = world.names("configmaps").len();
    world.api().silence(None);
    world.ready().await;
    assert_eq!(world.names("statefulsets").len(), 1);
    assert!(world.names("statefulsets")[0].ends_with("-0"), "{:?}", world.names("statefulsets"));
    assert_eq!((records, world.names("configmaps").len()), (3, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_comes_back_with_an_older_state_is_followed_there_and_on() {
    let (world, _operator) = World::installed().await;
    let (first, backup) = (world.uids("statefulsets"), world.api().backup());
    let is = |world: &World, replicas: usize| {
        let told = world.cluster.stage.lock().unwrap().snapshots[MODEL].workers.len();
        let ready = format!("{replicas}/{replicas}");
        let md = world.api().get("modeldeployments", "tiny").unwrap();
        let observed = md["status"]["observedGeneration"] == md["metadata"]["generation"];
        observed && md["status"]["printed"]["ready"] == *ready && told == 2 * replicas
    };
    world.edit(|spec| spec["replicas"] = json!(3));
    world.until("three", |world| is(world, 3)).await;
    world.api().restore(backup);
    // who has seen that sets are gone, and not yet that fewer are asked for, makes them for a moment
    let one = |world: &World| is(world, 1) && world.names("statefulsets").len() == 1;
    world.until("one, as there was", one).await;
    assert_eq!(world.uids("statefulsets"), first, "what runs goes on");
    world.edit(|spec| spec["replicas"] = json!(2));
    world.until("two", |world| is(world, 2)).await;
    assert_eq!(world.names("statefulsets").len(), 2);
    assert!(first.iter().all(|set| world.uids("statefulsets").contains(set)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_of_somebody_else_stays_as_it_is_and_is_named() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    let foreign =
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "tiny-workers"}, "spec": {"a": 1}});
    world.api().apply(foreign);
    let before = world.api().get("services", "tiny-workers");
    world.api().apply(model());
    world.says("Degraded: Service tiny-workers exists and does not belong to this ModelDeployment").await;
    assert_eq!(world.api().get("services", "tiny-workers"), before);
    world.api().delete("services", "tiny-workers");
    world.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_edits_or_deletes_is_put_right() {
    let (world, _operator) = World::installed().await;
    let objects = world.objects();
    let edited = world.api().edit("poddisruptionbudgets", &world.names("poddisruptionbudgets")[0], |budget| {
        budget["spec"]["maxUnavailable"] = json!(2);
    });
    assert!(edited);
    world.api().delete("services", "tiny-workers");
    world.until("put right", |world| world.objects() == objects).await;
}

/// The routers must hear of a lost worker, whatever of the surroundings cannot be read meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_cannot_be_read_again_is_as_it_was() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    world.declare_on_claim(&["ReadOnlyMany"]);
    world.ready().await;
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    world.api().break_by(move |call| {
        let broken = call.resource == "persistentvolumeclaims";
        counted.fetch_add(usize::from(broken), Ordering::Relaxed);
        broken.then_some(Fault::Answer(403))
    });
    world.cluster.make_no_pods(true);
    let pod = world.names("pods").into_iter().find(|name| name.ends_with("-0-1")).unwrap();
    // once more, if the controller had just begun to make up for it
    let is_lost = |world: &World| {
        world.api().delete("pods", &pod);
        world.status()["summary"].as_str().is_some_and(|text| text.starts_with("Degraded: worker 1 lost"))
    };
    world.until("lost", is_lost).await;
    world.until("it is asked for, in vain", |_| asked.load(Ordering::Relaxed) > 0).await;
    assert!(world.status()["summary"].as_str().unwrap().starts_with("Degraded: worker 1 lost"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_whose_reconcile_panics_or_fails_holds_up_no_other() {
    for fault in [Fault::Panic, Fault::Answer(500)] {
        let world = World::with(1).await;
        world.api().break_by(move |call| call.name.starts_with("poison").then_some(fault));
        let _operator = world.operator(0).await;
        let mut poison = model();
        poison["metadata"]["name"] = json!("poison");
        world.api().apply(poison);
        world.api().apply(model());
        world.ready().await;
        assert!(world.names("statefulsets").iter().all(|name| name.starts_with("tiny")), "the fault bit");
        world.api().mend();
        // a change wakes it, however long it would have waited
        world.api().edit("modeldeployments", "poison", |md| md["spec"]["model"]["maxContextTokens"] = json!(512));
        let healed =
            |world: &World| world.api().get("modeldeployments", "poison").unwrap()["status"]["summary"] == "Ready";
        world.until("the poison is out", healed).await;
    }
}
