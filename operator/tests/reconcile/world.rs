//! A cluster with operators in it, and the words of the tests.

use std::time::{Duration, Instant};

use operator::{
    control::Fleet,
    controller::{self, Settings},
    lease::Timing,
    render::Install,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use crate::{api::Api, cluster::Cluster};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// The path of the model that [`model`] declares.
pub const MODEL: &str = "default/tiny";

/// A cluster, and the addresses of its operators.
pub struct World {
    /// The cluster.
    pub cluster: Cluster,
    addresses: Vec<String>,
}

/// A running operator; killed when dropped.
pub struct Operator {
    tasks: JoinSet<()>,
}

impl World {
    /// A cluster with room for so many operators.
    pub async fn with(operators: usize) -> Self {
        // RUST_LOG=operator=debug shows what the operators do
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        let mut listeners = Vec::new();
        for _ in 0..operators {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let addresses: Vec<_> = listeners.iter().map(|one| one.local_addr().unwrap().to_string()).collect();
        drop(listeners);
        Self { cluster: Cluster::start(addresses.clone(), description()), addresses }
    }

    /// A cluster, an operator, and the model `tiny` with two shards, Ready.
    pub async fn installed() -> (Self, Operator) {
        let world = Self::with(1).await;
        let operator = world.operator(0).await;
        world.api().apply(model());
        world.ready().await;
        (world, operator)
    }

    /// The API server.
    pub fn api(&self) -> &Api {
        &self.cluster.api
    }

    /// Starts an operator.
    pub async fn operator(&self, at: usize) -> Operator {
        self.operator_with(at, "modelfleet-operator").await
    }

    /// Starts an operator that competes for this Lease.
    pub async fn operator_with(&self, at: usize, lease: &str) -> Operator {
        let listener = self.bind(at).await;
        let fleet = Fleet::new();
        let settings = Settings {
            namespaces: Vec::new(),
            namespace: "default".to_owned(),
            router_selector: "app.kubernetes.io/name=modelfleet,app.kubernetes.io/component=router".to_owned(),
            lease: lease.to_owned(),
            identity: format!("operator-{at}"),
            timing: Timing {
                duration: Duration::from_secs(2),
                deadline: Duration::from_millis(1500),
                renew: Duration::from_millis(200),
            },
            install: Install {
                image: "modelfleet:1".to_owned(),
                image_pull_policy: "IfNotPresent".to_owned(),
                operator: "modelfleet-operator:9100".to_owned(),
                router: "modelfleet-router".to_owned(),
                ..Install::default()
            },
        };
        let client = self.api().client();
        let mut tasks = JoinSet::new();
        let served = fleet.clone();
        tasks.spawn(async move {
            served.serve(listener, std::future::pending()).await.unwrap();
        });
        tasks.spawn(controller::run(client, settings, fleet, std::future::pending()));
        Operator { tasks }
    }

    async fn bind(&self, at: usize) -> TcpListener {
        let end = Instant::now() + PATIENCE;
        loop {
            match TcpListener::bind(&self.addresses[at]).await {
                Ok(listener) => return listener,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await; // polls
        }
    }

    /// Waits until `is` holds.
    pub async fn until(&self, what: &str, is: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is(self) {
            if Instant::now() >= end {
                let writes = self.api().writes();
                let last = &writes[writes.len().saturating_sub(12)..];
                panic!("never: {what}; status: {:#}; last writes: {last:#?}", self.status());
            }
            tokio::time::sleep(Duration::from_millis(10)).await; // polls
        }
    }

    /// Waits until the model is Ready, of its newest generation.
    pub async fn ready(&self) {
        self.until("Ready", |world| {
            let md = world.api().get("modeldeployments", "tiny").unwrap();
            md["status"]["summary"] == "Ready" && md["status"]["observedGeneration"] == md["metadata"]["generation"]
        })
        .await;
    }

    /// Waits until the STATUS column has this.
    pub async fn says(&self, summary: &str) {
        self.until(summary, |world| world.status()["summary"].as_str().is_some_and(|text| text.starts_with(summary)))
            .await;
    }

    /// The status of the model.
    pub fn status(&self) -> Value {
        self.api().get("modeldeployments", "tiny").map(|md| md["status"].clone()).unwrap_or_default()
    }

    /// One condition of the model.
    pub fn condition(&self, kind: &str) -> Value {
        let status = self.status();
        let mut all = status["conditions"].as_array().cloned().unwrap_or_default().into_iter();
        all.find(|one| one["type"] == kind).unwrap_or_default()
    }

    /// Declares the model with its files on a claim of these access modes.
    pub fn declare_on_claim(&self, modes: &[&str]) {
        self.api().apply(json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"},
            "spec": {"accessModes": modes}}));
        let mut model = model();
        model["spec"]["model"]["source"] = json!("pvc://models/tiny-r1");
        self.api().apply(model);
    }

    /// Changes the model as a user would.
    pub fn edit(&self, edit: impl FnOnce(&mut Value)) {
        assert!(self.api().edit("modeldeployments", "tiny", |md| edit(&mut md["spec"])));
    }

    /// The names of the objects of a kind.
    pub fn names(&self, plural: &str) -> Vec<String> {
        let name = |object: &Value| object["metadata"]["name"].as_str().unwrap().to_owned();
        self.api().list(plural).iter().map(name).collect()
    }

    /// `NAME UID` of the objects of a kind.
    pub fn uids(&self, plural: &str) -> Vec<String> {
        let line = |object: &Value| format!("{} {}", object["metadata"]["name"], object["metadata"]["uid"]);
        self.api().list(plural).iter().map(line).collect()
    }

    /// Everything that the operator owns, without what each run numbers anew.
    pub fn objects(&self) -> Value {
        let kinds = ["statefulsets", "services", "serviceaccounts", "configmaps", "poddisruptionbudgets", "jobs"];
        let of = |plural: &str| -> Vec<Value> { self.api().list(plural).into_iter().map(masked).collect() };
        kinds
            .into_iter()
            .map(|plural| (plural.to_owned(), Value::Array(of(plural))))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    /// `kind name generation` of everything.
    pub fn generations(&self) -> Vec<String> {
        let kinds = ["statefulsets", "services", "configmaps", "poddisruptionbudgets", "pods", "modeldeployments"];
        let line = |plural: &str, object: &Value| {
            let metadata = &object["metadata"];
            format!("{plural} {} {} {}", metadata["name"], metadata["uid"], metadata["generation"])
        };
        kinds
            .iter()
            .flat_map(|plural| self.api().list(plural).iter().map(|one| line(plural, one)).collect::<Vec<_>>())
            .collect()
    }
}

impl Operator {
    /// Ends it as a crash does, at once.
    pub async fn kill(mut self) {
        self.tasks.shutdown().await;
    }
}

/// A model with two shards.
pub fn model() -> Value {
    json!({
        "apiVersion": "modelfleet.io/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"source": "hf://modelfleet/tiny-r1"},
            "replicas": 1,
            "parallelism": {"expert": {"shards": 2}},
            "rollout": {"drainTimeout": "20s"},
        },
    })
}

fn description() -> Value {
    json!({
        "architecture": "DeepseekV3ForCausalLM", "dtype": "bf16", "parameters": 3_600_000, "denseBytes": 1_000_000,
        "kvBytesPerToken": 512, "maxContextTokens": 1024, "vocabSize": 512, "hiddenSize": 256, "layers": 2,
        "experts": 4, "expertsPerToken": 2, "moeLayers": [{"layer": 1, "expertBytes": 98_304}],
        "resolvedRevision": "c0ffee", "contentHash": "ab".repeat(32),
        "files": [{"path": "model.safetensors", "size": 7_000_000}],
    })
}

fn masked(mut object: Value) -> Value {
    let metadata = object["metadata"].as_object_mut().unwrap();
    for field in ["uid", "resourceVersion", "generation", "creationTimestamp", "ownerReferences"] {
        metadata.remove(field);
    }
    if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.remove("modelfleet.io/rendered");
    }
    object.as_object_mut().unwrap().remove("status");
    object
}
