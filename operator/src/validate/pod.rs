//! The pod template: what a user may add to the worker pods. Everything is refused by its path.
//!
//! The lists of fields are closed. What is on none of them is ours (ports, command, probes, service account, grace
//! period, readiness gates, images), or could leave what Pod Security calls `restricted`.

use std::collections::BTreeSet;

use crds::{GROUP, ModelDeploymentSpec, Reason};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use serde_json::{Map, Value};

use super::fields::{is_label_key, is_label_value};
use super::{Input, Refusal};

const ROOT: &str = "spec.podTemplate";
/// Longest template, as compact JSON.
const BYTES: usize = 64 * 1024;

const TEMPLATE: &[&str] = &["metadata", "spec"];
const METADATA: &[&str] = &["labels", "annotations"];
const POD: &[&str] = &[
    "affinity",
    "containers",
    "dnsConfig",
    "dnsPolicy",
    "hostAliases",
    "imagePullSecrets",
    "initContainers",
    "nodeSelector",
    "preemptionPolicy",
    "priorityClassName",
    "runtimeClassName",
    "schedulerName",
    "securityContext",
    "tolerations",
    "topologySpreadConstraints",
    "volumes",
];
const WORKER: &[&str] = &["env", "envFrom", "name", "securityContext", "volumeMounts"];
const FETCH: &[&str] = &["env", "envFrom", "name", "resources", "securityContext", "volumeMounts"];
const POD_SECURITY: &[&str] = &[
    "fsGroup",
    "fsGroupChangePolicy",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "seccompProfile",
    "supplementalGroups",
];
const CONTAINER_SECURITY: &[&str] = &[
    "allowPrivilegeEscalation",
    "capabilities",
    "privileged",
    "readOnlyRootFilesystem",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "seccompProfile",
];
const VOLUMES: &[&str] =
    &["configMap", "downwardAPI", "emptyDir", "ephemeral", "name", "persistentVolumeClaim", "projected", "secret"];
/// Names that the operator gives, and folders that it mounts.
const OUR_VOLUMES: &[&str] = &["claim", "hub-certificates", "hub-token", "model", "placement"];
const OUR_FOLDERS: &[&str] = &["/etc/modelfleet", "/model", "/pvc", "/var/run/modelfleet"];
const OUR_VARIABLES: &[&str] = &["HF_", "MODELFLEET_", "POD_IP", "SSL_CERT_FILE"];
/// Labels that select our pods.
const OUR_LABELS: &[&str] = &["app.kubernetes.io/", "apps.kubernetes.io/"];

pub(super) fn size(input: &Input<'_>) -> Vec<Refusal> {
    let Some(template) = &input.spec.pod_template else {
        return Vec::new();
    };
    let bytes = template.to_string().len();
    if bytes <= BYTES {
        return Vec::new();
    }
    let message = format!("{ROOT} has {bytes} bytes as JSON; use at most {BYTES}");
    vec![Refusal::new(Reason::InvalidPodTemplate, ROOT, message)]
}

/// What Kubernetes would not understand must not vanish silently.
pub(super) fn reads_back(input: &Input<'_>) -> Vec<Refusal> {
    let Some(template) = small(input) else {
        return Vec::new();
    };
    let Ok(parsed) = serde_json::from_value::<PodTemplateSpec>(template.clone()) else {
        return vec![unreadable(template)];
    };
    let back = serde_json::to_value(&parsed).expect("a template that was read can be written");
    let mut lost = Vec::new();
    differences(ROOT, template, Some(&back), &mut lost);
    lost.into_iter()
        .map(|path| invalid(&path, "is not a field of a pod template, or not its value; remove it"))
        .collect()
}

/// The template as Kubernetes types; `None` also where [`reads_back`] refused it.
pub(super) fn parse(spec: &ModelDeploymentSpec) -> Option<PodTemplateSpec> {
    serde_json::from_value(spec.pod_template.clone()?).ok()
}

/// The template, unless [`size`] refused it.
fn small<'a>(input: &Input<'a>) -> Option<&'a Value> {
    let template = input.spec.pod_template.as_ref()?;
    size(input).is_empty().then_some(template)
}

/// Goes down to the field without which the template could be read.
fn unreadable(template: &Value) -> Refusal {
    let reads = |value: &Value| serde_json::from_value::<PodTemplateSpec>(value.clone());
    let why = reads(template).err().map(|error| error.to_string()).unwrap_or_default();
    let (mut path, mut pointer) = (ROOT.to_owned(), String::new());
    while let Some((name, step)) = children(template, &pointer).into_iter().find(|(_, step)| {
        let mut without = template.clone();
        if let Some(field) = without.pointer_mut(step) {
            *field = Value::Null;
        }
        reads(&without).is_ok()
    }) {
        path += &name;
        pointer = step;
    }
    invalid(&path, &format!("is not what Kubernetes takes there ({why})"))
}

/// The fields or items at a JSON pointer: how each is told, and its own pointer.
fn children(value: &Value, pointer: &str) -> Vec<(String, String)> {
    match value.pointer(pointer) {
        Some(Value::Object(fields)) => {
            let step = |name: &String| name.replace('~', "~0").replace('/', "~1");
            fields.keys().map(|name| (format!(".{name}"), format!("{pointer}/{}", step(name)))).collect()
        }
        Some(Value::Array(items)) => (0..items.len()).map(|i| (format!("[{i}]"), format!("{pointer}/{i}"))).collect(),
        _ => Vec::new(),
    }
}

/// Paths whose value did not come back. Numbers may come back as text, which is what quantities are.
fn differences(path: &str, value: &Value, back: Option<&Value>, lost: &mut Vec<String>) {
    let empty = match value {
        Value::Null => true,
        Value::Object(fields) => fields.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    };
    match (value, back) {
        _ if empty => {}
        (Value::Object(fields), Some(Value::Object(back))) => {
            for (name, field) in fields {
                differences(&format!("{path}.{name}"), field, back.get(name), lost);
            }
        }
        (Value::Array(items), Some(Value::Array(back))) => {
            for (i, item) in items.iter().enumerate() {
                differences(&format!("{path}[{i}]"), item, back.get(i), lost);
            }
        }
        (Value::Number(number), Some(Value::String(text))) if number.to_string() == *text => {}
        (value, back) if back == Some(value) => {}
        _ => lost.push(path.to_owned()),
    }
}

/// Only fields of the closed lists.
pub(super) fn closed(input: &Input<'_>) -> Vec<Refusal> {
    let Some(template) = small(input) else {
        return Vec::new();
    };
    let spec = &template["spec"];
    let mut refusals = outside(ROOT, template, TEMPLATE);
    refusals.extend(outside(&format!("{ROOT}.metadata"), &template["metadata"], METADATA));
    refusals.extend(outside(&format!("{ROOT}.spec"), spec, POD));
    let path = format!("{ROOT}.spec.securityContext");
    refusals.extend(outside(&path, &spec["securityContext"], POD_SECURITY));
    for container in containers(template) {
        let fields = if container.init { FETCH } else { WORKER };
        refusals.extend(outside(&container.path, container.value, fields));
        let path = format!("{}.securityContext", container.path);
        refusals.extend(outside(&path, &container.value["securityContext"], CONTAINER_SECURITY));
    }
    for (path, volume) in items(&format!("{ROOT}.spec.volumes"), &spec["volumes"]) {
        refusals.extend(outside(&path, volume, VOLUMES));
    }
    refusals
}

fn outside(path: &str, value: &Value, allowed: &[&str]) -> Vec<Refusal> {
    let fields = value.as_object().into_iter().flat_map(Map::keys);
    let strange = fields.filter(|name| !allowed.contains(&name.as_str()));
    let refuse = |name: &String| {
        let field = format!("{path}.{name}");
        let message = format!("{field} may not be set; accepted here: {}", allowed.join(", "));
        Refusal::new(Reason::ReservedField, field, message)
    };
    strange.map(refuse).collect()
}

/// Labels and annotations that are not ours.
pub(super) fn labels(input: &Input<'_>) -> Vec<Refusal> {
    let Some(template) = small(input) else {
        return Vec::new();
    };
    let mut refusals = Vec::new();
    for kind in METADATA {
        let path = format!("{ROOT}.metadata.{kind}");
        for (key, value) in template["metadata"][kind].as_object().into_iter().flatten() {
            let is_label = *kind == "labels";
            let selects = OUR_LABELS.iter().any(|prefix| key.starts_with(prefix));
            if is_ours(key) || (is_label && selects) {
                refusals.push(reserved(&format!("{path}[{key}]")));
            } else if !is_label_key(key) || (is_label && !value.as_str().is_some_and(is_label_value)) {
                refusals
                    .push(invalid(&path, &format!("holds {key:?}, which is no valid {kind}; use NAME or DOMAIN/NAME")));
            }
        }
    }
    refusals
}

fn is_ours(key: &str) -> bool {
    let domain = key.split_once('/').map_or("", |(domain, _)| domain);
    domain == GROUP || domain.strip_suffix(GROUP).is_some_and(|rest| rest.ends_with('.'))
}

/// The containers are `fetch` and `worker`, and no name stands twice in a list.
pub(super) fn names(input: &Input<'_>) -> Vec<Refusal> {
    let Some(template) = small(input) else {
        return Vec::new();
    };
    let mut refusals = Vec::new();
    for container in containers(template) {
        let accepted = if container.init { "fetch" } else { "worker" };
        if container.value["name"] != accepted {
            let field = format!("{}.name", container.path);
            let message = format!("{field} is {}; only {accepted} may be changed there", container.value["name"]);
            refusals.push(Refusal::new(Reason::ReservedField, field, message));
        }
        refusals.extend(twice(&format!("{}.env", container.path), &container.value["env"], "name"));
        let mounts = format!("{}.volumeMounts", container.path);
        refusals.extend(twice(&mounts, &container.value["volumeMounts"], "mountPath"));
    }
    for list in ["containers", "initContainers", "volumes"] {
        refusals.extend(twice(&format!("{ROOT}.spec.{list}"), &template["spec"][list], "name"));
    }
    refusals
}

fn twice(path: &str, list: &Value, key: &str) -> Vec<Refusal> {
    let mut seen = BTreeSet::new();
    let again = items(path, list).filter_map(|(path, item)| {
        let name = item[key].as_str()?;
        (!seen.insert(name)).then(|| {
            let field = format!("{path}.{key}");
            let message = format!("{field} is {name:?}, which stands in the list already; remove one");
            Refusal::new(Reason::InvalidPodTemplate, field, message)
        })
    });
    again.collect()
}

/// Variables that the operator does not set itself.
pub(super) fn environment(input: &Input<'_>) -> Vec<Refusal> {
    let Some(template) = small(input) else {
        return Vec::new();
    };
    let mut refusals = Vec::new();
    for container in containers(template) {
        let path = format!("{}.env", container.path);
        for (path, variable) in items(&path, &container.value["env"]) {
            let name = variable["name"].as_str().unwrap_or_default();
            if OUR_VARIABLES.iter().any(|ours| name.starts_with(ours)) {
                refusals.push(reserved(&format!("{path}.name: {name}")));
            }
        }
    }
    refusals
}

/// Volumes with names and folders that are not ours.
pub(super) fn volumes(input: &Input<'_>) -> Vec<Refusal> {
    let Some(template) = small(input) else {
        return Vec::new();
    };
    let mut refusals = Vec::new();
    let spec = &template["spec"];
    for (path, volume) in items(&format!("{ROOT}.spec.volumes"), &spec["volumes"]) {
        let name = volume["name"].as_str().unwrap_or_default();
        if OUR_VOLUMES.contains(&name) {
            refusals.push(reserved(&format!("{path}.name: {name}")));
        }
        let sources = format!("{path}.projected.sources");
        for (path, source) in items(&sources, &volume["projected"]["sources"]) {
            if !source["serviceAccountToken"].is_null() {
                refusals.push(unsafe_pod(
                    &format!("{path}.serviceAccountToken"),
                    "workers have no token for the API server",
                ));
            }
        }
    }
    for container in containers(template) {
        let path = format!("{}.volumeMounts", container.path);
        for (path, mount) in items(&path, &container.value["volumeMounts"]) {
            let folder = mount["mountPath"].as_str().unwrap_or_default();
            let name = mount["name"].as_str().unwrap_or_default();
            if OUR_VOLUMES.contains(&name) || OUR_FOLDERS.iter().any(|ours| overlaps(folder, ours)) {
                refusals.push(reserved(&format!("{path}: {folder}")));
            }
        }
    }
    refusals
}

/// One path is the other, or lies in it.
fn overlaps(one: &str, other: &str) -> bool {
    let parts = |path: &str| path.split('/').filter(|p| !p.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    parts(one).iter().zip(&parts(other)).all(|(a, b)| a == b)
}

/// Security contexts stay within `restricted`.
pub(super) fn security(input: &Input<'_>) -> Vec<Refusal> {
    let Some(template) = small(input) else {
        return Vec::new();
    };
    let pod = &template["spec"]["securityContext"];
    let mut refusals = secure(&format!("{ROOT}.spec.securityContext"), pod);
    for container in containers(template) {
        let path = format!("{}.securityContext", container.path);
        refusals.extend(secure(&path, &container.value["securityContext"]));
    }
    refusals
}

fn secure(path: &str, context: &Value) -> Vec<Refusal> {
    let is = |field: &str, value: bool| context[field].is_null() || context[field] == value;
    let profile = &context["seccompProfile"]["type"];
    let added = context["capabilities"]["add"].as_array().is_none_or(Vec::is_empty);
    let dropped = &context["capabilities"]["drop"];
    let checks = [
        ("privileged", is("privileged", false), "use false"),
        ("allowPrivilegeEscalation", is("allowPrivilegeEscalation", false), "use false"),
        ("readOnlyRootFilesystem", is("readOnlyRootFilesystem", true), "use true"),
        ("runAsNonRoot", is("runAsNonRoot", true), "use true"),
        ("runAsUser", context["runAsUser"] != 0, "use another user than 0"),
        ("capabilities.add", added, "add none"),
        ("capabilities.drop", dropped.is_null() || *dropped == serde_json::json!(["ALL"]), "drop ALL"),
        ("seccompProfile.type", profile.is_null() || profile == "RuntimeDefault", "use RuntimeDefault"),
    ];
    let broken = checks.into_iter().filter(|(_, holds, _)| !holds);
    broken.map(|(field, _, accepted)| unsafe_pod(&format!("{path}.{field}"), accepted)).collect()
}

struct Container<'a> {
    path: String,
    value: &'a Value,
    init: bool,
}

fn containers(template: &Value) -> impl Iterator<Item = Container<'_>> {
    [("containers", false), ("initContainers", true)].into_iter().flat_map(|(list, init)| {
        let path = format!("{ROOT}.spec.{list}");
        items(&path, &template["spec"][list])
            .map(move |(path, value)| Container { path, value, init })
            .collect::<Vec<_>>()
    })
}

fn items<'a>(path: &str, list: &'a Value) -> impl Iterator<Item = (String, &'a Value)> {
    let path = path.to_owned();
    let items = list.as_array().into_iter().flatten().enumerate();
    items.map(move |(i, item)| (format!("{path}[{i}]"), item))
}

fn invalid(path: &str, what: &str) -> Refusal {
    Refusal::new(Reason::InvalidPodTemplate, path, format!("{path} {what}"))
}

fn reserved(path: &str) -> Refusal {
    Refusal::new(Reason::ReservedField, path, format!("{path} is reserved for the operator; use another"))
}

fn unsafe_pod(path: &str, accepted: &str) -> Refusal {
    let message = format!("{path} would leave the restricted Pod Security standard; {accepted}");
    Refusal::new(Reason::UnsafePod, path, message)
}
