//! What the fleet said about one model: a value, taken at one moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;
use wire::proto;

use super::{LEASE, Version, model::Model, process::Process};

pub use proto::{hello::Role, progress::Phase as ProgressPhase, worker_state::Phase as WorkerPhase};

/// What routers, workers, fetchers and describers of one model have said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FleetView {
    /// The version of the routers' snapshot; `None` unless this process leads and the model is published.
    pub version: Option<Version>,
    /// Workers that said hello, by id.
    pub workers: Vec<WorkerView>,
    /// Fetchers that said hello, by id: the id of a fetcher is that of the worker it fetches for.
    pub fetchers: Vec<FetcherView>,
    /// Routers within their lease, by id. They serve all models.
    pub routers: Vec<RouterView>,
    /// Summed over the live routers; `None` if there is none, or one has not told its load within the lease.
    pub load: Option<LoadView>,
    /// The newest description of each revision.
    pub descriptions: Vec<DescriptionView>,
    /// The newest failure of each process.
    pub failures: Vec<FailureView>,
    /// The measured load of experts, by replica.
    pub expert_loads: Vec<ExpertLoadView>,
}

/// One worker.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerView {
    /// The pod's UID, or the local token.
    pub id: String,
    /// What it runs.
    pub revision: String,
    /// Its replica.
    pub replica: u32,
    /// Its place in the replica.
    pub ordinal: u32,
    /// HOST:PORT of its gRPC, as it says.
    pub address: String,
    /// The model files that it has.
    pub content_hash: String,
    /// Its stream to this process is open.
    pub connected: bool,
    /// Since its last report.
    pub silent_for: Duration,
    /// `Unspecified` until it said.
    pub phase: WorkerPhase,
    /// Has the experts of its replica's present placement in memory, and said so under this leader.
    pub placement_loaded: bool,
    /// Acts on its newest mesh.
    pub acknowledged: bool,
    /// Asks by its replica's present placement in every step that runs, and said so under this leader.
    pub switched: bool,
    /// Every live router, and at least one, acts on a snapshot that lists this worker as one that takes requests.
    pub routed: bool,
    /// Its last load; `None` if older than [`super::LEASE`].
    pub load: Option<WorkerLoadView>,
    /// Weights read, while it loads.
    pub progress: Option<ProgressView>,
    /// How many connected workers do not ask it now, because it failed them.
    pub suspected_by: u32,
}

impl WorkerView {
    /// Its experts can be asked.
    pub fn holds(&self) -> bool {
        let phases = [WorkerPhase::Serving, WorkerPhase::Draining, WorkerPhase::Drained];
        self.connected && phases.contains(&self.phase)
    }
}

/// Rows that the requests of one replica gave to experts lately, over its connected workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertLoadView {
    /// What the workers run.
    pub revision: String,
    /// Their replica.
    pub replica: u32,
    /// By layer, then by expert.
    pub rows: BTreeMap<u32, Vec<u64>>,
}

/// A worker's own numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerLoadView {
    /// Sequences that wait for a place in a step.
    pub waiting: u64,
    /// Sequences that have one.
    pub running: u64,
    /// Key-value cache in use, in tokens.
    pub kv_tokens_used: u64,
    /// Key-value cache in all, in tokens.
    pub kv_tokens_total: u64,
    /// Weights of the dense part in memory.
    pub dense_bytes: u64,
    /// Weights of experts in memory.
    pub expert_bytes: u64,
}

/// One fetcher (an init container).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetcherView {
    /// The UID of its pod.
    pub id: String,
    /// What it fetches for.
    pub revision: String,
    /// How far it is.
    pub progress: Option<ProgressView>,
}

/// How far a download or a load is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgressView {
    /// What is being done.
    pub phase: ProgressPhase,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all; 0: not known yet.
    pub total_bytes: u64,
}

impl ProgressView {
    /// In whole percent, 0 while the total is not known.
    pub fn percent(&self) -> u8 {
        let percent = u128::from(self.done_bytes) * 100 / u128::from(self.total_bytes.max(1));
        percent.min(100) as u8
    }
}

/// One router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterView {
    /// The pod's UID, or the local token.
    pub id: String,
    /// HOST:PORT of its HTTP.
    pub http_address: String,
    /// HOST:PORT of its gRPC.
    pub grpc_address: String,
    /// The snapshot of this model that it acts on.
    pub acknowledged: Option<Version>,
    /// Since its last report.
    pub silent_for: Duration,
}

/// Work at the routers, summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadView {
    /// Requests that wait for a worker.
    pub queued: u64,
    /// Requests that run on one.
    pub running: u64,
    /// How long the oldest has waited.
    pub oldest_wait: Duration,
    /// Requests taken since the routers started.
    pub accepted: u64,
}

/// What a model weighs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescriptionView {
    /// The revision that was described.
    pub revision: String,
    /// What `modelfleet-worker describe` prints.
    pub json: Vec<u8>,
}

/// Why a process cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailureView {
    /// What failed.
    pub role: Role,
    /// The UID of its pod, or the local token.
    pub id: String,
    /// What it worked for.
    pub revision: String,
    /// CamelCase, stable.
    pub reason: String,
    /// For the user.
    pub message: String,
}

/// What was said about the model `name`, which is `model` if it is published.
pub(super) fn of(
    name: &str,
    model: Option<&Model>,
    processes: &BTreeMap<(Role, String), Process>,
    live_routers: &BTreeSet<String>,
    now: Instant,
) -> FleetView {
    let routers: Vec<&Process> =
        live_routers.iter().filter_map(|id| processes.get(&(Role::Router, id.clone()))).collect();
    let ours = |role: Role| {
        let of_role = processes.iter().filter(move |((of, _), _)| *of == role);
        of_role.map(|(_, process)| process).filter(|process| process.hello.model == name)
    };
    FleetView {
        version: model.and_then(Model::version),
        expert_loads: expert_loads(ours(Role::Worker).filter(|worker| worker.stream.is_some())),
        workers: {
            let suspected = |id: &String| {
                let by = ours(Role::Worker).filter(|peer| peer.stream.is_some() && peer.suspects.contains(id));
                u32::try_from(by.count()).unwrap_or(u32::MAX)
            };
            let view = |worker: &Process| WorkerView {
                suspected_by: suspected(&worker.hello.id),
                ..worker_view(worker, name, model, &routers, now)
            };
            ours(Role::Worker).map(view).collect()
        },
        fetchers: ours(Role::Fetch).map(fetcher_view).collect(),
        routers: routers.iter().map(|router| router_view(router, name, now)).collect(),
        load: load(&routers, name, now),
        descriptions: descriptions(processes.values().filter(|process| process.hello.model == name)),
        failures: processes.iter().filter_map(|((role, id), process)| failure(*role, id, process, name)).collect(),
    }
}

fn worker_view(worker: &Process, name: &str, model: Option<&Model>, routers: &[&Process], now: Instant) -> WorkerView {
    let id = &worker.hello.id;
    let acknowledged =
        |process: &Process, since: Version| process.acknowledged.get(name).is_some_and(|version| *version >= since);
    let placed_since = model.and_then(|model| model.placed_since(id));
    let loaded = worker.state.as_ref().and_then(|state| state.placement).map(Version::from);
    let serves = matches!(worker.phase(), WorkerPhase::Serving | WorkerPhase::Draining);
    let taking_since = model.and_then(|model| model.taking_since(id));
    WorkerView {
        id: id.clone(),
        revision: worker.hello.revision.clone(),
        replica: worker.hello.replica,
        ordinal: worker.hello.ordinal,
        address: worker.hello.address.clone(),
        content_hash: worker.hello.content_hash.clone(),
        connected: worker.stream.is_some(),
        silent_for: now.duration_since(worker.last),
        phase: worker.phase(),
        placement_loaded: serves && placed_since.zip(loaded).is_some_and(|(since, loaded)| loaded >= since),
        acknowledged: model
            .and_then(|model| model.mesh_version(id))
            .is_some_and(|version| acknowledged(worker, version)),
        switched: placed_since.is_some_and(|since| acknowledged(worker, since)),
        routed: !routers.is_empty()
            && taking_since.is_some_and(|since| routers.iter().all(|router| acknowledged(router, since))),
        load: worker.worker_load.as_ref().filter(|(at, _)| now.duration_since(*at) <= LEASE).map(|(_, load)| {
            WorkerLoadView {
                waiting: load.waiting,
                running: load.running,
                kv_tokens_used: load.kv_tokens_used,
                kv_tokens_total: load.kv_tokens_total,
                dense_bytes: load.dense_bytes,
                expert_bytes: load.expert_bytes,
            }
        }),
        progress: worker.progress.as_ref().map(progress),
        suspected_by: 0,
    }
}

fn expert_loads<'a>(workers: impl Iterator<Item = &'a Process>) -> Vec<ExpertLoadView> {
    let mut views: BTreeMap<(&str, u32), BTreeMap<u32, Vec<u64>>> = BTreeMap::new();
    for worker in workers {
        let sums = views.entry((&worker.hello.revision, worker.hello.replica)).or_default();
        for (layer, rows) in &worker.experts.lately {
            let sums = sums.entry(*layer).or_default();
            sums.resize(sums.len().max(rows.len()), 0);
            for (sum, rows) in sums.iter_mut().zip(rows) {
                *sum = sum.saturating_add(*rows);
            }
        }
    }
    let measured = views.into_iter().filter(|(_, rows)| !rows.is_empty());
    let view =
        |((revision, replica), rows): ((&str, u32), _)| ExpertLoadView { revision: revision.to_owned(), replica, rows };
    measured.map(view).collect()
}

fn fetcher_view(fetcher: &Process) -> FetcherView {
    FetcherView {
        id: fetcher.hello.id.clone(),
        revision: fetcher.hello.revision.clone(),
        progress: fetcher.progress.as_ref().map(progress),
    }
}

fn progress(progress: &proto::Progress) -> ProgressView {
    ProgressView { phase: progress.phase(), done_bytes: progress.done_bytes, total_bytes: progress.total_bytes }
}

fn router_view(router: &Process, name: &str, now: Instant) -> RouterView {
    RouterView {
        id: router.hello.id.clone(),
        http_address: router.hello.http_address.clone(),
        grpc_address: router.hello.address.clone(),
        acknowledged: router.acknowledged.get(name).copied(),
        silent_for: now.duration_since(router.last),
    }
}

/// The sum over live routers, if each has told its load within the lease. A model that one does not mention is idle
/// there.
fn load(routers: &[&Process], name: &str, now: Instant) -> Option<LoadView> {
    let mut sum = LoadView::default();
    for router in routers {
        let (at, models) = router.router_load.as_ref()?;
        if now.duration_since(*at) > LEASE {
            return None;
        }
        if let Some(load) = models.get(name) {
            sum.queued = sum.queued.saturating_add(load.queued);
            sum.running = sum.running.saturating_add(load.running);
            sum.oldest_wait = sum.oldest_wait.max(Duration::from_millis(load.oldest_wait_ms));
            sum.accepted = sum.accepted.saturating_add(load.accepted);
        }
    }
    (!routers.is_empty()).then_some(sum)
}

fn descriptions<'a>(processes: impl Iterator<Item = &'a Process>) -> Vec<DescriptionView> {
    let mut newest: BTreeMap<&str, &(Instant, Vec<u8>)> = BTreeMap::new();
    for process in processes {
        let Some(description) = &process.description else {
            continue;
        };
        let known = newest.entry(&process.hello.revision).or_insert(description);
        if known.0 < description.0 {
            *known = description;
        }
    }
    let view = |(revision, (_, json)): (&str, &(Instant, Vec<u8>))| DescriptionView {
        revision: revision.to_owned(),
        json: json.clone(),
    };
    newest.into_iter().map(view).collect()
}

fn failure(role: Role, id: &str, process: &Process, name: &str) -> Option<FailureView> {
    let failure = process.failure.as_ref().filter(|_| process.hello.model == name)?;
    Some(FailureView {
        role,
        id: id.to_owned(),
        revision: process.hello.revision.clone(),
        reason: failure.reason.clone(),
        message: failure.message.clone(),
    })
}
