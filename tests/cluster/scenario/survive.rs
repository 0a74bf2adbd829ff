//! Nodes that are lost while streams run: with a copy of each expert, no stream notices.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use anyhow::{Context, ensure};
use http_body_util::BodyExt;
use hyper::Method;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::{
    ask::{Client, question},
    cluster::{Cluster, SYSTEM, text},
};

const COPIED: &str = r#"
apiVersion: modelfleet.io/v1alpha1
kind: ModelDeployment
metadata: {name: copied}
spec:
  model: {source: "hf://modelfleet/tiny-r1", servedNames: [tiny-r1-copied]}
  parallelism: {expert: {shards: 4, redundancy: 1}}
"#;
const STREAMS: u64 = 20;

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
    let node = spare_node(cluster).await?;
    let client = Client::new(&format!("{}:8080", router_beside(cluster, &node).await?));
    let streams = Streams::start(&client).await?;
    let lost: BTreeSet<String> = on(cluster, &node).await?;
    ensure!(!lost.is_empty(), "{node} has a worker");

    cluster.fault(verb, &node).await?;
    let healed = async {
        let so_far = streams.whole();
        cluster
            .until("streams begin and end without the node", 30, async || {
                let now = streams.whole();
                ensure!(now >= so_far + 2 * STREAMS, "{} since the loss", now - so_far);
                Ok(())
            })
            .await?;
        cluster
            .until("the status tells of the loss, with all experts covered", 30, async || {
                let model = cluster.model("copied").await?;
                ensure!(model.summary().starts_with("Degraded"), "{}", model.summary());
                ensure!(model.printed("experts") == "16/16", "{}", model.printed("experts"));
                Ok(())
            })
            .await?;
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

/// A node with a worker, and without anything of which there is one only: the hub, DNS.
async fn spare_node(cluster: &Cluster) -> anyhow::Result<String> {
    let pods = cluster.get(&["pods", "--all-namespaces"]).await?;
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    let node = |pod: &Value| text(pod, "/spec/nodeName").to_owned();
    let single = |pod: &&Value| {
        let name = text(pod, "/metadata/name");
        ["hub-", "coredns-"].iter().any(|single| name.starts_with(single))
    };
    let needed: BTreeSet<String> = pods.iter().filter(single).map(node).collect();
    let workers = cluster.workers("copied").await?;
    let mut nodes = workers.values().map(node);
    nodes.find(|node| !needed.contains(node)).with_context(|| format!("every node is among {needed:?}"))
}

/// The address of a router that is on another node.
async fn router_beside(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
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

/// Streams that begin again whenever they end, each compared with what it was before anything was lost.
struct Streams {
    stop: Arc<AtomicBool>,
    whole: Arc<AtomicU64>,
    wrong: Arc<Mutex<Vec<String>>>,
    tasks: JoinSet<()>,
}

impl Streams {
    async fn start(client: &Client) -> anyhow::Result<Self> {
        let mut undisturbed = BTreeMap::new();
        for index in 0..STREAMS {
            undisturbed.insert(index, answer(client, index).await?);
        }
        let (stop, whole): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let wrong: Arc<Mutex<Vec<String>>> = Arc::default();
        let mut tasks = JoinSet::new();
        for (index, expected) in undisturbed {
            let (client, stop, whole, wrong) = (client.clone(), stop.clone(), whole.clone(), wrong.clone());
            tasks.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let problem = match answer(&client, index).await {
                        Ok(text) if text == expected => None,
                        Ok(text) => Some(format!("stream {index} said {text:?} and not {expected:?}")),
                        Err(error) => Some(format!("stream {index}: {error:#}")),
                    };
                    match problem {
                        None => drop(whole.fetch_add(1, Ordering::Relaxed)),
                        Some(problem) => wrong.lock().expect("no stream panics").push(problem),
                    }
                }
            });
        }
        Ok(Self { stop, whole, wrong, tasks })
    }

    /// How many ended as they should.
    fn whole(&self) -> u64 {
        self.whole.load(Ordering::Relaxed)
    }

    /// Stops, and fails if one stream was not whole.
    async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        let wrong = self.wrong.lock().expect("no stream panics");
        ensure!(wrong.is_empty(), "{} of {}: {:#?}", wrong.len(), self.whole(), &wrong[..wrong.len().min(5)]);
        Ok(())
    }
}

/// All that one stream says, thought included.
async fn answer(client: &Client, index: u64) -> anyhow::Result<String> {
    let mut body = question("tiny-r1-copied", &format!("What is {} + {}?", 100 + 17 * index, 23 + 11 * index));
    body["stream"] = true.into();
    let headers = [("content-type", "application/json")];
    let response = client.open(Method::POST, "/v1/chat/completions", &headers, body.to_string().into_bytes()).await?;
    let status = response.status();
    let body = String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?;
    ensure!(status.is_success(), "{status}: {body}");
    let mut events: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    ensure!(events.pop() == Some("[DONE]"), "the stream has no end: {body}");
    let mut said = String::new();
    for event in events {
        let event: Value = serde_json::from_str(event).with_context(|| event.to_owned())?;
        let delta = &event["choices"][0]["delta"];
        said += text(delta, "/reasoning_content");
        said += text(delta, "/content");
    }
    Ok(said)
}
