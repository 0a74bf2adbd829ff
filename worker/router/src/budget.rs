//! How many retries a model may still make: a failing worker must not turn each request into many. Pure.

use std::time::Duration;

/// Thousandths of a retry that each request earns: retries are a tenth of the requests.
const PER_REQUEST: u64 = 100;
/// Thousandths of a retry that each millisecond earns, so that a model with few requests has retries too.
const PER_MILLISECOND: u64 = 10;
/// Thousandths of a retry that are kept: what a window of ten seconds earns without any request.
const MOST: u64 = 10_000 * PER_MILLISECOND;

/// The retries of one model.
#[derive(Debug)]
pub struct Budget {
    left: u64,
    at: Duration,
}

impl Default for Budget {
    fn default() -> Self {
        Self { left: MOST, at: Duration::ZERO }
    }
}

impl Budget {
    /// A request came.
    pub fn earn(&mut self) {
        self.left = (self.left + PER_REQUEST).min(MOST);
    }

    /// Takes one retry, if there is one.
    pub fn take(&mut self, now: Duration) -> bool {
        let passed = now.saturating_sub(self.at).as_millis() as u64;
        self.at = self.at.max(now);
        self.left = self.left.saturating_add(passed.saturating_mul(PER_MILLISECOND)).min(MOST);
        match self.left.checked_sub(1000) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_a_storm_retries_are_a_tenth_of_the_requests_and_ten_a_second() {
        let mut budget = Budget::default();
        let mut retries = 0;
        for millisecond in 0..60_000 {
            budget.earn();
            while budget.take(Duration::from_millis(millisecond)) {
                retries += 1;
            }
        }
        let (tenth, per_second, at_first) = (6000, 600, 100);
        assert!((6500..=tenth + per_second + at_first).contains(&retries), "{retries}");
    }

    #[test]
    fn what_was_not_used_is_kept_for_a_window_only() {
        let mut budget = Budget::default();
        let burst = |budget: &mut Budget, now| (0..1000).filter(|_| budget.take(now)).count();
        assert_eq!(burst(&mut budget, Duration::ZERO), 100);
        assert_eq!(burst(&mut budget, Duration::from_secs(1)), 10);
        assert_eq!(burst(&mut budget, Duration::from_secs(3600)), 100);
    }
}
