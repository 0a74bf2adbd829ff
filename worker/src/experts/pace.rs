//! How fast one holder answers, as measured: what its rows are expected to take, and when it is late.

use std::{collections::VecDeque, time::Duration};

use super::split;

/// Replies whose times are remembered.
const WINDOW: usize = 128;
/// Below this many, a holder is given the time of [`START_ROW`] besides.
const FEW: usize = 8;
/// Nobody is late sooner.
pub(super) const LEAST: Duration = Duration::from_millis(50);
/// Longer than this nobody is waited for who may be dead; who is slower than that is asked again.
const MOST: Duration = Duration::from_secs(10);
/// How often the slowest of a hundred replies may be slower still.
const PATIENCE: f64 = 5.0;
/// What a row may take at a holder that we know nothing of: generous, for a first long prompt.
const START_ROW: Duration = Duration::from_millis(20);
/// Rows that take as long as a message without rows, for comparing replies of different sizes.
const ROWS_A_MESSAGE: f64 = 16.0;
/// How much an older reply counts against the next.
const FADE: f64 = 0.97;
/// A holder that we know nothing of: a message, and a row, in seconds.
const GUESS: (f64, f64) = (1e-3, 1e-4);

/// Times of one holder's replies.
#[derive(Debug, Clone, Default)]
pub(super) struct Pace {
    /// Seconds a reply, divided by its [`size`], as they came.
    window: VecDeque<f64>,
    /// The same, ascending: each call asks for its deadline.
    sorted: Vec<f64>,
    line: Line,
}

/// A line of time by rows through the replies, the newest counting most.
#[derive(Debug, Clone, Default)]
struct Line {
    weight: f64,
    rows: f64,
    time: f64,
    rows_rows: f64,
    rows_time: f64,
}

fn size(rows: usize) -> f64 {
    1.0 + rows as f64 / ROWS_A_MESSAGE
}

impl Pace {
    /// Counts a reply to so many rows.
    pub(super) fn answered(&mut self, rows: usize, took: Duration) {
        self.line.add(rows as f64, took.as_secs_f64());
        self.remember(rows, took);
    }

    /// Counts a reply that was not waited for any longer than this: the next may take twice as long.
    pub(super) fn late(&mut self, rows: usize, waited: Duration) {
        self.remember(rows, waited.mul_f64(2.0 / PATIENCE));
    }

    fn remember(&mut self, rows: usize, took: Duration) {
        if self.window.len() >= WINDOW
            && let Some(oldest) = self.window.pop_front()
        {
            self.sorted.remove(self.rank(oldest));
        }
        let time = took.as_secs_f64() / size(rows);
        self.window.push_back(time);
        self.sorted.insert(self.rank(time), time);
    }

    /// How many of the times remembered are less.
    fn rank(&self, time: f64) -> usize {
        self.sorted.partition_point(|other| other.total_cmp(&time).is_lt())
    }

    /// How long a reply to so many rows may take: five times what 99 of 100 took, at least 50 ms, and in the beginning
    /// more for each row.
    pub(super) fn deadline(&self, rows: usize) -> Duration {
        let usual = Duration::from_secs_f64(self.p99() * PATIENCE * size(rows)).min(MOST);
        let start = if self.window.len() < FEW {
            LEAST.saturating_add(START_ROW.saturating_mul(u32::try_from(rows).unwrap_or(u32::MAX)))
        } else {
            LEAST
        };
        usual.max(start)
    }

    /// Of the times remembered, by nearest rank.
    fn p99(&self) -> f64 {
        let rank = (self.sorted.len() * 99).div_ceil(100).max(1) - 1;
        self.sorted.get(rank).copied().unwrap_or_default()
    }

    /// What to expect while so many rows are on their way already.
    pub(super) fn expected(&self, on_their_way: usize) -> split::Holder {
        let (message, row) = self.line.message_and_row();
        split::Holder { start: message + on_their_way as f64 * row, row }
    }
}

impl Line {
    fn add(&mut self, rows: f64, time: f64) {
        for sum in [&mut self.weight, &mut self.rows, &mut self.time, &mut self.rows_rows, &mut self.rows_time] {
            *sum *= FADE;
        }
        self.weight += 1.0;
        self.rows += rows;
        self.time += time;
        self.rows_rows += rows * rows;
        self.rows_time += rows * time;
    }

    /// Seconds of a message without rows, and of each row; both above 0.
    fn message_and_row(&self) -> (f64, f64) {
        if self.weight == 0.0 {
            return GUESS;
        }
        let (rows, time) = (self.rows / self.weight, self.time / self.weight);
        let spread = self.rows_rows / self.weight - rows * rows;
        let slope = (self.rows_time / self.weight - rows * time) / spread;
        // replies of one size only, or of sizes that say nothing: half of their time is the message's
        let row = if spread > 1e-6 * rows * rows && slope > 0.0 { slope } else { time / 2.0 / rows.max(1.0) };
        let row = row.clamp(1e-9, (time / rows.max(1.0)).max(1e-9));
        ((time - row * rows).max(1e-6), row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_holder_that_nobody_knows_gets_fifty_milliseconds_and_time_for_each_row() {
        let pace = Pace::default();
        assert_eq!(pace.deadline(0), ms(50));
        assert_eq!(pace.deadline(8), ms(210));
        assert!(pace.deadline(2000) >= Duration::from_secs(30));
    }

    #[test]
    fn the_deadline_is_five_times_what_99_of_100_take_and_never_under_fifty_milliseconds() {
        let mut pace = Pace::default();
        (0..200).for_each(|_| pace.answered(16, ms(4)));
        assert_eq!(pace.deadline(16), ms(50));
        (0..126).for_each(|_| pace.answered(16, ms(30)));
        assert_eq!(pace.deadline(16), ms(150));
        assert_eq!(pace.deadline(48), ms(300), "twice the size of a message of 16 rows");
        pace.answered(16, ms(1000));
        assert_eq!(pace.deadline(16), ms(150), "one of a hundred is forgiven");
        (0..WINDOW).for_each(|_| pace.answered(16, ms(4)));
        assert_eq!(pace.deadline(16), ms(50), "what was slow long ago is forgotten");
    }

    #[test]
    fn who_is_given_up_too_soon_gets_more_time_the_next_times() {
        let mut pace = Pace::default();
        (0..FEW).for_each(|_| pace.answered(0, ms(2)));
        for _ in 0..4 {
            let waited = pace.deadline(0);
            pace.late(0, waited);
            assert!(pace.deadline(0) >= waited.mul_f64(1.9), "{:?} after {waited:?}", pace.deadline(0));
        }
    }

    #[test]
    fn message_and_row_are_told_apart() {
        let mut pace = Pace::default();
        for rows in [1, 8, 64, 3, 200, 16, 5] {
            pace.answered(rows, Duration::from_micros(500 + 20 * rows as u64));
        }
        let expected = pace.expected(0);
        assert!((expected.row - 20e-6).abs() < 1e-9 && (expected.start - 500e-6).abs() < 1e-7, "{expected:?}");
        assert!((pace.expected(10).start - 700e-6).abs() < 1e-7);
    }

    #[test]
    fn strange_times_never_give_a_holder_without_cost() {
        for times in [[5u64, 5, 5], [9, 3, 1], [0, 0, 0]] {
            let mut pace = Pace::default();
            (1..).zip(times).for_each(|(rows, took)| pace.answered(rows, ms(took)));
            let expected = pace.expected(3);
            assert!(expected.row > 0.0 && expected.start > 0.0 && expected.start.is_finite(), "{expected:?}");
        }
    }
}
