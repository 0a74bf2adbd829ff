//! The rules of the API beyond types: for each the CEL expression that the API server evaluates and the words of the
//! refusal, side by side, so that `validate`, which repeats every rule for stored objects, says the same.
//!
//! A path such as `spec.model.servedNames[0]` names a field in words and finds its place in the schema. No words
//! repeat a source or a token: they end in conditions and events.

use std::time::Duration;

use serde_json::{Value, json};

/// A bound on a whole number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole {
    /// The field.
    pub path: &'static str,
    /// The least that is accepted.
    pub min: i64,
    /// The most that is accepted.
    pub max: i64,
}

/// A bound on a duration, which is text such as `30s`, `5m` or `1h30m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The field.
    pub path: &'static str,
    /// The least that is accepted.
    pub min: &'static str,
    /// The most that is accepted.
    pub max: &'static str,
}

/// Any other rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// The field, or the object whose fields are compared.
    pub path: &'static str,
    /// CEL: true where the value is accepted.
    pub cel: &'static str,
    /// What the refusal says.
    pub words: &'static str,
    /// CEL that makes the same words with values in them; empty where there are none. `{}` in `words` stands for each.
    pub with_values: &'static str,
}

/// Number of replicas.
pub const REPLICAS: Whole = Whole { path: "spec.replicas", min: 0, max: 1000 };
/// Longest prompt plus answer.
pub const MAX_CONTEXT: Whole = Whole { path: "spec.model.maxContextTokens", min: 1, max: 100_000_000 };
/// Workers of a replica.
pub const SHARDS: Whole = Whole { path: "spec.parallelism.expert.shards", min: 1, max: 1024 };
/// Further copies of an expert.
pub const REDUNDANCY: Whole = Whole { path: "spec.parallelism.expert.redundancy", min: 0, max: 15 };
/// Tokens in a worker's cache.
pub const KV_CACHE: Whole = Whole { path: "spec.memory.kvCacheTokens", min: 1, max: 1_000_000_000 };
/// Fewest replicas.
pub const MIN_REPLICAS: Whole = Whole { path: "spec.autoscaling.minReplicas", min: 0, max: 1000 };
/// Most replicas.
pub const MAX_REPLICAS: Whole = Whole { path: "spec.autoscaling.maxReplicas", min: 1, max: 1000 };
/// Requests a replica.
pub const QUEUE_TARGET: Whole = Whole { path: "spec.autoscaling.metrics[0].queueDepth.target", min: 1, max: 100_000 };
/// Requests that wait.
pub const MAX_PENDING: Whole = Whole { path: "spec.routing.queue.maxPending", min: 1, max: 1_000_000 };
/// How often a stream goes on elsewhere.
pub const MAX_ATTEMPTS: Whole = Whole { path: "spec.routing.migration.maxAttempts", min: 1, max: 100 };
/// Replicas above the wanted number.
pub const MAX_SURGE: Whole = Whole { path: "spec.rollout.rollingUpdate.maxSurge", min: 0, max: 1000 };
/// Replicas below the wanted number.
pub const MAX_UNAVAILABLE: Whole = Whole { path: "spec.rollout.rollingUpdate.maxUnavailable", min: 0, max: 1000 };

/// Time over which the largest wanted number counts.
pub const STABILIZATION: Span =
    Span { path: "spec.autoscaling.behavior.scaleDown.stabilizationWindow", min: "2s", max: "24h" };
/// Time without requests.
pub const IDLE_AFTER: Span = Span { path: "spec.autoscaling.idle.after", min: "5s", max: "168h" };
/// Time that a request waits.
pub const MAX_WAIT: Span = Span { path: "spec.routing.queue.maxWait", min: "1s", max: "1h" };
/// Time that a sequence waits for an expert.
pub const EXPERT_WAIT: Span = Span { path: "spec.failure.maxWait", min: "1s", max: "1h" };
/// Time to finish requests.
pub const DRAIN: Span = Span { path: "spec.rollout.drainTimeout", min: "1s", max: "24h" };
/// Time without progress.
pub const PROGRESS: Span = Span { path: "spec.rollout.progressDeadline", min: "10s", max: "24h" };

/// The scheme.
pub const SOURCE_SCHEME: Check = Check {
    path: "spec.model.source",
    cel: "self.matches('^(hf|pvc|file)://')",
    words: "spec.model.source does not begin with a known scheme; use hf://OWNER/NAME, pvc://CLAIM/PATH or file://PATH",
    with_values: "",
};
/// No secrets in the source.
pub const SOURCE_USER: Check = Check {
    path: "spec.model.source",
    cel: "self.startsWith('file://') || !self.contains('@')",
    words: "spec.model.source holds a user or a password; put the token into a Secret and name it in spec.model.credentialsRef",
    with_values: "",
};
/// No way out of a repository or a claim. On a person's own disk `..` is fine.
pub const SOURCE_DOTS: Check = Check {
    path: "spec.model.source",
    cel: "!self.matches('^(hf|pvc)://') || !self.matches('/[.][.]?(/|$)')",
    words: "spec.model.source has a path with . or ..; name the folder itself",
    with_values: "",
};
/// A repository.
pub const SOURCE_HF: Check = Check {
    path: "spec.model.source",
    cel: "!self.startsWith('hf://') || self.contains('@') || self.matches('/[.][.]?(/|$)') || self.matches('^hf://[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$')",
    words: "spec.model.source names no repository; use hf://OWNER/NAME with letters, digits, '.', '_' and '-'",
    with_values: "",
};
/// A claim and a folder in it.
pub const SOURCE_PVC: Check = Check {
    path: "spec.model.source",
    cel: "!self.startsWith('pvc://') || self.contains('@') || self.matches('/[.][.]?(/|$)') || self.matches('^pvc://[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?(/[A-Za-z0-9._-]+)*/?$')",
    words: "spec.model.source names no claim; use pvc://CLAIM or pvc://CLAIM/PATH with letters, digits, '.', '_' and '-'",
    with_values: "",
};
/// A folder.
pub const SOURCE_FILE: Check = Check {
    path: "spec.model.source",
    cel: "!self.startsWith('file://') || self.matches('^file://[^[:cntrl:]]+$')",
    words: "spec.model.source names no folder; use file://PATH",
    with_values: "",
};
/// A revision that a hub understands.
pub const REVISION: Check = Check {
    path: "spec.model.revision",
    cel: "self.matches('^[A-Za-z0-9][A-Za-z0-9._/-]*$') && !self.contains('..')",
    words: "spec.model.revision is no branch, tag or commit; use letters, digits, '.', '_', '-' and '/'",
    with_values: "",
};
/// Only hubs have revisions.
pub const REVISION_OF_HUB: Check = Check {
    path: "spec.model",
    cel: "!has(self.revision) || self.source.startsWith('hf://')",
    words: "spec.model.revision is set; only hf:// sources have revisions, so remove it",
    with_values: "",
};
/// Only hubs take tokens.
pub const CREDENTIALS_OF_HUB: Check = Check {
    path: "spec.model",
    cel: "!has(self.credentialsRef) || self.source.startsWith('hf://')",
    words: "spec.model.credentialsRef is set; only hf:// sources take a token, so remove it",
    with_values: "",
};
/// A name that a request can hold.
pub const SERVED_NAME: Check = Check {
    path: "spec.model.servedNames[0]",
    cel: "self.matches('^[A-Za-z0-9]([A-Za-z0-9._:/-]*[A-Za-z0-9])?$')",
    words: "spec.model.servedNames holds an unusable name; begin and end with a letter or digit, with '.', '_', ':', '/' and '-' between",
    with_values: "",
};
/// A Secret's name.
pub const SECRET_NAME: Check = Check {
    path: "spec.model.credentialsRef.name",
    cel: "self.matches('^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$')",
    words: "spec.model.credentialsRef.name is no name of a Secret in this namespace; use lower-case letters, digits, '-' and '.'",
    with_values: "",
};
/// A key of a Secret.
pub const SECRET_KEY: Check = Check {
    path: "spec.model.credentialsRef.key",
    cel: "self.matches('^[A-Za-z0-9._-]+$') && !self.startsWith('..') && self != '.'",
    words: "spec.model.credentialsRef.key is no key of a Secret; use letters, digits, '-', '_' and '.'",
    with_values: "",
};
/// Resources by their names.
pub const RESOURCE_NAMES: [Check; 2] = [
    Check { path: "spec.resources.requests", ..RESOURCE_NAME },
    Check { path: "spec.resources.limits", ..RESOURCE_NAME },
];
const RESOURCE_NAME: Check = Check {
    path: "",
    cel: "self.all(name, name in ['cpu', 'memory', 'ephemeral-storage'] || name.startsWith('hugepages-') || name.contains('/'))",
    words: "spec.resources holds an unknown name; use cpu, memory, ephemeral-storage, hugepages-SIZE or DOMAIN/NAME",
    with_values: "",
};
/// Quantities are numbers above 0; devices are whole.
pub const QUANTITIES: [Check; 2] =
    [Check { path: "spec.resources.requests", ..QUANTITY }, Check { path: "spec.resources.limits", ..QUANTITY }];
const QUANTITY: Check = Check {
    path: "",
    cel: "self.all(name, isQuantity(string(self[name])) && quantity(string(self[name])).isGreaterThan(quantity('0')) && quantity(string(self[name])).isLessThan(quantity('1Ei')) && (!name.contains('/') || quantity(string(self[name])).isInteger()))",
    words: "spec.resources holds a bad quantity; use a number above 0 and below 1Ei such as 500m, 2 or 4Gi, and a whole one for devices",
    with_values: "",
};
/// Requests up to the limit.
pub const REQUEST_LIMIT: Check = Check {
    path: "spec.resources",
    cel: "!has(self.requests) || !has(self.limits) || self.requests.all(name, !(name in self.limits) || !isQuantity(string(self.requests[name])) || !isQuantity(string(self.limits[name])) || !quantity(string(self.requests[name])).isGreaterThan(quantity(string(self.limits[name]))))",
    words: "spec.resources.requests asks for more than spec.resources.limits allows; lower the request or raise the limit",
    with_values: "",
};
/// Keys of labels.
pub const NODE_LABEL_KEYS: Check = Check {
    path: "spec.scheduling.nodeSelector",
    cel: "self.all(key, key.size() <= 317 && key.matches('^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$'))",
    words: "spec.scheduling.nodeSelector holds an invalid label key; use NAME or DOMAIN/NAME",
    with_values: "",
};
/// Our labels are on pods, not on nodes.
pub const NODE_LABEL_RESERVED: Check = Check {
    path: "spec.scheduling.nodeSelector",
    cel: "self.all(key, !key.startsWith('modelfleet.io/'))",
    words: "spec.scheduling.nodeSelector holds a label of modelfleet.io/, which is reserved; remove it",
    with_values: "",
};
/// Values of labels.
pub const NODE_LABEL_VALUES: Check = Check {
    path: "spec.scheduling.nodeSelector",
    cel: "self.all(key, self[key].matches('^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$'))",
    words: "spec.scheduling.nodeSelector holds an invalid label value; begin and end with a letter or digit, with '.', '_' and '-' between",
    with_values: "",
};
/// A taint's key.
pub const TOLERATION_KEY: Check = Check {
    path: "spec.scheduling.tolerations[0]",
    cel: "!has(self.key) || self.key.matches('^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$')",
    words: "spec.scheduling.tolerations holds an invalid key; use NAME or DOMAIN/NAME",
    with_values: "",
};
/// What goes together in a toleration.
pub const TOLERATION_SHAPE: Check = Check {
    path: "spec.scheduling.tolerations[0]",
    cel: "(self.operator == 'Exists' || has(self.key)) && (self.operator == 'Equal' || !has(self.value)) && (!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute'))",
    words: "spec.scheduling.tolerations holds fields that do not go together; Equal needs a key, Exists takes no value, tolerationSeconds needs effect NoExecute",
    with_values: "",
};
/// A taint's value.
pub const TOLERATION_VALUE: Check = Check {
    path: "spec.scheduling.tolerations[0]",
    cel: "!has(self.value) || self.value.matches('^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$')",
    words: "spec.scheduling.tolerations holds an invalid value; begin and end with a letter or digit, with '.', '_' and '-' between",
    with_values: "",
};
/// A PriorityClass.
pub const PRIORITY_CLASS: Check = Check {
    path: "spec.scheduling.priorityClassName",
    cel: "self.matches('^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$')",
    words: "spec.scheduling.priorityClassName is no name of a PriorityClass; use lower-case letters, digits, '-' and '.'",
    with_values: "",
};
/// A node label.
pub const SPREAD_LABEL: Check = Check {
    path: "spec.scheduling.topology.spreadAcross",
    cel: "self.matches('^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$')",
    words: "spec.scheduling.topology.spreadAcross is no label key; use NAME or DOMAIN/NAME, such as topology.kubernetes.io/zone",
    with_values: "",
};
/// Without copies nothing is kept apart.
pub const SPREAD_COPIES: Check = Check {
    path: "spec",
    cel: "!has(self.scheduling) || !has(self.scheduling.topology) || !has(self.scheduling.topology.spreadAcross) || (has(self.parallelism) && has(self.parallelism.expert) && has(self.parallelism.expert.redundancy) && self.parallelism.expert.redundancy > 0)",
    words: "spec.scheduling.topology.spreadAcross is set, but no expert has copies to spread; set spec.parallelism.expert.redundancy to 1 or more, or remove it",
    with_values: "",
};
/// Each copy is on a worker of its own.
pub const COPIES_APART: Check = Check {
    path: "spec.parallelism.expert",
    cel: "!has(self.shards) || !has(self.redundancy) || self.shards < 1 || self.redundancy < self.shards",
    words: "spec.parallelism.expert.redundancy is {}; shards is {} and no worker holds two copies, so use at most {}",
    with_values: "'spec.parallelism.expert.redundancy is %d; shards is %d and no worker holds two copies, so use at most %d'.format([self.redundancy, self.shards, self.shards - 1])",
};
/// Nothing is accepted and ignored.
pub const MIGRATION_OFF: Check = Check {
    path: "spec.routing.migration",
    cel: "self.mode != 'Disabled' || !has(self.maxAttempts)",
    words: "spec.routing.migration.mode is Disabled, so maxAttempts does nothing; remove it or use Enabled",
    with_values: "",
};
/// Nothing is accepted and ignored.
pub const AUTOSCALING_OFF: Check = Check {
    path: "spec.autoscaling",
    cel: "self.mode != 'Disabled' || !(has(self.minReplicas) || has(self.maxReplicas) || has(self.metrics) || has(self.behavior) || has(self.idle))",
    words: "spec.autoscaling.mode is Disabled, so minReplicas, maxReplicas, metrics, behavior and idle do nothing; remove them or use Internal",
    with_values: "",
};
/// There is a largest number.
pub const AUTOSCALING_MAX: Check = Check {
    path: "spec.autoscaling",
    cel: "self.mode != 'Internal' || has(self.maxReplicas)",
    words: "spec.autoscaling.maxReplicas is missing; mode Internal needs it",
    with_values: "",
};
/// The smallest number is not above the largest.
pub const AUTOSCALING_RANGE: Check = Check {
    path: "spec.autoscaling",
    cel: "!has(self.minReplicas) || !has(self.maxReplicas) || self.minReplicas <= self.maxReplicas",
    words: "spec.autoscaling.minReplicas is {}; maxReplicas is {}, so use at most {}",
    with_values: "'spec.autoscaling.minReplicas is %d; maxReplicas is %d, so use at most %d'.format([self.minReplicas, self.maxReplicas, self.maxReplicas])",
};
/// Sleep needs 0.
pub const AUTOSCALING_IDLE: Check = Check {
    path: "spec.autoscaling",
    cel: "!has(self.idle) || self.mode == 'Disabled' || (has(self.minReplicas) && self.minReplicas == 0)",
    words: "spec.autoscaling.idle is set, but minReplicas is {}; a model goes to sleep only with minReplicas 0",
    with_values: "'spec.autoscaling.idle is set, but minReplicas is %d; a model goes to sleep only with minReplicas 0'.format([has(self.minReplicas) ? self.minReplicas : 1])",
};
/// A change must be possible.
pub const ROLLING_STUCK: Check = Check {
    path: "spec.rollout.rollingUpdate",
    cel: "(has(self.maxSurge) ? self.maxSurge : 1) + (has(self.maxUnavailable) ? self.maxUnavailable : 0) != 0",
    words: "spec.rollout.rollingUpdate allows neither surge nor missing replicas, so nothing could change; use at least 1 for maxSurge or maxUnavailable",
    with_values: "",
};
/// Two hands on one number. Only of use against a stored object, so `validate` cannot repeat it.
pub const REPLICAS_SCALED: Check = Check {
    path: "spec",
    cel: "!has(self.autoscaling) || !has(oldSelf.autoscaling) || self.autoscaling.mode != 'Internal' || oldSelf.autoscaling.mode != 'Internal' || self.replicas == oldSelf.replicas",
    words: "spec.replicas is set by autoscaling; change minReplicas or maxReplicas",
    with_values: "",
};

const WHOLES: [Whole; 12] = [
    REPLICAS,
    MAX_CONTEXT,
    SHARDS,
    REDUNDANCY,
    KV_CACHE,
    MIN_REPLICAS,
    MAX_REPLICAS,
    QUEUE_TARGET,
    MAX_PENDING,
    MAX_ATTEMPTS,
    MAX_SURGE,
    MAX_UNAVAILABLE,
];

const SPANS: [Span; 6] = [STABILIZATION, IDLE_AFTER, MAX_WAIT, EXPERT_WAIT, DRAIN, PROGRESS];

const CHECKS: [Check; 34] = [
    SOURCE_SCHEME,
    SOURCE_USER,
    SOURCE_DOTS,
    SOURCE_HF,
    SOURCE_PVC,
    SOURCE_FILE,
    REVISION,
    REVISION_OF_HUB,
    CREDENTIALS_OF_HUB,
    SERVED_NAME,
    SECRET_NAME,
    SECRET_KEY,
    RESOURCE_NAMES[0],
    RESOURCE_NAMES[1],
    QUANTITIES[0],
    QUANTITIES[1],
    REQUEST_LIMIT,
    NODE_LABEL_KEYS,
    NODE_LABEL_RESERVED,
    NODE_LABEL_VALUES,
    TOLERATION_KEY,
    TOLERATION_SHAPE,
    TOLERATION_VALUE,
    PRIORITY_CLASS,
    SPREAD_LABEL,
    SPREAD_COPIES,
    COPIES_APART,
    MIGRATION_OFF,
    AUTOSCALING_OFF,
    AUTOSCALING_MAX,
    AUTOSCALING_RANGE,
    AUTOSCALING_IDLE,
    ROLLING_STUCK,
    REPLICAS_SCALED,
];

/// Hours, minutes and seconds, each once and in this order.
const DURATION: &str = "^([0-9]{1,5}h)?([0-9]{1,5}m)?([0-9]{1,5}s)?$";

/// Every rule as the schema has it, with the path where it belongs.
pub(crate) fn all() -> impl Iterator<Item = (&'static str, Value)> {
    let wholes = WHOLES.iter().map(|whole| (whole.path, whole.cel()));
    let spans = SPANS.iter().flat_map(|span| span.cel().map(|rule| (span.path, rule)));
    let checks = CHECKS.iter().map(|check| (check.path, check.cel()));
    wholes.chain(spans).chain(checks)
}

impl Whole {
    /// The refusal of a value; `None` if it is accepted.
    pub fn refuse(&self, value: i64) -> Option<String> {
        let Whole { path, min, max } = self;
        let accepted = (*min..=*max).contains(&value);
        (!accepted).then(|| format!("{path} is {value}; use {min} to {max}"))
    }

    fn cel(&self) -> Value {
        let Whole { path, min, max } = self;
        json!({
            "rule": format!("self >= {min} && self <= {max}"),
            "message": format!("{path} is out of range; use {min} to {max}"),
            "messageExpression": format!("'{path} is %d; use {min} to {max}'.format([self])"),
        })
    }
}

impl Span {
    /// The duration that the text says.
    ///
    /// # Errors
    /// The refusal, if it says none or one out of bounds.
    pub fn parse(&self, text: &str) -> Result<Duration, String> {
        let Span { path, min, max } = self;
        let no_duration = || format!("{path} is {text:?}; use a duration such as 30s, 5m or 1h30m");
        let value = duration(text).ok_or_else(no_duration)?;
        let [low, high] = [min, max].map(|bound| duration(bound).unwrap_or_default());
        if value < low || value > high {
            return Err(format!("{path} is {text}; use {min} to {max}"));
        }
        Ok(value)
    }

    fn cel(&self) -> [Value; 2] {
        let Span { path, min, max } = self;
        let form = format!("self != '' && self.matches('{DURATION}')");
        [
            json!({
                "rule": form,
                "message": format!("{path} is no duration; use one such as 30s, 5m or 1h30m"),
                "messageExpression":
                    format!("'{path} is \"' + self + '\"; use a duration such as 30s, 5m or 1h30m'"),
            }),
            json!({
                "rule": format!(
                    "!({form}) || (duration(self) >= duration('{min}') && duration(self) <= duration('{max}'))"
                ),
                "message": format!("{path} is out of range; use {min} to {max}"),
                "messageExpression": format!("'{path} is ' + self + '; use {min} to {max}'"),
            }),
        ]
    }
}

impl Check {
    /// The words with values in place of each `{}`.
    pub fn says(&self, values: &[&dyn std::fmt::Display]) -> String {
        let mut parts = self.words.split("{}");
        let mut text = parts.next().unwrap_or_default().to_owned();
        for (value, part) in values.iter().zip(parts) {
            text += &format!("{value}{part}");
        }
        text
    }

    fn cel(&self) -> Value {
        let mut rule = json!({"rule": self.cel, "message": self.words});
        if !self.with_values.is_empty() {
            rule["messageExpression"] = json!(self.with_values);
        }
        rule
    }
}

/// Hours, minutes and seconds, each once and in this order, up to five digits each.
fn duration(text: &str) -> Option<Duration> {
    let (mut rest, mut seconds) = (text, 0);
    for (unit, worth) in [('h', 3600), ('m', 60), ('s', 1)] {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let Some(after) = rest[digits..].strip_prefix(unit) else {
            continue;
        };
        let number: u64 = rest[..digits].parse().ok().filter(|_| digits <= 5)?;
        seconds += number * worth;
        rest = after;
    }
    (rest.is_empty() && !text.is_empty()).then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_hours_minutes_and_seconds_in_order() {
        let cases = [
            ("30s", Some(30)),
            ("5m", Some(300)),
            ("1h30m", Some(5400)),
            ("1h2m3s", Some(3723)),
            ("0s", Some(0)),
            ("00060s", Some(60)),
            ("", None),
            ("30", None),
            ("s", None),
            ("-5s", None),
            ("5s5m", None),
            ("1.5h", None),
            ("1d", None),
            ("100000s", None),
            ("5 s", None),
            ("٣s", None),
        ];
        for (text, seconds) in cases {
            assert_eq!(duration(text), seconds.map(Duration::from_secs), "{text:?}");
        }
    }

    #[test]
    fn a_bound_of_a_duration_is_a_duration() {
        for span in SPANS {
            assert!(duration(span.min).unwrap() < duration(span.max).unwrap(), "{}", span.path);
        }
    }

    #[test]
    fn a_refusal_names_the_field_its_value_and_what_is_accepted() {
        assert_eq!(REPLICAS.refuse(-1).unwrap(), "spec.replicas is -1; use 0 to 1000");
        assert_eq!(REPLICAS.refuse(0), None);
        assert_eq!(DRAIN.parse("48h").unwrap_err(), "spec.rollout.drainTimeout is 48h; use 1s to 24h");
        assert_eq!(
            AUTOSCALING_RANGE.says(&[&5, &3, &3]),
            "spec.autoscaling.minReplicas is 5; maxReplicas is 3, so use at most 3"
        );
    }
}
