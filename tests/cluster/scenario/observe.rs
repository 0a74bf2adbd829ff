//! What the collector got.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use hyper::Method;
use serde_json::Value;

use crate::{
    ask::{Client, question},
    cluster::{Cluster, text},
};

/// Words that are asked, and must be found nowhere in the telemetry.
const CANARY: &str = "canary-word-of-a-prompt";

async fn collector(cluster: &Cluster) -> anyhow::Result<Client> {
    Ok(Client::new(&format!("{}:8000", cluster.service("surroundings", "collector").await?)))
}

/// One trace, the client's, with spans of the router, of the worker and of holders of experts: three pods or more.
pub(crate) async fn one_trace_has_router_worker_and_experts(cluster: &Cluster) -> anyhow::Result<()> {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let client = Client::router(cluster).await?;
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let headers = [("content-type", "application/json"), ("traceparent", parent.as_str())];
    let body = question("tiny-r1-sharded", "What is 47 + 85?").to_string().into_bytes();
    let answer = client.send(Method::POST, "/v1/chat/completions", &headers, body).await?;
    ensure!(answer.content().contains("132"), "{}", answer.text());

    let collector = collector(cluster).await?;
    cluster
        .until("the trace is whole", 30, async || {
            let spans = collector.get(&format!("/traces/{TRACE}")).await?.json();
            let spans = spans.as_array().context("a list of spans")?;
            let pods: BTreeSet<_> = spans.iter().map(|span| text(span, "/sender")).collect();
            let services: BTreeSet<_> = spans.iter().map(|span| text(span, "/service")).collect();
            ensure!(pods.len() >= 3 && !pods.contains(""), "spans of {pods:?}: {spans:#?}");
            ensure!(services == ["modelfleet-router", "modelfleet-worker"].into(), "spans of {services:?}");
            check_parents(spans)
        })
        .await
}

/// Every span hangs below another of the trace, or below the client's.
fn check_parents(spans: &[Value]) -> anyhow::Result<()> {
    let mut known: BTreeSet<_> = spans.iter().map(|span| text(span, "/span")).collect();
    known.insert("00f067aa0ba902b7");
    let orphan = spans.iter().find(|span| !known.contains(text(span, "/parent")));
    ensure!(orphan.is_none(), "a span without its parent: {orphan:?}");
    Ok(())
}

pub(crate) async fn no_text_is_in_the_telemetry(cluster: &Cluster) -> anyhow::Result<()> {
    let client = Client::router(cluster).await?;
    client.post("/v1/chat/completions", &question("tiny-r1-sharded", CANARY)).await?;
    client.post("/v1/chat/completions", &serde_json::json!({"model": "tiny-r1-sharded", "messages": CANARY})).await?;
    let collector = collector(cluster).await?;
    cluster
        .until("metrics and logs arrive", 90, async || {
            let names = collector.get("/metrics").await?.text();
            for name in [
                "gen_ai.server.request.duration",
                "gen_ai.server.time_to_first_token",
                "gen_ai.server.time_per_output_token",
                "gen_ai.client.token.usage",
            ] {
                ensure!(names.contains(name), "{name} is not among {names}");
            }
            ensure!(collector.get("/logs").await?.json().as_u64() > Some(0), "no log record arrived");
            Ok(())
        })
        .await?;
    for secret in [CANARY, "hf_cluster_tests"] {
        let found = collector.get(&format!("/contains/{secret}")).await?.json();
        ensure!(found == Value::Bool(false), "{secret} is in the telemetry");
    }
    Ok(())
}
