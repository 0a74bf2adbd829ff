//! What workers ask of their nodes.

use std::collections::BTreeMap;

use crds::{ModelDeploymentSpec, Reason, rules};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use planner::Bytes;

use super::{Input, Refusal, unless};

const NAMES: usize = 8;
/// One, in the unit of [`parse`].
const ONE: i128 = 1_000_000_000;
/// 1Ei, the first amount that is too large.
const TOO_MUCH: i128 = (1 << 60) * ONE;

type List = BTreeMap<String, Quantity>;

/// Requests and limits, each with its place in the arrays of rules.
fn lists(spec: &ModelDeploymentSpec) -> impl Iterator<Item = (usize, &List)> {
    let resources = spec.resources.as_ref();
    let lists = resources.map(|r| [r.requests.as_ref(), r.limits.as_ref()]).unwrap_or_default();
    lists.into_iter().enumerate().filter_map(|(i, list)| Some((i, list?)))
}

pub(super) fn names(input: &Input<'_>) -> Vec<Refusal> {
    let known = |name: &String| {
        ["cpu", "memory", "ephemeral-storage"].contains(&name.as_str())
            || name.starts_with("hugepages-")
            || name.contains('/')
    };
    let refuse = |(i, list): (usize, &List)| {
        let check = &rules::RESOURCE_NAMES[i];
        let mut refusals = unless(list.keys().all(known), check, Reason::InvalidQuantity);
        if list.len() > NAMES {
            let message = format!("{} has {} names; use at most {NAMES}", check.path, list.len());
            refusals.push(Refusal::new(Reason::InvalidQuantity, check.path, message));
        }
        refusals
    };
    lists(input.spec).flat_map(refuse).collect()
}

pub(super) fn amounts(input: &Input<'_>) -> Vec<Refusal> {
    let good = |(name, quantity): (&String, &Quantity)| {
        parse(&quantity.0).is_some_and(|amount| {
            let whole = !name.contains('/') || amount % ONE == 0;
            amount > 0 && amount < TOO_MUCH && whole
        })
    };
    let refuse =
        |(i, list): (usize, &List)| unless(list.iter().all(good), &rules::QUANTITIES[i], Reason::InvalidQuantity);
    lists(input.spec).flat_map(refuse).collect()
}

pub(super) fn within_limits(input: &Input<'_>) -> Vec<Refusal> {
    let Some(resources) = &input.spec.resources else {
        return Vec::new();
    };
    let (Some(requests), Some(limits)) = (&resources.requests, &resources.limits) else {
        return Vec::new();
    };
    let within = |(name, request): (&String, &Quantity)| {
        let limit = limits.get(name).and_then(|limit| parse(&limit.0));
        parse(&request.0).zip(limit).is_none_or(|(request, limit)| request <= limit)
    };
    unless(requests.iter().all(within), &rules::REQUEST_LIMIT, Reason::InvalidQuantity)
}

/// The memory limit of a worker, in whole bytes.
pub(super) fn memory_limit(spec: &ModelDeploymentSpec) -> Option<Bytes> {
    memory_bytes(spec.resources.as_ref()?.limits.as_ref()?.get("memory")?)
}

/// What a quantity of memory says, in whole bytes.
pub(crate) fn memory_bytes(quantity: &Quantity) -> Option<Bytes> {
    u64::try_from(parse(&quantity.0)? / ONE).ok().map(Bytes)
}

/// The amount that a quantity says, in billionths; a larger one than Kubernetes can hold counts as the largest.
fn parse(text: &str) -> Option<i128> {
    let (sign, text) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = text.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 || fraction.contains('.') {
        return None;
    }
    let digits: i128 = format!("{whole}{fraction}").parse().unwrap_or(i128::MAX);
    let (factor, exponent) = scale(suffix)?;
    let exponent = exponent.saturating_add(9).saturating_sub(i64::try_from(fraction.len()).ok()?);
    let amount = digits.checked_mul(factor).and_then(|amount| shift(amount, exponent));
    Some(sign * amount.unwrap_or(i128::MAX))
}

/// Times ten to the power of `exponent`, rounded up; `None` if it is too large.
fn shift(amount: i128, exponent: i64) -> Option<i128> {
    let power = 10_i128.checked_pow(u32::try_from(exponent.unsigned_abs()).unwrap_or(u32::MAX));
    match (exponent < 0, power) {
        (_, _) if amount == 0 => Some(0),
        (false, power) => amount.checked_mul(power?),
        (true, Some(power)) => Some(amount / power + i128::from(amount % power != 0)),
        (true, None) => Some(1),
    }
}

/// A factor and a power of ten.
fn scale(suffix: &str) -> Option<(i128, i64)> {
    let binary = |power: u32| Some((1_i128 << (10 * power), 0));
    match suffix {
        "n" => Some((1, -9)),
        "u" => Some((1, -6)),
        "m" => Some((1, -3)),
        "" => Some((1, 0)),
        "k" => Some((1, 3)),
        "M" => Some((1, 6)),
        "G" => Some((1, 9)),
        "T" => Some((1, 12)),
        "P" => Some((1, 15)),
        "E" => Some((1, 18)),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => Some((1, suffix.strip_prefix(['e', 'E'])?.parse().ok()?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        let cases = [
            ("2", Some(2 * ONE)),
            ("500m", Some(ONE / 2)),
            ("1.5Gi", Some((3 << 29) * ONE)),
            (".5", Some(ONE / 2)),
            ("1e3", Some(1000 * ONE)),
            ("1E3", Some(1000 * ONE)),
            ("1E", Some(1_000_000_000_000_000_000 * ONE)),
            ("-1Gi", Some(-(1 << 30) * ONE)),
            ("0", Some(0)),
            ("1n", Some(1)),
            ("0.1n", Some(1)),
            ("1e9999", Some(i128::MAX)),
            ("1e-9999", Some(1)),
            ("", None),
            ("Gi", None),
            ("1gb", None),
            ("1.2.3", None),
            ("1 Gi", None),
            ("1e", None),
        ];
        for (text, amount) in cases {
            assert_eq!(parse(text), amount, "{text:?}");
        }
    }
}
