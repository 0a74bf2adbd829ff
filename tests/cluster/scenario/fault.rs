//! What happens to requests and objects when something dies, or when nothing happened at all.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, bail, ensure};
use http_body_util::BodyExt;
use hyper::Method;
use tokio::{task::JoinSet, time::sleep};

use crate::{
    ask::{Asking, Client, question},
    cluster::{Cluster, MODELS, SYSTEM, text},
};

/// How long requests go on without an operator.
const WITHOUT_OPERATOR: Duration = Duration::from_secs(120);

pub(crate) async fn a_killed_worker_comes_back_alone(cluster: &Cluster) -> anyhow::Result<()> {
    let before = uids(cluster, "sharded").await?;
    let victim = before.keys().nth(1).context("four workers")?.clone();
    cluster.kubectl(&["delete", "pod", &victim, "--namespace", MODELS, "--grace-period=0", "--force"]).await?;
    cluster
        .until("the status tells of the loss", 10, async || {
            let model = cluster.model("sharded").await?;
            let (shards, experts) = (model.printed("shards"), model.printed("experts"));
            ensure!(shards == "3/4" && experts != "16/16", "SHARDS {shards}, EXPERTS {experts}: {}", model.summary());
            model.expect("Ready", "False")
        })
        .await?;
    cluster.ready("sharded", 60).await?;
    let after = uids(cluster, "sharded").await?;
    let changed: Vec<_> = before.keys().filter(|name| before.get(*name) != after.get(*name)).collect();
    ensure!(changed == [&victim] && after.len() == 4, "only {victim} is new: {before:?} {after:?}");
    Client::router(cluster).await?.right_sum("tiny-r1-sharded", 47, 85).await?;
    Ok(())
}

async fn uids(cluster: &Cluster, model: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let pods = cluster.workers(model).await?;
    Ok(pods.iter().map(|(name, pod)| (name.clone(), text(pod, "/metadata/uid").to_owned())).collect())
}

/// A second `kubectl apply` and new operators change no generation of any object.
pub(crate) async fn nothing_changes_when_nothing_changed(cluster: &Cluster) -> anyhow::Result<()> {
    let generations = async || {
        let mut all = cluster.children("sharded").await?;
        all.extend(cluster.children("tiny-r1").await?);
        for name in ["sharded", "tiny-r1"] {
            let model = cluster.model(name).await?;
            all.insert(format!("ModelDeployment {name}"), model.0["metadata"]["generation"].as_i64().unwrap_or(0));
        }
        anyhow::Ok(all)
    };
    let before = generations().await?;
    ensure!(before.keys().any(|title| title.starts_with("StatefulSet")), "{before:?}");
    cluster.apply_example("sharded.yaml").await?;
    cluster.apply_example("five-lines.yaml").await?;
    cluster.kubectl(&["rollout", "restart", "--namespace", SYSTEM, "deployment/modelfleet-operator"]).await?;
    cluster
        .kubectl(&["rollout", "status", "--namespace", SYSTEM, "deployment/modelfleet-operator", "--timeout=90s"])
        .await?;
    let leader = leader(cluster).await?;
    cluster
        .until("one of the new operators leads", 60, async || {
            let now = self::leader(cluster).await?;
            ensure!(now != leader || cluster.pods_of("operator").await?.keys().any(|pod| now.contains(pod)), "{now}");
            Ok(())
        })
        .await?;
    for name in ["sharded", "tiny-r1"] {
        cluster.ready(name, 30).await?;
    }
    let after = generations().await?;
    ensure!(before == after, "before: {before:#?}\nafter: {after:#?}");
    Ok(())
}

async fn leader(cluster: &Cluster) -> anyhow::Result<String> {
    let lease = cluster.get(&["lease", "modelfleet-operator", "--namespace", SYSTEM]).await?;
    Ok(text(&lease, "/spec/holderIdentity").to_owned())
}

/// First the operators are cut off, then they are gone: two minutes in which requests notice nothing.
pub(crate) async fn requests_go_on_without_an_operator(cluster: &Cluster) -> anyhow::Result<()> {
    let client = Client::router(cluster).await?;
    let asking = Asking::start(&client, "tiny-r1-sharded", 2);
    let operators: Vec<_> = cluster.pods_of("operator").await?.into_keys().collect();
    for pod in &operators {
        cluster.fault("cut", &format!("{SYSTEM}/{pod}")).await?;
    }
    sleep(WITHOUT_OPERATOR / 4).await; // the time is what is tried
    let scale = |replicas: &'static str| {
        ["scale", "--namespace", SYSTEM, "deployment/modelfleet-operator", "--replicas", replicas]
    };
    cluster.kubectl(&scale("0")).await?;
    for pod in &operators {
        cluster.kubectl(&["delete", "pod", pod, "--namespace", SYSTEM, "--grace-period=0", "--force"]).await?;
    }
    let before = asking.answered();
    sleep(WITHOUT_OPERATOR * 3 / 4).await; // the time is what is tried
    ensure!(asking.answered() > before, "requests are answered without an operator");
    cluster.kubectl(&scale("2")).await?;
    cluster
        .kubectl(&["rollout", "status", "--namespace", SYSTEM, "deployment/modelfleet-operator", "--timeout=90s"])
        .await?;
    cluster.ready("sharded", 60).await?;
    asking.stop_without_error().await.map(drop)
}

/// 300 requests, half of whose clients leave at some moment.
pub(crate) async fn clients_that_leave_leave_nothing_behind(cluster: &Cluster) -> anyhow::Result<()> {
    let client = Client::router(cluster).await?;
    let mut tasks = JoinSet::new();
    for index in 0..300_u64 {
        let client = client.clone();
        tasks.spawn(async move {
            if index % 2 == 0 {
                return client.right_sum("tiny-r1-sharded", 10 + index, 200 + index).await.map(drop);
            }
            let mut body = question("tiny-r1-sharded", &format!("What is {index} + 1?"));
            body["stream"] = true.into();
            let headers = [("content-type", "application/json")];
            let mut response =
                client.open(Method::POST, "/v1/chat/completions", &headers, body.to_string().into_bytes()).await?;
            ensure!(response.status().is_success(), "{}", response.status());
            for _ in 0..index % 7 {
                response.frame().await;
            }
            Ok(())
        });
        if tasks.len() >= 32 {
            tasks.join_next().await.context("a task")???;
        }
    }
    while let Some(result) = tasks.join_next().await {
        result??;
    }
    cluster
        .until("no request is left in routers and workers", 30, async || {
            for (pod, address) in cluster.pods_of("router").await? {
                for name in ["modelfleet_router_queued_requests", "modelfleet_router_running_requests"] {
                    at_zero(&address, name).await.with_context(|| pod.clone())?;
                }
            }
            for (pod, object) in cluster.workers("sharded").await? {
                for name in ["running_sequences", "waiting_sequences", "kv_tokens"] {
                    let name = format!("modelfleet_worker_{name}");
                    at_zero(text(&object, "/status/podIP"), &name).await.with_context(|| pod.clone())?;
                }
            }
            Ok(())
        })
        .await?;
    client.right_sum("tiny-r1-sharded", 47, 85).await?;
    Ok(())
}

async fn at_zero(address: &str, metric: &str) -> anyhow::Result<()> {
    let value = Client::new(&format!("{address}:9400")).metric(metric).await?;
    if value == 0.0 { Ok(()) } else { bail!("{metric} is {value}") }
}
