//! What runs where: counters of workers, and the guard that lowers them whatever way a request ends. Pure.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::{line::Line, snapshot::Worker, vigil::Life};

const FIRST_SUSPICION: Duration = Duration::from_millis(500);
const LONGEST_SUSPICION: Duration = Duration::from_secs(8);

/// What this router knows of a worker by its own doing; it outlives snapshots. On cache lines of its own, for all
/// cores write to it.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerLoad {
    outstanding: AtomicU32,
    failures: AtomicU32,
    /// Milliseconds on the router's clock.
    suspect_until: AtomicU64,
    /// One request runs there although it has not answered since it failed.
    is_tried: AtomicBool,
    by_name: AtomicBool,
    leaving: AtomicBool,
    pub(crate) life: Life,
}

impl WorkerLoad {
    /// Sequences that are out there.
    pub fn outstanding(&self) -> u32 {
        self.outstanding.load(Relaxed)
    }

    /// Whether it failed a moment ago, is being tried again with one request, or gives no sign of life.
    pub fn is_suspect(&self, now: Duration) -> bool {
        self.suspect_until.load(Relaxed) > now.as_millis() as u64
            || self.is_tried.load(Relaxed)
            || self.life.is_silent()
    }

    /// It did not answer: it gets nothing for a while, longer with each failure in a row; what fails in that while is no
    /// further one. Where nobody answered at its address, its name is tried next, and the other way round.
    pub fn failed(&self, now: Duration, nobody_there: bool) {
        if self.suspect_until.load(Relaxed) > now.as_millis() as u64 {
            return; // several answers were lost at once
        }
        let failures = self.failures.fetch_add(1, Relaxed).min(8);
        let suspicion = (FIRST_SUSPICION * 2_u32.pow(failures)).min(LONGEST_SUSPICION);
        self.suspect_until.store((now + suspicion).as_millis() as u64, Relaxed);
        self.is_tried.store(false, Relaxed);
        if nobody_there {
            self.by_name.fetch_xor(true, Relaxed);
        }
    }

    /// It answered.
    pub fn answered(&self) {
        self.failures.store(0, Relaxed);
        self.suspect_until.store(0, Relaxed);
        self.is_tried.store(false, Relaxed);
    }

    /// Whether it goes away: what runs there goes elsewhere, if it can.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Relaxed)
    }

    pub(crate) fn leaves(&self, leaving: bool) {
        self.leaving.store(leaving, Relaxed);
    }

    /// Whether its name is to be used instead of its address.
    pub fn is_by_name(&self) -> bool {
        self.by_name.load(Relaxed)
    }
}

/// The right to run one request on one worker. It lives in the response's body; when it drops, at the end, an error or
/// a disconnect, the counters go down and the next in line comes up.
#[derive(Debug)]
pub struct Grant {
    line: Arc<Line>,
    worker: Arc<Worker>,
    weight: u32,
    is_trial: bool,
    is_refused: bool,
}

impl Grant {
    /// Counts a request of `weight` sequences in.
    pub(crate) fn new(line: &Arc<Line>, worker: &Arc<Worker>, weight: u32) -> Self {
        worker.load.outstanding.fetch_add(weight, Relaxed);
        line.running.fetch_add(1, Relaxed);
        let is_trial = worker.load.failures.load(Relaxed) > 0;
        if is_trial {
            worker.load.is_tried.store(true, Relaxed);
        }
        Self { line: line.clone(), worker: worker.clone(), weight, is_trial, is_refused: false }
    }

    /// The worker.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// The model.
    pub fn line(&self) -> &Line {
        &self.line
    }

    /// Whether another worker could take over what runs here.
    pub fn has_other(&self, now: Duration) -> bool {
        self.line.has_other(&self.worker, self.weight, now)
    }

    /// Gives it back without telling the line, whose lock the caller may hold.
    pub(crate) fn refuse(mut self) {
        self.is_refused = true;
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.worker.load.outstanding.fetch_sub(self.weight, Relaxed);
        self.line.running.fetch_sub(1, Relaxed);
        if self.is_trial {
            self.worker.load.is_tried.store(false, Relaxed);
        }
        if !self.is_refused {
            self.line.freed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_suspect_longer_with_each_failure_until_it_answers() {
        let load = WorkerLoad::default();
        let at = Duration::from_millis;
        load.failed(at(1000), false);
        assert!(load.is_suspect(at(1499)) && !load.is_suspect(at(1500)));
        (0..100).for_each(|_| load.failed(at(1499), false));
        assert!(!load.is_suspect(at(1500)), "all that was lost at once is one failure");
        load.failed(at(1500), false);
        assert!(load.is_suspect(at(2499)) && !load.is_suspect(at(2500)));
        (10..100).for_each(|second| load.failed(at(second * 1000), false));
        load.failed(at(200_000), false);
        assert!(load.is_suspect(at(207_999)) && !load.is_suspect(at(208_000)));
        load.answered();
        assert!(!load.is_suspect(at(3000)));
        load.failed(at(3000), false);
        assert!(!load.is_suspect(at(3500)));
    }

    #[test]
    fn name_and_address_are_tried_in_turn() {
        let load = WorkerLoad::default();
        load.failed(Duration::ZERO, true);
        assert!(load.is_by_name());
        load.failed(Duration::from_secs(10), false);
        assert!(load.is_by_name());
        load.failed(Duration::from_secs(20), true);
        assert!(!load.is_by_name());
    }
}
