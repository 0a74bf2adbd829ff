//! How the number of replicas changes.

use crds::{Autoscaling, AutoscalingMode, Reason, rules};

use super::{Input, Refusal, unless};

const REASON: Reason = Reason::InvalidAutoscaling;

fn scaling<'a>(input: &Input<'a>, mode: AutoscalingMode) -> Option<&'a Autoscaling> {
    input.spec.autoscaling.as_ref().filter(|scaling| scaling.mode == mode)
}

/// Nothing is accepted and ignored.
pub(super) fn mode_off(input: &Input<'_>) -> Vec<Refusal> {
    let Some(scaling) = scaling(input, AutoscalingMode::Disabled) else {
        return Vec::new();
    };
    let only_mode = Autoscaling { mode: AutoscalingMode::Disabled, ..Autoscaling::default() };
    unless(*scaling == only_mode, &rules::AUTOSCALING_OFF, REASON)
}

pub(super) fn maximum(input: &Input<'_>) -> Vec<Refusal> {
    let Some(scaling) = scaling(input, AutoscalingMode::Internal) else {
        return Vec::new();
    };
    unless(scaling.max_replicas.is_some(), &rules::AUTOSCALING_MAX, REASON)
}

pub(super) fn range(input: &Input<'_>) -> Vec<Refusal> {
    let Some(scaling) = &input.spec.autoscaling else {
        return Vec::new();
    };
    match (scaling.min_replicas, scaling.max_replicas) {
        (Some(min), Some(max)) if min > max => {
            let check = rules::AUTOSCALING_RANGE;
            vec![Refusal::new(REASON, rules::MIN_REPLICAS.path, check.says(&[&min, &max, &max]))]
        }
        _ => Vec::new(),
    }
}

pub(super) fn idle(input: &Input<'_>) -> Vec<Refusal> {
    let Some(scaling) = scaling(input, AutoscalingMode::Internal) else {
        return Vec::new();
    };
    let min = scaling.min_replicas.unwrap_or(1);
    if scaling.idle.is_none() || min == 0 {
        return Vec::new();
    }
    let message = rules::AUTOSCALING_IDLE.says(&[&min]);
    vec![Refusal::new(REASON, "spec.autoscaling.idle", message)]
}

pub(super) fn metrics(input: &Input<'_>) -> Vec<Refusal> {
    const FIELD: &str = "spec.autoscaling.metrics";
    let metrics = input.spec.autoscaling.as_ref().and_then(|scaling| scaling.metrics.as_ref());
    match metrics.map(Vec::len) {
        None | Some(1) => Vec::new(),
        Some(count) => {
            let message = format!("{FIELD} has {count} entries; use one of type QueueDepth");
            vec![Refusal::new(REASON, FIELD, message)]
        }
    }
}

pub(super) fn rolling_update(input: &Input<'_>) -> Vec<Refusal> {
    let rolling = input.spec.rollout.as_ref().and_then(|rollout| rollout.rolling_update.as_ref());
    let Some(rolling) = rolling else {
        return Vec::new();
    };
    let surge = rolling.max_surge.unwrap_or(1);
    let moves = surge != 0 || rolling.max_unavailable.unwrap_or(0) != 0;
    unless(moves, &rules::ROLLING_STUCK, Reason::InvalidRollout)
}
