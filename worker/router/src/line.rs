//! The live side of a model: its queue and its counters, over all its snapshots. Pure, but for a lock.
//!
//! Grants are given under the queue's lock, so that a worker's bound holds exactly and nobody overtakes the line.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use wire::proto::{ModelLoad, model_snapshot::Availability};

use crate::{
    load::Grant,
    pick::{Pick, View, Why, pick},
    queue::{Queue, Ticket},
    snapshot::Model,
};

/// Takes a grant to whoever waits for it, or back if they have gone.
pub type Waiter = Box<dyn FnOnce(Grant) -> Result<(), Grant> + Send>;
/// Called when something was freed, with nothing locked: it calls [`Line::serve`] with the time and a draw.
pub type Freed = Arc<dyn Fn(&Arc<Line>) + Send + Sync>;

/// A model's queue and counters.
pub struct Line {
    model: ArcSwap<Model>,
    queue: Mutex<Queue<Waiter>>,
    queued: AtomicUsize,
    pub(crate) running: AtomicU64,
    accepted: AtomicU64,
    freed: Freed,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("model", &self.model.load().name).finish_non_exhaustive()
    }
}

/// Who comes to the line.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Sequences to run.
    pub weight: u32,
    /// When the request came.
    pub arrived: Duration,
    /// It was let in before, and lost its worker: it goes first.
    pub is_retry: bool,
}

/// What came of it.
#[derive(Debug)]
pub enum Entered {
    /// Go.
    Granted(Grant),
    /// Wait; the waiter brings the grant.
    Waiting(Ticket, Why),
    /// As many wait as may.
    Full,
    /// Nothing will come of waiting.
    Off,
}

impl Line {
    /// An empty line of `model`.
    pub fn new(model: Model, freed: Freed) -> Arc<Self> {
        Arc::new(Self {
            model: ArcSwap::from_pointee(model),
            queue: Mutex::default(),
            queued: AtomicUsize::new(0),
            running: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            freed,
        })
    }

    /// The newest snapshot.
    pub fn model(&self) -> Arc<Model> {
        self.model.load_full()
    }

    /// Replaces the snapshot. The caller then calls [`Line::serve`].
    pub(crate) fn update(&self, model: Model) {
        self.model.store(Arc::new(model));
    }

    /// Gives a worker, or a place in the queue that `waiter` belongs to.
    pub fn enter(self: &Arc<Self>, entry: Entry, now: Duration, draw: u64, waiter: impl FnOnce() -> Waiter) -> Entered {
        let model = self.model.load();
        let mut queue = self.lock();
        if model.availability == Availability::Off {
            return Entered::Off;
        }
        if !entry.is_retry {
            self.accepted.fetch_add(1, Relaxed);
        }
        let mut why = Why::AllBusy; // those before it in the queue come first
        if entry.is_retry || queue.is_empty() {
            match pick(&views(&model, now), entry.weight, draw) {
                Pick::Worker(index) => {
                    return Entered::Granted(Grant::new(self, &model.workers[index], entry.weight));
                }
                Pick::Wait(because) => why = because,
            }
        }
        let place = if entry.is_retry {
            Ok(queue.put_back(waiter(), entry.weight, entry.arrived))
        } else {
            queue.push(waiter(), entry.weight, entry.arrived, model.max_pending)
        };
        self.queued.store(queue.len(), Relaxed);
        place.map_or(Entered::Full, |ticket| Entered::Waiting(ticket, why))
    }

    /// Leaves the queue, if still in it.
    pub fn leave(&self, ticket: Ticket) {
        let mut queue = self.lock();
        let left = queue.remove(ticket);
        self.queued.store(queue.len(), Relaxed);
        drop(queue);
        drop(left);
    }

    /// Gives workers to those in line, as far as there are any. `draw` is called once for each.
    pub fn serve(self: &Arc<Self>, now: Duration, mut draw: impl FnMut() -> u64) {
        while self.queued.load(Relaxed) > 0 {
            let model = self.model.load();
            let mut queue = self.lock();
            let Some(weight) = queue.first() else { return };
            let Pick::Worker(index) = pick(&views(&model, now), weight, draw()) else {
                return;
            };
            let waiter = queue.pop();
            self.queued.store(queue.len(), Relaxed);
            let grant = Grant::new(self, &model.workers[index], weight);
            drop(queue);
            if let Some(Err(grant)) = waiter.map(|waiter| waiter(grant)) {
                grant.refuse(); // they have gone; the next one
            }
        }
    }

    /// The model is gone: nobody waits any longer.
    pub(crate) fn close(&self) {
        let left = std::mem::take(&mut *self.lock());
        self.queued.store(0, Relaxed);
        drop(left); // with the lock released
    }

    pub(crate) fn freed(self: &Arc<Self>) {
        if self.queued.load(Relaxed) > 0 {
            (self.freed)(self);
        }
    }

    /// How many wait, and how many run.
    pub fn counts(&self) -> (u64, u64) {
        (self.queued.load(Relaxed) as u64, self.running.load(Relaxed))
    }

    /// What the operator is told.
    pub fn load(&self, now: Duration) -> ModelLoad {
        let (queued, running) = self.counts();
        ModelLoad {
            model: self.model.load().name.clone(),
            queued,
            running,
            oldest_wait_ms: self.lock().oldest_wait(now).as_millis() as u64,
            accepted: self.accepted.load(Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue<Waiter>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn views(model: &Model, now: Duration) -> Vec<View> {
    let view = |worker: &Arc<crate::snapshot::Worker>| View {
        outstanding: worker.load.outstanding(),
        is_draining: worker.is_draining,
        is_suspect: worker.load.is_suspect(now),
    };
    model.workers.iter().map(view).collect()
}

#[cfg(test)]
mod tests;
