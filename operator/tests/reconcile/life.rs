//! The life of a model: install, scale, roll, lose a worker, be refused, sleep and wake, go.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use wire::proto;

use crate::world::{MODEL, Operator, World, model};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn installs_to_ready_and_says_so_in_every_column() {
    let (world, _operator) = World::installed().await;
    let status = world.status();
    assert_eq!(status["printed"], json!({"model": "tiny-r1", "ready": "1/1", "shards": "2/2", "experts": "4/4"}));
    assert_eq!(status["model"]["resolvedRevision"], "c0ffee");
    assert_eq!((&status["replicas"], &status["desiredReplicas"]), (&json!(1), &json!(1)));
    assert_eq!(
        status["selector"],
        "modelfleet.io/model=tiny,app.kubernetes.io/component=worker,apps.kubernetes.io/pod-index=0"
    );
    for (kind, wanted) in [("Accepted", "True"), ("Planned", "True"), ("Ready", "True"), ("Degraded", "False")] {
        assert_eq!(world.condition(kind)["status"], wanted, "{kind}");
    }
    assert!(world.names("jobs").is_empty(), "the describer is gone once its answer is recorded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_apply_and_a_restart_write_nothing() {
    let (world, operator) = World::installed().await;
    let (generations, writes) = (world.generations(), world.api().writes().len());
    operator.kill().await;
    let _operator = world.operator(0).await;
    world.api().apply(model());
    spoken(&world, 2).await;
    pass(&world).await;
    assert_eq!(world.generations(), generations);
    assert_eq!(world.api().writes()[writes..], [], "nothing changed, so nothing is written");
}

/// The operator of this epoch tells the routers of workers.
async fn spoken(world: &World, epoch: u64) {
    let routed = |world: &World| {
        let stage = world.cluster.stage.lock().unwrap();
        let told = stage.snapshots.get(MODEL);
        told.is_some_and(|told| told.version.is_some_and(|version| version.epoch >= epoch) && !told.workers.is_empty())
    };
    world.until("the new operator speaks", routed).await;
}

/// Two looks of the operator.
async fn pass(world: &World) {
    let (leases, end) = (lease_version(world), std::time::Instant::now() + std::time::Duration::from_secs(4));
    world.until("time passes", |_| std::time::Instant::now() > end).await;
    assert!(lease_version(world) > leases, "it leads");
}

fn lease_version(world: &World) -> u64 {
    world.api().list("leases")[0]["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
}

/// As [`World::installed`], with so many replicas.
async fn replicated(replicas: u32) -> (World, Operator) {
    let (world, operator) = World::installed().await;
    world.edit(|spec| spec["replicas"] = json!(replicas));
    let ready = json!(format!("{replicas}/{replicas}"));
    world.until("all replicas", |world| world.status()["printed"]["ready"] == ready).await;
    world.ready().await;
    (world, operator)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scales_up_and_drains_before_it_scales_down() {
    let (world, _operator) = replicated(2).await;
    world.cluster.stage.lock().unwrap().busy = true;
    world.edit(|spec| spec["replicas"] = json!(1));
    let draining = |world: &World| {
        let stage = world.cluster.stage.lock().unwrap();
        stage.snapshots[MODEL].workers.iter().filter(|worker| worker.draining).count()
    };
    world.until("the routers hear that both workers of a replica drain", |world| draining(world) == 2).await;
    world.says("Draining 1 replica").await;
    assert_eq!(world.names("statefulsets").len(), 2, "it stays while it has requests");
    world.cluster.stage.lock().unwrap().busy = false;
    world.until("one replica", |world| world.names("statefulsets").len() == 1).await;
    world.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolls_replica_by_replica_and_never_leaves_the_routers_without() {
    let (world, _operator) = World::installed().await;
    let before = world.names("statefulsets");
    world.cluster.stage.lock().unwrap().seen.clear();
    world.edit(|spec| spec["model"]["maxContextTokens"] = json!(512));
    world
        .until("rolled", |world| world.names("statefulsets") != before && world.names("statefulsets").len() == 1)
        .await;
    world.ready().await;
    assert_eq!(world.condition("Progressing")["reason"], "RolledOut");
    for snapshot in &world.cluster.stage.lock().unwrap().seen {
        let taking = snapshot.workers.iter().filter(|worker| !worker.draining).count();
        assert!(taking >= 2, "{snapshot:?}");
    }
    world.until("the old revision's records are gone", |world| world.names("configmaps").len() == 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolls_within_the_surge_at_each_moment() {
    let (world, _operator) = replicated(2).await;
    let (mut standing, before) = (BTreeSet::from_iter(world.names("statefulsets")), world.api().writes().len());
    world.edit(|spec| spec["model"]["maxContextTokens"] = json!(512));
    let old = standing.clone();
    world.until("rolled", |world| world.names("statefulsets").iter().all(|set| !old.contains(set))).await;
    let mut most = 0;
    for call in world.api().writes()[before..].iter().filter(|call| call.resource == "statefulsets") {
        match call.method.as_str() {
            "DELETE" => drop(standing.remove(&call.name)),
            _ => drop(standing.insert(call.name.clone())),
        }
        most = most.max(standing.len());
    }
    assert_eq!(most, 3, "maxSurge is 1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_number_of_shards_moves_experts_and_replaces_no_worker() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    let mut model = model();
    model["spec"]["resources"] = json!({"requests": {"memory": "256Mi"}});
    world.api().apply(model);
    world.ready().await;
    let (revision, before) = (world.status()["plan"]["revision"].clone(), world.uids("pods"));
    for (shards, workers) in [(4, "4/4"), (3, "3/3"), (2, "2/2")] {
        world.edit(|spec| spec["parallelism"]["expert"]["shards"] = json!(shards));
        world.until(workers, |world| world.status()["printed"]["shards"] == workers).await;
        world.ready().await;
        world.until("as many pods", |world| world.names("pods").len() == shards + 1).await;
    }
    assert_eq!(world.status()["plan"]["revision"], revision);
    assert_eq!(world.uids("pods"), before, "the workers that stayed were never replaced");
    let stage = world.cluster.stage.lock().unwrap();
    assert!(stage.held.iter().all(|held| *held), "an expert was asked for that its holder had not loaded");
    let taking = |snapshot: &proto::ModelSnapshot| snapshot.workers.iter().filter(|worker| !worker.draining).count();
    let served = stage.seen.iter().skip_while(|snapshot| taking(snapshot) < 2);
    assert!(served.map(taking).all(|taking| taking >= 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_too_small_for_fewer_shards_is_replaced_by_the_rollout() {
    let world = World::with(1).await;
    world.cluster.describe(|description| description["moeLayers"][0]["expertBytes"] = json!(50_000_000));
    let _operator = world.operator(0).await;
    let mut model = model();
    model["spec"]["parallelism"]["expert"]["shards"] = json!(4);
    world.api().apply(model);
    world.ready().await;
    let before = world.names("statefulsets");
    world.edit(|spec| spec["parallelism"]["expert"]["shards"] = json!(2));
    world.until("two shards", |world| world.status()["printed"]["shards"] == "2/2").await;
    world.until("another replica", |world| world.names("statefulsets").len() == 1).await;
    world.ready().await;
    assert_ne!(world.names("statefulsets"), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_are_placed_over_the_domains_and_a_lost_worker_leaves_all_experts_covered() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    let mut model = model();
    model["spec"]["parallelism"]["expert"] = json!({"shards": 4, "redundancy": 1});
    world.api().apply(model);
    world.ready().await;
    assert_eq!(world.status()["experts"], json!({"total": 4, "covered": 4, "minCopies": 2}));
    let template = &world.api().list("statefulsets")[0]["spec"]["template"]["spec"];
    assert_eq!(template["topologySpreadConstraints"][0]["topologyKey"], "kubernetes.io/hostname");
    world.cluster.make_no_pods(true);
    let pod = world.names("pods").into_iter().find(|name| name.ends_with("-0-2")).unwrap();
    world.api().delete("pods", &pod);
    world.says("Degraded: worker 2 lost, experts 4/4 covered, minimum copies 1").await;
    world.cluster.make_no_pods(false);
    world.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_come_and_go_while_workers_run() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    let mut model = model();
    model["spec"]["resources"] = json!({"requests": {"memory": "256Mi"}});
    world.api().apply(model);
    world.ready().await;
    let before = world.uids("pods");
    for (redundancy, copies) in [(1, 2), (0, 1)] {
        world.edit(|spec| spec["parallelism"]["expert"]["redundancy"] = json!(redundancy));
        world.until("copies", |world| world.status()["experts"]["minCopies"] == copies).await;
        world.ready().await;
    }
    assert_eq!(world.uids("pods"), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_revision_leaves_the_old_one_serving_and_going_back_recovers() {
    let (world, _operator) = World::installed().await;
    let good = world.status()["plan"]["revision"].as_str().unwrap().to_owned();
    // what loads from now on never ends loading
    let set = format!("tiny-{good}-0");
    world.edit(|spec| spec["model"]["maxContextTokens"] = json!(512));
    world.until("a second replica", |world| world.names("statefulsets").len() == 2).await;
    let bad = world.names("statefulsets").into_iter().find(|name| *name != set).unwrap();
    world.cluster.make_no_pods(true);
    for pod in world.names("pods").into_iter().filter(|name| name.starts_with(&bad)) {
        world.api().delete("pods", &pod);
    }
    world.says("Rolling out").await;
    assert!(world.names("statefulsets").contains(&set));
    world.edit(|spec| spec["model"] = model()["spec"]["model"].clone());
    world.until("the bad one goes", |world| world.names("statefulsets") == [set.clone()]).await;
    world.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_worker_is_named_with_what_it_held_and_comes_back() {
    let (world, _operator) = World::installed().await;
    let pod = world.names("pods").into_iter().find(|name| name.ends_with("-0-1")).unwrap();
    world.cluster.make_no_pods(true);
    world.api().delete("pods", &pod);
    world.says("Degraded: worker 1 lost, experts 2/4 covered").await;
    assert_eq!(world.condition("Degraded")["reason"], "WorkerLost");
    world.cluster.make_no_pods(false);
    world.ready().await;
    assert_eq!(world.condition("Degraded")["status"], "False");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_of_one_node_takes_one_worker_and_is_named() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    world.declare_on_claim(&["ReadWriteOnce"]);
    world.says("Unplannable: spec.model.source names claim models, which is ReadWriteOnce; 1 x 2 workers need ReadOnlyMany").await;
    assert_eq!(world.condition("Planned")["reason"], "ClaimNotShared");
    assert!(world.names("statefulsets").is_empty());
    world.api().edit("persistentvolumeclaims", "models", |claim| {
        claim["spec"]["accessModes"] = json!(["ReadWriteOnce", "ReadOnlyMany"]);
    });
    world.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_are_refused_are_told_in_the_servers_words() {
    let (world, _operator) = World::installed().await;
    world.cluster.make_no_pods(true);
    world.edit(|spec| spec["replicas"] = json!(2));
    world.until("a second set", |world| world.names("statefulsets").len() == 2).await;
    let set = world.names("statefulsets").into_iter().find(|name| name.ends_with("-1")).unwrap();
    let uid = world.api().get("statefulsets", &set).unwrap()["metadata"]["uid"].clone();
    let words = format!("pods \"{set}-0\" is forbidden: exceeded quota: small, requested: pods=1, used: pods=2");
    world.api().apply(json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "refused"},
        "reason": "FailedCreate", "lastTimestamp": "2026-02-01T00:00:00Z",
        "message": format!("create Pod {set}-0 in StatefulSet {set} failed error: {words}"),
        "involvedObject": {"kind": "StatefulSet", "namespace": "default", "name": set, "uid": uid}}));
    world.says(&format!("Degraded: QuotaExceeded: pods \"{set}-0\" is forbidden: exceeded quota: small")).await;
    for condition in ["Degraded", "Scheduled"] {
        assert_eq!(world.condition(condition)["reason"], "QuotaExceeded", "{condition}");
        assert_eq!(world.condition(condition)["message"], words, "{condition}");
    }
    assert_eq!(world.status()["printed"]["ready"], "1/2", "what runs goes on");
    world.cluster.make_no_pods(false);
    world.ready().await;
    assert_eq!(world.condition("Degraded")["status"], "False");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_spec_leaves_what_runs_and_taking_it_back_recovers() {
    let (world, _operator) = World::installed().await;
    let objects = world.objects();
    world.edit(|spec| spec["model"]["source"] = json!("file:///models/tiny"));
    world.until("refused", |world| world.condition("Accepted")["status"] == "False").await;
    world.says("Refused: ").await;
    assert_eq!(world.objects(), objects);
    assert_eq!(world.status()["printed"]["ready"], "1/1");
    world.edit(|spec| spec["model"] = model()["spec"]["model"].clone());
    world.ready().await;
    assert_eq!(world.condition("Accepted")["status"], "True");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_spec_leaves_its_workers_to_the_routers_if_the_accepted_one_is_lost_too() {
    let (world, operator) = World::installed().await;
    world.edit(|spec| spec["model"]["source"] = json!("file:///models/tiny"));
    world.says("Refused: ").await;
    operator.kill().await;
    world.api().delete("configmaps", "tiny-accepted");
    let told = world.cluster.stage.lock().unwrap().seen.len();
    let operator = world.operator(0).await;
    world.until("the routers are told of both workers", |world| takes(world, told, 2)).await;
    assert_eq!(world.names("statefulsets").len(), 1);
    let pod = world.names("pods").into_iter().find(|name| name.ends_with("-0-1")).unwrap();
    world.cluster.make_no_pods(true);
    world.api().delete("pods", &pod);
    world.until("and that one is gone", |world| takes(world, told, 0) || takes(world, told, 1)).await;
    world.cluster.make_no_pods(false);
    world.until("and of the one that replaces it", |world| takes(world, told, 2)).await;
    world.edit(|spec| spec["model"] = model()["spec"]["model"].clone());
    world.ready().await;
    drop(operator);
}

/// The newest snapshot since `told` has so many workers that take requests.
fn takes(world: &World, told: usize, workers: usize) -> bool {
    let stage = world.cluster.stage.lock().unwrap();
    let newest = stage.seen[told..].last();
    newest.is_some_and(|newest| newest.workers.iter().filter(|worker| !worker.draining).count() == workers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_accepted_spec_that_cannot_be_read_is_named_and_leaves_its_workers_to_the_routers() {
    let (world, operator) = World::installed().await;
    world.edit(|spec| spec["model"]["source"] = json!("file:///models/tiny"));
    world.says("Refused: ").await;
    operator.kill().await;
    assert!(world.api().edit("configmaps", "tiny-accepted", |config| config["data"]["spec.json"] = json!("{")));
    let (sets, told) = (world.uids("statefulsets"), world.cluster.stage.lock().unwrap().seen.len());
    let _operator = world.operator(0).await;
    world.until("the routers are told of both workers", |world| takes(world, told, 2)).await;
    let named = |world: &World| {
        let message = world.condition("Accepted")["message"].as_str().unwrap_or_default().to_owned();
        message.contains("; the record in ConfigMap tiny-accepted cannot be read: spec.json: ")
    };
    world.until("it is named", named).await;
    world.edit(|spec| spec["model"] = model()["spec"]["model"].clone());
    world.ready().await;
    assert_eq!(world.uids("statefulsets"), sets);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revision_whose_record_cannot_be_read_is_named_and_stays_as_it_is() {
    let (world, operator) = World::installed().await;
    let record = format!("tiny-{}", world.status()["plan"]["revision"].as_str().unwrap());
    operator.kill().await;
    assert!(world.api().edit("configmaps", &record, |config| config["data"]["description.json"] = json!("{")));
    let (objects, told) = (world.objects(), world.cluster.stage.lock().unwrap().seen.len());
    let _operator = world.operator(0).await;
    world.until("the routers are told of both workers", |world| takes(world, told, 2)).await;
    world.says(&format!("DescribeFailed: the record in ConfigMap {record} cannot be read: description.json: ")).await;
    assert_eq!(world.objects(), objects);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revision_whose_record_cannot_be_read_drains_is_taken_back_and_goes() {
    let (world, operator) = World::installed().await;
    let record = format!("tiny-{}", world.status()["plan"]["revision"].as_str().unwrap());
    operator.kill().await;
    assert!(world.api().edit("configmaps", &record, |config| config["data"]["description.json"] = json!("{")));
    let uids = world.uids("statefulsets");
    world.cluster.stage.lock().unwrap().busy = true;
    let _operator = world.operator(0).await;
    world.edit(|spec| spec["suspend"] = json!(true));
    world.until("it drains", |world| marked(world).len() == 1).await;
    world.edit(|spec| spec["suspend"] = json!(false));
    world.until("it is taken back", |world| marked(world).is_empty()).await;
    assert_eq!(world.uids("statefulsets"), uids);
    world.cluster.stage.lock().unwrap().busy = false;
    world.edit(|spec| spec["suspend"] = json!(true));
    world.until("it goes", |world| world.names("statefulsets").is_empty()).await;
    world.says("Suspended").await;
    world.edit(|spec| spec["suspend"] = json!(false));
    world.ready().await;
    assert_ne!(world.api().get("configmaps", &record).unwrap()["data"]["description.json"], "{", "it is made anew");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_of_which_nothing_is_known_goes_when_none_is_wanted() {
    let world = World::with(1).await;
    let operator = world.operator(0).await;
    let mut model = model();
    model["spec"]["rollout"] = json!({"drainTimeout": "1s"});
    world.api().apply(model);
    world.ready().await;
    let revision = world.status()["plan"]["revision"].as_str().unwrap().to_owned();
    operator.kill().await;
    for record in [format!("tiny-{revision}"), format!("tiny-{revision}-0")] {
        assert!(world.api().edit("configmaps", &record, |config| config["data"] = json!({})));
    }
    let _operator = world.operator(0).await;
    world.says("DescribeFailed").await;
    assert_eq!(world.names("statefulsets").len(), 1);
    world.edit(|spec| spec["suspend"] = json!(true));
    world.until("it goes", |world| world.names("statefulsets").is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_replicas_stay_though_their_record_is_lost() {
    let (world, operator) = replicated(3).await;
    let old = world.names("statefulsets");
    world.cluster.stage.lock().unwrap().busy = true;
    world.edit(|spec| spec["model"]["maxContextTokens"] = json!(512));
    world.until("an old one drains", |world| marked(world).len() == 1).await;
    operator.kill().await;
    let new = world.names("statefulsets").into_iter().find(|set| !old.contains(set)).unwrap();
    let uid = |world: &World| world.api().get("statefulsets", &new).map(|set| set["metadata"]["uid"].clone());
    let before = uid(&world);
    world.api().delete("configmaps", new.rsplit_once('-').unwrap().0);
    world.cluster.make_no_pods(true); // nor one that describes the model
    world.cluster.stage.lock().unwrap().busy = false;
    let _operator = world.operator(0).await;
    world.says("Describing model").await;
    world.until("the old one is taken back", |world| marked(world).is_empty()).await;
    world.cluster.make_no_pods(false);
    world.until("rolled", |world| world.names("statefulsets").iter().all(|set| !old.contains(set))).await;
    world.ready().await;
    assert_eq!(uid(&world), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_of_an_earlier_revision_whose_record_is_lost_finish_their_requests_and_go() {
    let (world, operator) = replicated(3).await;
    let (old, record) = (world.names("statefulsets"), world.status()["plan"]["revision"].clone());
    operator.kill().await;
    world.api().delete("configmaps", &format!("tiny-{}", record.as_str().unwrap()));
    world.cluster.stage.lock().unwrap().busy = true;
    world.edit(|spec| spec["model"]["maxContextTokens"] = json!(512));
    let operator = world.operator(0).await;
    world.until("one drains", |world| marked(world).len() == 1).await;
    let since = marked(&world);
    operator.kill().await;
    let _operator = world.operator(0).await;
    let writes = world.api().writes().len();
    spoken(&world, 3).await;
    pass(&world).await;
    assert!(old.iter().all(|set| world.names("statefulsets").contains(set)), "it stays while it has requests");
    assert_eq!(marked(&world), since, "a restart gives it no more time");
    let writes = &world.api().writes()[writes..];
    assert!(!writes.iter().any(|call| call.resource == "statefulsets"), "marked once: {writes:?}");
    world.cluster.stage.lock().unwrap().busy = false;
    let new = |world: &World| world.names("statefulsets").iter().filter(|set| !old.contains(set)).count();
    world.until("all are new", |world| new(world) == 3 && world.names("statefulsets").len() == 3).await;
    world.ready().await;
    world.until("the old records are gone", |world| world.names("configmaps").len() == 5).await;
}

/// Since when the replicas that are marked as draining do.
fn marked(world: &World) -> Vec<String> {
    let sets = world.api().list("statefulsets");
    let since =
        |set: &Value| set["metadata"]["annotations"]["modelfleet.io/draining-since"].as_str().map(str::to_owned);
    sets.iter().filter_map(since).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_plan_is_lost_or_unreadable_gets_it_back_and_keeps_its_workers() {
    let (world, operator) = World::installed().await;
    let (pods, set) = (world.uids("pods"), world.names("statefulsets").remove(0));
    let data = |world: &World| Some(world.api().get("configmaps", &set)?["data"].clone());
    let before = data(&world);
    world.api().delete("configmaps", &set);
    world.until("it is there again", |world| data(world) == before).await;
    operator.kill().await;
    assert!(world.api().edit("configmaps", &set, |config| config["data"]["plan.json"] = json!("{")));
    let _operator = world.operator(0).await;
    world.until("it can be read again", |world| data(world) == before).await;
    world.ready().await;
    assert_eq!(world.uids("pods"), pods);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sleeps_when_idle_and_a_request_that_waits_wakes_it() {
    let world = World::with(1).await;
    let _operator = world.operator(0).await;
    let mut model = model();
    model["spec"]["replicas"] = json!(0);
    model["spec"]["autoscaling"] = json!({"mode": "Internal", "minReplicas": 0, "maxReplicas": 2, "idle": {"after": "10s"},
        "behavior": {"scaleDown": {"stabilizationWindow": "2s"}}});
    world.api().apply(model);
    world.says("Asleep").await;
    let snapshot = |world: &World| world.cluster.stage.lock().unwrap().snapshots.contains_key(MODEL);
    world.until("the router knows the model", snapshot).await;
    world.cluster.stage.lock().unwrap().queued.insert(MODEL.to_owned(), 1);
    world.until("awake", |world| world.status()["printed"]["ready"] == "1/1").await;
    world.cluster.stage.lock().unwrap().queued.clear();
    world.says("Asleep").await;
    assert!(world.names("statefulsets").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn suspended_there_are_no_workers() {
    let (world, _operator) = World::installed().await;
    world.edit(|spec| spec["suspend"] = json!(true));
    world.says("Suspended").await;
    assert!(world.names("statefulsets").is_empty());
    world.edit(|spec| spec["suspend"] = json!(false));
    world.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_in_the_middle_of_a_rollout_nothing_is_left() {
    let (world, _operator) = World::installed().await;
    world.edit(|spec| spec["model"]["maxContextTokens"] = json!(512));
    world.until("two revisions", |world| world.names("statefulsets").len() == 2).await;
    world.api().delete("modeldeployments", "tiny");
    let nothing = |world: &World| {
        let kinds = ["statefulsets", "services", "serviceaccounts", "configmaps", "poddisruptionbudgets", "jobs"];
        let forgotten = !world.cluster.stage.lock().unwrap().snapshots.contains_key(MODEL);
        forgotten && kinds.iter().all(|plural| world.names(plural).is_empty()) && world.names("pods") == ["router"]
    };
    world.until("all gone", nothing).await;
}
