//! From what a user wrote to what the operator may act on.
//!
//! `RULES` is the list of all rules, in the order in which they are told. It repeats every rule of the schema and of
//! `crds::rules` with the same words, for objects that were stored before a rule existed and for local mode, where no
//! API server checked anything. It adds what a schema cannot say: where the model is to run, and the pod template.
//!
//! Architecture Invariant: pure. A refusal is a value; the last accepted spec goes on serving.

mod count;
mod fields;
mod mesh;
mod pod;
mod quantity;
mod revision;
mod scale;
mod schedule;
mod source;

use std::time::Duration;

use crds::{AutoscalingMode, Migration, MigrationMode, ModelDeployment, ModelDeploymentSpec, Reason, Rebalance, rules};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use planner::{Bytes, Millis, Tokens, autoscale};

pub(crate) use quantity::memory_bytes;
pub use revision::RESTARTED_AT;

/// Where a model is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// As pods.
    Cluster,
    /// As child processes on loopback.
    Local,
}

/// Why a spec is not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For the condition, events and metrics.
    pub reason: Reason,
    /// Path of the field.
    pub field: String,
    /// What is wrong, and what is accepted.
    pub message: String,
}

/// A spec that was accepted, as values that need no further check.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidModel {
    /// As it was written.
    pub spec: ModelDeploymentSpec,
    /// The names that requests may use, beside `NAMESPACE/NAME`.
    pub served_names: Vec<String>,
    /// Replicas that the user wrote. Where autoscaling is on, the number to start with.
    pub replicas: u32,
    /// Workers of a replica; `None`: the planner decides.
    pub shards: Option<u32>,
    /// Further copies of each expert, on other failure domains.
    pub redundancy: u32,
    /// What is done when the measured load of the experts is uneven.
    pub rebalance: Rebalance,
    /// The node label whose values are failure domains.
    pub spread_across: String,
    /// How long a sequence waits for an expert that nobody holds; `None`: the worker's default.
    pub expert_wait: Option<Duration>,
    /// How often a stream may go on at another worker.
    pub migration_attempts: u32,
    /// The memory limit of a worker.
    pub worker_memory: Option<Bytes>,
    /// Tokens in a worker's cache; `None`: the planner decides.
    pub kv_cache_tokens: Option<Tokens>,
    /// The longest prompt plus answer; `None`: the model's.
    pub max_context_tokens: Option<Tokens>,
    /// How the number of replicas follows the load; `None`: it does not.
    pub autoscaling: Option<autoscale::Policy>,
    /// Requests that may wait, over all routers.
    pub max_pending: u32,
    /// How long each may wait.
    pub max_wait: Duration,
    /// Replicas above the wanted number during a change.
    pub max_surge: u32,
    /// Replicas that may be missing during a change.
    pub max_unavailable: u32,
    /// How long a worker that is to go may finish its requests.
    pub drain_timeout: Duration,
    /// How long a change may make no progress before the status says so.
    pub progress_deadline: Duration,
    /// What the user adds to the worker pods.
    pub pod_template: Option<PodTemplateSpec>,
    /// Canonical text of all that changes what a worker runs: equal texts are one revision.
    pub revision_input: String,
}

impl ValidModel {
    /// Failure domains are told by a label that only nodes have.
    pub fn spreads_over_labels(&self) -> bool {
        self.redundancy > 0 && self.spread_across != HOST
    }

    /// What the planner is asked.
    pub fn request(&self, previous: Option<planner::Placement>) -> planner::Request {
        planner::Request {
            shards: self.shards,
            redundancy: self.redundancy,
            worker_memory: self.worker_memory,
            kv_cache_tokens: self.kv_cache_tokens,
            max_context_tokens: self.max_context_tokens,
            previous,
        }
    }
}

/// What a rule looks at.
struct Input<'a> {
    spec: &'a ModelDeploymentSpec,
    place: Place,
}

type Rule = fn(&Input<'_>) -> Vec<Refusal>;

/// Every rule. The order is the order of the refusals.
const RULES: &[Rule] = &[
    source::scheme,
    source::no_user,
    source::no_dots,
    source::shape,
    source::length,
    source::place,
    source::revision,
    source::credentials,
    source::served_names,
    count::wholes,
    count::durations,
    quantity::names,
    quantity::amounts,
    quantity::within_limits,
    schedule::node_selector,
    schedule::tolerations,
    schedule::priority_class,
    mesh::copies,
    mesh::spread,
    mesh::migration,
    scale::mode_off,
    scale::maximum,
    scale::range,
    scale::idle,
    scale::metrics,
    scale::rolling_update,
    pod::size,
    pod::reads_back,
    pod::closed,
    pod::labels,
    pod::names,
    pod::environment,
    pod::volumes,
    pod::security,
];

const HOST: &str = "kubernetes.io/hostname";
const MIGRATION_ATTEMPTS: u32 = 3;
pub(crate) const MAX_PENDING: u32 = 1024;
pub(crate) const MAX_WAIT: Duration = Duration::from_secs(120);
const MAX_SURGE: u32 = 1;
const MAX_UNAVAILABLE: u32 = 0;
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
const PROGRESS_DEADLINE: Duration = Duration::from_secs(600);
const QUEUE_TARGET: u32 = 8;
const STABILIZATION: Duration = Duration::from_secs(300);
const IDLE_AFTER: Duration = Duration::from_secs(600);

/// Checks a `ModelDeployment` against every rule.
///
/// # Errors
/// All refusals, in the order of the rules.
pub fn validate(md: &ModelDeployment, place: Place) -> Result<ValidModel, Vec<Refusal>> {
    let input = Input { spec: &md.spec, place };
    let refusals: Vec<Refusal> = RULES.iter().flat_map(|rule| rule(&input)).collect();
    if refusals.is_empty() { Ok(valid(md)) } else { Err(refusals) }
}

fn valid(md: &ModelDeployment) -> ValidModel {
    let spec = &md.spec;
    let queue = spec.routing.as_ref().and_then(|routing| routing.queue.as_ref());
    let rollout = spec.rollout.clone().unwrap_or_default();
    let rolling = rollout.rolling_update.unwrap_or_default();
    let expert = spec.parallelism.as_ref().and_then(|p| p.expert.clone()).unwrap_or_default();
    let topology = spec.scheduling.as_ref().and_then(|scheduling| scheduling.topology.as_ref());
    let expert_wait = spec.failure.as_ref().and_then(|failure| failure.max_wait.as_deref());
    let cache = spec.memory.as_ref().and_then(|memory| memory.kv_cache_tokens);
    ValidModel {
        served_names: served_names(md),
        replicas: unsigned(spec.replicas),
        shards: expert.shards.map(unsigned),
        redundancy: expert.redundancy.map_or(0, unsigned),
        rebalance: expert.rebalance.unwrap_or_default(),
        spread_across: topology.and_then(|one| one.spread_across.clone()).unwrap_or_else(|| HOST.to_owned()),
        expert_wait: expert_wait.and_then(|text| rules::EXPERT_WAIT.parse(text).ok()),
        migration_attempts: attempts(spec.routing.as_ref().and_then(|routing| routing.migration.as_ref())),
        worker_memory: quantity::memory_limit(spec),
        kv_cache_tokens: cache.map(tokens),
        max_context_tokens: spec.model.max_context_tokens.map(tokens),
        autoscaling: policy(spec),
        max_pending: queue.and_then(|q| q.max_pending).map_or(MAX_PENDING, unsigned),
        max_wait: span(rules::MAX_WAIT, queue.and_then(|q| q.max_wait.as_deref()), MAX_WAIT),
        max_surge: rolling.max_surge.map_or(MAX_SURGE, unsigned),
        max_unavailable: rolling.max_unavailable.map_or(MAX_UNAVAILABLE, unsigned),
        drain_timeout: span(rules::DRAIN, rollout.drain_timeout.as_deref(), DRAIN_TIMEOUT),
        progress_deadline: span(rules::PROGRESS, rollout.progress_deadline.as_deref(), PROGRESS_DEADLINE),
        pod_template: pod::parse(spec),
        revision_input: revision::input(md),
        spec: spec.clone(),
    }
}

fn served_names(md: &ModelDeployment) -> Vec<String> {
    let own = || vec![md.metadata.name.clone().unwrap_or_default()];
    md.spec.model.served_names.clone().unwrap_or_else(own)
}

/// How often a stream may go on at another worker.
pub(crate) fn attempts(migration: Option<&Migration>) -> u32 {
    match migration {
        Some(migration) if migration.mode == MigrationMode::Disabled => 0,
        Some(migration) => migration.max_attempts.map_or(MIGRATION_ATTEMPTS, unsigned),
        None => MIGRATION_ATTEMPTS,
    }
}

fn policy(spec: &ModelDeploymentSpec) -> Option<autoscale::Policy> {
    let scaling = spec.autoscaling.as_ref().filter(|a| a.mode == AutoscalingMode::Internal)?;
    let window = scaling.behavior.as_ref().and_then(|b| b.scale_down.as_ref());
    let window = window.and_then(|down| down.stabilization_window.as_deref());
    let idle = scaling.idle.as_ref().and_then(|idle| idle.after.as_deref());
    let target = scaling.metrics.as_ref().and_then(|metrics| metrics.first());
    Some(autoscale::Policy {
        min: scaling.min_replicas.map_or(1, unsigned),
        max: scaling.max_replicas.map_or(1, unsigned),
        target: target.map_or(QUEUE_TARGET, |metric| unsigned(metric.queue_depth.target)),
        window: millis(span(rules::STABILIZATION, window, STABILIZATION)),
        idle_after: millis(span(rules::IDLE_AFTER, idle, IDLE_AFTER)),
    })
}

/// A count that a rule found not negative.
fn unsigned(value: i32) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

fn tokens(value: i64) -> Tokens {
    Tokens(u64::try_from(value).unwrap_or(0))
}

/// A duration that a rule found good, or the default.
fn span(bound: rules::Span, text: Option<&str>, default: Duration) -> Duration {
    text.and_then(|text| bound.parse(text).ok()).unwrap_or(default)
}

fn millis(span: Duration) -> Millis {
    Millis::from_secs(span.as_secs())
}

impl Refusal {
    fn new(reason: Reason, field: impl Into<String>, message: impl Into<String>) -> Self {
        Refusal { reason, field: field.into(), message: message.into() }
    }

    /// The refusal of a rule that the API server has too.
    fn of(check: &rules::Check, reason: Reason) -> Self {
        Refusal::new(reason, check.path, check.words)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// A refusal unless the rule holds.
fn unless(holds: bool, check: &rules::Check, reason: Reason) -> Vec<Refusal> {
    if holds { Vec::new() } else { vec![Refusal::of(check, reason)] }
}

#[cfg(test)]
mod tests;
