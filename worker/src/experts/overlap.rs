//! Whether a step goes in two halves, so that one computes while rows of the other travel.
//!
//! Each half reads the weights anew and sends messages of its own, so it pays only where steps wait long, as for
//! holders on other machines, and not even there always. Nobody can tell beforehand: both ways are timed, for steps of
//! like size, and the faster one is taken. The bits are the same.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

/// Steps of each way that are remembered, and needed to judge it.
const WINDOW: usize = 9;
/// The way that is not taken is tried once in so many steps, as things change.
const TRY_EVERY: u32 = 64;
/// Halves are not tried where whole steps wait for less than this part of their time: only waiting can go away.
const WORTH_A_TRY: f64 = 0.1;
/// Halves must take less than this part of the time, since they cost the holders more.
const WORTH_IT: f64 = 0.95;

/// Which way a step goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Whole,
    Halves,
}

/// How long steps took.
#[derive(Debug, Default)]
pub(super) struct Overlap {
    /// By [`class`].
    sizes: BTreeMap<usize, Size>,
}

/// Steps whose rows have the same first three binary digits are of like size: a fixed part of their time, the weights
/// and the way, would else make the larger ones look faster, row for row.
fn class(rows: usize) -> usize {
    let digits = rows.max(1).ilog2().saturating_sub(2);
    rows >> digits << digits
}

#[derive(Debug, Default)]
struct Size {
    /// Seconds a row.
    whole: Window,
    halves: Window,
    /// Of whole steps: which part of their time they waited.
    waiting: Window,
    steps: u32,
}

impl Overlap {
    /// Which way a step of so many rows goes.
    pub(super) fn way(&mut self, rows: usize) -> Way {
        let size = self.sizes.entry(class(rows)).or_default();
        size.steps = size.steps.wrapping_add(1);
        size.way()
    }

    /// Counts a step that went this way: what it took, and how much of that it waited.
    pub(super) fn took(&mut self, rows: usize, way: Way, took: Duration, waited: Duration) {
        let size = self.sizes.entry(class(rows)).or_default();
        let seconds = took.as_secs_f64().max(1e-9);
        let times = match way {
            Way::Whole => &mut size.whole,
            Way::Halves => &mut size.halves,
        };
        times.add(seconds / rows.max(1) as f64);
        if way == Way::Whole {
            size.waiting.add(waited.as_secs_f64() / seconds);
        }
    }
}

impl Size {
    fn way(&self) -> Way {
        let Some(whole) = self.whole.middle() else { return Way::Whole };
        let is_worth_a_try = self.waiting.middle().is_some_and(|waiting| waiting >= WORTH_A_TRY);
        let (better, other) = match self.halves.middle() {
            None if is_worth_a_try => return Way::Halves,
            Some(halves) if halves < WORTH_IT * whole => (Way::Halves, Way::Whole),
            Some(_) if is_worth_a_try => (Way::Whole, Way::Halves),
            _ => return Way::Whole,
        };
        if self.steps.is_multiple_of(TRY_EVERY) { other } else { better }
    }
}

/// The last few of some values.
#[derive(Debug, Default)]
struct Window(VecDeque<f64>);

impl Window {
    fn add(&mut self, value: f64) {
        if self.0.len() >= WINDOW {
            self.0.pop_front();
        }
        self.0.push_back(value);
    }

    /// Their median, which a step that a fault held up does not move; `None` while there are too few.
    fn middle(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.0.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        (sorted.len() >= WINDOW).then(|| sorted[WINDOW / 2])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs steps, each of which takes what `took` says: how many went in halves.
    fn steps(overlap: &mut Overlap, number: usize, rows: usize, took: impl Fn(Way) -> (u64, u64)) -> usize {
        let mut halves = 0;
        for _ in 0..number {
            let way = overlap.way(rows);
            let (took, waited) = took(way);
            overlap.took(rows, way, Duration::from_micros(took), Duration::from_micros(waited));
            halves += usize::from(way == Way::Halves);
        }
        halves
    }

    #[test]
    fn steps_that_hardly_wait_go_whole() {
        assert_eq!(steps(&mut Overlap::default(), 1000, 8, |_| (1000, 90)), 0);
    }

    #[test]
    fn the_faster_way_is_taken_and_the_other_tried_now_and_then() {
        let halves = |halves| {
            steps(&mut Overlap::default(), 1000, 8, |way| (if way == Way::Whole { 1000 } else { halves }, 500))
        };
        assert!((970..=991).contains(&halves(700)), "{}", halves(700));
        assert!((9..=30).contains(&halves(1400)), "{}", halves(1400));
        assert!((9..=30).contains(&halves(960)), "as good is not better: {}", halves(960));
    }

    #[test]
    fn what_changes_is_noticed() {
        let mut overlap = Overlap::default();
        let far = |way| (if way == Way::Whole { 1000 } else { 700 }, 500);
        let near = |way| (if way == Way::Whole { 500 } else { 700 }, 0);
        assert!(steps(&mut overlap, 200, 8, far) > 150);
        steps(&mut overlap, 700, 8, near);
        assert_eq!(steps(&mut overlap, 200, 8, near), 0);
        assert!(steps(&mut overlap, 1000, 8, far) > 900);
    }

    #[test]
    fn few_steps_that_a_fault_held_up_change_nothing() {
        let mut overlap = Overlap::default();
        let far = |way| (if way == Way::Whole { 1000 } else { 700 }, 500);
        steps(&mut overlap, 100, 8, far);
        for _ in 0..WINDOW / 2 {
            overlap.took(8, Way::Halves, Duration::from_secs(1), Duration::from_secs(1));
        }
        assert!(steps(&mut overlap, 60, 8, far) >= 59);
    }

    #[test]
    fn each_size_has_its_own_way() {
        let mut overlap = Overlap::default();
        let took = |few: bool| move |way| (if (way == Way::Halves) == few { 700 } else { 1000 }, 500);
        steps(&mut overlap, 100, 64, took(true));
        assert!(
            steps(&mut overlap, 100, 127, took(false)) <= 11,
            "halves that pay for half as many rows are forgotten"
        );
        assert_eq!(steps(&mut overlap, 27, 72, took(true)), 27);
        assert_eq!(steps(&mut overlap, 27, 120, took(false)), 0);
    }

    #[test]
    fn sizes_are_like_where_a_row_more_changes_little() {
        assert_eq!([0, 1, 2, 3, 7, 8, 9, 10].map(class), [0, 1, 2, 3, 7, 8, 8, 10]);
        assert_eq!([64, 79, 80, 127, 1000].map(class), [64, 64, 80, 112, 896]);
    }
}
