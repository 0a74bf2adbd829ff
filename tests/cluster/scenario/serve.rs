//! What a user does first: declare a model, watch it become ready, ask it.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    ask::{Client, question},
    cluster::{Cluster, SYSTEM, run, text},
};

pub(crate) async fn five_lines_answer_within_a_minute(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply_example("five-lines.yaml").await?;
    let model = cluster.ready("tiny-r1", 60).await?;
    ensure!(model.printed("ready") == "1/1", "READY is {}", model.printed("ready"));
    ensure!(model.printed("model") == "tiny-r1", "MODEL is {}", model.printed("model"));
    let client = Client::router(cluster).await?;
    client.right_sum("tiny-r1", 47, 85).await?;
    client.right_sum("models/tiny-r1", 318, 475).await?;
    Ok(())
}

/// `tests/cluster/ask.py` checks what it gets.
pub(crate) async fn the_openai_client_is_served(cluster: &Cluster) -> anyhow::Result<()> {
    let url = Client::router(cluster).await?.url;
    let python = cluster.python.to_string_lossy().into_owned();
    run(&python, &["tests/cluster/ask.py", &format!("{url}/v1"), "tiny-r1"], "").await.map(drop)
}

/// Typed, and found by reflection alone: grpcurl has no copy of our protocol.
pub(crate) async fn grpcurl_is_served(cluster: &Cluster) -> anyhow::Result<()> {
    let address = format!("{}:9090", cluster.service(SYSTEM, "modelfleet-router").await?);
    let services = run("grpcurl", &["-plaintext", &address, "list"], "").await?;
    for service in ["modelfleet.v1.Inference", "grpc.health.v1.Health"] {
        ensure!(services.lines().any(|line| line == service), "{service} is missing: {services}");
    }
    ensure!(!services.contains("modelfleet.v1.Worker"), "what is between our processes is not for clients: {services}");
    let health = run("grpcurl", &["-plaintext", &address, "grpc.health.v1.Health/Check"], "").await?;
    ensure!(health.contains("SERVING"), "{health}");

    let request = json!({
        "model": "tiny-r1",
        "messages": {"messages": [{"role": "user", "content": "What is 47 + 85?"}]},
        "sampling": {"temperature": 0},
    });
    let call = ["-plaintext", "-d", "@", &address, "modelfleet.v1.Inference/Generate"];
    let printed = run("grpcurl", &call, &request.to_string()).await?;
    let responses = serde_json::Deserializer::from_str(&printed).into_iter::<Value>();
    let responses = responses.collect::<Result<Vec<_>, _>>()?;
    let answer: String = responses.iter().map(|response| text(response, "/text")).collect();
    let thought: String = responses.iter().map(|response| text(response, "/reasoning")).collect();
    ensure!(answer.contains("132") && !thought.is_empty(), "{printed}");
    ensure!(responses.last().is_some_and(|last| last["usage"]["completionTokens"].as_u64() > Some(0)), "{printed}");

    let unknown = json!({"model": "nobody", "prompt": "1"});
    let refused = run("grpcurl", &call, &unknown.to_string()).await.expect_err("an unknown model");
    ensure!(format!("{refused:#}").contains("NotFound"), "{refused:#}");
    Ok(())
}

/// `SHARDS 4/4`, `EXPERTS 16/16`; each worker keeps four experts a layer, and the answer is that of one worker.
pub(crate) async fn four_shards_share_the_experts_on_three_nodes(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply_example("sharded.yaml").await?;
    let model = cluster.ready("sharded", 90).await?;
    ensure!(model.printed("shards") == "4/4", "SHARDS is {}", model.printed("shards"));
    ensure!(model.printed("experts") == "16/16", "EXPERTS is {}", model.printed("experts"));

    let workers = cluster.workers("sharded").await?;
    let nodes: BTreeSet<_> = workers.values().map(|pod| text(pod, "/spec/nodeName")).collect();
    ensure!(workers.len() == 4 && nodes.len() == 3, "four workers on three nodes: {nodes:?}");
    let mut bytes = BTreeSet::new();
    for (name, pod) in &workers {
        let admin = Client::new(&format!("{}:9400", text(pod, "/status/podIP")));
        let experts = admin.metric("modelfleet_worker_experts_held").await.with_context(|| name.clone())?;
        // three of the four layers have experts
        ensure!((experts - 12.0).abs() < 0.5, "{name} holds {experts} experts; 4 in each of 3 layers are its share");
        bytes.insert(admin.metric("modelfleet_worker_expert_weights_bytes").await? as u64);
    }
    let whole = cluster.workers("tiny-r1").await?;
    let whole = whole.values().next().context("a worker of tiny-r1")?;
    let whole = Client::new(&format!("{}:9400", text(whole, "/status/podIP")));
    let all = whole.metric("modelfleet_worker_expert_weights_bytes").await? as u64;
    ensure!(all > 0 && bytes == [all / 4].into(), "a quarter of {all} bytes each: {bytes:?}");

    let client = Client::router(cluster).await?;
    for (a, b) in [(47, 85), (318, 475), (9, 94)] {
        let sharded = client.right_sum("tiny-r1-sharded", a, b).await?.json();
        let alone = client.right_sum("tiny-r1", a, b).await?.json();
        ensure!(sharded["choices"] == alone["choices"], "four workers: {sharded}\none: {alone}");
    }
    Ok(())
}

/// A part of a request line and body, and the status that it gets.
const BAD_REQUESTS: [(&str, &str, &str, u16); 19] = [
    ("GET", "/v1/nonsense", "", 404),
    ("GET", "/v1/chat/completions", "", 405),
    ("POST", "/v1/chat/completions", "", 400),
    ("POST", "/v1/chat/completions", "{", 400),
    ("POST", "/v1/chat/completions", "[]", 400),
    ("POST", "/v1/chat/completions", r#"{"messages": []}"#, 400),
    ("POST", "/v1/chat/completions", r#"{"model": 7, "messages": []}"#, 400),
    ("POST", "/v1/chat/completions", r#"{"model": "nobody", "messages": [{"role": "user", "content": "1"}]}"#, 404),
    ("POST", "/v1/chat/completions", r#"{"model": "tiny-r1"}"#, 400),
    ("POST", "/v1/chat/completions", r#"{"model": "tiny-r1", "messages": "hello"}"#, 400),
    (
        "POST",
        "/v1/chat/completions",
        r#"{"model": "tiny-r1", "messages": [{"role": "user", "content": "1"}], "n": 1000}"#,
        400,
    ),
    (
        "POST",
        "/v1/chat/completions",
        r#"{"model": "tiny-r1", "messages": [{"role": "user", "content": "1"}], "temperature": -1}"#,
        400,
    ),
    (
        "POST",
        "/v1/chat/completions",
        r#"{"model": "tiny-r1", "messages": [{"role": "user", "content": "1"}], "top_p": 7}"#,
        400,
    ),
    (
        "POST",
        "/v1/chat/completions",
        r#"{"model": "tiny-r1", "messages": [{"role": "user", "content": "1"}], "max_tokens": 0}"#,
        400,
    ),
    (
        "POST",
        "/v1/chat/completions",
        r#"{"model": "tiny-r1", "messages": [{"role": "user", "content": "1"}], "stream": "yes"}"#,
        400,
    ),
    (
        "POST",
        "/v1/chat/completions",
        r#"{"model": "tiny-r1", "messages": [{"role": "user", "content": "1"}], "chat_template": "{{ 1 }}"}"#,
        400,
    ),
    (
        "POST",
        "/v1/chat/completions",
        r#"{"model": "tiny-r1", "messages": [{"role": "user", "content": "1"}], "tools": [{"type": "function", "function": {"name": "f"}}]}"#,
        400,
    ),
    ("POST", "/v1/completions", r#"{"model": "tiny-r1", "prompt": [999999]}"#, 400),
    ("POST", "/v1/completions", r#"{"model": "tiny-r1", "prompt": [-1]}"#, 400),
];

pub(crate) async fn bad_requests_get_a_clear_answer(cluster: &Cluster) -> anyhow::Result<()> {
    let client = Client::router(cluster).await?;
    let headers = [("content-type", "application/json")];
    for (method, path, body, status) in BAD_REQUESTS {
        let method = Method::from_bytes(method.as_bytes())?;
        let answer = client.send(method, path, &headers, body.into()).await?;
        ensure!(answer.status.as_u16() == status, "{path} {body}: {} {}, not {status}", answer.status, answer.text());
        let error = &answer.json()["error"];
        ensure!(
            !text(error, "/message").is_empty() && !text(error, "/type").is_empty(),
            "{path} {body}: {}",
            answer.text()
        );
    }
    let deep = format!(r#"{{"model": "tiny-r1", "x": {}{}}}"#, "[".repeat(5000), "]".repeat(5000));
    let big = question("tiny-r1", &"1".repeat(8 << 20)).to_string();
    for (body, status) in [(deep, StatusCode::BAD_REQUEST), (big, StatusCode::PAYLOAD_TOO_LARGE)] {
        let answer = client.send(Method::POST, "/v1/chat/completions", &headers, body.into_bytes()).await?;
        ensure!(answer.status == status, "{} {}, not {status}", answer.status, answer.text());
    }
    client.right_sum("tiny-r1", 20, 22).await?;
    Ok(())
}
