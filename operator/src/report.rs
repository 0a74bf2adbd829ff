//! What we saw and did, for people and for `kubectl wait`: pure, and whole each time.
//!
//! `trouble` finds what is wrong with workers, `finding` makes conditions of it, `summary` the one line, `event` tells
//! what changed since the last status.

mod event;
mod finding;
mod summary;
#[cfg(test)]
mod tests;
mod trouble;

use crds::{
    AutoscalingStatus, ConditionType, Endpoint, ExpertCounts, ModelDeployment, ModelDeploymentStatus, ModelStatus,
    PlanStatus, Printed, Reason, RolloutStatus, ScalingDecision, ShardCounts,
};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use planner::{Plan, autoscale};

pub use self::event::{Note, notes};
use self::{finding::Finding, trouble::Trouble};
use crate::{
    apply::Applied,
    decide::{Decision, Planning},
    error::Error,
    observe::Observed,
    render::{Install, Names, Record},
    replica::Replica,
    validate::{Refusal, ValidModel},
};

/// All that a status is made from.
#[derive(Debug, Clone, Copy)]
pub struct Case<'a> {
    /// The object, with the status that it has.
    pub md: &'a ModelDeployment,
    /// Names of its objects.
    pub names: &'a Names,
    /// The model that runs: of this spec, or of the one that was accepted last.
    pub model: &'a ValidModel,
    /// Why this spec is not accepted; empty if it is.
    pub refusals: &'a [Refusal],
    /// What else to say about an accepted spec.
    pub remark: Option<&'a str>,
    /// The install.
    pub install: &'a Install,
    /// What there is.
    pub seen: &'a Observed,
    /// What should be.
    pub decision: &'a Decision,
    /// What came of the writes.
    pub outcome: Result<&'a Applied, &'a Error>,
    /// The present, in whole seconds.
    pub now: Timestamp,
}

/// The status of a model that runs, or is about to.
pub fn report(case: &Case<'_>) -> ModelDeploymentStatus {
    let before = case.md.status.clone().unwrap_or_default();
    let counts = Counts::of(case);
    let trouble = Trouble::find(case);
    let mut status = ModelDeploymentStatus {
        observed_generation: case.md.metadata.generation,
        conditions: Vec::new(),
        summary: Some(summary::summary(case, &counts, &trouble)),
        printed: Some(printed(case, &counts)),
        replicas: Some(signed(counts.replicas)),
        ready_replicas: Some(signed(counts.ready)),
        updated_replicas: Some(signed(counts.updated)),
        desired_replicas: Some(signed(case.decision.wanted)),
        selector: Some(case.names.scale_selector()),
        shards: Some(ShardCounts { total: signed(counts.workers), ready: signed(counts.ready_workers) }),
        experts: counts.experts.clone(),
        plan: counts.plan.map(|plan| plan_status(case, plan)),
        model: record(case).map(model_status),
        endpoints: endpoints(case.install),
        rollout: None,
        autoscaling: autoscaling(case, before.autoscaling.as_ref()),
    };
    status.rollout = rollout(case, &before, status.summary.as_deref());
    let findings = finding::findings(case, &counts, &trouble, status.rollout.as_ref());
    status.conditions = finding::conditions(before.conditions, findings, case.md.metadata.generation, case.now);
    status
}

/// The status of an object of which no version was ever accepted.
pub fn refused(md: &ModelDeployment, reason: Reason, message: &str, now: Timestamp) -> ModelDeploymentStatus {
    let before = md.status.clone().unwrap_or_default();
    let findings = vec![
        Finding::no(ConditionType::Accepted, reason, message.to_owned()),
        Finding::no(ConditionType::Ready, reason, "the spec is not accepted".to_owned()),
    ];
    let generation = md.metadata.generation;
    ModelDeploymentStatus {
        observed_generation: generation,
        conditions: finding::conditions(before.conditions, findings, generation, now),
        summary: Some(summary::line(&format!("Refused: {message}"))),
        replicas: Some(0),
        ready_replicas: Some(0),
        ..ModelDeploymentStatus::default()
    }
}

/// What is counted once and shown in several places.
struct Counts<'a> {
    /// Replicas that should stand after this pass, draining ones left out.
    replicas: u32,
    /// Of the revision that replicas are made of now, not draining.
    current: Vec<&'a Replica>,
    ready: u32,
    updated: u32,
    workers: u32,
    ready_workers: u32,
    experts: Option<ExpertCounts>,
    plan: Option<&'a Plan>,
}

impl<'a> Counts<'a> {
    fn of(case: &Case<'a>) -> Self {
        let decision = case.decision;
        let staying: Vec<_> = decision.targets.iter().filter(|target| target.draining_since.is_none()).collect();
        let serving: Vec<&Replica> =
            decision.replicas.iter().filter(|one| one.stands() && one.draining_since.is_none()).collect();
        let is_current = |one: &&&Replica| Some(&one.revision) == decision.running.as_ref();
        let current: Vec<&Replica> = serving.iter().filter(is_current).copied().collect();
        let plan = plan(decision);
        let shards = plan.map_or(0, |plan| plan.shards);
        let workers = decision.wanted.saturating_mul(shards);
        let ready_workers: u32 = current.iter().map(|one| one.ready_workers()).sum();
        Self {
            replicas: unsigned(staying.len()),
            ready: unsigned(serving.iter().filter(|one| one.ready()).count()),
            updated: unsigned(staying.iter().filter(|one| one.revision == decision.revision).count()),
            workers,
            ready_workers: ready_workers.min(workers),
            experts: plan.and_then(|plan| experts(case, plan, &serving)),
            plan,
            current,
        }
    }

    /// All replicas that are wanted are there, ready, and of the revision that was asked for.
    fn complete(&self, decision: &Decision) -> bool {
        let updated = self.current.iter().filter(|one| one.ready() && one.revision == decision.revision);
        decision.wanted > 0 && unsigned(updated.count()) >= decision.wanted
    }
}

fn plan(decision: &Decision) -> Option<&Plan> {
    if let Planning::Planned(plan) = &decision.planning {
        return Some(plan);
    }
    let running = decision.running.as_ref()?;
    decision.targets.iter().find(|target| &target.revision == running).map(|target| &target.plan)
}

/// The least, over the layers, of experts with a live holder in any replica.
fn experts(case: &Case<'_>, plan: &Plan, replicas: &[&Replica]) -> Option<ExpertCounts> {
    let first = plan.placement.layers.first()?;
    let held = |layer: u32, expert: usize| {
        replicas.iter().any(|replica| {
            let placement = replica.plan.as_ref().map(|plan| &plan.placement);
            let layers = placement.into_iter().flat_map(|placement| &placement.layers);
            let holders = layers.filter(|one| one.layer == layer).filter_map(|one| one.experts.get(expert));
            let mut holders = holders.flatten();
            holders.any(|ordinal| replica.worker(*ordinal).is_some_and(super::replica::Worker::holds))
        })
    };
    let covered = |layer: &planner::placement::LayerPlacement| {
        (0..layer.experts.len()).filter(|expert| held(layer.layer, *expert)).count()
    };
    let covered = plan.placement.layers.iter().map(covered).min().unwrap_or(0);
    let (total, covered) = (signed(unsigned(first.experts.len())), signed(unsigned(covered)));
    // one that starts has none yet, which is no loss
    let worked = replicas.iter().filter(|replica| replica.ready() || !replica.lost().is_empty());
    let min_copies = worked.filter_map(|replica| min_copies_of(replica)).min();
    let min_copies = min_copies.or_else(|| replicas.iter().filter_map(|replica| min_copies_of(replica)).max());
    let min_copies = min_copies.unwrap_or(0);
    Some(ExpertCounts { total, covered, min_copies: signed(min_copies), skew_percent: skew(case, replicas) })
}

/// Of the replica where it is largest, in whole tens: a status that changes with each request wakes all who watch.
fn skew(case: &Case<'_>, replicas: &[&Replica]) -> Option<i32> {
    let of = |replica: &&Replica| {
        let record = case.decision.records.iter().find(|record| record.revision == replica.revision)?;
        let loads = crate::moving::loads(replica, &record.description, case.seen)?;
        planner::placement::skew_percent(&replica.plan.as_ref()?.placement, &loads)
    };
    replicas.iter().filter_map(of).max().map(|percent| signed(percent / 10 * 10))
}

/// The fewest live holders that an expert has in a replica.
fn min_copies_of(replica: &Replica) -> Option<u32> {
    let lives = |ordinal: &&u32| replica.worker(**ordinal).is_some_and(crate::replica::Worker::holds);
    let layers = &replica.plan.as_ref()?.placement.layers;
    let copies = layers.iter().flat_map(|layer| &layer.experts).map(|holders| holders.iter().filter(lives).count());
    copies.min().map(unsigned)
}

fn printed(case: &Case<'_>, counts: &Counts<'_>) -> Printed {
    let source = &case.model.spec.model.source;
    let known = counts.plan.is_some();
    Printed {
        model: source.rsplit('/').find(|part| !part.is_empty()).unwrap_or(source).to_owned(),
        ready: format!("{}/{}", counts.ready, case.decision.wanted),
        shards: if known { format!("{}/{}", counts.ready_workers, counts.workers) } else { "-".to_owned() },
        experts: match &counts.experts {
            Some(experts) => format!("{}/{}", experts.covered, experts.total),
            None => "-".to_owned(),
        },
    }
}

fn plan_status(case: &Case<'_>, plan: &Plan) -> PlanStatus {
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    PlanStatus {
        revision: case.decision.running.as_ref().unwrap_or(&case.decision.revision).to_string(),
        shards: signed(plan.shards),
        worker_bytes: number(plan.fullest().total().0),
        kv_cache_tokens: number(plan.kv_cache_tokens.0),
        max_context_tokens: number(plan.max_context_tokens.0),
    }
}

fn record<'a>(case: &Case<'a>) -> Option<&'a Record> {
    let running = case.decision.running.as_ref()?;
    case.decision.records.iter().find(|record| &record.revision == running)
}

fn model_status(record: &Record) -> ModelStatus {
    ModelStatus {
        resolved_revision: record.description.resolved_revision.clone(),
        architecture: record.description.architecture.clone(),
        parameters: i64::try_from(record.description.parameters).unwrap_or(i64::MAX),
    }
}

fn endpoints(install: &Install) -> Vec<Endpoint> {
    let (http, grpc) = (crate::launch::ROUTER_HTTP_PORT, crate::launch::ROUTER_GRPC_PORT);
    vec![
        Endpoint { protocol: "OpenAI".to_owned(), url: format!("http://{}:{http}/v1", install.router) },
        Endpoint { protocol: "gRPC".to_owned(), url: format!("{}:{grpc}", install.router) },
    ]
}

/// The change that goes on. Its time moves when anything about it does, the download's progress included.
fn rollout(case: &Case<'_>, before: &ModelDeploymentStatus, summary: Option<&str>) -> Option<RolloutStatus> {
    let decision = case.decision;
    let others = decision.replicas.iter().find(|one| one.stands() && one.revision != decision.revision);
    let mut rollout = RolloutStatus {
        revision: decision.revision.to_string(),
        previous_revision: others.map(|one| one.revision.to_string()).unwrap_or_default(),
        step: decision.step.why.to_string(),
        last_progress_time: Some(Time(case.now)),
    };
    if let Some(last) = before.rollout.as_ref().filter(|_| before.summary.as_deref() == summary) {
        let moved = Some(Time(case.now));
        rollout.last_progress_time.clone_from(&last.last_progress_time);
        if rollout != *last || rollout.last_progress_time.is_none() {
            rollout.last_progress_time = moved;
        }
    }
    Some(rollout)
}

/// The last decision that changed the number or held it for another reason.
fn autoscaling(case: &Case<'_>, before: Option<&AutoscalingStatus>) -> Option<AutoscalingStatus> {
    let decision = case.decision.scaling.as_ref()?;
    let last = before.and_then(|before| before.last_decision.as_ref());
    let reason = finding::scaling_reason(decision.why).to_string();
    if decision.from == decision.to && last.is_some_and(|last| last.reason == reason) {
        return before.cloned();
    }
    // A hold says why the number is what it is; what led to the number is worth more.
    let holds = decision.from == decision.to && decision.why == autoscale::Why::Steady;
    if holds && last.is_some() {
        return before.cloned();
    }
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let last_decision = ScalingDecision {
        from: signed(decision.from),
        to: signed(decision.to),
        reason,
        queued: decision.load.map(|load| number(load.queued)),
        running: decision.load.map(|load| number(load.running)),
        time: Some(Time(case.now)),
    };
    Some(AutoscalingStatus { last_decision: Some(last_decision) })
}

fn signed(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn unsigned(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
