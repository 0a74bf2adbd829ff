//! What the fleet said about one model: a value, taken at one moment.

use std::time::Duration;

use wire::proto;

use super::Version;

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
    /// Every live router, and at least one, acts on a snapshot that lists this worker as one that takes requests.
    pub routed: bool,
    /// Its last load; `None` if older than [`super::LEASE`].
    pub load: Option<WorkerLoadView>,
    /// Weights read, while it loads.
    pub progress: Option<ProgressView>,
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
