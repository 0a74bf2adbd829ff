//! The table of the benchmark.

use std::{collections::BTreeMap, time::Duration};

use crate::{Hit, Kind};

/// What was measured, by kind.
#[derive(Default)]
pub(crate) struct Rows(BTreeMap<Kind, Row>);

#[derive(Default)]
struct Row {
    faults: usize,
    hits: Vec<Hit>,
}

impl Rows {
    /// What one fault did.
    pub(crate) fn add(&mut self, kind: Kind, hits: Vec<Hit>) {
        let row = self.0.entry(kind).or_default();
        row.faults += 1;
        row.hits.extend(hits);
    }

    /// Whether no fault changed an answer.
    pub(crate) fn are_same(&self) -> bool {
        self.0.values().flat_map(|row| &row.hits).all(|hit| hit.is_same)
    }

    pub(crate) fn print(&self) {
        println!(
            "{:6} {:24} {:>6} {:>7} {:>8} {:>8} {:>8} {:>16} {:>12}",
            "copies", "worker", "faults", "streams", "p50 ms", "p99 ms", "max ms", "p99 ms from back", "same answers"
        );
        for kind in Kind::ALL {
            let Some(row) = self.0.get(&kind) else { continue };
            let stalls: Vec<Duration> = row.hits.iter().map(|hit| hit.stall).collect();
            let after: Vec<Duration> = row.hits.iter().filter_map(|hit| hit.after_back).collect();
            let same = row.hits.iter().filter(|hit| hit.is_same).count();
            println!(
                "{:<6} {kind:24} {:>6} {:>7} {:>8} {:>8} {:>8} {:>16} {:>12}",
                kind.copies,
                row.faults,
                row.hits.len(),
                of_100(&stalls, 50),
                of_100(&stalls, 99),
                of_100(&stalls, 100),
                if kind.copies == 0 { of_100(&after, 99) } else { "-".to_owned() },
                format!("{same} of {}", row.hits.len()),
            );
        }
    }
}

/// Milliseconds that so many of a hundred keep to, by nearest rank.
fn of_100(times: &[Duration], many: usize) -> String {
    let mut times = times.to_vec();
    times.sort();
    let rank = (times.len() * many).div_ceil(100).max(1);
    times.get(rank - 1).map_or_else(|| "-".to_owned(), |time| format!("{:.0}", time.as_secs_f64() * 1000.0))
}
