//! Rollouts under load, and deletion at any moment.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::{
    ask::{Asking, Client},
    cluster::{Cluster, MODELS, text},
    scenario::survive::{router_beside, spare_node},
    stream::Streams,
};

/// Streams that end while a model is changed again and again.
const ENOUGH: u64 = 5000;

/// Replica by replica, each known to the routers before an old one goes; a loop of requests notices nothing, though the
/// record of the old revision is lost meanwhile.
pub(crate) async fn a_rollout_loses_no_request(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply_example("rolled.yaml").await?;
    cluster.ready("rolled", 90).await?;
    let old = sets(cluster).await?;
    ensure!(old.len() == 2, "a StatefulSet for each of two replicas: {old:?}");
    let client = Client::router(cluster).await?;
    let asking = Asking::start(&client, "tiny-r1-rolled", 4);
    edit(cluster, "rolled", r#"{"spec": {"model": {"revision": "next"}}}"#).await?;
    under_way(cluster).await?;
    let record = old[0].rsplit_once('-').context("NAME-REV-I")?.0;
    cluster.kubectl(&["delete", "configmap", record, "--namespace", MODELS]).await?;
    let mut most = 0;
    cluster
        .until("both replicas are new", 240, async || {
            let now = sets(cluster).await?;
            most = most.max(now.len());
            check_gates(cluster).await?;
            let model = cluster.model("rolled").await?;
            let updated = model.number("updatedReplicas");
            ensure!(updated == 2 && now.len() == 2, "{updated} updated, {now:?}: {}", model.summary());
            ensure!(now.iter().all(|set| !old.contains(set)), "{old:?} is still among {now:?}");
            model.expect("Ready", "True")
        })
        .await?;
    ensure!(most == 3, "one replica more than wanted at a time: {most} StatefulSets");
    asking.stop_without_error().await?;
    Ok(())
}

/// Waits until a new replica stands beside the two old ones.
async fn under_way(cluster: &Cluster) -> anyhow::Result<()> {
    cluster
        .until("the rollout is under way", 60, async || {
            let sets = sets(cluster).await?;
            ensure!(sets.len() == 3, "{sets:?}");
            Ok(())
        })
        .await
}

async fn sets(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let sets = cluster.list("statefulsets", "modelfleet.io/model=rolled").await?;
    Ok(sets.iter().map(|set| text(set, "/metadata/name").to_owned()).collect())
}

/// A ready worker is one that the routers have acknowledged.
async fn check_gates(cluster: &Cluster) -> anyhow::Result<()> {
    for (name, pod) in cluster.workers("rolled").await? {
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
        let is = |kind: &str| conditions.iter().any(|one| one["type"] == kind && one["status"] == "True");
        ensure!(!is("Ready") || is("modelfleet.io/routed"), "{name} is ready, but the routers do not know it");
    }
    Ok(())
}

/// All children are gone, whether the model was being described, loaded, served or rolled.
pub(crate) async fn deletion_leaves_nothing_in_any_phase(cluster: &Cluster) -> anyhow::Result<()> {
    edit(cluster, "rolled", r#"{"spec": {"model": {"revision": "main"}}}"#).await?;
    under_way(cluster).await?;
    cluster.delete("rolled").await.context("while it was rolled")?;

    for kind in ["Job", "StatefulSet", "Pod"] {
        cluster.apply_example("rolled.yaml").await?;
        cluster
            .until(&format!("it has a {kind}"), 60, async || {
                let children = cluster.children("rolled").await?;
                ensure!(children.keys().any(|title| title.starts_with(kind)), "{children:?}");
                Ok(())
            })
            .await?;
        cluster.delete("rolled").await.with_context(|| format!("when it had its first {kind}"))?;
    }
    cluster.apply_example("rolled.yaml").await?;
    cluster.ready("rolled", 90).await?;
    cluster.delete("rolled").await.context("when it was ready")
}

/// A pod deleted, a node drained, a rollout, `shards` from 4 to 6 to 3 and again, all while streams run: of [`ENOUGH`] none
/// fails or says something else, each goes on after each change of `shards`, which replaces no worker that stays.
pub(crate) async fn changes_under_load_cost_no_request(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply_example("redundant.yaml").await?;
    cluster.ready("redundant", 120).await?;
    let node = spare_node(cluster, "redundant").await?;
    let client = Client::new(&format!("{}:8080", router_beside(cluster, &node).await?));
    let streams = Streams::start(&client, "tiny-r1-redundant").await?;
    check_experts(cluster).await?;

    let before = uids(cluster).await?;
    let victim = before.keys().nth(1).context("four workers")?;
    cluster.kubectl(&["delete", "pod", victim, "--namespace", MODELS, "--grace-period=0", "--force"]).await?;
    cluster
        .until("the loss is told with the copies that are left", 20, async || {
            let model = cluster.model("redundant").await?;
            ensure!(model.printed("experts") == "16/16", "EXPERTS {}", model.printed("experts"));
            ensure!(model.summary().contains("minimum copies 1"), "{}", model.summary());
            Ok(())
        })
        .await?;
    cluster.ready("redundant", 60).await?;

    let drain = ["drain", &node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=150s"];
    let drained = cluster.kubectl(&drain).await;
    let settled = cluster.ready("redundant", 120).await;
    cluster.kubectl(&["uncordon", &node]).await?;
    drained?;
    settled?;

    let old = uids(cluster).await?;
    edit(cluster, "redundant", r#"{"spec": {"model": {"maxContextTokens": 512}}}"#).await?;
    cluster
        .until("all workers are of the new revision", 240, async || {
            let (model, now) = (cluster.model("redundant").await?, uids(cluster).await?);
            ensure!(now.len() == 4 && !now.keys().any(|name| old.contains_key(name)), "{now:?}: {}", model.summary());
            model.expect("Ready", "True")
        })
        .await?;

    let before = uids(cluster).await?;
    for shards in [6, 3].into_iter().cycle() {
        let change = format!(r#"{{"spec": {{"parallelism": {{"expert": {{"shards": {shards}}}}}}}}}"#);
        edit(cluster, "redundant", &change).await?;
        cluster
            .until(&format!("{shards} workers"), 150, async || {
                let (model, pods) = (cluster.model("redundant").await?, uids(cluster).await?.len());
                let all = format!("{shards}/{shards}");
                ensure!(model.printed("shards") == all && pods == shards, "{pods} pods: {}", model.summary());
                model.expect("Ready", "True")
            })
            .await?;
        streams.go_on(cluster).await.with_context(|| format!("with {shards} shards"))?;
        if shards == 3 && streams.whole() >= ENOUGH {
            break;
        }
    }
    let after = uids(cluster).await?;
    ensure!(after.iter().all(|(name, uid)| before.get(name) == Some(uid)), "{before:?} became {after:?}");
    streams.stop().await?;
    cluster.delete("redundant").await
}

/// `modelfleet experts`, as a user calls it: two copies of each expert on different nodes, and the rows of its requests.
async fn check_experts(cluster: &Cluster) -> anyhow::Result<()> {
    let seen: Value = serde_json::from_str(&cluster.experts("redundant", &["--output", "json"]).await?)?;
    let replica = &seen["replicas"][0];
    let node = |ordinal: &Value| replica["workers"][ordinal.as_u64().unwrap_or(u64::MAX) as usize]["node"].as_str();
    let layers = replica["layers"].as_array().context("layers with experts")?;
    ensure!(layers.len() == 3, "three of the four layers have experts: {seen:#}");
    for layer in layers {
        let experts = layer["experts"].as_array().context("experts of a layer")?;
        let rows: u64 = experts.iter().filter_map(|expert| expert["rows"].as_u64()).sum();
        ensure!(experts.len() == 16 && rows > 0, "16 experts that requests gave rows to: {layer:#}");
        for expert in experts {
            let holders = expert["holders"].as_array().context("holders of an expert")?;
            let nodes: BTreeSet<_> = holders.iter().filter_map(node).collect();
            ensure!(expert["copies"].as_u64() >= Some(2) && nodes.len() >= 2, "two copies on two nodes: {expert:#}");
        }
    }
    let drawn = cluster.experts("redundant", &[]).await?;
    ensure!(drawn.contains("replica 0, workers 4/4\nminimum copies 2, skew "), "{drawn}");
    let listed = cluster.experts("redundant", &["--layer", "2"]).await?;
    ensure!(listed.contains(" rows since the 4 workers started\n"), "{listed}");
    Ok(())
}

async fn edit(cluster: &Cluster, model: &str, patch: &str) -> anyhow::Result<()> {
    let arguments = ["patch", "modeldeployment", model, "--namespace", MODELS, "--type", "merge", "--patch", patch];
    cluster.kubectl(&arguments).await.map(drop)
}

async fn uids(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, String>> {
    let pods = cluster.workers("redundant").await?;
    Ok(pods.iter().map(|(name, pod)| (name.clone(), text(pod, "/metadata/uid").to_owned())).collect())
}
