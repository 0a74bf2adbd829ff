//! Rollouts under load, and deletion at any moment.

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::{
    ask::{Asking, Client},
    cluster::{Cluster, MODELS, text},
};

/// Replica by replica, each known to the routers before an old one goes; a loop of requests notices nothing.
pub(crate) async fn a_rollout_loses_no_request(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply_example("rolled.yaml").await?;
    cluster.ready("rolled", 90).await?;
    let old = sets(cluster).await?;
    ensure!(old.len() == 2, "a StatefulSet for each of two replicas: {old:?}");
    let client = Client::router(cluster).await?;
    let asking = Asking::start(&client, "tiny-r1-rolled", 4);
    edit(cluster, r#"{"spec": {"model": {"revision": "next"}}}"#).await?;
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

async fn edit(cluster: &Cluster, patch: &str) -> anyhow::Result<()> {
    let arguments = ["patch", "modeldeployment", "rolled", "--namespace", MODELS, "--type", "merge", "--patch", patch];
    cluster.kubectl(&arguments).await.map(drop)
}

/// All children are gone, whether the model was being described, loaded, served or rolled.
pub(crate) async fn deletion_leaves_nothing_in_any_phase(cluster: &Cluster) -> anyhow::Result<()> {
    edit(cluster, r#"{"spec": {"model": {"revision": "main"}}}"#).await?;
    cluster
        .until("the rollout is under way", 60, async || {
            let sets = sets(cluster).await?;
            ensure!(sets.len() == 3, "{sets:?}");
            Ok(())
        })
        .await?;
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
