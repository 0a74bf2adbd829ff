//! The pods of a revision: `fetch` brings the model's files, `worker` serves them.

use k8s_openapi::{
    DeepMerge,
    api::core::v1::{
        Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource,
        HTTPGetAction, KeyToPath, LocalObjectReference, ObjectFieldSelector, PersistentVolumeClaimVolumeSource,
        PodReadinessGate, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile,
        SecretVolumeSource, SecurityContext, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use planner::{Bytes, ModelDescription, Plan};

use super::{
    Install,
    name::{MODEL_NAME, Names, REPLICA, REVISION, Revision, WORKER},
    record::{CERTIFICATES, PLACEMENT},
};
use crate::{
    decide::Target,
    launch::{self, ADMIN_PORT, Hub, Launch, Site, Value},
    validate::ValidModel,
};

/// The readiness gate of worker pods: every router knows the worker.
pub const ROUTED: &str = "modelfleet.io/routed";
/// Seconds that a pod may take to end, beyond the time to drain.
const GRACE_SECONDS: u64 = 30;
/// Seconds that a worker stays on a node that went away; the default is five minutes.
const GONE_NODE_SECONDS: i64 = 30;
const NOBODY: i64 = 65532;
/// Where the image has our programs.
const PROGRAMS: &str = "/usr/local/bin";

const MODEL_VOLUME: &str = "model";
const PLACEMENT_VOLUME: &str = "placement";
const TOKEN_VOLUME: &str = "hub-token";
const CERTIFICATES_VOLUME: &str = "hub-certificates";
const CLAIM_VOLUME: &str = "claim";
const MODEL_DIR: &str = "/model";
const PLACEMENT_DIR: &str = "/etc/modelfleet/placement";
const TOKEN_DIR: &str = "/var/run/modelfleet/hub";
const CERTIFICATES_DIR: &str = "/etc/modelfleet/hub";
/// Where a claim is mounted: `pvc://CLAIM/PATH` is read from `/pvc/CLAIM/PATH`.
const CLAIM_DIR: &str = "/pvc";
const REVISION_VARIABLE: &str = "MODELFLEET_REVISION";
const REPLICA_VARIABLE: &str = "MODELFLEET_REPLICA";

/// What the pods of a revision are made from.
#[derive(Debug, Clone, Copy)]
pub struct Workload<'a> {
    /// Names of the model's objects.
    pub names: &'a Names,
    /// What the user wants.
    pub model: &'a ValidModel,
    /// What the install adds.
    pub install: &'a Install,
    /// Which revision.
    pub revision: &'a Revision,
}

/// The pods of a revision, for any replica: `place` makes them those of one.
pub fn template(workload: &Workload<'_>, description: &ModelDescription, plan: &Plan) -> PodTemplateSpec {
    let mut volumes = reading_volumes(workload);
    volumes.push(empty_dir(MODEL_VOLUME, model_dir_bytes(description)));
    volumes.push(config_volume(PLACEMENT_VOLUME, ""));
    let grace = workload.model.drain_timeout.as_secs().saturating_add(GRACE_SECONDS);
    let mut template = PodTemplateSpec {
        metadata: Some(metadata(workload, WORKER)),
        spec: Some(PodSpec {
            init_containers: Some(vec![fetch(workload, description)]),
            containers: vec![worker(workload, description, plan)],
            volumes: Some(volumes),
            readiness_gates: Some(vec![PodReadinessGate { condition_type: ROUTED.to_owned() }]),
            termination_grace_period_seconds: i64::try_from(grace).ok(),
            ..pod(workload)
        }),
    };
    customise(&mut template, workload.model);
    template
}

/// Makes the recorded pods those of the replica `set` with its plan.
pub(super) fn place(template: &mut PodTemplateSpec, set: &str, target: &Target) {
    let Some(spec) = &mut template.spec else {
        return;
    };
    let volumes = spec.volumes.iter_mut().flatten();
    for volume in volumes.filter(|volume| volume.name == PLACEMENT_VOLUME) {
        *volume = config_volume(PLACEMENT_VOLUME, set);
    }
    for worker in spec.containers.iter_mut().filter(|container| container.name == WORKER) {
        // a replica made after the number of shards changed has another cache than the first one of its revision
        let arguments = worker.args.get_or_insert_default();
        launch::set_flag(arguments, "--kv-cache-tokens", target.plan.kv_cache_tokens.0.to_string());
        let requests = worker.resources.get_or_insert_default().requests.get_or_insert_default();
        requests.entry("memory".to_owned()).or_insert_with(|| quantity(target.memory_request()));
    }
}

/// Keeps the copies of an expert apart: the pods of a replica are spread evenly over the failure domains that there are.
pub(super) fn spread(template: &mut PodTemplateSpec, model: &ValidModel, pods: &LabelSelector) {
    let Some(spec) = template.spec.as_mut().filter(|_| model.redundancy > 0) else {
        return;
    };
    spec.topology_spread_constraints.get_or_insert_default().push(TopologySpreadConstraint {
        label_selector: Some(pods.clone()),
        max_skew: 1,
        topology_key: model.spread_across.clone(),
        when_unsatisfiable: "DoNotSchedule".to_owned(),
        // a node that is gone is no domain that must be filled first
        node_taints_policy: Some("Honor".to_owned()),
        ..TopologySpreadConstraint::default()
    });
}

/// The pod that reads what the model weighs.
pub(super) fn describe(workload: &Workload<'_>) -> PodTemplateSpec {
    let hub = hub(workload);
    let launch = for_revision(launch::describe(&reading(workload, &hub)), workload.revision);
    let container =
        Container { volume_mounts: Some(reading_mounts(workload)), ..container("describe", workload, &launch) };
    PodTemplateSpec {
        metadata: Some(metadata(workload, super::name::DESCRIBE)),
        spec: Some(PodSpec {
            containers: vec![Container { resources: Some(small()), ..container }],
            volumes: Some(reading_volumes(workload)),
            restart_policy: Some("OnFailure".to_owned()),
            termination_grace_period_seconds: Some(5),
            ..pod(workload)
        }),
    }
}

/// What worker and describe pods have in common.
fn pod(workload: &Workload<'_>) -> PodSpec {
    let scheduling = workload.model.spec.scheduling.clone().unwrap_or_default();
    let secrets = workload.install.image_pull_secrets.iter();
    let secrets: Vec<_> = secrets.map(|name| LocalObjectReference { name: name.clone() }).collect();
    PodSpec {
        service_account_name: Some(workload.names.workers()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        image_pull_secrets: (!secrets.is_empty()).then_some(secrets),
        node_selector: scheduling.node_selector,
        priority_class_name: scheduling.priority_class_name,
        tolerations: Some(tolerations(scheduling.tolerations.unwrap_or_default().iter().map(toleration).collect())),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(NOBODY),
            run_as_group: Some(NOBODY),
            fs_group: Some(NOBODY),
            seccomp_profile: Some(seccomp()),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    }
}

fn metadata(workload: &Workload<'_>, component: &str) -> ObjectMeta {
    let mut labels = workload.names.labels(component);
    labels.insert(REVISION.to_owned(), workload.revision.to_string());
    let annotations = [(MODEL_NAME.to_owned(), workload.names.model().to_owned())];
    ObjectMeta { labels: Some(labels), annotations: Some(annotations.into()), ..ObjectMeta::default() }
}

fn fetch(workload: &Workload<'_>, description: &ModelDescription) -> Container {
    let hub = hub(workload);
    let mut read = reading(workload, &hub);
    // the commit that was described, or a tag that moves would bring other files
    if !description.resolved_revision.is_empty() {
        read.revision = Some(&description.resolved_revision);
    }
    let launch = for_revision(launch::fetch(&read, MODEL_DIR), workload.revision);
    let mut mounts = reading_mounts(workload);
    mounts.push(mount(MODEL_VOLUME, MODEL_DIR, false));
    Container { volume_mounts: Some(mounts), resources: Some(small()), ..container("fetch", workload, &launch) }
}

fn worker(workload: &Workload<'_>, description: &ModelDescription, plan: &Plan) -> Container {
    let mut launch = launch::serve(&launch::Serve {
        site: Site::Pod,
        model: workload.names.path(),
        model_dir: MODEL_DIR,
        revision: workload.revision.as_str(),
        content_hash: &description.content_hash,
        replica: 0,
        ordinal: 0,
        placement_path: &format!("{PLACEMENT_DIR}/{PLACEMENT}"),
        placement: &plan.placement,
        kv_cache_tokens: plan.kv_cache_tokens.0,
        max_context_tokens: plan.max_context_tokens.0,
        drain_timeout: workload.model.drain_timeout,
        operators: std::slice::from_ref(&workload.install.operator),
        telemetry: &workload.install.telemetry,
    });
    replica_from_label(&mut launch);
    let resources = workload.model.spec.resources.clone().unwrap_or_default();
    Container {
        ports: Some(launch.ports.iter().map(port).collect()),
        resources: Some(ResourceRequirements { requests: resources.requests, limits: resources.limits, claims: None }),
        volume_mounts: Some(vec![mount(MODEL_VOLUME, MODEL_DIR, true), mount(PLACEMENT_VOLUME, PLACEMENT_DIR, true)]),
        readiness_probe: Some(Probe { period_seconds: Some(2), failure_threshold: Some(3), ..probe("/readyz") }),
        liveness_probe: Some(Probe { period_seconds: Some(10), failure_threshold: Some(6), ..probe("/healthz") }),
        ..container(WORKER, workload, &launch)
    }
}

/// Readers report by our revision; their argument is the hub's.
fn for_revision(mut launch: Launch, revision: &Revision) -> Launch {
    let value = Value::Text(revision.to_string());
    launch.environment.push(launch::Variable { name: REVISION_VARIABLE.to_owned(), value });
    launch
}

/// A revision is recorded once for all replicas, so a worker reads its replica from its pod's label.
fn replica_from_label(launch: &mut Launch) {
    launch::set_flag(&mut launch.arguments, "--replica", format!("$({REPLICA_VARIABLE})"));
    launch.environment.push(launch::Variable {
        name: REPLICA_VARIABLE.to_owned(),
        value: Value::PodField(format!("metadata.labels['{REPLICA}']")),
    });
}

fn container(name: &str, workload: &Workload<'_>, launch: &Launch) -> Container {
    Container {
        name: name.to_owned(),
        image: Some(workload.install.image.clone()),
        image_pull_policy: Some(workload.install.image_pull_policy.clone()),
        command: Some(vec![format!("{PROGRAMS}/{}", launch.program.file_name())]),
        args: Some(launch.arguments.clone()),
        env: Some(launch.environment.iter().map(variable).collect()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            seccomp_profile: Some(seccomp()),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

/// Merges the user's part in: lists with keys by key; `tolerations` and `nodeSelector` replace those of `scheduling`.
fn customise(template: &mut PodTemplateSpec, model: &ValidModel) {
    let Some(user) = model.pod_template.clone() else {
        return;
    };
    let spec = template.spec.get_or_insert_default();
    if let Some(theirs) = &user.spec {
        if theirs.node_selector.is_some() {
            spec.node_selector = None;
        }
        if theirs.tolerations.is_some() {
            spec.tolerations = None;
        }
    }
    template.merge_from(user);
    let spec = template.spec.get_or_insert_default();
    spec.tolerations = Some(tolerations(spec.tolerations.take().unwrap_or_default()));
}

/// Those asked for, and a short stay on a node that went away unless they say otherwise.
fn tolerations(mut asked: Vec<Toleration>) -> Vec<Toleration> {
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        if asked.iter().any(|one| one.key.as_deref() == Some(key)) {
            continue;
        }
        asked.push(Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some("NoExecute".to_owned()),
            toleration_seconds: Some(GONE_NODE_SECONDS),
            value: None,
        });
    }
    asked
}

fn toleration(asked: &crds::Toleration) -> Toleration {
    Toleration {
        key: asked.key.clone(),
        operator: Some(format!("{:?}", asked.operator)),
        value: asked.value.clone(),
        effect: asked.effect.map(|effect| format!("{effect:?}")),
        toleration_seconds: asked.toleration_seconds,
    }
}

fn reading<'a>(workload: &'a Workload<'_>, hub: &'a Hub) -> launch::Read<'a> {
    launch::Read {
        site: Site::Pod,
        source: &workload.model.spec.model.source,
        revision: workload.model.spec.model.revision.as_deref(),
        model: workload.names.path(),
        operators: std::slice::from_ref(&workload.install.operator),
        hub,
        telemetry: &workload.install.telemetry,
    }
}

fn hub(workload: &Workload<'_>) -> Hub {
    let install = &workload.install.hub;
    let token = workload.model.spec.model.credentials_ref.is_some();
    Hub {
        endpoint: install.endpoint.clone(),
        token_file: token.then(|| format!("{TOKEN_DIR}/token")),
        ca_file: install.certificates.is_some().then(|| format!("{CERTIFICATES_DIR}/{CERTIFICATES}")),
        proxy: install.proxy.clone(),
        no_proxy: install.no_proxy.clone(),
    }
}

/// What `fetch` and `describe` read from, beside the network.
fn reading_volumes(workload: &Workload<'_>) -> Vec<Volume> {
    let mut volumes = Vec::new();
    if let Some(secret) = &workload.model.spec.model.credentials_ref {
        volumes.push(Volume {
            name: TOKEN_VOLUME.to_owned(),
            secret: Some(SecretVolumeSource {
                secret_name: Some(secret.name.clone()),
                items: Some(vec![KeyToPath { key: secret.key.clone(), path: "token".to_owned(), mode: None }]),
                // it may be made later; the program waits for the file and says what is missing
                optional: Some(true),
                default_mode: None,
            }),
            ..Volume::default()
        });
    }
    if workload.install.hub.certificates.is_some() {
        volumes.push(config_volume(CERTIFICATES_VOLUME, &workload.names.hub()));
    }
    if let Some(claim) = claim(&workload.model.spec.model.source) {
        let source = PersistentVolumeClaimVolumeSource { claim_name: claim.to_owned(), read_only: Some(true) };
        volumes.push(Volume {
            name: CLAIM_VOLUME.to_owned(),
            persistent_volume_claim: Some(source),
            ..Volume::default()
        });
    }
    volumes
}

fn reading_mounts(workload: &Workload<'_>) -> Vec<VolumeMount> {
    let mut mounts = Vec::new();
    if workload.model.spec.model.credentials_ref.is_some() {
        mounts.push(mount(TOKEN_VOLUME, TOKEN_DIR, true));
    }
    if workload.install.hub.certificates.is_some() {
        mounts.push(mount(CERTIFICATES_VOLUME, CERTIFICATES_DIR, true));
    }
    if let Some(claim) = claim(&workload.model.spec.model.source) {
        mounts.push(mount(CLAIM_VOLUME, &format!("{CLAIM_DIR}/{claim}"), true));
    }
    mounts
}

/// The claim of `pvc://CLAIM/PATH`.
pub fn claim(source: &str) -> Option<&str> {
    source.strip_prefix("pvc://").and_then(|rest| rest.split('/').next())
}

/// The files, and room for what a file system adds.
fn model_dir_bytes(description: &ModelDescription) -> Bytes {
    let files = description.file_bytes();
    files.plus(Bytes(files.0 / 20)).plus(Bytes(64 << 20))
}

/// A reader of files: it needs little, whatever the model weighs. Its limit leaves room for checksums at full speed.
fn small() -> ResourceRequirements {
    let list = |cpu: &str, memory: &str| {
        let both = [("cpu", cpu), ("memory", memory)];
        Some(both.map(|(name, amount)| (name.to_owned(), Quantity(amount.to_owned()))).into())
    };
    ResourceRequirements { requests: list("50m", "64Mi"), limits: list("2", "512Mi"), claims: None }
}

/// In whole mebibytes, rounded up, spelt as the API server stores it.
fn quantity(bytes: Bytes) -> Quantity {
    let mebibytes = bytes.0.div_ceil(1 << 20);
    Quantity(match mebibytes {
        0 => "0".to_owned(),
        _ if mebibytes.is_multiple_of(1024) => Bytes(mebibytes << 20).to_string(),
        _ => format!("{mebibytes}Mi"),
    })
}

fn empty_dir(name: &str, size: Bytes) -> Volume {
    let source = EmptyDirVolumeSource { size_limit: Some(quantity(size)), medium: None };
    Volume { name: name.to_owned(), empty_dir: Some(source), ..Volume::default() }
}

fn config_volume(name: &str, config: &str) -> Volume {
    let source = ConfigMapVolumeSource { name: config.to_owned(), default_mode: None, items: None, optional: None };
    Volume { name: name.to_owned(), config_map: Some(source), ..Volume::default() }
}

fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

fn probe(path: &str) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::Int(i32::from(ADMIN_PORT)),
            host: None,
            http_headers: None,
            scheme: None,
        }),
        timeout_seconds: Some(5),
        ..Probe::default()
    }
}

fn port(port: &launch::Port) -> ContainerPort {
    ContainerPort {
        name: Some(port.name.to_owned()),
        container_port: i32::from(port.number),
        protocol: Some("TCP".to_owned()),
        host_ip: None,
        host_port: None,
    }
}

fn variable(variable: &launch::Variable) -> EnvVar {
    let (value, value_from) = match &variable.value {
        Value::Text(text) => (Some(text.clone()), None),
        Value::PodField(path) => {
            let field = ObjectFieldSelector { field_path: path.clone(), api_version: None };
            (None, Some(EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() }))
        }
    };
    EnvVar { name: variable.name.clone(), value, value_from }
}

fn seccomp() -> SeccompProfile {
    SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }
}
