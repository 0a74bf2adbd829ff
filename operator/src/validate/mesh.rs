//! Copies of experts, and streams that outlive their worker.

use crds::{ExpertParallelism, MigrationMode, Reason, rules};

use super::fields::is_label_key;
use super::{Input, Refusal, unless};

fn expert<'a>(input: &Input<'a>) -> Option<&'a ExpertParallelism> {
    input.spec.parallelism.as_ref()?.expert.as_ref()
}

/// Each copy has a worker of its own.
pub(super) fn copies(input: &Input<'_>) -> Vec<Refusal> {
    let expert = expert(input);
    match (expert.and_then(|expert| expert.redundancy), expert.and_then(|expert| expert.shards)) {
        (Some(redundancy), Some(shards)) if shards >= 1 && redundancy >= shards => {
            let message = rules::COPIES_APART.says(&[&redundancy, &shards, &(shards - 1)]);
            vec![Refusal::new(Reason::InvalidCount, rules::REDUNDANCY.path, message)]
        }
        _ => Vec::new(),
    }
}

/// A label that nodes can have, and copies to spread by it.
pub(super) fn spread(input: &Input<'_>) -> Vec<Refusal> {
    let topology = input.spec.scheduling.as_ref().and_then(|scheduling| scheduling.topology.as_ref());
    let Some(label) = topology.and_then(|topology| topology.spread_across.as_deref()) else {
        return Vec::new();
    };
    let mut refusals = unless(is_label_key(label), &rules::SPREAD_LABEL, Reason::InvalidScheduling);
    let copies = expert(input).and_then(|expert| expert.redundancy).unwrap_or(0) > 0;
    if !copies {
        let words = rules::SPREAD_COPIES.words;
        refusals.push(Refusal::new(Reason::InvalidScheduling, rules::SPREAD_LABEL.path, words));
    }
    refusals
}

/// Nothing is accepted and ignored.
pub(super) fn migration(input: &Input<'_>) -> Vec<Refusal> {
    let migration = input.spec.routing.as_ref().and_then(|routing| routing.migration.as_ref());
    let ignored = migration.is_some_and(|one| one.mode == MigrationMode::Disabled && one.max_attempts.is_some());
    unless(!ignored, &rules::MIGRATION_OFF, Reason::InvalidCount)
}
