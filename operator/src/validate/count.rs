//! Numbers and durations within their bounds.

use crds::{Reason, rules};

use super::{Input, Refusal};

pub(super) fn wholes(input: &Input<'_>) -> Vec<Refusal> {
    let spec = input.spec;
    let scaling = spec.autoscaling.as_ref();
    let rolling = spec.rollout.as_ref().and_then(|rollout| rollout.rolling_update.as_ref());
    let mut values: Vec<(rules::Whole, Option<i64>)> = vec![
        (rules::REPLICAS, Some(i64::from(spec.replicas))),
        (rules::MAX_CONTEXT, spec.model.max_context_tokens),
        (rules::SHARDS, wide(spec.parallelism.as_ref().and_then(|p| p.expert.as_ref()?.shards))),
        (rules::REDUNDANCY, wide(spec.parallelism.as_ref().and_then(|p| p.expert.as_ref()?.redundancy))),
        (rules::KV_CACHE, spec.memory.as_ref().and_then(|memory| memory.kv_cache_tokens)),
        (rules::MIN_REPLICAS, wide(scaling.and_then(|scaling| scaling.min_replicas))),
        (rules::MAX_REPLICAS, wide(scaling.and_then(|scaling| scaling.max_replicas))),
        (rules::MAX_PENDING, wide(spec.routing.as_ref().and_then(|r| r.queue.as_ref()?.max_pending))),
        (rules::MAX_ATTEMPTS, wide(spec.routing.as_ref().and_then(|r| r.migration.as_ref()?.max_attempts))),
        (rules::MAX_SURGE, wide(rolling.and_then(|rolling| rolling.max_surge))),
        (rules::MAX_UNAVAILABLE, wide(rolling.and_then(|rolling| rolling.max_unavailable))),
    ];
    let metrics = scaling.and_then(|scaling| scaling.metrics.as_ref()).into_iter().flatten();
    values.extend(metrics.map(|m| (rules::QUEUE_TARGET, Some(i64::from(m.queue_depth.target)))));
    let refuse = |(bound, value): &(rules::Whole, Option<i64>)| {
        let message = value.and_then(|value| bound.refuse(value))?;
        Some(Refusal::new(Reason::InvalidCount, bound.path, message))
    };
    values.iter().filter_map(refuse).collect()
}

fn wide(value: Option<i32>) -> Option<i64> {
    value.map(i64::from)
}

pub(super) fn durations(input: &Input<'_>) -> Vec<Refusal> {
    let spec = input.spec;
    let scaling = spec.autoscaling.as_ref();
    let window = scaling.and_then(|a| a.behavior.as_ref()?.scale_down.as_ref());
    let rollout = spec.rollout.as_ref();
    let values: [(rules::Span, Option<&str>); 6] = [
        (rules::STABILIZATION, window.and_then(|down| down.stabilization_window.as_deref())),
        (rules::IDLE_AFTER, scaling.and_then(|a| a.idle.as_ref()?.after.as_deref())),
        (rules::MAX_WAIT, spec.routing.as_ref().and_then(|r| r.queue.as_ref()?.max_wait.as_deref())),
        (rules::EXPERT_WAIT, spec.failure.as_ref().and_then(|failure| failure.max_wait.as_deref())),
        (rules::DRAIN, rollout.and_then(|rollout| rollout.drain_timeout.as_deref())),
        (rules::PROGRESS, rollout.and_then(|rollout| rollout.progress_deadline.as_deref())),
    ];
    let refuse = |(bound, text): &(rules::Span, Option<&str>)| {
        let message = bound.parse((*text)?).err()?;
        Some(Refusal::new(Reason::InvalidDuration, bound.path, message))
    };
    values.iter().filter_map(refuse).collect()
}
