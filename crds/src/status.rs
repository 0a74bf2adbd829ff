//! The status of a `ModelDeployment`: what the operator saw and did. Written by one field manager, whole.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operator saw and did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelDeploymentStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Accepted, Planned, ModelReady, Scheduled, Available, Progressing, Degraded, ScalingActive, Ready`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// One line for people, at most 120 characters: the column STATUS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// The other columns of `kubectl get`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub printed: Option<Printed>,
    /// Replicas that exist, ready or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Replicas whose workers are all ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<i32>,
    /// Replicas of the newest revision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updated_replicas: Option<i32>,
    /// Replicas that are wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_replicas: Option<i32>,
    /// Matches one pod a replica, for `/scale`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Workers over all replicas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<ShardCounts>,
    /// Routed experts; absent for a dense model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertCounts>,
    /// What each replica is made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanStatus>,
    /// What the model's files say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelStatus>,
    /// Where requests are answered.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["protocol"]))]
    pub endpoints: Vec<Endpoint>,
    /// The change that is going on, or the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,
    /// What autoscaling decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<AutoscalingStatus>,
}

/// Columns of `kubectl get`: each is one text, because a printer column is one JSONPath.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Printed {
    /// The model's name without its owner, such as `Qwen3-30B-A3B`.
    pub model: String,
    /// Ready and wanted replicas, such as `1/2`.
    pub ready: String,
    /// Ready and wanted workers, such as `6/8`.
    pub shards: String,
    /// Covered and all experts of a layer, such as `128/128`; `-` for a dense model.
    pub experts: String,
}

/// Workers over all replicas.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ShardCounts {
    /// Workers that are wanted.
    pub total: i32,
    /// Workers that are ready.
    pub ready: i32,
}

/// Routed experts of a layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ExpertCounts {
    /// Routed experts of each layer.
    pub total: i32,
    /// The least, over the layers, of experts with a live holder.
    pub covered: i32,
    /// The fewest live holders that any expert has in one replica.
    pub min_copies: i32,
    /// By how much the measured load of the busiest worker is above the average one, in tens of percent; absent until there is
    /// a load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skew_percent: Option<i32>,
}

/// What each replica is made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PlanStatus {
    /// The newest revision: 8 hex characters.
    pub revision: String,
    /// Workers of a replica.
    pub shards: i32,
    /// Memory that the fullest worker needs, in bytes.
    pub worker_bytes: i64,
    /// Tokens that the key-value cache of a worker holds.
    pub kv_cache_tokens: i64,
    /// The longest prompt plus answer, in tokens.
    pub max_context_tokens: i64,
}

/// What the model's files say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelStatus {
    /// The commit that `spec.model.revision` meant when this revision was planned; empty if the source has none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub resolved_revision: String,
    /// As `config.json` names it, such as `DeepseekV3ForCausalLM`.
    pub architecture: String,
    /// Number of parameters.
    pub parameters: i64,
}

/// Where requests are answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// `OpenAI` or `gRPC`.
    pub protocol: String,
    /// Address inside the cluster.
    pub url: String,
}

/// A change of revision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RolloutStatus {
    /// The revision that is wanted.
    pub revision: String,
    /// The revision that is replaced, while one is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub previous_revision: String,
    /// What is done or waited for, such as `wait: new 1 loading`.
    pub step: String,
    /// When something last moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_progress_time: Option<Time>,
}

/// What autoscaling decided.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AutoscalingStatus {
    /// The last decision that changed the number, or held it for a new reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_decision: Option<ScalingDecision>,
}

/// A decision with its inputs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ScalingDecision {
    /// Replicas before.
    pub from: i32,
    /// Replicas after.
    pub to: i32,
    /// Why: one of the reasons of `ScalingActive`.
    pub reason: String,
    /// Requests that waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queued: Option<i64>,
    /// Requests that ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running: Option<i64>,
    /// When it was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
}

/// What can be true or false of a `ModelDeployment`. States, not events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ConditionType {
    /// The spec is valid here. If not, the last accepted revision goes on serving.
    Accepted,
    /// The model fits what the spec gives it.
    Planned,
    /// The model's files are known, and the workers have them.
    ModelReady,
    /// Every worker has a node.
    Scheduled,
    /// At least one replica answers requests.
    Available,
    /// A change is going on, or went through.
    Progressing,
    /// Something is broken that was not asked for.
    Degraded,
    /// Autoscaling sees the load and may change the number of replicas.
    ScalingActive,
    /// All wanted replicas of the newest revision answer requests.
    Ready,
}

/// Why a condition is what it is. The names are stable; events and metrics use them too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the documentation; the message of the condition says the rest")]
pub enum Reason {
    // Accepted
    Valid,
    Unparsable,
    InvalidSource,
    UnsupportedSource,
    InvalidRevision,
    InvalidServedName,
    ServedNameTaken,
    InvalidReference,
    InvalidCount,
    InvalidDuration,
    InvalidQuantity,
    InvalidScheduling,
    InvalidAutoscaling,
    InvalidRollout,
    InvalidPodTemplate,
    ReservedField,
    UnsafePod,
    // Planned
    Planned,
    RebalanceAdvised,
    Describing,
    NoRoom,
    TooManyShards,
    TooFewDomains,
    ClaimNotShared,
    ContextTooLong,
    // ModelReady
    Fetched,
    Fetching,
    DescribeFailed,
    FetchFailed,
    SourceNotFound,
    GatedModel,
    CredentialsMissing,
    ChecksumMismatch,
    UnsupportedModel,
    InvalidModelFile,
    // Scheduled
    Scheduled,
    Unschedulable,
    PodsPending,
    // Available, Ready
    ReplicasReady,
    ShardsMissing,
    ReplicasMissing,
    Loading,
    NotRouted,
    ScaledToZero,
    Suspended,
    // Progressing
    RolledOut,
    RollingOut,
    MovingExperts,
    Draining,
    ProgressDeadlineExceeded,
    // Degraded
    AsDesired,
    WorkerLost,
    WorkerCrashing,
    ImagePullFailed,
    QuotaExceeded,
    PodRefused,
    WorkerSuspected,
    Forbidden,
    ApplyFailed,
    // ScalingActive
    Disabled,
    Steady,
    ScaledUp,
    ScaledDown,
    Woken,
    Stabilizing,
    RedistributionTooHigh,
    AtMinimum,
    AtMaximum,
    LoadMissing,
    LoadStale,
}

impl ConditionType {
    /// The name in the status.
    pub fn as_str(self) -> &'static str {
        NAMES[self as usize]
    }
}

const NAMES: [&str; 9] = [
    "Accepted",
    "Planned",
    "ModelReady",
    "Scheduled",
    "Available",
    "Progressing",
    "Degraded",
    "ScalingActive",
    "Ready",
];

impl std::fmt::Display for ConditionType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::fmt::Display for Reason {
    /// The name in the status: CamelCase, as the variant is written.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}
