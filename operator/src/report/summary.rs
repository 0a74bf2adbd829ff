//! The column STATUS: one line, the most important thing first.

use crds::ExpertCounts;
use planner::rollout::Why;

use super::{Case, Counts, trouble::Trouble};
use crate::decide::Planning;

/// Characters of a line.
const MOST: usize = 120;

/// What one concern has to say, if anything.
type Words = fn(&Case<'_>, &Counts<'_>, &Trouble) -> Option<String>;

/// The line for a model that runs, or is about to.
pub(super) fn summary(case: &Case<'_>, counts: &Counts<'_>, trouble: &Trouble) -> String {
    let words: [Words; 7] = [refused, failed, at_zero, not_made, unplanned, broken, moving];
    let first = words.iter().find_map(|words| words(case, counts, trouble));
    line(&first.unwrap_or_else(|| "Ready".to_owned()))
}

/// Cuts a text to one line of at most 120 characters.
pub(super) fn line(text: &str) -> String {
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if flat.chars().count() <= MOST {
        return flat;
    }
    let cut: String = flat.chars().take(MOST - 3).collect();
    format!("{}...", cut.trim_end())
}

/// `worker 2 lost, experts 16/16 covered, minimum copies 1`; of copies only where there are.
pub(super) fn lost(names: &[String], experts: Option<&ExpertCounts>, redundancy: u32) -> String {
    let workers = workers(names);
    let covered = experts.map(|experts| format!(", experts {}/{} covered", experts.covered, experts.total));
    let copies = experts.filter(|_| redundancy > 0).map(|experts| format!(", minimum copies {}", experts.min_copies));
    format!("{workers} lost{}{}", covered.unwrap_or_default(), copies.unwrap_or_default())
}

/// `worker 2 does not answer all peers`
pub(super) fn suspected(names: &[String]) -> String {
    let verb = if names.len() == 1 { "does" } else { "do" };
    format!("{} {verb} not answer all peers", workers(names))
}

fn workers(names: &[String]) -> String {
    match names {
        [one] => format!("worker {one}"),
        many => format!("workers {}", many.join(", ")),
    }
}

fn refused(case: &Case<'_>, _: &Counts<'_>, _: &Trouble) -> Option<String> {
    case.refusals.first().map(|refusal| format!("Refused: {}", refusal.message))
}

fn failed(case: &Case<'_>, _: &Counts<'_>, _: &Trouble) -> Option<String> {
    case.outcome.err().map(|error| format!("Degraded: {}", error.chain()))
}

fn at_zero(case: &Case<'_>, counts: &Counts<'_>, _: &Trouble) -> Option<String> {
    let leaving = case.decision.replicas.iter().filter(|one| !one.workers.is_empty()).count();
    match (case.decision.wanted, leaving.max(counts.replicas as usize)) {
        (0, 0) if case.model.spec.suspend => Some("Suspended".to_owned()),
        (0, 0) if case.model.autoscaling.is_some() => Some("Asleep".to_owned()),
        (0, 0) => Some("Scaled to zero".to_owned()),
        (0, leaving) => Some(format!("Draining {}", number(leaving, "replica"))),
        _ => None,
    }
}

fn not_made(_: &Case<'_>, _: &Counts<'_>, trouble: &Trouble) -> Option<String> {
    trouble.not_made.as_ref().map(|(reason, message)| format!("Degraded: {reason}: {message}"))
}

fn unplanned(case: &Case<'_>, _: &Counts<'_>, trouble: &Trouble) -> Option<String> {
    match &case.decision.planning {
        Planning::Describing => Some(match &trouble.model {
            Some((reason, message)) => format!("{reason}: {message}"),
            None => "Describing model".to_owned(),
        }),
        Planning::Unreadable(why) => Some(format!("DescribeFailed: {why}")),
        Planning::NoRoom(why) => Some(format!("Unplannable: {why}")),
        Planning::NotShared(why) => Some(format!("Unplannable: {why}")),
        Planning::Planned(_) => None,
    }
}

fn broken(case: &Case<'_>, counts: &Counts<'_>, trouble: &Trouble) -> Option<String> {
    if let Some(image) = &trouble.image {
        return Some(image.clone());
    }
    if let Some(message) = &trouble.unschedulable {
        return Some(format!("Unschedulable: {message}"));
    }
    if let Some((reason, message)) = &trouble.model {
        return Some(format!("{reason}: {message}"));
    }
    if let Some(crash) = &trouble.crash {
        return Some(crash.clone());
    }
    if trouble.lost.is_empty() && !trouble.suspected.is_empty() {
        return Some(format!("Degraded: {}", suspected(&trouble.suspected)));
    }
    (!trouble.lost.is_empty())
        .then(|| format!("Degraded: {}", lost(&trouble.lost, counts.experts.as_ref(), case.model.redundancy)))
}

fn moving(case: &Case<'_>, counts: &Counts<'_>, trouble: &Trouble) -> Option<String> {
    let (decision, total) = (case.decision, counts.current.len());
    let others = decision.replicas.iter().any(|one| one.stands() && one.revision != decision.revision);
    if others {
        let done = counts.current.iter().filter(|one| one.ready()).count();
        return Some(format!("Rolling out {}: {done}/{} replicas", decision.revision, decision.wanted));
    }
    if let Some(why) = &decision.moving {
        return Some(format!("Moving experts: {why}"));
    }
    if trouble.fetching.workers > 0 {
        return Some(format!("Downloading {}%", trouble.fetching.tens()));
    }
    if trouble.loading.workers > 0 {
        let workers = number(trouble.loading.workers, "worker");
        return Some(format!("Loading {}%: {workers}", trouble.loading.tens()));
    }
    if trouble.pending > 0 || total < decision.wanted as usize {
        return Some(format!("Starting {}", number((counts.workers - counts.ready_workers) as usize, "worker")));
    }
    if trouble.unrouted > 0 {
        return Some(format!("Waiting for routers: {}", number(trouble.unrouted, "worker")));
    }
    match decision.step.why {
        Why::Draining { replicas } => Some(format!("Draining {}", number(replicas as usize, "replica"))),
        _ => (!counts.complete(decision)).then(|| format!("{}/{} replicas ready", counts.ready, decision.wanted)),
    }
}

fn number(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    }
}
