//! One case a test: what there is, and what people are told.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use planner::{ModelDescription, Outcome};
use serde_json::{Value, json};

use super::*;
use crate::{
    control::{
        DescriptionView, FailureView, FetcherView, ProgressPhase, ProgressView, Role, RouterView, Version, WorkerPhase,
        WorkerView,
    },
    decide::decide,
    render::fresh,
    validate::{Place, validate},
};

/// A model, what there is of it, and the moment.
struct Scene {
    md: ModelDeployment,
    seen: Observed,
    refusals: Vec<Refusal>,
    error: Option<Error>,
    now: Timestamp,
}

impl Scene {
    /// Nothing but the object.
    fn new(spec: Value) -> Self {
        let md = serde_json::from_value(json!({
            "apiVersion": "modelfleet.io/v1alpha1", "kind": "ModelDeployment",
            "metadata": {"name": "tiny", "namespace": "default", "uid": "md", "generation": 3},
            "spec": spec,
        }))
        .unwrap();
        let now = "2026-01-01T01:00:00Z".parse().unwrap();
        Self { md, seen: Observed::default(), refusals: Vec::new(), error: None, now }
    }

    /// Everything is rendered and applied, and every pod is in the state that `status` and `view` make.
    fn installed(spec: Value) -> Self {
        let mut scene = Self::new(spec);
        let (names, model) = (Names::of(&scene.md), scene.model());
        let Outcome::Planned(plan) = planner::plan(&description(), &model.request(None)) else {
            panic!("does not fit")
        };
        let desired = fresh(&names, &model, &Install::default(), &description(), &plan);
        let mut sets = desired.stateful_sets;
        for set in &mut sets {
            set.metadata.creation_timestamp = Some(Time("2026-01-01T00:00:00Z".parse().unwrap()));
        }
        scene.seen.owned.config_maps = desired.config_maps.into_iter().map(Arc::new).collect();
        scene.seen.owned.stateful_sets = sets.into_iter().map(Arc::new).collect();
        scene.seen.fleet.version = Some(Version { epoch: 1, sequence: 1 });
        let router = RouterView {
            id: "router".to_owned(),
            http_address: String::new(),
            grpc_address: String::new(),
            acknowledged: scene.seen.fleet.version,
            silent_for: std::time::Duration::ZERO,
        };
        scene.seen.fleet.routers.push(router);
        for set in scene.seen.owned.stateful_sets.clone() {
            for ordinal in 0..plan.shards {
                scene.add_worker(&set, ordinal);
            }
        }
        scene
    }

    fn add_worker(&mut self, set: &k8s_openapi::api::apps::v1::StatefulSet, ordinal: u32) {
        let id = format!("pod-{}", self.seen.pods.len());
        let mut pod = serde_json::to_value(&set.spec.as_ref().unwrap().template).unwrap();
        pod["metadata"]["name"] = format!("{}-{ordinal}", set.metadata.name.as_ref().unwrap()).into();
        pod["metadata"]["uid"] = id.clone().into();
        pod["metadata"]["creationTimestamp"] = "2026-01-01T00:00:01Z".into();
        pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"] = ordinal.to_string().into();
        pod["status"] = ready();
        self.seen.pods.push(Arc::new(serde_json::from_value(pod).unwrap()));
        let labels = set.metadata.labels.as_ref().unwrap();
        self.seen.fleet.workers.push(WorkerView {
            id,
            revision: labels["modelfleet.io/revision"].clone(),
            replica: labels["modelfleet.io/replica"].parse().unwrap(),
            ordinal,
            address: String::new(),
            content_hash: String::new(),
            connected: true,
            silent_for: std::time::Duration::ZERO,
            phase: WorkerPhase::Serving,
            placement_loaded: true,
            acknowledged: true,
            switched: true,
            routed: true,
            load: None,
            progress: None,
            suspected_by: 0,
        });
    }

    /// Puts the pod of this worker into another state.
    fn pod(mut self, ordinal: usize, status: Value) -> Self {
        let mut pod = Pod::clone(&self.seen.pods[ordinal]);
        pod.status = serde_json::from_value(status).unwrap();
        self.seen.pods[ordinal] = Arc::new(pod);
        self
    }

    /// Puts the time at which this worker's pod was made.
    fn made(mut self, ordinal: usize, time: &str) -> Self {
        let mut pod = Pod::clone(&self.seen.pods[ordinal]);
        pod.metadata.creation_timestamp = Some(Time(time.parse().unwrap()));
        self.seen.pods[ordinal] = Arc::new(pod);
        self
    }

    fn model(&self) -> ValidModel {
        validate(&self.md, Place::Cluster).unwrap()
    }

    fn status(&self) -> ModelDeploymentStatus {
        let (names, model, install) = (Names::of(&self.md), self.model(), Install::default());
        let before = self.md.status.as_ref().and_then(|status| status.desired_replicas).map(i32::unsigned_abs);
        let decision = decide(&names, &model, &install, &self.seen, before, &mut None, self.now);
        let applied = Applied::default();
        report(&Case {
            md: &self.md,
            names: &names,
            model: &model,
            refusals: &self.refusals,
            remark: None,
            install: &install,
            seen: &self.seen,
            decision: &decision,
            outcome: self.error.as_ref().map_or(Ok(&applied), Err),
            now: self.now,
        })
    }

    /// The summary, and one condition as `Status Reason`.
    fn says(&self, condition: ConditionType) -> (String, String) {
        let status = self.status();
        let found = status.conditions.iter().find(|one| one.type_ == condition.as_str()).unwrap();
        (status.summary.clone().unwrap(), format!("{} {}", found.status, found.reason))
    }
}

#[test]
fn a_worker_that_does_not_answer_its_peers_is_named() {
    let mut scene = Scene::installed(spec(json!({})));
    scene.seen.fleet.workers[2].suspected_by = 1;
    let expected = told("Degraded: worker 2 does not answer all peers", "True WorkerSuspected");
    assert_eq!(scene.says(ConditionType::Degraded), expected);
}

fn told(summary: &str, condition: &str) -> (String, String) {
    (summary.to_owned(), condition.to_owned())
}

fn spec(more: Value) -> Value {
    let mut spec = json!({"model": {"source": "hf://modelfleet/tiny-r1"}, "parallelism": {"expert": {"shards": 4}}});
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    spec
}

fn four() -> Value {
    spec(json!({}))
}

fn description() -> ModelDescription {
    serde_json::from_value(json!({
        "architecture": "DeepseekV3ForCausalLM", "dtype": "bf16", "parameters": 1, "denseBytes": 1_000_000,
        "kvBytesPerToken": 512, "maxContextTokens": 1024, "vocabSize": 512, "hiddenSize": 256, "layers": 2,
        "experts": 16, "expertsPerToken": 4, "moeLayers": [{"layer": 1, "expertBytes": 98_304}],
    }))
    .unwrap()
}

fn ready() -> Value {
    json!({"podIP": "10.0.0.1", "conditions": [
        {"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"},
        {"type": "modelfleet.io/routed", "status": "True"}],
        "initContainerStatuses": [container("fetch", true, json!({"terminated": {"exitCode": 0}}))],
        "containerStatuses": [container("worker", true, json!({"running": {}}))]})
}

fn starting(fetched: bool) -> Value {
    let fetch = if fetched { json!({"terminated": {"exitCode": 0}}) } else { json!({"running": {}}) };
    json!({"podIP": "10.0.0.1", "conditions": [{"type": "PodScheduled", "status": "True"}],
        "initContainerStatuses": [container("fetch", fetched, fetch)],
        "containerStatuses": [container("worker", false, json!({"running": {}}))]})
}

fn container(name: &str, ready: bool, state: Value) -> Value {
    json!({"name": name, "ready": ready, "restartCount": 0, "image": "modelfleet:2", "imageID": "", "state": state})
}

fn progress(phase: ProgressPhase, done: u64, total: u64) -> Option<ProgressView> {
    Some(ProgressView { phase, done_bytes: done, total_bytes: total })
}

#[test]
fn ready_when_all_workers_are() {
    let scene = Scene::installed(four());
    assert_eq!(scene.says(ConditionType::Ready), told("Ready", "True ReplicasReady"));
    let printed = scene.status().printed.unwrap();
    assert_eq!((printed.ready.as_str(), printed.shards.as_str(), printed.experts.as_str()), ("1/1", "4/4", "16/16"));
}

#[test]
fn describing_until_the_weight_is_known() {
    let scene = Scene::new(four());
    assert_eq!(scene.says(ConditionType::ModelReady), told("Describing model", "False Describing"));
}

#[test]
fn a_describer_that_fails_says_why() {
    let mut scene = Scene::new(four());
    let revision = crate::render::Revision::of(scene.model().revision_input.as_bytes()).to_string();
    scene.seen.fleet.failures.push(FailureView {
        role: Role::Describe,
        id: "pod".to_owned(),
        revision,
        reason: "SourceNotFound".to_owned(),
        message: "hf://modelfleet/tiny-r1: the hub says 404".to_owned(),
    });
    let summary = "SourceNotFound: hf://modelfleet/tiny-r1: the hub says 404";
    assert_eq!(scene.says(ConditionType::ModelReady), told(summary, "False SourceNotFound"));
}

#[test]
fn a_description_that_cannot_be_read_is_told() {
    let mut scene = Scene::new(four());
    let revision = crate::render::Revision::of(scene.model().revision_input.as_bytes()).to_string();
    scene.seen.fleet.descriptions.push(DescriptionView { revision, json: b"{}".to_vec() });
    let (summary, condition) = scene.says(ConditionType::Planned);
    assert!(summary.starts_with("DescribeFailed: missing field"), "{summary}");
    assert_eq!(condition, "False DescribeFailed");
}

#[test]
fn more_shards_than_experts_are_unplannable_with_both_numbers() {
    let mut scene = Scene::new(spec(json!({"parallelism": {"expert": {"shards": 17}}})));
    let revision = crate::render::Revision::of(scene.model().revision_input.as_bytes()).to_string();
    let json = serde_json::to_vec(&description()).unwrap();
    scene.seen.fleet.descriptions.push(DescriptionView { revision, json });
    let (summary, condition) = scene.says(ConditionType::Planned);
    assert_eq!(condition, "False TooManyShards");
    assert!(summary.contains("17") && summary.contains("16"), "{summary}");
}

#[test]
fn downloads_are_told_in_tens_of_percent() {
    let mut scene = Scene::installed(four());
    for ordinal in 0..4 {
        scene = scene.pod(ordinal, starting(false));
        let progress = progress(ProgressPhase::Downloading, 47, 100);
        let (id, revision) = (format!("pod-{ordinal}"), String::new());
        scene.seen.fleet.fetchers.push(FetcherView { id, revision, progress });
    }
    scene.seen.fleet.workers.clear();
    assert_eq!(scene.says(ConditionType::ModelReady), told("Downloading 40%", "False Fetching"));
}

#[test]
fn loading_counts_the_workers_that_load() {
    let mut scene = Scene::installed(four());
    for ordinal in 0..2 {
        scene = scene.pod(ordinal, starting(true));
        let view = &mut scene.seen.fleet.workers[ordinal];
        view.phase = WorkerPhase::Loading;
        view.progress = progress(ProgressPhase::Loading, 49, 100);
    }
    assert_eq!(scene.says(ConditionType::Available), told("Loading 40%: 2 workers", "False Loading"));
}

#[test]
fn a_worker_that_only_waits_for_routers_is_not_ready() {
    let mut status = ready();
    status["conditions"] = json!([{"type": "PodScheduled", "status": "True"}]);
    let scene = Scene::installed(four()).pod(0, status);
    assert_eq!(scene.says(ConditionType::Available), told("Waiting for routers: 1 worker", "False NotRouted"));
}

#[test]
fn the_schedulers_words_are_kept() {
    let status = json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient memory."}]});
    let scene = Scene::installed(four()).pod(0, status);
    let summary = "Unschedulable: 0/3 nodes are available: 3 Insufficient memory.";
    assert_eq!(scene.says(ConditionType::Scheduled), told(summary, "False Unschedulable"));
}

#[test]
fn a_label_that_no_node_has_is_named_with_its_field() {
    let mut spec = four();
    spec["parallelism"]["expert"]["redundancy"] = json!(1);
    spec["scheduling"] = json!({"topology": {"spreadAcross": "example.com/rack"}});
    let words =
        "0/3 nodes are available: 3 node(s) didn't match pod topology spread constraints (missing required label).";
    let status = json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": words}]});
    let scene = Scene::installed(spec).pod(0, status);
    let conditions = scene.status().conditions;
    let scheduled = conditions.iter().find(|one| one.type_ == "Scheduled").unwrap();
    let field = "spec.scheduling.topology.spreadAcross is example.com/rack, a label that not all nodes have";
    assert_eq!(scheduled.message, format!("{field}: {words}"));
}

#[test]
fn an_image_that_cannot_be_pulled_is_named() {
    let mut status = starting(false);
    status["initContainerStatuses"][0]["state"] = json!({"waiting": {"reason": "ImagePullBackOff"}});
    let scene = Scene::installed(four()).pod(0, status);
    assert_eq!(scene.says(ConditionType::Degraded), told("ImagePullBackOff modelfleet:2", "True ImagePullFailed"));
}

#[test]
fn a_container_that_ends_again_and_again_is_named() {
    let mut status = starting(true);
    status["containerStatuses"][0]["state"] = json!({"waiting": {"reason": "CrashLoopBackOff"}});
    status["containerStatuses"][0]["lastState"] = json!({"terminated": {"exitCode": 137}});
    let scene = Scene::installed(four()).pod(2, status);
    let summary = "CrashLoopBackOff: container worker of worker 2, exit code 137";
    assert_eq!(scene.says(ConditionType::Degraded), told(summary, "True WorkerCrashing"));
}

#[test]
fn a_lost_worker_is_named_with_what_is_still_covered() {
    let mut scene = Scene::installed(four());
    scene.seen.pods.remove(2);
    scene.seen.fleet.workers.remove(2);
    let summary = "Degraded: worker 2 lost, experts 12/16 covered";
    assert_eq!(scene.says(ConditionType::Degraded), told(summary, "True WorkerLost"));
}

#[test]
fn a_worker_that_is_made_again_was_lost_however_young_the_replica_is() {
    let mut status = ready();
    status["conditions"][1]["lastTransitionTime"] = "2026-01-01T00:00:04Z".into();
    let others = [0, 2, 3].into_iter().fold(Scene::installed(four()), |scene, other| scene.pod(other, status.clone()));
    let scene = others.pod(1, starting(false)).made(1, "2026-01-01T00:00:06Z");
    assert!(
        scene.says(ConditionType::Degraded).0.starts_with("Degraded: worker 1 lost"),
        "{:?}",
        scene.status().summary
    );
    let scene = scene.made(1, "2026-01-01T00:00:02Z");
    assert_eq!(scene.says(ConditionType::Degraded).1, "False AsDesired", "it is one of the first");
}

#[test]
fn of_several_replicas_the_one_that_lost_a_worker_is_named_with_what_it_has_left() {
    let expert = json!({"shards": 4, "redundancy": 1});
    let mut scene = Scene::installed(spec(json!({"replicas": 2, "parallelism": {"expert": expert}})));
    assert_eq!(scene.status().experts.unwrap().min_copies, 2);
    scene.seen.pods.remove(6);
    scene.seen.fleet.workers.remove(6);
    let summary = "Degraded: worker 2 of replica 1 lost, experts 16/16 covered, minimum copies 1";
    assert_eq!(scene.says(ConditionType::Degraded), told(summary, "True WorkerLost"));
}

#[test]
fn suspended_and_asleep_are_told_apart() {
    let scene = Scene::new(spec(json!({"suspend": true})));
    assert_eq!(scene.says(ConditionType::Ready), told("Suspended", "False Suspended"));
    let scaling = json!({"mode": "Internal", "minReplicas": 0, "maxReplicas": 2});
    let scene = Scene::new(spec(json!({"replicas": 0, "autoscaling": scaling})));
    assert_eq!(scene.says(ConditionType::Ready), told("Asleep", "False ScaledToZero"));
    assert_eq!(scene.says(ConditionType::ScalingActive).1, "False LoadMissing");
}

#[test]
fn a_rollout_counts_the_replicas_of_the_new_revision() {
    let mut scene = Scene::installed(four());
    scene.md.spec.model.max_context_tokens = Some(512);
    let revision = crate::render::Revision::of(scene.model().revision_input.as_bytes()).to_string();
    let json = serde_json::to_vec(&description()).unwrap();
    scene.seen.fleet.descriptions.push(DescriptionView { revision: revision.clone(), json });
    let summary = format!("Rolling out {revision}: 0/1 replicas");
    assert_eq!(scene.says(ConditionType::Progressing), told(&summary, "True RollingOut"));
    assert_eq!(scene.says(ConditionType::Available).1, "True ReplicasReady", "the old one serves");
}

#[test]
fn no_progress_for_long_is_told() {
    let mut scene = Scene::installed(four()).pod(0, starting(true));
    scene.md.status = Some(scene.status());
    assert_eq!(scene.says(ConditionType::Progressing).1, "True RollingOut");
    scene.now += std::time::Duration::from_secs(600);
    assert_eq!(scene.says(ConditionType::Progressing).1, "False ProgressDeadlineExceeded");
    scene.md.status = Some(scene.status());
    scene.now += std::time::Duration::from_secs(2);
    assert_eq!(Some(scene.status()), scene.md.status, "what is stuck is not written anew each time it is looked at");
}

#[test]
fn a_write_that_fails_is_told_with_the_servers_words() {
    let mut scene = Scene::installed(four());
    let status =
        kube::core::Status { code: 403, message: "exceeded quota: small".to_owned(), ..kube::core::Status::success() };
    let source = Box::new(kube::Error::Api(status.boxed()));
    scene.error = Some(Error::Apply { kind: "StatefulSet".to_owned(), name: "tiny-0".to_owned(), source });
    let summary = "Degraded: could not apply StatefulSet tiny-0: exceeded quota: small";
    assert_eq!(scene.says(ConditionType::Degraded), told(summary, "True QuotaExceeded"));
}

#[test]
fn a_refused_spec_is_told_while_the_old_one_serves() {
    let mut scene = Scene::installed(four());
    let (field, message) = ("spec.replicas".to_owned(), "spec.replicas is -1; use at least 0".to_owned());
    scene.refusals.push(Refusal { reason: Reason::InvalidCount, field, message });
    let summary = "Refused: spec.replicas is -1; use at least 0";
    assert_eq!(scene.says(ConditionType::Accepted), told(summary, "False InvalidCount"));
    assert_eq!(scene.says(ConditionType::Available).1, "True ReplicasReady");
}

#[test]
fn a_condition_keeps_its_time_until_its_status_flips() {
    let mut scene = Scene::installed(four());
    let first = scene.status();
    scene.md.status = Some(first.clone());
    scene.now += std::time::Duration::from_secs(60);
    assert_eq!(scene.status(), first, "nothing changed, so nothing is to be written");
    let scene = scene.pod(0, starting(true));
    let time = |status: &ModelDeploymentStatus, kind: ConditionType| {
        status.conditions.iter().find(|one| one.type_ == kind.as_str()).unwrap().last_transition_time.clone()
    };
    let second = scene.status();
    assert_eq!(time(&second, ConditionType::Ready), Time(scene.now));
    assert_eq!(time(&second, ConditionType::Accepted), time(&first, ConditionType::Accepted));
}

#[test]
fn events_tell_what_changed_and_not_what_is_as_it_should_be() {
    let good = Scene::installed(four());
    let first = good.status();
    let bad = {
        let mut scene = Scene::installed(four());
        scene.seen.pods.remove(2);
        scene.seen.fleet.workers.remove(2);
        scene.md.status = Some(first.clone());
        scene.status()
    };
    assert_eq!(notes(Some(&first), &first), []);
    let told: Vec<(bool, String)> =
        notes(Some(&first), &bad).into_iter().map(|note| (note.warning, note.reason)).collect();
    assert!(told.contains(&(true, "WorkerLost".to_owned())), "{told:?}");
}

#[test]
fn a_line_has_at_most_120_characters() {
    let line = summary::line(&"wörd ".repeat(60));
    assert!(line.chars().count() <= 120 && line.ends_with("..."), "{line}");
}
