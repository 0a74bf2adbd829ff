//! What a cluster does around the API server, as doubles: the StatefulSet and Job controllers, garbage collection, and
//! a kubelet whose containers are the doubles of `process`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{task::JoinSet, time::MissedTickBehavior};
use wire::proto::worker_state::Phase;

use crate::{
    api::Api,
    process::{self, Place, Shared},
};

const OWNED: [&str; 7] =
    ["statefulsets", "services", "serviceaccounts", "configmaps", "poddisruptionbudgets", "jobs", "pods"];

/// A running cluster; ends when dropped.
pub struct Cluster {
    /// The API server.
    pub api: Api,
    /// What the processes do.
    pub stage: Shared,
    no_pods: Arc<Mutex<bool>>,
    /// While set, pods are made and get no node.
    pub full: Arc<AtomicBool>,
    description: Arc<Mutex<Value>>,
    _tasks: JoinSet<()>,
}

impl Cluster {
    /// Starts one whose processes connect to `operators`.
    pub fn start(operators: Vec<String>, description: Value) -> Self {
        let (api, stage) = (Api::default(), Shared::default());
        let (no_pods, full) = (Arc::<Mutex<bool>>::default(), Arc::<AtomicBool>::default());
        for name in ["node-0", "node-1", "node-2"] {
            api.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {}}}));
            let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
            assert!(api.edit("nodes", name, |node| node["status"] = ready));
        }
        api.apply(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "router", "labels": {
                "app.kubernetes.io/name": "modelfleet", "app.kubernetes.io/component": "router"}},
        }));
        assert!(api.edit("pods", "router", |pod| pod["status"] = json!({"podIP": "127.0.0.1"})));
        let description = Arc::new(Mutex::new(description));
        let mut tasks = JoinSet::new();
        let id = text(&api.get("pods", "router").unwrap()["metadata"]["uid"]);
        process::router(&operators, &id, &stage, &mut tasks);
        let node = Node {
            api: api.clone(),
            stage: stage.clone(),
            no_pods: no_pods.clone(),
            full: full.clone(),
            operators,
            description: description.clone(),
            running: Mutex::default(),
        };
        tasks.spawn(async move {
            let mut turns = tokio::time::interval(Duration::from_millis(20));
            turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                turns.tick().await;
                node.turn();
            }
        });
        Self { api, stage, no_pods, full, description, _tasks: tasks }
    }

    /// From now on no pod is made, or pods are made again. Those that are being made just now are there afterwards.
    pub fn make_no_pods(&self, no_pods: bool) {
        *self.no_pods.lock().unwrap() = no_pods;
    }

    /// Cuts a node off: its pods are to go, and nobody ends them.
    pub fn lose(&self, node: &str) {
        assert!(self.api.edit("nodes", node, |node| node["status"]["conditions"][0]["status"] = "Unknown".into()));
        for pod in self.api.list("pods").iter().filter(|pod| pod["spec"]["nodeName"] == node) {
            self.terminate(&text(&pod["metadata"]["name"]));
        }
    }

    /// Marks a pod as one that is to go.
    pub fn terminate(&self, pod: &str) {
        let at = "2026-01-01T00:00:00Z";
        assert!(self.api.edit("pods", pod, |pod| pod["metadata"]["deletionTimestamp"] = at.into()));
    }

    /// Changes what describers tell.
    pub fn describe(&self, edit: impl FnOnce(&mut Value)) {
        edit(&mut self.description.lock().unwrap());
    }
}

struct Node {
    api: Api,
    stage: Shared,
    /// Held while some are made.
    no_pods: Arc<Mutex<bool>>,
    full: Arc<AtomicBool>,
    operators: Vec<String>,
    description: Arc<Mutex<Value>>,
    /// Processes by pod UID.
    running: Mutex<BTreeMap<String, JoinSet<()>>>,
}

impl Node {
    fn turn(&self) {
        self.collect_garbage();
        let no_pods = self.no_pods.lock().unwrap();
        if !*no_pods {
            self.make_pods();
        }
        drop(no_pods);
        self.bind_pods();
        self.run_pods();
    }

    /// Deletes what has a controller that is gone.
    fn collect_garbage(&self) {
        let kinds = OWNED.iter().chain(&["modeldeployments"]);
        let living: Vec<String> =
            kinds.flat_map(|plural| self.api.list(plural)).map(|object| text(&object["metadata"]["uid"])).collect();
        for plural in OWNED {
            for object in self.api.list(plural) {
                let owner = &object["metadata"]["ownerReferences"][0]["uid"];
                if owner.is_string() && !living.contains(&text(owner)) {
                    self.api.delete(plural, &text(&object["metadata"]["name"]));
                }
            }
        }
    }

    fn make_pods(&self) {
        for set in self.api.list("statefulsets") {
            let pods = set["spec"]["replicas"].as_u64().unwrap_or(0);
            for ordinal in 0..pods {
                let name = format!("{}-{ordinal}", text(&set["metadata"]["name"]));
                self.make_pod(&set, "StatefulSet", &name, Some(ordinal));
            }
            let last = format!("{}-{pods}", text(&set["metadata"]["name"]));
            if self.api.get("pods", &last).is_some() {
                self.api.delete("pods", &last);
            }
        }
        for job in self.api.list("jobs") {
            let name = format!("{}-pod", text(&job["metadata"]["name"]));
            self.make_pod(&job, "Job", &name, None);
        }
    }

    fn make_pod(&self, owner: &Value, kind: &str, name: &str, ordinal: Option<u64>) {
        if self.api.get("pods", name).is_some() {
            return;
        }
        let mut pod = owner["spec"]["template"].clone();
        pod["apiVersion"] = "v1".into();
        pod["kind"] = "Pod".into();
        pod["metadata"]["name"] = name.into();
        if let Some(ordinal) = ordinal {
            pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"] = ordinal.to_string().into();
        }
        pod["metadata"]["ownerReferences"] = json!([{
            "apiVersion": "apps/v1", "kind": kind, "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"], "controller": true}]);
        self.api.apply(pod);
    }

    /// Spreads pods over the nodes that live, by ordinal.
    fn bind_pods(&self) {
        let (nodes, full) = (self.live_nodes(), self.full.load(Ordering::Relaxed));
        for pod in self.api.list("pods").iter().filter(|pod| pod["spec"]["nodeName"].is_null() && !is_router(pod)) {
            let said = !pod["status"]["conditions"].is_null();
            if nodes.is_empty() || full && said {
                continue;
            }
            let node = &nodes[place(pod).ordinal as usize % nodes.len()];
            // deleted meanwhile, it is nobody's business
            let _ = self.api.edit("pods", &text(&pod["metadata"]["name"]), |pod| {
                let scheduled = json!({"type": "PodScheduled", "status": if full { "False" } else { "True" }});
                pod["status"] = json!({"conditions": [scheduled]});
                if !full {
                    pod["status"]["podIP"] = "127.0.0.1".into();
                    pod["spec"]["nodeName"] = node.as_str().into();
                }
            });
        }
    }

    fn live_nodes(&self) -> Vec<String> {
        let nodes = self.api.list("nodes").into_iter();
        let live = nodes.filter(|node| node["status"]["conditions"][0]["status"] == "True");
        live.map(|node| text(&node["metadata"]["name"])).collect()
    }

    fn run_pods(&self) {
        let mut pods = self.api.list("pods");
        let nodes = self.live_nodes();
        pods.retain(|pod| nodes.contains(&text(&pod["spec"]["nodeName"])));
        let mut running = self.running.lock().unwrap();
        let ids: Vec<String> = pods.iter().map(|pod| text(&pod["metadata"]["uid"])).collect();
        running.retain(|id, _| ids.contains(id));
        for pod in &pods {
            let place = place(pod);
            running.entry(place.id.clone()).or_insert_with(|| self.start(pod, place.clone()));
            self.probe(pod, &place.id);
        }
    }

    fn start(&self, pod: &Value, place: Place) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        match pod["metadata"]["labels"]["app.kubernetes.io/component"].as_str() {
            Some("worker") => process::worker(&self.operators, place, &self.stage, &mut tasks),
            _ => process::describer(&self.operators, place, self.description.lock().unwrap().to_string(), &mut tasks),
        }
        tasks
    }

    /// A pod is ready when its worker has loaded and its readiness gate is open.
    fn probe(&self, pod: &Value, id: &str) {
        let phase = self.stage.lock().unwrap().phases.get(id).copied();
        let loaded = matches!(phase, Some(Phase::Serving | Phase::Draining | Phase::Drained));
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let has = |kind: &str| conditions.iter().any(|one| one["type"] == kind && one["status"] == "True");
        let ready = loaded && has("modelfleet.io/routed");
        let probed = pod["status"]["containerStatuses"][0]["ready"] == true;
        if ready == has("Ready") && probed == loaded {
            return;
        }
        let _ = self.api.edit("pods", &text(&pod["metadata"]["name"]), |pod| {
            let conditions = pod["status"]["conditions"].as_array_mut().unwrap();
            conditions.retain(|one| one["type"] != "Ready");
            conditions.push(json!({"type": "Ready", "status": if ready { "True" } else { "False" }}));
            let status = |name: &str, ready: bool| {
                json!({
                "name": name, "ready": ready, "restartCount": 0, "image": "", "imageID": "",
                "state": {"terminated": {"exitCode": 0}}})
            };
            pod["status"]["initContainerStatuses"] = json!([status("fetch", true)]);
            pod["status"]["containerStatuses"] = json!([status("worker", loaded)]);
        });
    }
}

fn is_router(pod: &Value) -> bool {
    pod["metadata"]["name"] == "router"
}

fn place(pod: &Value) -> Place {
    let labels = &pod["metadata"]["labels"];
    let number = |label: &str| labels[label].as_str().and_then(|text| text.parse().ok()).unwrap_or(0);
    let arguments = pod["spec"]["containers"][0]["args"].as_array().cloned().unwrap_or_default();
    let environment = pod["spec"]["containers"][0]["env"].as_array().cloned().unwrap_or_default();
    let revision = environment.iter().find(|one| one["name"] == "MODELFLEET_REVISION");
    let flag = arguments.iter().position(|argument| argument == "--content-hash");
    Place {
        id: text(&pod["metadata"]["uid"]),
        model: format!("default/{}", text(&pod["metadata"]["annotations"]["modelfleet.io/model-name"])),
        // a worker has it as an argument, which is the label's value too
        revision: text(revision.map_or(&labels["modelfleet.io/revision"], |one| &one["value"])),
        replica: number("modelfleet.io/replica"),
        ordinal: number("apps.kubernetes.io/pod-index"),
        content_hash: flag.map(|flag| text(&arguments[flag + 1])).unwrap_or_default(),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
