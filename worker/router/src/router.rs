//! The router's state: the table, the connections, and what is told about them.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use opentelemetry::metrics::Meter;
use tokio::sync::{Notify, watch};
use tracing::info;
use wire::proto::{Acknowledgement, Instruction, RouterLoad, instruction};

use crate::{
    channels::Channels,
    line::{Freed, Line},
    metrics::Metrics,
    patience::Patience,
    snapshot::Table,
};

/// The router. Clones are the same one.
#[derive(Clone)]
pub struct Router(Arc<State>);

struct State {
    table: Arc<ArcSwap<Table>>,
    freed: Freed,
    channels: Channels,
    metrics: Arc<Metrics>,
    started: Instant,
    waiting: Notify,
    synced: AtomicBool,
    ready: watch::Sender<bool>,
    patience: Patience,
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Router").field("table", &self.0.table.load()).finish_non_exhaustive()
    }
}

impl Router {
    /// A router that knows no model yet, with its instruments in `meter`.
    pub fn new(meter: &Meter) -> Self {
        Self::with_patience(meter, Patience::default())
    }

    /// As [`Router::new`], with other bounds of what is waited for.
    pub fn with_patience(meter: &Meter, patience: Patience) -> Self {
        let started = Instant::now();
        let freed: Freed = Arc::new(move |line| line.serve(started.elapsed(), || fastrand::u64(..)));
        let table = Arc::new(ArcSwap::<Table>::default());
        Self(Arc::new(State {
            metrics: Arc::new(Metrics::new(meter, &table)),
            table,
            freed,
            channels: Channels::default(),
            started,
            waiting: Notify::new(),
            synced: AtomicBool::new(false),
            ready: watch::Sender::new(false),
            patience,
        }))
    }

    /// Acts on an instruction of the control stream. A snapshot is in force when this returns, so its acknowledgement
    /// may be sent.
    pub fn apply(&self, instruction: Instruction) -> Option<Acknowledgement> {
        match instruction.instruction? {
            instruction::Instruction::Model(snapshot) => {
                let (model, version) = (snapshot.model.clone(), snapshot.version);
                self.replace(|table| table.with(snapshot.clone(), &self.0.freed));
                if let Some(line) = self.0.table.load().find(&model) {
                    line.serve(self.now(), || fastrand::u64(..));
                }
                Some(Acknowledgement { model, version })
            }
            instruction::Instruction::Removed(removed) => {
                self.replace(|table| table.without(&removed.model));
                None
            }
            instruction::Instruction::Synced(_) => {
                if !self.0.synced.swap(true, Relaxed) {
                    info!("knows all models");
                    self.0.ready.send_replace(true);
                }
                None
            }
            instruction::Instruction::Mesh(_) => None, // for workers
        }
    }

    /// Only the task of the control stream replaces the table, so nothing is lost between the load and the store.
    fn replace(&self, change: impl Fn(&Table) -> Table) {
        let table = change(&self.0.table.load());
        let addresses: HashSet<String> = table
            .lines()
            .flat_map(|line| line.model().workers.clone())
            .flat_map(|worker| [worker.address.clone(), worker.named_address.clone()])
            .collect();
        self.0.table.store(Arc::new(table));
        self.0.channels.retain(|address| addresses.contains(address));
    }

    /// The model that answers to `name`.
    pub fn find(&self, name: &str) -> Option<Arc<Line>> {
        self.0.table.load().find(name).cloned()
    }

    /// All models.
    pub fn table(&self) -> Arc<Table> {
        self.0.table.load_full()
    }

    /// What the operator is told every second.
    pub fn load(&self) -> RouterLoad {
        let now = self.now();
        RouterLoad { models: self.0.table.load().lines().map(|line| line.load(now)).collect() }
    }

    /// Gives workers to those in line whose reason to wait has passed with time.
    pub fn look(&self) {
        for line in self.0.table.load().lines() {
            line.serve(self.now(), || fastrand::u64(..));
        }
    }

    /// Whether all models were heard of once, and no end has begun; follows changes.
    pub fn readiness(&self) -> watch::Receiver<bool> {
        self.0.ready.subscribe()
    }

    /// The end begins: not ready, though requests are still served.
    pub fn retire(&self) {
        self.0.ready.send_replace(false);
    }

    /// Whether all models were heard of once. Requests before that are told to come again.
    pub fn is_synced(&self) -> bool {
        self.0.synced.load(Relaxed)
    }

    /// Has the load sent now, because a request waits for a worker that does not exist.
    pub fn wake_operator(&self) {
        self.0.waiting.notify_one();
    }

    /// Resolves after [`Router::wake_operator`].
    pub async fn somebody_waits(&self) {
        self.0.waiting.notified().await;
    }

    pub(crate) fn channels(&self) -> &Channels {
        &self.0.channels
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    pub(crate) fn patience(&self) -> &Patience {
        &self.0.patience
    }

    /// The router's clock.
    pub(crate) fn now(&self) -> Duration {
        self.0.started.elapsed()
    }

    pub(crate) fn since_start(&self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.0.started)
    }
}
