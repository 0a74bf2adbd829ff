//! What a worker is doing: shared by its services, the control stream and the drain.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use engine::Experts;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use wire::proto::{ExpertLoad, LayerLoad, Suspects, Version, WorkerLoad, WorkerState, worker_state::Phase};

use super::Options;
use crate::{
    drive::Driver,
    mesh::{Mesh, Meshes},
};

/// How long a worker that others can do without is not asked before it ends.
const UNASKED: Duration = Duration::from_secs(1);

/// The state of one worker.
pub struct State {
    /// The pod's UID, or the local token.
    pub id: String,
    /// NAMESPACE/NAME.
    pub model: String,
    /// Of the model files.
    pub content_hash: String,
    /// Index of the replica.
    pub replica: u32,
    /// Its place in the replica.
    pub ordinal: u32,
    /// Who holds which experts.
    pub meshes: Meshes,
    /// The newest version whose experts are all in memory.
    pub loaded: watch::Sender<Option<Version>>,
    stage: watch::Sender<Stage>,
    serving: Mutex<Option<Serving>>,
    requests: Arc<Semaphore>,
    most_requests: u32,
}

/// What there is once the weights are in memory.
pub struct Serving {
    /// Runs sequences.
    pub driver: Driver,
    /// The routed experts; none if the engine has none.
    pub experts: Option<Arc<Experts>>,
    /// Rows that peers asked for so far.
    pub asked: Arc<AtomicU64>,
    /// Bytes of the other weights.
    pub dense_bytes: u64,
    /// Ids of peers that are not asked because they failed.
    pub suspects: watch::Receiver<BTreeSet<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Loading,
    Serving,
    Draining,
    /// Requests that still run are ended.
    Cut,
}

/// Why a request is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The worker goes away.
    Draining,
    /// Too many wait here.
    Full,
}

impl State {
    /// The state of a worker that has yet to load the experts of `mesh`.
    pub fn new(mesh: Mesh, options: &Options) -> Arc<Self> {
        let most = options.max_sequences.saturating_mul(1 + super::WAITING_PER_RUNNING).clamp(1, 1 << 16);
        Arc::new(Self {
            id: options.id.clone(),
            model: options.model.clone(),
            content_hash: options.content_hash.clone(),
            replica: options.replica,
            ordinal: options.ordinal,
            meshes: Meshes::new(mesh),
            loaded: watch::Sender::new(None),
            stage: watch::Sender::new(Stage::Loading),
            serving: Mutex::default(),
            requests: Arc::new(Semaphore::new(most)),
            most_requests: u32::try_from(most).unwrap_or(u32::MAX),
        })
    }

    /// The experts are in memory: requests are taken from here on.
    pub fn serving(&self, serving: Serving) {
        *self.serving.lock().unwrap_or_else(PoisonError::into_inner) = Some(serving);
        self.stage.send_if_modified(|stage| {
            let loading = *stage == Stage::Loading;
            if loading {
                *stage = Stage::Serving;
            }
            loading
        });
    }

    /// No new requests from here on.
    pub fn drain(&self) {
        self.stage.send_replace(Stage::Draining);
    }

    /// Ends requests that still run.
    pub fn cut(&self) {
        self.stage.send_replace(Stage::Cut);
    }

    /// Waits until running requests are to be ended.
    pub async fn is_cut(&self) {
        let mut stage = self.stage.subscribe();
        let _ = stage.wait_for(|&stage| stage == Stage::Cut).await; // the sender lives as long as we do
    }

    /// A place for one request, free again when it is dropped.
    ///
    /// # Errors
    /// If the worker drains, its replica goes away, or too many requests are here.
    pub fn admit(&self) -> Result<OwnedSemaphorePermit, Refused> {
        if *self.stage.borrow() != Stage::Serving || self.meshes.newest().drain {
            return Err(Refused::Draining);
        }
        self.requests.clone().try_acquire_owned().map_err(|_| Refused::Full)
    }

    /// Requests that are here.
    pub fn running(&self) -> usize {
        self.most_requests as usize - self.requests.available_permits()
    }

    /// Waits until no request is here.
    pub async fn finished(&self) {
        let all = self.requests.acquire_many(self.most_requests).await;
        drop(all); // the semaphore is never closed
    }

    /// Waits until no other worker of the mesh needs experts from here: none runs, or others hold all of them too and
    /// nobody asked for a while.
    pub async fn unneeded(&self) {
        let mut mesh = self.meshes.follow();
        let none_runs = mesh.wait_for(|mesh| !mesh.others_run(&self.id, self.replica));
        tokio::select! {
            _ = none_runs => {} // the sender lives as long as we do
            () = self.unasked() => {}
        }
    }

    async fn unasked(&self) {
        let asked = || self.with_serving(|serving| serving.asked.load(Ordering::Relaxed));
        let mut before = asked();
        loop {
            tokio::time::sleep(UNASKED).await;
            let now = asked();
            if now == before && self.meshes.newest().others_hold(self.ordinal, self.replica) {
                return;
            }
            before = now;
        }
    }

    /// Whether the experts are in memory and requests are taken.
    ///
    /// # Errors
    /// Why not.
    pub fn ready(&self) -> Result<(), String> {
        match *self.stage.borrow() {
            Stage::Loading => Err("reading weights".into()),
            Stage::Serving => Ok(()),
            Stage::Draining | Stage::Cut => Err("draining".into()),
        }
    }

    /// What the operator is told about this worker.
    pub fn report(&self) -> WorkerState {
        let mesh = self.meshes.newest();
        let idle = self.running() == 0 && !mesh.others_run(&self.id, self.replica);
        let phase = match *self.stage.borrow() {
            Stage::Loading => Phase::Loading,
            Stage::Serving if !mesh.drain => Phase::Serving,
            _ if idle => Phase::Drained,
            _ => Phase::Draining,
        };
        let nothing_to_load = self.with_serving(|serving| serving.experts.is_none()).unwrap_or(false);
        let placement = if nothing_to_load { Some(mesh.version) } else { *self.loaded.borrow() };
        WorkerState { phase: phase.into(), placement }
    }

    /// What the operator is told every second, once the experts are in memory.
    pub fn load(&self) -> Option<WorkerLoad> {
        self.with_serving(|serving| {
            let load = serving.driver.load();
            WorkerLoad {
                waiting: load.waiting as u64,
                running: load.running as u64,
                kv_tokens_used: load.kv_tokens_used as u64,
                kv_tokens_total: load.kv_tokens_total as u64,
                dense_bytes: serving.dense_bytes,
                expert_bytes: serving.experts.as_ref().map_or(0, |experts| experts.weight().1),
            }
        })
    }

    /// The peers that this worker does not ask because they failed it.
    pub fn suspects(&self) -> Suspects {
        let ids = self.with_serving(|serving| serving.suspects.borrow().iter().cloned().collect());
        Suspects { ids: ids.unwrap_or_default() }
    }

    /// Rows by layer and expert, once the experts are in memory.
    pub fn expert_load(&self) -> Option<ExpertLoad> {
        let layer = |(layer, rows)| LayerLoad { layer: u32::try_from(layer).unwrap_or(u32::MAX), rows };
        let routed = self.with_serving(|serving| serving.experts.as_ref().map(|experts| experts.routed()))??;
        Some(ExpertLoad { layers: routed.into_iter().map(layer).collect() })
    }

    fn with_serving<T>(&self, read: impl FnOnce(&Serving) -> T) -> Option<T> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(read)
    }
}
