//! What is wrong with the workers, and how far those are that still come up.

use crds::Reason;
use k8s_openapi::{api::core::v1::Event, apimachinery::pkg::apis::meta::v1::Time};
use kube::ResourceExt;

use super::Case;
use crate::{
    control::{FailureView, ProgressPhase, ProgressView, Role, WorkerPhase},
    replica::{Replica, Worker},
    validate::ValidModel,
};

/// What is wrong, each as a text for people. Replicas that drain have no trouble.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    /// Why the model cannot be described, fetched or loaded.
    pub(super) model: Option<(Reason, String)>,
    /// Why a pod is not made, in the API server's words.
    pub(super) not_made: Option<(Reason, String)>,
    /// Why a pod has no node.
    pub(super) unschedulable: Option<String>,
    /// An image that cannot be pulled, with Kubernetes' reason.
    pub(super) image: Option<String>,
    /// A container that ends again and again.
    pub(super) crash: Option<String>,
    /// Workers that worked before: `2`, or `2 of replica 1` where there are several.
    pub(super) lost: Vec<String>,
    /// Workers that run and do not answer some of their peers, told in the same way.
    pub(super) suspected: Vec<String>,
    /// Pods that are not there yet, or have no node.
    pub(super) pending: usize,
    /// Workers whose files are on the way.
    pub(super) fetching: Share,
    /// Workers that read their weights.
    pub(super) loading: Share,
    /// Workers that wait for the routers only.
    pub(super) unrouted: usize,
}

/// How far some workers are, together.
#[derive(Debug, Default)]
pub(super) struct Share {
    /// How many.
    pub(super) workers: usize,
    done: u64,
    total: u64,
}

impl Share {
    /// Percent in whole tens: a status that changes each second wakes everybody who watches.
    pub(super) fn tens(&self) -> u64 {
        let percent = u128::from(self.done) * 100 / u128::from(self.total.max(1));
        u64::try_from(percent.min(100)).unwrap_or(100) / 10 * 10
    }

    fn add(&mut self, progress: Option<ProgressView>) {
        self.workers += 1;
        if let Some(progress) = progress {
            self.done = self.done.saturating_add(progress.done_bytes);
            self.total = self.total.saturating_add(progress.total_bytes);
        }
    }
}

impl Trouble {
    pub(super) fn find(case: &Case<'_>) -> Self {
        let mut trouble = Self { model: describer(case), ..Self::default() };
        let stays = |one: &&Replica| one.stands() && one.draining_since.is_none();
        let standing: Vec<&Replica> = case.decision.replicas.iter().filter(stays).collect();
        for replica in &standing {
            let name = |ordinal: u32| worker_name(replica, ordinal, &standing);
            trouble.not_made = trouble.not_made.take().or_else(|| not_made(replica, case));
            trouble.lost.extend(replica.lost().into_iter().map(name));
            let suspected = |worker: &&Worker| worker.view.as_ref().is_some_and(|view| view.suspected_by > 0);
            let suspected = replica.workers.iter().filter(|worker| worker.ready()).filter(suspected);
            trouble.suspected.extend(suspected.map(|worker| name(worker.ordinal)));
            for ordinal in 0..replica.shards().max(replica.pods()) {
                match replica.worker(ordinal) {
                    Some(worker) => trouble.add(worker, case),
                    None => trouble.pending += 1,
                }
            }
        }
        trouble.not_made = trouble.not_made.take().or_else(|| describer_not_made(case));
        for pod in &case.seen.pods {
            trouble.image = trouble.image.take().or_else(|| image(&Worker::bare(pod)));
        }
        let together = case.decision.together.as_ref().map(ToString::to_string);
        trouble.unschedulable = together.or(trouble.unschedulable.take());
        trouble
    }

    fn add(&mut self, worker: &Worker, case: &Case<'_>) {
        if worker.ready() || worker.terminating() {
            return;
        }
        if let Some(failure) = &worker.failure {
            self.model.get_or_insert_with(|| of(failure, case));
        }
        if let Some(scheduled) = worker.condition("PodScheduled").filter(|one| one.status == "False") {
            let message = scheduled.message.clone().unwrap_or_else(|| "no node fits".to_owned());
            self.unschedulable.get_or_insert_with(|| spread(message, case.model));
            return;
        }
        if let Some(crash) = crash(worker) {
            self.crash.get_or_insert(crash);
        }
        let progress = worker.view.as_ref().and_then(|view| view.progress);
        if worker.condition("PodScheduled").is_none() {
            self.pending += 1;
        } else if !worker.fetched() {
            self.fetching.add(worker.fetcher.as_ref().and_then(|fetcher| fetcher.progress));
        } else if worker.probed() {
            self.unrouted += 1;
        } else {
            let reads = worker.view.as_ref().is_some_and(|view| view.phase == WorkerPhase::Loading);
            let loading = |progress: &ProgressView| progress.phase == ProgressPhase::Loading;
            self.loading.add(progress.filter(|progress| reads && loading(progress)));
        }
    }
}

/// The scheduler's words, after the field that they speak of where nodes lack its label.
fn spread(message: String, model: &ValidModel) -> String {
    if !model.spreads_over_labels() || !message.contains("missing required label") {
        return message;
    }
    let label = &model.spread_across;
    format!("spec.scheduling.topology.spreadAcross is {label}, a label that not all nodes have: {message}")
}

/// An ordinal, with its replica where there are several, and with the revision of that where there are several.
fn worker_name(replica: &Replica, ordinal: u32, all: &[&Replica]) -> String {
    let others = || all.iter().filter(|one| !std::ptr::eq(**one, replica));
    if others().any(|one| one.revision != replica.revision) {
        format!("{ordinal} of replica {}-{}", replica.revision, replica.index)
    } else if others().next().is_some() {
        format!("{ordinal} of replica {}", replica.index)
    } else {
        ordinal.to_string()
    }
}

/// What the describer of the asked revision says.
fn describer(case: &Case<'_>) -> Option<(Reason, String)> {
    if !matches!(case.decision.planning, crate::decide::Planning::Describing) {
        return None;
    }
    let revision = case.decision.revision.as_str();
    let mut failures = case.seen.fleet.failures.iter();
    failures
        .find(|failure| failure.role == Role::Describe && failure.revision == revision)
        .map(|failure| of(failure, case))
}

/// A failure that a process reported. Only reasons that we know become reasons of ours. A process sees of a Secret only
/// the file that it lacks; the spec has its name.
fn of(failure: &FailureView, case: &Case<'_>) -> (Reason, String) {
    let known = [
        Reason::SourceNotFound,
        Reason::GatedModel,
        Reason::CredentialsMissing,
        Reason::ChecksumMismatch,
        Reason::UnsupportedModel,
        Reason::InvalidModelFile,
    ];
    let other = if failure.role == Role::Describe { Reason::DescribeFailed } else { Reason::FetchFailed };
    let reason = known.into_iter().find(|reason| reason.to_string() == failure.reason).unwrap_or(other);
    let message = match &case.model.spec.model.credentials_ref {
        Some(secret) if reason == Reason::CredentialsMissing => {
            format!("waiting for key {} of Secret {} (spec.model.credentialsRef)", secret.key, secret.name)
        }
        _ => failure.message.clone(),
    };
    (reason, message)
}

/// Why a pod of a replica is not made: a refusal that is younger than every pod that was.
fn not_made(replica: &Replica, case: &Case<'_>) -> Option<(Reason, String)> {
    let set = replica.set.as_ref()?;
    if (0..replica.pods()).all(|ordinal| replica.worker(ordinal).is_some()) {
        return None;
    }
    let pods = replica.workers.iter().map(|worker| worker.pod.as_ref());
    let newest = pods.filter_map(|pod| pod.metadata.creation_timestamp.as_ref()).max();
    refusal(set.uid()?.as_str(), newest, case)
}

fn describer_not_made(case: &Case<'_>) -> Option<(Reason, String)> {
    let name = case.names.describe(&case.decision.revision);
    let job = case.seen.owned.jobs.iter().find(|job| job.name_any() == name)?;
    let mut pods = case.seen.pods.iter().flat_map(|pod| pod.owner_references());
    let uid = job.uid()?;
    if pods.any(|owner| owner.uid == uid) { None } else { refusal(&uid, None, case) }
}

/// The newest event that tells why `maker` could not make a pod, unless a pod came `after`.
fn refusal(maker: &str, after: Option<&Time>, case: &Case<'_>) -> Option<(Reason, String)> {
    let of = |event: &&std::sync::Arc<Event>| event.involved_object.uid.as_deref() == Some(maker);
    let newest = case.seen.refused_pods.iter().filter(of).max_by_key(|event| time(event))?;
    if after.is_some_and(|after| time(newest).is_some_and(|at| at < *after)) {
        return None;
    }
    let message = newest.message.as_deref().unwrap_or("the API server does not say why");
    // the controllers say first what they were doing
    let words = message.split_once("failed error: ").or_else(|| message.split_once("Error creating: "));
    let words = words.map_or(message, |(_, words)| words);
    let quota = words.contains("exceeded quota") || words.contains("failed quota");
    Some((if quota { Reason::QuotaExceeded } else { Reason::PodRefused }, words.to_owned()))
}

fn time(event: &Event) -> Option<Time> {
    let series = event.series.as_ref().and_then(|series| series.last_observed_time.as_ref());
    let micro = series.or(event.event_time.as_ref()).map(|time| Time(time.0));
    event.last_timestamp.clone().or(micro)
}

fn image(worker: &Worker) -> Option<String> {
    let reasons = ["ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"];
    worker.containers().find_map(|status| {
        let waiting = status.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref().filter(|reason| reasons.contains(reason))?;
        Some(format!("{reason} {}", status.image))
    })
}

fn crash(worker: &Worker) -> Option<String> {
    let reasons = ["CrashLoopBackOff", "CreateContainerConfigError", "CreateContainerError", "RunContainerError"];
    worker.containers().find_map(|status| {
        let waiting = status.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref().filter(|reason| reasons.contains(reason))?;
        let last = status.last_state.as_ref().and_then(|state| state.terminated.as_ref());
        let ended = last.map(|last| format!(", exit code {}", last.exit_code)).unwrap_or_default();
        Some(format!("{reason}: container {} of worker {}{ended}", status.name, worker.ordinal))
    })
}
