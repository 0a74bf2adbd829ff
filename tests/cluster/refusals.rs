//! Bad YAML: what is laid over the spec of a model that is served, who refuses it, and words that the refusal has.

/// Who refuses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum By {
    /// The API server: nothing is stored.
    Admission,
    /// The operator: this condition is False.
    Condition(&'static str),
}

/// A change of the spec (JSON merge patch), who refuses it, and some of the words.
pub(crate) type Refusal = (&'static str, By, &'static str);

const ACCEPTED: By = By::Condition("Accepted");

#[rustfmt::skip]
pub(crate) const REFUSALS: [Refusal; 66] = [
    // counts
    (r#"{"replicas": -1}"#, By::Admission, "spec.replicas is -1; use 0 to 1000"),
    (r#"{"replicas": 1001}"#, By::Admission, "spec.replicas is 1001; use 0 to 1000"),
    (r#"{"replicas": 2147483648}"#, By::Admission, "spec.replicas"),
    (r#"{"replicas": "3"}"#, By::Admission, "spec.replicas"),
    (r#"{"replicas": 2.5}"#, By::Admission, "spec.replicas"),
    (r#"{"model": {"maxContextTokens": 0}}"#, By::Admission, "spec.model.maxContextTokens is 0; use 1 to 100000000"),
    (r#"{"memory": {"kvCacheTokens": -1}}"#, By::Admission, "spec.memory.kvCacheTokens is -1; use 1 to 1000000000"),
    (r#"{"parallelism": {"expert": {"shards": 0}}}"#, By::Admission, "spec.parallelism.expert.shards is 0; use 1 to 1024"),
    (r#"{"parallelism": {"expert": {"shards": 1000000000}}}"#, By::Admission, "spec.parallelism.expert.shards is 1000000000; use 1 to 1024"),
    (r#"{"routing": {"queue": {"maxPending": 0}}}"#, By::Admission, "spec.routing.queue.maxPending is 0; use 1 to 1000000"),
    // sources
    (r#"{"model": {"source": ""}}"#, By::Admission, "does not begin with a known scheme; use hf://OWNER/NAME"),
    (r#"{"model": {"source": "s3://bucket/model"}}"#, By::Admission, "does not begin with a known scheme"),
    (r#"{"model": {"source": "https://hub.example/a/b"}}"#, By::Admission, "does not begin with a known scheme"),
    (r#"{"model": {"source": "hf://owner"}}"#, By::Admission, "names no repository; use hf://OWNER/NAME"),
    (r#"{"model": {"source": "hf://owner/name/more"}}"#, By::Admission, "names no repository"),
    (r#"{"model": {"source": "hf://owner/../name"}}"#, By::Admission, "has a path with . or .."),
    (r#"{"model": {"source": "hf://user:secret@owner/name"}}"#, By::Admission, "holds a user or a password"),
    (r#"{"model": {"source": "pvc://"}}"#, By::Admission, "names no claim"),
    (r#"{"model": {"source": "pvc://claim/../other"}}"#, By::Admission, "has a path with . or .."),
    (r#"{"model": {"revision": "two words"}}"#, By::Admission, "spec.model.revision is no branch, tag or commit"),
    (r#"{"model": {"source": "pvc://claim", "revision": "main"}}"#, By::Admission, "only hf:// sources have revisions"),
    (r#"{"model": {"source": "pvc://claim", "credentialsRef": {"name": "hub"}}}"#, By::Admission, "only hf:// sources take a token"),
    (r#"{"model": {"credentialsRef": {"name": "other/secret"}}}"#, By::Admission, "is no name of a Secret in this namespace"),
    (r#"{"model": {"servedNames": []}}"#, By::Admission, "spec.model.servedNames"),
    (r#"{"model": {"servedNames": ["one", "one"]}}"#, By::Admission, "Duplicate value"),
    (r#"{"model": {"servedNames": ["two words"]}}"#, By::Admission, "spec.model.servedNames holds an unusable name"),
    // quantities
    (r#"{"resources": {"requests": {}, "limits": {"memory": "-1Gi"}}}"#, By::Admission, "spec.resources holds a bad quantity"),
    (r#"{"resources": {"requests": {}, "limits": {"memory": "0"}}}"#, By::Admission, "spec.resources holds a bad quantity"),
    (r#"{"resources": {"requests": {}, "limits": {"memory": "much"}}}"#, By::Admission, "spec.resources holds a bad quantity"),
    (r#"{"resources": {"requests": {}, "limits": {"nvidia.com/gpu": "1m"}}}"#, By::Admission, "a whole one for devices"),
    (r#"{"resources": {"requests": {}, "limits": {"gpu": "1"}}}"#, By::Admission, "spec.resources holds an unknown name"),
    (r#"{"resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}}"#, By::Admission, "asks for more than spec.resources.limits allows"),
    // scheduling
    (r#"{"scheduling": {"nodeSelector": {"two words": "x"}}}"#, By::Admission, "spec.scheduling.nodeSelector holds an invalid label key"),
    (r#"{"scheduling": {"nodeSelector": {"pool": "-"}}}"#, By::Admission, "spec.scheduling.nodeSelector holds an invalid label value"),
    (r#"{"scheduling": {"nodeSelector": {"modelfleet.io/pool": "x"}}}"#, By::Admission, "which is reserved; remove it"),
    (r#"{"scheduling": {"nodeSelector": {}, "tolerations": [{"operator": "Exists", "value": "x"}]}}"#, By::Admission, "fields that do not go together"),
    (r#"{"scheduling": {"nodeSelector": {}, "priorityClassName": "Very High"}}"#, By::Admission, "is no name of a PriorityClass"),
    // scaling
    (r#"{"autoscaling": {"mode": "Internal"}}"#, By::Admission, "spec.autoscaling.maxReplicas is missing; mode Internal needs it"),
    (r#"{"autoscaling": {"mode": "internal", "maxReplicas": 2}}"#, By::Admission, "Unsupported value"),
    (r#"{"autoscaling": {"mode": "Disabled", "maxReplicas": 2}}"#, By::Admission, "remove them or use Internal"),
    (r#"{"autoscaling": {"mode": "Internal", "minReplicas": 5, "maxReplicas": 3}}"#, By::Admission, "spec.autoscaling.minReplicas is 5; maxReplicas is 3, so use at most 3"),
    (r#"{"autoscaling": {"mode": "Internal", "maxReplicas": 3, "idle": {"after": "5m"}}}"#, By::Admission, "a model goes to sleep only with minReplicas 0"),
    (r#"{"autoscaling": {"mode": "Internal", "maxReplicas": 3, "metrics": [{"type": "QueueDepth", "queueDepth": {"target": 0}}]}}"#, By::Admission, "queueDepth.target is 0; use 1 to 100000"),
    (r#"{"autoscaling": {"mode": "Internal", "maxReplicas": 3, "metrics": [{"type": "Cpu", "queueDepth": {"target": 1}}]}}"#, By::Admission, "Unsupported value"),
    (r#"{"autoscaling": {"mode": "Internal", "maxReplicas": 3, "behavior": {"scaleDown": {"stabilizationWindow": "1ns"}}}}"#, By::Admission, "use a duration such as 30s"),
    (r#"{"autoscaling": {"mode": "Internal", "minReplicas": 0, "maxReplicas": 3, "idle": {"after": "87600h"}}}"#, By::Admission, "spec.autoscaling.idle.after is 87600h; use 5s to 168h"),
    // rollout and queue
    (r#"{"routing": {"queue": {"maxWait": "soon"}}}"#, By::Admission, "use a duration such as 30s"),
    (r#"{"rollout": {"drainTimeout": "0s"}}"#, By::Admission, "spec.rollout.drainTimeout is 0s; use 1s to 24h"),
    (r#"{"rollout": {"progressDeadline": "-5m"}}"#, By::Admission, "use a duration such as 30s"),
    (r#"{"rollout": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}}"#, By::Admission, "allows neither surge nor missing replicas"),
    // what does not exist
    (r#"{"replica": 3}"#, By::Admission, "unknown field \"spec.replica\""),
    (r#"{"model": {"sauce": "hf://a/b"}}"#, By::Admission, "unknown field \"spec.model.sauce\""),
    (r#"{"suspend": "yes"}"#, By::Admission, "spec.suspend"),
    // what only the operator knows
    (r#"{"model": {"source": "file:///models/tiny-r1"}}"#, ACCEPTED, "in a cluster use hf://OWNER/NAME or pvc://CLAIM/PATH"),
    (r#"{"podTemplate": {"spec": {"hostNetwork": true}}}"#, ACCEPTED, "spec.podTemplate.spec.hostNetwork"),
    (r#"{"podTemplate": {"spec": {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}}}"#, ACCEPTED, "spec.podTemplate.spec.volumes[0].hostPath"),
    (r#"{"podTemplate": {"spec": {"serviceAccountName": "admin"}}}"#, ACCEPTED, "spec.podTemplate.spec.serviceAccountName"),
    (r#"{"podTemplate": {"spec": {"containers": [{"name": "worker", "command": ["sh"]}]}}}"#, ACCEPTED, "spec.podTemplate.spec.containers[0].command"),
    (r#"{"podTemplate": {"spec": {"containers": [{"name": "worker", "securityContext": {"privileged": true}}]}}}"#, ACCEPTED, "privileged"),
    (r#"{"podTemplate": {"spec": {"tolerationz": []}}}"#, ACCEPTED, "spec.podTemplate.spec.tolerationz"),
    (r#"{"podTemplate": {"metadata": {"labels": {"modelfleet.io/model": "other"}}}}"#, ACCEPTED, "modelfleet.io/model"),
    (r#"{"parallelism": {"expert": {"shards": 64}}}"#, By::Condition("Planned"), "16"),
    (r#"{"model": {"maxContextTokens": 10000000}}"#, By::Condition("Planned"), "10000000"),
    (r#"{"model": {"source": "hf://modelfleet/nobody"}}"#, By::Condition("ModelReady"), "modelfleet/nobody"),
    (r#"{"model": {"revision": "no-such-branch"}}"#, By::Condition("ModelReady"), "no-such-branch"),
    (r#"{"model": {"source": "hf://modelfleet/unknown"}}"#, By::Condition("ModelReady"), "UnheardOfForCausalLM"),
];
