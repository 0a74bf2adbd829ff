//! What a fleet tells a collector: one trace over all its processes, metrics of the conventions, and no text.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tests::{collector::Collector, local::Fleet, poll};
use tokio::net::TcpListener;

use crate::{
    http::{chat, client},
    local::deployment,
};

/// The longest that telemetry may be on its way.
const PATIENCE: Duration = Duration::from_secs(120);
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";
const CANARY: &str = "xylophone-marmalade";
const CANARY_WORD: &str = "marmalade";

/// A fleet of four shards that tells a collector everything at once, with these variables besides.
async fn traced(besides: &[(&str, &str)]) -> (tempfile::TempDir, Fleet, Collector) {
    let collector = Collector::default();
    let otlp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", otlp.local_addr().unwrap());
    let taking = collector.clone();
    tokio::spawn(async move { taking.take(otlp).await });
    let (folder, file) = deployment(4);
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "300"),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
        ("OTEL_BLRP_SCHEDULE_DELAY", "100"),
        ("RUST_LOG", "debug"),
    ];
    let environment: Vec<_> = environment.iter().chain(besides).copied().collect();
    let mut fleet = Fleet::start(&file, &environment).unwrap();
    tokio::task::block_in_place(|| fleet.ready()).unwrap();
    (folder, fleet, collector)
}

fn text<'a>(span: &'a Value, key: &str) -> &'a str {
    span[key].as_str().unwrap_or_default()
}

/// Every span hangs below another, or below the client's; and the way down is that of the request.
fn is_whole(spans: &[Value]) -> anyhow::Result<()> {
    let known: BTreeMap<&str, &Value> = spans.iter().map(|span| (text(span, "span"), span)).collect();
    let named = |name: &'static str| spans.iter().filter(move |span| text(span, "name") == name);
    let parent = |span: &Value| known.get(text(span, "parent")).copied();
    for span in spans {
        ensure!(text(span, "parent") == CLIENT || parent(span).is_some(), "no parent: {span}");
    }
    let roots: Vec<_> = spans.iter().filter(|span| text(span, "parent") == CLIENT).collect();
    ensure!(roots.len() == 1, "one request is one span below the client's: {roots:?}");
    ensure!(text(roots[0], "service") == "modelfleet-router" && text(roots[0], "name") == "POST /v1/chat/completions");
    let at_worker = named("modelfleet.v1.Worker/Generate").find(|span| text(span, "service") == "modelfleet-worker");
    let at_worker = at_worker.context("no span of the worker")?;
    let called = parent(at_worker).context("the worker's span has no parent")?;
    ensure!(text(called, "service") == "modelfleet-router", "the router calls the worker: {called}");
    let connection = |span: &Value| text(span, "connection").to_owned();
    let (mut holders, mut served) = (BTreeSet::new(), 0);
    for span in named("experts.run") {
        let above = parent(span).context("an expert call has no parent")?;
        if text(above, "name") == "experts.run" {
            ensure!(connection(above) == connection(at_worker), "who calls is the worker: {above}");
            ensure!(connection(span) != connection(at_worker), "who serves is another: {span}");
            holders.insert(connection(span));
            served += 1;
        } else {
            ensure!(text(above, "span") == text(at_worker, "span"), "calls hang below the worker's span: {above}");
        }
    }
    ensure!(holders.len() == 3, "experts of three other workers: {holders:?}, {served} calls");
    let processes: BTreeSet<_> = spans.iter().map(connection).collect();
    ensure!(processes.len() == 5, "a router and four workers: {processes:?}");
    Ok(())
}

/// Asks for a sum under the client's trace; its spans and the metrics of the conventions must arrive.
async fn is_told(fleet: Fleet, collector: &Collector) {
    let url = fleet.url().unwrap();
    let body = json!({
        "model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": "What is 47 + 85?"}],
    });
    let request = client().post(format!("{url}/v1/chat/completions")).json(&body);
    let response = request.header("traceparent", format!("00-{TRACE}-{CLIENT}-01")).send().await.unwrap();
    assert!(response.text().await.unwrap().contains("132"));
    poll::eventually("the trace is whole", PATIENCE, async || is_whole(&collector.trace(TRACE))).await.unwrap();
    poll::eventually("the metrics of the conventions arrive", PATIENCE, async || {
        let names = collector.metrics();
        for name in ["request.duration", "time_to_first_token", "time_per_output_token"] {
            ensure!(names.contains(&format!("gen_ai.server.{name}")), "no {name} among {names:?}");
        }
        ensure!(names.iter().any(|name| name == "gen_ai.client.token.usage"), "no usage among {names:?}");
        Ok(())
    })
    .await
    .unwrap();
    fleet.stop().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_holds_router_worker_and_experts() {
    let (_folder, fleet, collector) = traced(&[]).await;
    is_told(fleet, &collector).await;
    assert_eq!(collector.ways(), ["application/grpc - -"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_standard_variables_say_how_a_collector_is_told() {
    let variables = [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=seven"),
    ];
    let (_folder, fleet, collector) = traced(&variables).await;
    is_told(fleet, &collector).await;
    assert_eq!(collector.ways(), ["application/grpc gzip seven", "application/x-protobuf gzip seven"]);
}

#[test]
fn a_setting_that_cannot_be_honoured_is_told_and_ends_nothing() {
    let (_folder, file) = deployment(1);
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "not a URL"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "squeeze"),
        ("OTEL_EXPORTER_OTLP_LOGS_CERTIFICATE", "/nowhere.pem"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
    ];
    let mut fleet = Fleet::start(&file, &environment).unwrap();
    fleet.ready().unwrap();
    let printed = fleet.printed().join("\n");
    for told in ["not a URL", "http/json", "squeeze", "/nowhere.pem"] {
        assert!(printed.contains(told), "{told}: {printed}");
    }
    fleet.stop().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_word_of_prompt_or_answer_is_told_to_anybody_else() {
    let (_folder, fleet, collector) = traced(&[]).await;
    let url = fleet.url().unwrap();
    let thought = chat(&url, "tiny", "What is 318 + 475?").await.unwrap().reasoning;
    assert!(thought.len() > 8, "{thought:?}");
    let echo = json!({"model": "tiny", "prompt": CANARY, "echo": true, "logprobs": 1, "max_tokens": 4});
    for (path, body, status) in [
        ("completions", echo, 200),
        ("chat/completions", json!({"model": "tiny", "messages": [{"role": "user", "content": CANARY}]}), 200),
        ("chat/completions", json!({"model": "tiny", "messages": CANARY}), 400),
        ("chat/completions", json!({"model": "tiny", "messages": [{"role": CANARY, "content": 7}]}), 400),
        ("completions", json!({"model": "tiny", "prompt": [CANARY.repeat(2000)], "max_tokens": 4}), 400),
        ("completions", json!({"model": "tiny", "prompt": "a", "stop": [[CANARY]]}), 400),
        ("completions", json!({"model": "tiny", "prompt": "a", "suffix": CANARY}), 400),
    ] {
        let response = client().post(format!("{url}/v1/{path}")).json(&body).send().await.unwrap();
        assert_eq!(response.status(), status, "{body:.200}");
        let text = response.text().await.unwrap();
        assert!(path != "completions" || status != 200 || text.contains(CANARY), "the answer is a canary too: {text}");
    }
    poll::eventually("logs and metrics arrive", PATIENCE, async || {
        ensure!(collector.log_records() > 0 && collector.metrics().len() > 4, "{:?}", collector.metrics());
        Ok(())
    })
    .await
    .unwrap();
    let seen = fleet.lines();
    fleet.stop().unwrap();
    let printed = seen.lock().unwrap().join("\n");
    for secret in [CANARY, CANARY_WORD, thought.trim()] {
        assert!(!collector.contains(secret), "the collector was told {secret}");
        assert!(!printed.contains(secret), "standard error was told {secret}");
    }
    assert!(printed.contains("ready") && collector.contains("modelfleet"), "there is something to look at");
}
