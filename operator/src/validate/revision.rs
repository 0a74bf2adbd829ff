//! What a revision is: all that changes what a worker runs, as canonical text.

use crds::{Memory, ModelDeployment, Resources, Scheduling, SecretKey};
use kube::ResourceExt;
use serde::Serialize;

/// Annotation of a `ModelDeployment`: a new value starts every worker anew.
pub const RESTARTED_AT: &str = "modelfleet.io/restartedAt";

/// Neither `shards` nor what concerns only routers and the number of replicas. A field that a later release adds
/// enters only when it is set, so an upgrade rolls nothing.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RevisionInput<'a> {
    source: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    credentials_ref: Option<&'a SecretKey>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_context_tokens: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resources: Option<&'a Resources>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<&'a Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scheduling: Option<&'a Scheduling>,
    #[serde(skip_serializing_if = "Option::is_none")]
    drain_timeout: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_template: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    restarted_at: Option<&'a str>,
}

/// The canonical text: JSON without spaces, fields in a fixed order, keys of free-form objects sorted.
pub(super) fn input(md: &ModelDeployment) -> String {
    let (spec, model) = (&md.spec, &md.spec.model);
    let mut pod_template = spec.pod_template.clone();
    if let Some(template) = &mut pod_template {
        template.sort_all_objects();
    }
    let input = RevisionInput {
        source: &model.source,
        revision: model.revision.as_deref(),
        credentials_ref: model.credentials_ref.as_ref(),
        max_context_tokens: model.max_context_tokens,
        resources: spec.resources.as_ref(),
        memory: spec.memory.as_ref(),
        scheduling: spec.scheduling.as_ref(),
        drain_timeout: spec.rollout.as_ref().and_then(|rollout| rollout.drain_timeout.as_deref()),
        pod_template,
        restarted_at: md.annotations().get(RESTARTED_AT).map(String::as_str),
    };
    serde_json::to_string(&input).expect("a spec that was read as JSON can be written as JSON")
}
