//! Nodes that are lost while streams run: with a copy of each expert, no stream notices.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::{
    ask::Client,
    cluster::{Cluster, SYSTEM, text},
    stream::Streams,
};

const COPIED: &str = r#"
apiVersion: modelfleet.io/v1alpha1
kind: ModelDeployment
metadata: {name: copied}
spec:
  model: {source: "hf://modelfleet/tiny-r1", servedNames: [tiny-r1-copied]}
  parallelism: {expert: {shards: 4, redundancy: 1}}
"#;

/// Its network is cut: callers and routers turn to others, the lost worker is replaced elsewhere, and the twin that comes
/// back with the network does no harm.
pub(crate) async fn a_node_that_is_cut_off_costs_no_stream(cluster: &Cluster) -> anyhow::Result<()> {
    lose_a_node(cluster, "cut").await
}

/// Its kubelet and all its containers are killed.
pub(crate) async fn a_node_that_dies_costs_no_stream(cluster: &Cluster) -> anyhow::Result<()> {
    lose_a_node(cluster, "kill").await
}

async fn lose_a_node(cluster: &Cluster, verb: &str) -> anyhow::Result<()> {
    cluster.apply(COPIED).await?;
    cluster.ready("copied", 120).await?;
    let node = spare_node(cluster, "copied").await?;
    let client = Client::new(&format!("{}:8080", router_beside(cluster, &node).await?));
    let streams = Streams::start(&client, "tiny-r1-copied").await?;
    let lost: BTreeSet<String> = on(cluster, &node).await?;
    ensure!(!lost.is_empty(), "{node} has a worker");

    cluster.fault(verb, &node).await?;
    let healed = async {
        let told = cluster.until("the status tells of the loss, with all experts covered", 30, async || {
            let model = cluster.model("copied").await?;
            ensure!(model.summary().starts_with("Degraded"), "{}", model.summary());
            ensure!(model.printed("experts") == "16/16", "{}", model.printed("experts"));
            Ok(())
        });
        tokio::try_join!(told, streams.go_on(cluster))?;
        cluster
            .until("the lost workers are replaced on other nodes", 120, async || {
                let elsewhere = cluster.workers("copied").await?;
                let uids: BTreeSet<String> = elsewhere.values().map(uid).collect();
                ensure!(uids.is_disjoint(&lost) && elsewhere.len() == 4, "{lost:?} are among {uids:?}");
                ensure!(on(cluster, &node).await?.is_empty(), "a new one is on {node}");
                cluster.model("copied").await?.expect("Ready", "True")
            })
            .await
    };
    let healed = healed.await;
    cluster.fault("heal", &node).await?;
    healed?;
    cluster
        .until("the node is back, and its old workers are gone", 90, async || {
            let nodes = cluster.get(&["node", &node]).await?;
            let conditions = nodes["status"]["conditions"].as_array().cloned().unwrap_or_default();
            ensure!(
                conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"),
                "{node} is not ready"
            );
            ensure!(on(cluster, &node).await?.is_disjoint(&lost), "an old one is on {node}");
            Ok(())
        })
        .await?;
    streams.stop().await?;
    cluster.ready("copied", 60).await?;
    cluster.delete("copied").await
}

/// A node with a worker of a model, and without anything of which there is one only: the hub, DNS.
pub(crate) async fn spare_node(cluster: &Cluster, model: &str) -> anyhow::Result<String> {
    let pods = cluster.get(&["pods", "--all-namespaces"]).await?;
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    let node = |pod: &Value| text(pod, "/spec/nodeName").to_owned();
    let single = |pod: &&Value| {
        let name = text(pod, "/metadata/name");
        ["hub-", "coredns-"].iter().any(|single| name.starts_with(single))
    };
    let needed: BTreeSet<String> = pods.iter().filter(single).map(node).collect();
    let workers = cluster.workers(model).await?;
    let mut nodes = workers.values().map(node);
    nodes.find(|node| !needed.contains(node)).with_context(|| format!("every node is among {needed:?}"))
}

/// The address of a router that is on another node.
pub(crate) async fn router_beside(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    let routers = ["pods", "--namespace", SYSTEM, "--selector", "app.kubernetes.io/component=router"];
    let routers = cluster.get(&routers).await?["items"].as_array().cloned().unwrap_or_default();
    let beside = routers.iter().find(|pod| text(pod, "/spec/nodeName") != node);
    Ok(text(beside.context("a router on another node")?, "/status/podIP").to_owned())
}

/// The UIDs of the model's workers on a node.
async fn on(cluster: &Cluster, node: &str) -> anyhow::Result<BTreeSet<String>> {
    let workers = cluster.workers("copied").await?;
    Ok(workers.values().filter(|pod| text(pod, "/spec/nodeName") == node).map(uid).collect())
}

fn uid(pod: &Value) -> String {
    text(pod, "/metadata/uid").to_owned()
}
