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
    budget::Budget,
    load::Grant,
    patience::Pace,
    pick::{Pick, View, Why, pick},
    queue::{Queue, Ticket},
    snapshot::{Content, Model, Worker},
};

/// Takes a grant to whoever waits for it, or back if they have gone.
pub type Waiter = Box<dyn FnOnce(Grant) -> Result<(), Grant> + Send>;
/// Called when something was freed, with nothing locked: it calls [`Line::serve`] with the time and a draw.
pub type Freed = Arc<dyn Fn(&Arc<Line>) + Send + Sync>;

/// A model's queue and counters.
pub struct Line {
    model: ArcSwap<Model>,
    waiting: Mutex<Waiting>,
    queued: AtomicUsize,
    pub(crate) running: AtomicU64,
    accepted: AtomicU64,
    /// How long workers take to take a call.
    pub(crate) pace: Pace,
    freed: Freed,
}

#[derive(Default)]
struct Waiting {
    queue: Queue<(Entry, Waiter)>,
    budget: Budget,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("model", &self.model.load().name).finish_non_exhaustive()
    }
}

/// Who comes to the line.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Sequences to run.
    pub weight: u32,
    /// When the request came.
    pub arrived: Duration,
    /// Whether it was here before.
    pub turn: Turn,
}

/// How a request stands in the line.
#[derive(Clone, Debug)]
pub enum Turn {
    /// It comes for the first time.
    First,
    /// It was let in before, and lost its worker: it goes first, as far as there are retries.
    Retry,
    /// A part of its answer is at the client: it goes first, to a worker of the same content.
    Resume(Arc<Content>),
}

impl Turn {
    fn fits(&self, worker: &Worker) -> bool {
        match self {
            Self::First | Self::Retry => true,
            Self::Resume(content) => *content == worker.content,
        }
    }

    /// Whether who stands so finds the same workers as one who stands like `other`.
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::First, Self::First) | (Self::Retry, Self::Retry) => true,
            (Self::Resume(content), Self::Resume(other)) => content == other,
            _ => false,
        }
    }
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
            waiting: Mutex::default(),
            queued: AtomicUsize::new(0),
            running: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            pace: Pace::default(),
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
        let mut waiting = self.lock();
        if model.availability == Availability::Off {
            return Entered::Off;
        }
        let is_new = matches!(entry.turn, Turn::First);
        if is_new {
            self.accepted.fetch_add(1, Relaxed);
            waiting.budget.earn();
        }
        let mut why = Why::AllBusy; // those before it in the queue come first
        if !is_new || !waiting.queue.has_new() {
            match choose(&model, &entry, &mut waiting.budget, now, draw) {
                Pick::Worker(index) => return Entered::Granted(Grant::new(self, &model.workers[index], entry.weight)),
                Pick::Wait(because) => why = because,
            }
        }
        let arrived = entry.arrived;
        let place = if is_new {
            waiting.queue.push((entry, waiter()), arrived, model.max_pending)
        } else {
            Ok(waiting.queue.put_back((entry, waiter()), arrived))
        };
        self.queued.store(waiting.queue.len(), Relaxed);
        place.map_or(Entered::Full, |ticket| Entered::Waiting(ticket, why))
    }

    /// Leaves the queue, if still in it.
    pub fn leave(&self, ticket: Ticket) {
        let mut waiting = self.lock();
        let left = waiting.queue.remove(ticket);
        self.queued.store(waiting.queue.len(), Relaxed);
        drop(waiting);
        drop(left);
    }

    /// Gives workers to those in line, as far as there are any. `draw` is called once for each who is looked at.
    pub fn serve(self: &Arc<Self>, now: Duration, mut draw: impl FnMut() -> u64) {
        while self.queued.load(Relaxed) > 0 {
            let model = self.model.load();
            let mut guard = self.lock();
            let Waiting { queue, budget } = &mut *guard;
            // who found nobody: those like them that need no less are not looked at, since many may wait for what is gone
            let mut without: Vec<(Turn, u32)> = Vec::new();
            let chosen = |(entry, _): &(Entry, Waiter)| {
                if without.iter().any(|(turn, weight)| turn.is_like(&entry.turn) && *weight <= entry.weight) {
                    return None;
                }
                match choose(&model, entry, budget, now, draw()) {
                    Pick::Worker(index) => Some(index),
                    Pick::Wait(_) => {
                        without.push((entry.turn.clone(), entry.weight));
                        None
                    }
                }
            };
            let Some(((entry, waiter), index)) = queue.take(chosen) else { return };
            self.queued.store(queue.len(), Relaxed);
            let grant = Grant::new(self, &model.workers[index], entry.weight);
            drop(guard);
            if let Err(grant) = waiter(grant) {
                grant.refuse(); // they have gone; the next one
            }
        }
    }

    /// Whether a worker other than `worker` could take over a request of this weight that runs there.
    pub(crate) fn has_other(&self, worker: &Worker, weight: u32, now: Duration) -> bool {
        let model = self.model.load();
        let turn = Turn::Resume(worker.content.clone());
        let mut views = views(&model, &turn, now).into_iter().zip(&model.workers);
        views.any(|(view, other)| other.id != worker.id && view.can_take(weight))
    }

    /// The model is gone: nobody waits any longer.
    pub(crate) fn close(&self) {
        let left = std::mem::take(&mut self.lock().queue);
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
            oldest_wait_ms: self.lock().queue.oldest_wait(now).as_millis() as u64,
            accepted: self.accepted.load(Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker for `entry`; a retry takes one of those that are left.
fn choose(model: &Model, entry: &Entry, budget: &mut Budget, now: Duration, draw: u64) -> Pick {
    match pick(&views(model, &entry.turn, now), entry.weight, draw) {
        Pick::Worker(_) if matches!(entry.turn, Turn::Retry) && !budget.take(now) => Pick::Wait(Why::AllBusy),
        pick => pick,
    }
}

fn views(model: &Model, turn: &Turn, now: Duration) -> Vec<View> {
    let view = |worker: &Arc<Worker>| View {
        outstanding: worker.load.outstanding(),
        is_draining: worker.is_draining,
        is_suspect: worker.load.is_suspect(now),
        is_other: !turn.fits(worker),
    };
    model.workers.iter().map(view).collect()
}

#[cfg(test)]
mod tests;
