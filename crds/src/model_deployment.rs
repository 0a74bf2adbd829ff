//! `ModelDeployment`: what a user declares.
//!
//! The types say what can be written, not what is accepted: numbers are signed and durations are text, as they
//! arrive. The operator's `validate` turns them into values that carry the proof.

#![allow(clippy::duplicated_attributes, reason = "each column of `kubectl get` has a type")]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::status::ModelDeploymentStatus;

/// A model, and how it is served.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "modelfleet.io",
    version = "v1alpha1",
    kind = "ModelDeployment",
    plural = "modeldeployments",
    shortname = "mdep",
    category = "all",
    namespaced,
    status = "ModelDeploymentStatus",
    derive = "Default",
    derive = "PartialEq",
    doc = "A model that a fleet of workers serves.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Model", type_ = "string", json_path = ".status.printed.model"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.printed.ready"),
    printcolumn(name = "Shards", type_ = "string", json_path = ".status.printed.shards"),
    printcolumn(name = "Experts", type_ = "string", json_path = ".status.printed.experts"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.summary"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ModelDeploymentSpec {
    /// Which model is served, and where its files come from.
    pub model: Model,
    /// How many complete copies of the model serve requests, each on its own workers. With `autoscaling.mode: Internal`
    /// the size to start with; later changes are refused then. 0 is legal.
    #[serde(default = "one")]
    pub replicas: i32,
    /// How the model is parted among the workers of a replica.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallelism: Option<Parallelism>,
    /// What each worker asks of its node. A memory limit also bounds how much of the model a worker is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// What each worker keeps in memory beside the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Where workers may run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduling: Option<Scheduling>,
    /// How the number of replicas follows the load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// How requests reach the workers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing: Option<Routing>,
    /// What happens when workers are lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// How a change of the model or of its workers is carried out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
    /// No workers at all, and no waking: requests are answered with 503.
    #[serde(default, skip_serializing_if = "is_false")]
    pub suspend: bool,
    /// A partial PodTemplateSpec that is merged into the pods of the workers: lists with keys by key; `tolerations`
    /// and `nodeSelector` replace those of `scheduling`. The containers are named `fetch` and `worker`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub pod_template: Option<serde_json::Value>,
}

/// Which model is served.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Model {
    /// Where the files are: `hf://OWNER/NAME` (a hub of the Hugging Face kind), `pvc://CLAIM/PATH` (a claim of this
    /// namespace, mounted read-only; in a cluster only) or `file://PATH` (local mode only; a relative path starts
    /// at the YAML's folder).
    #[schemars(length(max = 512))]
    pub source: String,
    /// Branch, tag or commit of an `hf://` source; `main` if unset. What it meant at the start is in the status.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub revision: Option<String>,
    /// The names that requests may use for this model, beside `NAMESPACE/NAME`, which always works. The object's
    /// name if unset. The oldest holder keeps a name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), inner(length(max = 128)), extend("x-kubernetes-list-type" = "set"))]
    pub served_names: Option<Vec<String>>,
    /// The Secret of this namespace that holds the hub's token. It may be made later: the fetch waits for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials_ref: Option<SecretKey>,
    /// The longest prompt plus answer, in tokens; the model's own limit if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_context_tokens: Option<i64>,
}

/// One key of a Secret in the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// Name of the Secret.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Key inside the Secret.
    #[serde(default = "token")]
    #[schemars(length(max = 253))]
    pub key: String,
}

/// How the model is parted among the workers of a replica.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Parallelism {
    /// How the routed experts of a mixture-of-experts model are parted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert: Option<ExpertParallelism>,
}

/// How the routed experts are parted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExpertParallelism {
    /// Workers of a replica, each with its share of every layer's experts. If unset, the fewest whose share fits the
    /// memory limit; 1 without a limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<i32>,
    /// Further copies of each expert, each on another node: with 1, any node can be lost and no request fails; 0 if
    /// unset. A change moves experts while requests run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redundancy: Option<i32>,
    /// Whether experts move when the measured load says that others should have more copies or other workers;
    /// `Disabled` if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rebalance: Option<Rebalance>,
}

/// What is done when the measured load of the experts is uneven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Rebalance {
    /// Nothing.
    #[default]
    Disabled,
    /// The status and an Event say what would be gained.
    Advise,
    /// Experts move while requests run, if the gain outweighs the move.
    Apply,
}

/// What a worker asks of its node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// The least a worker is given, by resource name. If memory is unset, what the plan needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "quantities")]
    pub requests: Option<BTreeMap<String, Quantity>>,
    /// The most a worker may use, by resource name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "quantities")]
    pub limits: Option<BTreeMap<String, Quantity>>,
}

/// What a worker keeps in memory beside the weights.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// Tokens of all running requests that a worker's key-value cache holds. If unset, what fits the memory limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_tokens: Option<i64>,
}

/// Where workers may run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Scheduling {
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "labels")]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// Taints of nodes that are tolerated.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub tolerations: Option<Vec<Toleration>>,
    /// Name of the PriorityClass of the worker pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub priority_class_name: Option<String>,
    /// What the workers of a replica are spread over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
}

/// What the workers of a replica are spread over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Topology {
    /// The node label whose values are the failure domains: no two copies of an expert are in one, and the workers of a
    /// replica are spread evenly over them. `kubernetes.io/hostname` if unset. Only with `redundancy`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 317))]
    pub spread_across: Option<String>,
}

/// A taint of nodes that is tolerated.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Toleration {
    /// Key of the taint; every key if unset, and then `operator` is `Exists`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 317))]
    pub key: Option<String>,
    /// Whether the taint's value counts.
    #[serde(default)]
    pub operator: TolerationOperator,
    /// Value of the taint, with `operator: Equal`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub value: Option<String>,
    /// Effect of the taint; every effect if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effect: Option<TaintEffect>,
    /// How long a `NoExecute` taint is tolerated; for ever if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toleration_seconds: Option<i64>,
}

/// How a toleration is compared with a taint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TolerationOperator {
    /// Key and value are equal.
    #[default]
    Equal,
    /// The key is equal.
    Exists,
}

/// What a taint does to pods that do not tolerate it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TaintEffect {
    /// They are not scheduled.
    NoSchedule,
    /// They are scheduled only if nothing else fits.
    PreferNoSchedule,
    /// They are evicted.
    NoExecute,
}

/// How the number of replicas follows the load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Autoscaling {
    /// Who changes the number of replicas.
    pub mode: AutoscalingMode,
    /// The fewest replicas; 1 if unset. With 0 an idle model goes to sleep and its next request wakes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_replicas: Option<i32>,
    /// The most replicas. `Internal` needs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_replicas: Option<i32>,
    /// What is measured; `QueueDepth` with a target of 8 if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub metrics: Option<Vec<Metric>>,
    /// How fast the number may change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub behavior: Option<Behavior>,
    /// When a model without requests goes to sleep, with `minReplicas: 0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle: Option<Idle>,
}

/// Who changes the number of replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AutoscalingMode {
    /// Whoever writes `spec.replicas`: a person, or a HorizontalPodAutoscaler through `/scale`.
    #[default]
    Disabled,
    /// The operator, from the queue that it sees. It never writes `spec.replicas`.
    Internal,
}

/// What is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Metric {
    /// Which signal.
    #[serde(rename = "type")]
    pub kind: MetricType,
    /// How much of it a replica should have.
    pub queue_depth: QueueDepth,
}

/// A signal to scale by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MetricType {
    /// Requests that wait or run.
    QueueDepth,
}

/// Target of `QueueDepth`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QueueDepth {
    /// Waiting and running requests that one replica should have at most.
    pub target: i32,
}

/// How fast the number of replicas may change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Behavior {
    /// How it shrinks. It grows at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale_down: Option<ScaleDown>,
}

/// How the number of replicas shrinks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScaleDown {
    /// The largest number wanted over this time is kept; `5m` if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 20))]
    pub stabilization_window: Option<String>,
}

/// When a model goes to sleep.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Idle {
    /// How long no request was seen before the last replica goes; `10m` if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 20))]
    pub after: Option<String>,
}

/// How requests reach the workers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Routing {
    /// What happens to requests that no worker has room for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<Queue>,
    /// Whether a stream goes on at another worker when its own is lost or goes away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<Migration>,
}

/// Whether a stream goes on at another worker when its own is lost or goes away.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Migration {
    /// Whether it does.
    #[serde(default)]
    pub mode: MigrationMode,
    /// How often one stream may; 3 if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<i32>,
}

/// Whether streams go on at other workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MigrationMode {
    /// They do, with the same tokens.
    #[default]
    Enabled,
    /// They end with an error.
    Disabled,
}

/// What happens when workers are lost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// How long a running request waits for an expert that no worker holds; `30s` if unset. Then it ends with an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 20))]
    pub max_wait: Option<String>,
}

/// What happens to requests that no worker has room for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Queue {
    /// How many may wait, over all routers; 1024 if unset. More are answered with 429.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_pending: Option<i32>,
    /// How long each may wait; `2m` if unset. Then it is answered with 503.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 20))]
    pub max_wait: Option<String>,
}

/// How a change of the model or of its workers is carried out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// How many replicas change at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rolling_update: Option<RollingUpdate>,
    /// How long a worker that is to go may finish its requests; `60s` if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 20))]
    pub drain_timeout: Option<String>,
    /// How long a change may make no progress before the status says so; `10m` if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 20))]
    pub progress_deadline: Option<String>,
}

/// How many replicas change at a time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RollingUpdate {
    /// Replicas above the wanted number during a change; 1 if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_surge: Option<i32>,
    /// Replicas that may be missing during a change; 0 if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_unavailable: Option<i32>,
}

fn one() -> i32 {
    1
}

fn token() -> String {
    "token".to_owned()
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

fn any_object(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// Numbers and text are both usual: `cpu: 2`, `memory: 4Gi`.
fn quantities(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "object",
        "maxProperties": 8,
        "additionalProperties": {
            "x-kubernetes-int-or-string": true,
            "maxLength": 32,
        },
    })
}

fn labels(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "object",
        "maxProperties": 32,
        "additionalProperties": {"type": "string", "maxLength": 63},
    })
}
