//! How long to wait before an object that failed is tried again.
//!
//! kube tells its error policy no attempt count, so the attempts of each object are kept here and forgotten on success.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// The longest pause.
pub const CAP: Duration = Duration::from_secs(300);
const FIRST: Duration = Duration::from_millis(500);

/// The pause before attempt `attempt` (from 0): it doubles up to [`CAP`], less up to a half of it by `draw`.
///
/// `draw` is uniform over all of `u64`; half the pause is fixed, so that a storm spreads but never hurries.
pub fn pause(attempt: u32, draw: u64) -> Duration {
    let whole = FIRST.saturating_mul(2_u32.saturating_pow(attempt)).min(CAP);
    let half = whole / 2;
    half + half.mul_f64(draw as f64 / u64::MAX as f64)
}

/// Attempts since the last success, by object, and what failed in them.
#[derive(Debug)]
pub struct Backoff<K> {
    attempts: Mutex<HashMap<K, (String, u32)>>,
}

impl<K> Default for Backoff<K> {
    fn default() -> Self {
        Self { attempts: Mutex::default() }
    }
}

impl<K: Eq + Hash> Backoff<K> {
    /// Counts a failure of `what` and says how long to wait.
    ///
    /// An object that fails elsewhere than before has come further, so its count begins anew: an API server that
    /// refuses a call now and then must not make the whole wait as long as all of its steps would.
    pub fn failed(&self, key: K, what: &str) -> Duration {
        let mut attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, attempt) = attempts.entry(key).or_default();
        if before != what {
            (*before, *attempt) = (what.to_owned(), 0);
        }
        let pause = pause(*attempt, draw());
        *attempt = attempt.saturating_add(1);
        pause
    }

    /// Forgets the failures of an object.
    pub fn succeeded(&self, key: &K) {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

/// A random number that needs no crate: the seed of a fresh hash map.
pub(crate) fn draw() -> u64 {
    RandomState::new().hash_one(0_u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_the_cap_and_keep_half_of_themselves() {
        assert_eq!(pause(0, u64::MAX), FIRST);
        assert_eq!(pause(0, 0), FIRST / 2);
        assert_eq!(pause(3, u64::MAX), FIRST * 8);
        assert_eq!(pause(40, u64::MAX), CAP);
        assert_eq!(pause(u32::MAX, 0), CAP / 2);
    }

    #[test]
    fn success_forgets_and_objects_do_not_share() {
        let backoff = Backoff::default();
        for _ in 0..12 {
            backoff.failed("a", "write");
        }
        assert!(backoff.failed("a", "write") >= CAP / 2);
        assert!(backoff.failed("b", "write") <= FIRST);
        backoff.succeeded(&"a");
        assert!(backoff.failed("a", "write") <= FIRST);
    }

    #[test]
    fn an_object_that_came_further_does_not_wait_for_its_earlier_failures() {
        let backoff = Backoff::default();
        for _ in 0..12 {
            backoff.failed("a", "first");
        }
        assert!(backoff.failed("a", "second") <= FIRST);
        assert!(backoff.failed("a", "second") > FIRST / 2);
    }
}
