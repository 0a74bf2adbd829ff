//! Which holders are asked now: whether the stream to one is open, and whether it is doubted.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use tokio::sync::watch;

use crate::metrics::Metrics;

/// What all standings of one worker come to; shared with who reports it and who waits for a change.
#[derive(Clone)]
pub struct Board {
    /// Counts changes of any standing.
    changes: watch::Sender<u64>,
    suspects: watch::Sender<BTreeSet<String>>,
    metrics: Arc<Metrics>,
}

impl Board {
    /// Nobody is known yet.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { changes: watch::Sender::new(0), suspects: watch::Sender::new(BTreeSet::new()), metrics }
    }

    /// The ids of peers that are not asked because they failed this worker.
    pub fn suspects(&self) -> watch::Receiver<BTreeSet<String>> {
        self.suspects.subscribe()
    }

    /// Changes whenever trying again makes sense.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Something changed for the better, or may have.
    pub(super) fn bump(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// `suspect` is asked under the lock: of two tasks that tell at once, the last has seen what both did.
    fn set(&self, id: &str, suspect: impl FnOnce() -> bool) {
        self.suspects.send_if_modified(|suspects| {
            let is_suspect = suspect();
            let changed = if is_suspect { suspects.insert(id.to_owned()) } else { suspects.remove(id) };
            if changed && is_suspect {
                self.metrics.suspected();
            }
            if changed {
                self.metrics.suspects(suspects.len());
            }
            changed
        });
    }
}

/// How much a holder is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// It is asked.
    Full,
    /// It missed a deadline, and is probed.
    Doubted,
    /// It has not answered the probe in time either.
    Silent,
}

const TRUST: [Trust; 3] = [Trust::Full, Trust::Doubted, Trust::Silent];

/// The standing of one peer. Dropped when the peer is gone from the mesh.
pub(super) struct Standing {
    id: String,
    open: AtomicBool,
    /// The stream ended, or could not be opened, and is not open again.
    broken: AtomicBool,
    trust: AtomicU8,
    /// Whether it is said to have its experts, so that a stream to it must open.
    expected: AtomicBool,
    board: Board,
}

impl Standing {
    /// Of a peer that was not tried yet.
    pub(super) fn new(id: &str, board: &Board) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            open: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            trust: AtomicU8::new(Trust::Full as u8),
            expected: AtomicBool::new(false),
            board: board.clone(),
        })
    }

    /// Whether the peer is asked for rows.
    pub(super) fn is_asked(&self) -> bool {
        self.is_open() && self.trust() == Trust::Full
    }

    /// Whether the stream to it is open.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Whether there is no hope of an answer for now: no stream, or no answer to the probe.
    pub(super) fn is_silent(&self) -> bool {
        !self.is_open() || self.trust() == Trust::Silent
    }

    /// Whether it is being probed.
    pub(super) fn is_doubted(&self) -> bool {
        self.trust() != Trust::Full
    }

    fn trust(&self) -> Trust {
        TRUST[usize::from(self.trust.load(Ordering::Acquire)) % TRUST.len()]
    }

    /// The stream to it opened.
    pub(super) fn opened(&self) {
        self.open.store(true, Ordering::Release);
        self.broken.store(false, Ordering::Release);
        self.tell();
    }

    /// The stream to it ended, or did not open.
    pub(super) fn broke(&self) {
        self.open.store(false, Ordering::Release);
        self.broken.store(true, Ordering::Release);
        self.tell();
    }

    /// It missed a deadline.
    pub(super) fn doubt(&self) {
        self.set_trust(Trust::Doubted);
    }

    /// It does not answer the probe. If it was heard meanwhile otherwise, the probe counts for nothing: no other one
    /// would follow, and nobody would ask it again.
    pub(super) fn is_not_heard(&self) {
        let (doubted, silent) = (Trust::Doubted as u8, Trust::Silent as u8);
        if self.trust.compare_exchange(doubted, silent, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.tell();
        }
    }

    /// It answered.
    pub(super) fn is_heard(&self) {
        self.set_trust(Trust::Full);
    }

    /// Whether the mesh says that it has its experts.
    pub(super) fn expect(&self, expected: bool) {
        self.expected.store(expected, Ordering::Release);
        self.set_suspect();
    }

    fn set_trust(&self, trust: Trust) {
        self.trust.store(trust as u8, Ordering::Release);
        self.tell();
    }

    fn tell(&self) {
        self.set_suspect();
        self.board.bump();
    }

    fn set_suspect(&self) {
        let is_wrong = || self.broken.load(Ordering::Acquire) || self.is_doubted();
        self.board.set(&self.id, || self.expected.load(Ordering::Acquire) && is_wrong());
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.board.set(&self.id, || false);
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::metrics::MeterProvider as _;

    use super::*;

    #[test]
    fn suspects_are_peers_that_should_answer_and_do_not() {
        let board = Board::new(Metrics::new(&opentelemetry::metrics::noop::NoopMeterProvider::new().meter("test")));
        let suspects = board.suspects();
        let suspected = || suspects.borrow().iter().cloned().collect::<Vec<String>>();
        let peer = Standing::new("a", &board);
        peer.broke();
        assert!(suspected().is_empty(), "it is still reading its weights");
        peer.expect(true);
        assert_eq!(suspected(), ["a"]);
        peer.opened();
        assert!(suspected().is_empty() && peer.is_asked());
        peer.doubt();
        assert!(suspected() == ["a"] && !peer.is_asked() && !peer.is_silent());
        peer.is_not_heard();
        assert!(suspected() == ["a"] && peer.is_silent());
        peer.is_heard();
        assert!(suspected().is_empty() && peer.is_asked());
        peer.is_not_heard();
        assert!(suspected().is_empty() && peer.is_asked(), "a probe that was given up says so too late");
        peer.broke();
        assert_eq!((suspected(), peer.is_asked()), (vec![String::from("a")], false));
        drop(peer);
        assert!(suspected().is_empty(), "who is gone from the mesh is nobody's suspect");
    }
}
