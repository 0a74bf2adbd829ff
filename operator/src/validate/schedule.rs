//! Where workers may run.

use crds::{GROUP, Reason, TaintEffect, Toleration, TolerationOperator, rules};

use super::fields::{is_label_key, is_label_value, is_object_name};
use super::{Input, Refusal, unless};

const REASON: Reason = Reason::InvalidScheduling;
const ENTRIES: usize = 32;

pub(super) fn node_selector(input: &Input<'_>) -> Vec<Refusal> {
    const FIELD: &str = "spec.scheduling.nodeSelector";
    let selector = input.spec.scheduling.as_ref().and_then(|s| s.node_selector.as_ref());
    let Some(selector) = selector else {
        return Vec::new();
    };
    let ours = format!("{GROUP}/");
    let mut refusals = too_many(FIELD, selector.len());
    refusals.extend(unless(selector.keys().all(|key| is_label_key(key)), &rules::NODE_LABEL_KEYS, REASON));
    let free = selector.keys().all(|key| !key.starts_with(&ours));
    refusals.extend(unless(free, &rules::NODE_LABEL_RESERVED, REASON));
    let values = selector.values().all(|value| is_label_value(value));
    refusals.extend(unless(values, &rules::NODE_LABEL_VALUES, REASON));
    refusals
}

pub(super) fn tolerations(input: &Input<'_>) -> Vec<Refusal> {
    const FIELD: &str = "spec.scheduling.tolerations";
    let tolerations = input.spec.scheduling.as_ref().and_then(|s| s.tolerations.as_ref());
    let Some(tolerations) = tolerations else {
        return Vec::new();
    };
    let all = |holds: fn(&Toleration) -> bool| tolerations.iter().all(holds);
    let mut refusals = too_many(FIELD, tolerations.len());
    let keys = all(|t| t.key.as_deref().is_none_or(is_label_key));
    refusals.extend(unless(keys, &rules::TOLERATION_KEY, REASON));
    refusals.extend(unless(all(goes_together), &rules::TOLERATION_SHAPE, REASON));
    let values = all(|t| t.value.as_deref().is_none_or(is_label_value));
    refusals.extend(unless(values, &rules::TOLERATION_VALUE, REASON));
    refusals
}

fn goes_together(toleration: &Toleration) -> bool {
    let matches = match toleration.operator {
        TolerationOperator::Equal => toleration.key.is_some(),
        TolerationOperator::Exists => toleration.value.is_none(),
    };
    let evicts = toleration.effect == Some(TaintEffect::NoExecute);
    matches && (toleration.toleration_seconds.is_none() || evicts)
}

pub(super) fn priority_class(input: &Input<'_>) -> Vec<Refusal> {
    let class = input.spec.scheduling.as_ref().and_then(|s| s.priority_class_name.as_ref());
    let Some(class) = class else {
        return Vec::new();
    };
    let holds = class.len() <= 253 && is_object_name(class);
    unless(holds, &rules::PRIORITY_CLASS, REASON)
}

fn too_many(field: &str, count: usize) -> Vec<Refusal> {
    if count <= ENTRIES {
        return Vec::new();
    }
    vec![Refusal::new(REASON, field, format!("{field} has {count} entries; use at most {ENTRIES}"))]
}
