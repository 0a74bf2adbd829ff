//! Conditions: what is true or false of a model, with a stable reason, and since when.

use crds::{ConditionType, Reason, RolloutStatus};
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use planner::{NoRoom, autoscale, rollout::Why};

use super::{Case, Counts, trouble::Trouble};
use crate::decide::Planning;

/// A condition before it has a time.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Finding {
    kind: ConditionType,
    status: &'static str,
    reason: String,
    message: String,
}

impl Finding {
    pub(super) fn yes(kind: ConditionType, reason: Reason, message: String) -> Self {
        Self { kind, status: "True", reason: reason.to_string(), message }
    }

    pub(super) fn no(kind: ConditionType, reason: Reason, message: String) -> Self {
        Self { kind, status: "False", reason: reason.to_string(), message }
    }
}

/// One finding a type, in the order of the types.
pub(super) fn findings(
    case: &Case<'_>,
    counts: &Counts<'_>,
    trouble: &Trouble,
    rollout: Option<&RolloutStatus>,
) -> Vec<Finding> {
    vec![
        accepted(case),
        planned(case),
        model_ready(case, trouble),
        scheduled(case, trouble),
        available(case, counts, trouble),
        progressing(case, rollout),
        degraded(case, counts, trouble),
        scaling(case),
        ready(case, counts),
    ]
}

/// The findings as conditions. The time of one that keeps its status stays, or each pass would wake the watch.
pub(super) fn conditions(
    before: Vec<Condition>,
    findings: Vec<Finding>,
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    let condition = |finding: Finding| {
        let kind = finding.kind.to_string();
        let old = before.iter().find(|one| one.type_ == kind && one.status == finding.status);
        Condition {
            type_: kind,
            status: finding.status.to_owned(),
            reason: finding.reason,
            message: cut(finding.message),
            observed_generation: generation,
            last_transition_time: old.map_or(Time(now), |old| old.last_transition_time.clone()),
        }
    };
    findings.into_iter().map(condition).collect()
}

fn accepted(case: &Case<'_>) -> Finding {
    match case.refusals {
        [] => {
            Finding::yes(ConditionType::Accepted, Reason::Valid, case.remark.unwrap_or("the spec is valid").to_owned())
        }
        [first, ..] => {
            let messages: Vec<&str> = case.refusals.iter().map(|refusal| refusal.message.as_str()).collect();
            Finding::no(ConditionType::Accepted, first.reason, messages.join("; "))
        }
    }
}

fn planned(case: &Case<'_>) -> Finding {
    let kind = ConditionType::Planned;
    match &case.decision.planning {
        Planning::Describing => Finding::no(kind, Reason::Describing, "what the model weighs is being read".to_owned()),
        Planning::Unreadable(why) => {
            Finding::no(kind, Reason::DescribeFailed, format!("the description cannot be read: {why}"))
        }
        Planning::NoRoom(why) => Finding::no(kind, no_room(why), why.to_string()),
        Planning::NotShared(why) => Finding::no(kind, Reason::ClaimNotShared, why.to_string()),
        Planning::Planned(plan) => {
            let message = format!("{} shards, the fullest needs {}", plan.shards, plan.fullest().total());
            match case.decision.advice {
                Some(percent) => {
                    let advice = format!("{message}; experts would be {percent}% faster elsewhere");
                    let apply = "spec.parallelism.expert.rebalance Apply moves them";
                    Finding::yes(kind, Reason::RebalanceAdvised, format!("{advice}: {apply}"))
                }
                None => Finding::yes(kind, Reason::Planned, message),
            }
        }
    }
}

fn model_ready(case: &Case<'_>, trouble: &Trouble) -> Finding {
    let kind = ConditionType::ModelReady;
    if let Some((reason, message)) = &trouble.model {
        return Finding::no(kind, *reason, message.clone());
    }
    match &case.decision.planning {
        Planning::Describing => Finding::no(kind, Reason::Describing, "what the model weighs is being read".to_owned()),
        Planning::Unreadable(why) => Finding::no(kind, Reason::DescribeFailed, why.clone()),
        _ if trouble.fetching.workers > 0 => {
            let message = format!("{} workers fetch the model's files", trouble.fetching.workers);
            Finding::no(kind, Reason::Fetching, message)
        }
        _ => Finding::yes(kind, Reason::Fetched, "the model's files are known".to_owned()),
    }
}

fn scheduled(case: &Case<'_>, trouble: &Trouble) -> Finding {
    let kind = ConditionType::Scheduled;
    if let Some((reason, message)) = &trouble.not_made {
        return Finding::no(kind, *reason, message.clone());
    }
    if let Some(message) = &trouble.unschedulable {
        return Finding::no(kind, Reason::Unschedulable, message.clone());
    }
    let unplanned = case.decision.running.is_none() && case.decision.wanted > 0;
    if trouble.pending > 0 || unplanned {
        return Finding::no(kind, Reason::PodsPending, format!("{} workers have no pod yet", trouble.pending));
    }
    Finding::yes(kind, Reason::Scheduled, "every worker has a node".to_owned())
}

fn available(case: &Case<'_>, counts: &Counts<'_>, trouble: &Trouble) -> Finding {
    let (kind, wanted) = (ConditionType::Available, case.decision.wanted);
    if counts.ready > 0 {
        let message = format!("{} of {wanted} replicas answer requests", counts.ready);
        return Finding::yes(kind, Reason::ReplicasReady, message);
    }
    let (reason, message) = match wanted {
        0 => at_zero(case),
        _ if !trouble.lost.is_empty() => (Reason::ShardsMissing, "no replica has all its workers".to_owned()),
        _ if trouble.loading.workers > 0 => (Reason::Loading, "workers read their weights".to_owned()),
        _ if trouble.unrouted > 0 => (Reason::NotRouted, "the routers do not know the workers yet".to_owned()),
        _ => (Reason::ReplicasMissing, format!("0 of {wanted} replicas answer requests")),
    };
    Finding::no(kind, reason, message)
}

fn progressing(case: &Case<'_>, rollout: Option<&RolloutStatus>) -> Finding {
    let kind = ConditionType::Progressing;
    if let Some(why) = &case.decision.moving {
        return Finding::yes(kind, Reason::MovingExperts, why.to_string());
    }
    if case.decision.step.why == Why::Complete && matches!(case.decision.planning, Planning::Planned(_)) {
        return Finding::yes(kind, Reason::RolledOut, format!("revision {} runs", case.decision.revision));
    }
    let moved = rollout.and_then(|rollout| rollout.last_progress_time.as_ref()).map_or(case.now, |moved| moved.0);
    let still = case.now.duration_since(moved).as_secs().max(0).unsigned_abs();
    if still >= case.model.progress_deadline.as_secs() {
        // since when, not for how long: a message that counts is a write each time anyone looks
        let message = format!("no progress since {moved}: {}", case.decision.step.why);
        return Finding::no(kind, Reason::ProgressDeadlineExceeded, message);
    }
    if case.decision.running.is_none() && case.decision.planning == Planning::Describing {
        let message = "what the model weighs is being read".to_owned();
        return Finding::yes(kind, Reason::Describing, message);
    }
    let reason = match case.decision.step.why {
        Why::Draining { .. } => Reason::Draining,
        _ => Reason::RollingOut,
    };
    Finding::yes(kind, reason, case.decision.step.why.to_string())
}

fn degraded(case: &Case<'_>, counts: &Counts<'_>, trouble: &Trouble) -> Finding {
    let kind = ConditionType::Degraded;
    if let Err(error) = case.outcome {
        let reason = match error.reason() {
            "QuotaExceeded" => Reason::QuotaExceeded,
            "Forbidden" => Reason::Forbidden,
            _ => Reason::ApplyFailed,
        };
        return Finding::yes(kind, reason, error.chain());
    }
    if let Some((reason, message)) = &trouble.not_made {
        return Finding::yes(kind, *reason, message.clone());
    }
    if let Some(image) = &trouble.image {
        return Finding::yes(kind, Reason::ImagePullFailed, image.clone());
    }
    if let Some(crash) = &trouble.crash {
        return Finding::yes(kind, Reason::WorkerCrashing, crash.clone());
    }
    if !trouble.lost.is_empty() {
        return Finding::yes(
            kind,
            Reason::WorkerLost,
            super::summary::lost(&trouble.lost, counts.experts.as_ref(), case.model.redundancy),
        );
    }
    if !trouble.suspected.is_empty() {
        return Finding::yes(kind, Reason::WorkerSuspected, super::summary::suspected(&trouble.suspected));
    }
    Finding::no(kind, Reason::AsDesired, "nothing is broken".to_owned())
}

fn scaling(case: &Case<'_>) -> Finding {
    let kind = ConditionType::ScalingActive;
    let Some(decision) = &case.decision.scaling else {
        return Finding::no(kind, Reason::Disabled, "spec.replicas is what is wanted".to_owned());
    };
    // No numbers of the load: they change all the time, and each change would be a write.
    let (reason, message) = (scaling_reason(decision.why), format!("{} replicas are wanted", decision.to));
    match decision.why {
        autoscale::Why::LoadMissing | autoscale::Why::LoadStale => {
            Finding::no(kind, reason, "the routers' load is not known, so the number holds".to_owned())
        }
        _ => Finding::yes(kind, reason, message),
    }
}

fn ready(case: &Case<'_>, counts: &Counts<'_>) -> Finding {
    let (kind, wanted) = (ConditionType::Ready, case.decision.wanted);
    if counts.complete(case.decision) {
        return Finding::yes(kind, Reason::ReplicasReady, format!("{wanted} of {wanted} replicas answer requests"));
    }
    if wanted == 0 {
        let (reason, message) = at_zero(case);
        return Finding::no(kind, reason, message);
    }
    let (ready, revision) = (counts.ready, &case.decision.revision);
    let message = match counts.updated < wanted && ready >= wanted {
        true => format!("{} of {wanted} replicas run revision {revision}", counts.updated),
        false => format!("{ready} of {wanted} replicas answer requests"),
    };
    Finding::no(kind, Reason::ReplicasMissing, message)
}

fn at_zero(case: &Case<'_>) -> (Reason, String) {
    if case.model.spec.suspend {
        (Reason::Suspended, "spec.suspend is true".to_owned())
    } else if case.model.autoscaling.is_some() {
        (Reason::ScaledToZero, "idle; the next request wakes it".to_owned())
    } else {
        (Reason::ScaledToZero, "spec.replicas is 0".to_owned())
    }
}

fn no_room(why: &NoRoom) -> Reason {
    match why {
        NoRoom::TooManyShards { .. } => Reason::TooManyShards,
        NoRoom::ContextTooLong { .. } => Reason::ContextTooLong,
        NoRoom::CacheTooSmall { .. }
        | NoRoom::MemoryTooSmall { .. }
        | NoRoom::TooFewWorkers { .. }
        | NoRoom::TooFewDomains { .. }
        | NoRoom::Copies(_) => Reason::NoRoom,
    }
}

/// The planner's reason, in the words of the API.
pub(super) fn scaling_reason(why: autoscale::Why) -> Reason {
    match why {
        autoscale::Why::Steady => Reason::Steady,
        autoscale::Why::ScaledUp => Reason::ScaledUp,
        autoscale::Why::AtMaximum => Reason::AtMaximum,
        autoscale::Why::ScaledDown => Reason::ScaledDown,
        autoscale::Why::Stabilizing => Reason::Stabilizing,
        autoscale::Why::RedistributionTooHigh => Reason::RedistributionTooHigh,
        autoscale::Why::AtMinimum => Reason::AtMinimum,
        autoscale::Why::ScaledToZero => Reason::ScaledToZero,
        autoscale::Why::Woken => Reason::Woken,
        autoscale::Why::LoadMissing => Reason::LoadMissing,
        autoscale::Why::LoadStale => Reason::LoadStale,
    }
}

/// Kubernetes takes 32768 bytes; nobody reads so much.
fn cut(mut message: String) -> String {
    const MOST: usize = 4096;
    if message.len() > MOST {
        message.truncate(message.floor_char_boundary(MOST));
    }
    message
}
