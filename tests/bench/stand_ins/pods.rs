//! A kubelet without containers: every pod gets an address, and the stand-in of its process says to the operator what the
//! process would say. A describer tells what the model weighs; a worker holds its experts at once, and tells its load
//! every second.

use std::{collections::BTreeMap, pin::pin, time::Duration};

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::JoinSet, time::interval};
use wire::proto::{
    Description, Hello, Report, WorkerLoad, WorkerState, hello::Role, instruction::Instruction, report::Report as Say,
    worker_state::Phase,
};

const READY: &str = "Ready";
const ROUTED: &str = "modelfleet.io/routed";

/// Plays for the pods of namespace `default`, as the API server at `api` (plain HTTP) has them, for ever.
pub(crate) async fn run(api: &str, operator: &str) -> anyhow::Result<()> {
    let node =
        Node { pods: format!("{api}/api/v1/namespaces/default/pods"), client: client()?, description: describe()? };
    let mut running = BTreeMap::<String, JoinSet<()>>::new();
    let mut ticks = interval(Duration::from_secs(1));
    loop {
        ticks.tick().await;
        let mut pods: Value = node.client.get(&node.pods).send().await?.json().await?;
        let pods: Vec<Value> = pods["items"].as_array_mut().context("a list of pods")?.drain(..).collect();
        running.retain(|id, _| pods.iter().any(|pod| pod["metadata"]["uid"] == id.as_str()));
        for pod in &pods {
            let start = || node.start(pod, operator);
            running.entry(text(&pod["metadata"]["uid"])).or_insert_with(start);
            node.report(pod).await?;
        }
    }
}

struct Node {
    pods: String,
    client: reqwest::Client,
    description: String,
}

/// What tiny-r1 weighs, as `modelfleet-worker describe` tells it.
fn describe() -> anyhow::Result<String> {
    let files = engine::LocalFiles(tests::root().join("manifests/models/tiny-r1"));
    let mut described = serde_json::to_value(engine::describe(&files)?)?;
    described["resolvedRevision"] = "c0ffee".into();
    described["contentHash"] = "ab".repeat(32).into();
    described["files"] = json!([{"path": "model.safetensors", "size": 7_000_000}]);
    Ok(described.to_string())
}

fn client() -> anyhow::Result<reqwest::Client> {
    // fails only if there is a provider already
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(reqwest::Client::builder().no_proxy().build()?)
}

impl Node {
    fn start(&self, pod: &Value, operator: &str) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        let (operators, hello) = (vec![operator.to_owned()], hello(pod));
        match hello.role() {
            Role::Worker => drop(tasks.spawn(worker(operators, hello))),
            Role::Describe => drop(tasks.spawn(describer(operators, hello, self.description.clone()))),
            _ => {} // a router: a real one runs beside us
        }
        tasks
    }

    /// Tells the API server of a pod's address, and whether it is ready: once the operator has opened its gate.
    async fn report(&self, pod: &Value) -> anyhow::Result<()> {
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let has = |kind: &str| conditions.iter().any(|one| one["type"] == kind && one["status"] == "True");
        if pod["status"]["podIP"].is_string() && has(READY) == has(ROUTED) {
            return Ok(());
        }
        let ready = |is: bool| json!({"type": READY, "status": if is { "True" } else { "False" }});
        let container = json!({"name": "worker", "ready": true, "restartCount": 0, "image": "", "imageID": "",
            "state": {"running": {}}});
        let status = json!({"status": {
            "phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}],
            "conditions": [{"type": "PodScheduled", "status": "True"}, ready(has(ROUTED))],
            "containerStatuses": [container]}});
        let url = format!("{}/{}/status", self.pods, text(&pod["metadata"]["name"]));
        let patch = self.client.patch(url).header("content-type", "application/strategic-merge-patch+json");
        let response = patch.body(status.to_string()).send().await?;
        let code = response.status();
        ensure!(code.is_success() || code == 404, "{code}: {}", response.text().await?);
        Ok(())
    }
}

fn hello(pod: &Value) -> Hello {
    let labels = &pod["metadata"]["labels"];
    let number = |label: &str| labels[label].as_str().and_then(|text| text.parse().ok()).unwrap_or_default();
    let container = &pod["spec"]["containers"][0];
    let entries = |list: &str| container[list].as_array().cloned().unwrap_or_default();
    let arguments = entries("args");
    let hash = arguments.iter().skip_while(|argument| *argument != "--content-hash").nth(1);
    let environment = entries("env");
    let revision = environment.iter().find(|one| one["name"] == "MODELFLEET_REVISION");
    let role = match labels["app.kubernetes.io/component"].as_str() {
        Some("worker") => Role::Worker,
        Some("router") => Role::Router,
        _ => Role::Describe,
    };
    let id = text(&pod["metadata"]["uid"]);
    Hello {
        role: role.into(),
        process: format!("{id} 1"),
        id,
        model: format!("default/{}", text(&pod["metadata"]["annotations"]["modelfleet.io/model-name"])),
        revision: text(revision.map_or(&labels["modelfleet.io/revision"], |one| &one["value"])),
        replica: number("modelfleet.io/replica"),
        ordinal: number("apps.kubernetes.io/pod-index"),
        address: "127.0.0.1:9000".to_owned(),
        content_hash: hash.map(text).unwrap_or_default(),
        ..Hello::default()
    }
}

async fn describer(operators: Vec<String>, hello: Hello, description: String) {
    let (say, reports) = mpsc::channel(4);
    let mut told = pin!(wire::fleet::watch(operators, move || hello.clone(), reports));
    let description = Say::Description(Description { json: description.into_bytes().into() });
    // fails only if the stream below is gone
    let _ = say.send(Report { report: Some(description) }).await;
    while told.next().await.is_some() {}
}

async fn worker(operators: Vec<String>, hello: Hello) {
    let (say, reports) = mpsc::channel(4);
    let mut told = pin!(wire::fleet::watch(operators, move || hello.clone(), reports));
    let mut ticks = interval(Duration::from_secs(1));
    loop {
        let word = tokio::select! {
            _ = ticks.tick() => Say::WorkerLoad(WorkerLoad { kv_tokens_total: 65_536, ..WorkerLoad::default() }),
            told = told.next() => match told.and_then(|told| told.instruction) {
                Some(Instruction::Mesh(mesh)) => {
                    let phase = if mesh.drain { Phase::Drained } else { Phase::Serving };
                    Say::WorkerState(WorkerState { phase: phase.into(), placement: mesh.version })
                }
                Some(_) => continue,
                None => return,
            },
        };
        // fails only if the stream above is gone
        let _ = say.send(Report { report: Some(word) }).await;
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
