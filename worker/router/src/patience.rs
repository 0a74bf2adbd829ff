//! How long the router waits for what may never come. Pure.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// The least time that a worker has to take a call, however fast others are: one that gives no sign of life is left long
/// before, so this one only has much to do.
const LEAST_HEAD: Duration = Duration::from_secs(5);
/// How many times slower than the slowest of late one may be.
const SLOWER: u64 = 20;
/// Bytes of a body for which a worker gets another millisecond: it parses, renders and tokenizes them first.
const BYTES_PER_MILLISECOND: usize = 256;

/// Bounds that tests draw tighter.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a worker to take a call of a small body, where nothing is known of others.
    pub head: Duration,
    /// Without a piece of a running answer, until another worker gets it although this one is there.
    pub slow: Duration,
    /// For a client to read something of what there is to read.
    pub reader: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { head: Duration::from_secs(10), slow: Duration::from_secs(120), reader: Duration::from_secs(60) }
    }
}

/// How long workers of a model take to take a call: the slowest of late.
#[derive(Debug, Default)]
pub struct Pace {
    /// Microseconds; 0: nothing is known.
    slowest: AtomicU64,
}

impl Pace {
    /// A worker took a call after so long.
    pub fn took(&self, time: Duration) {
        let before = self.slowest.load(Relaxed);
        self.slowest.store((time.as_micros() as u64).max(before - before / 16).max(1), Relaxed);
    }

    /// How long the next one may take.
    pub fn limit(&self, body_bytes: usize, patience: &Patience) -> Duration {
        let usual = match self.slowest.load(Relaxed) {
            0 => patience.head,
            slowest => Duration::from_micros(slowest.saturating_mul(SLOWER)).max(LEAST_HEAD).min(patience.head),
        };
        usual + Duration::from_millis((body_bytes / BYTES_PER_MILLISECOND) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_has_as_long_as_others_needed_of_late_within_bounds() {
        let (pace, patience) = (Pace::default(), Patience::default());
        let limit = || pace.limit(0, &patience);
        assert_eq!(limit(), patience.head, "nothing is known");
        pace.took(Duration::from_millis(400));
        assert_eq!(limit(), Duration::from_secs(8));
        pace.took(Duration::from_secs(9));
        assert_eq!(limit(), patience.head);
        for _ in 0..200 {
            pace.took(Duration::from_millis(1));
        }
        assert_eq!(limit(), LEAST_HEAD, "the slow one is forgotten");
        assert_eq!(pace.limit(4 << 20, &patience), LEAST_HEAD + Duration::from_millis(16_384));
    }
}
