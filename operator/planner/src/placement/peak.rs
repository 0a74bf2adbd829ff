//! How well a load can be split among the copies of its experts: the exact answer, by maximum flow.

use std::cmp::Ordering;
use std::collections::VecDeque;

use super::{LayerPlacement, Placement};

/// The load of the fullest worker of a layer, if the rows of each expert are split as well as can be: `rows` on
/// `workers` of them, which hold all copies of the experts that those rows ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peak {
    /// Rows that no other worker can take.
    pub rows: u64,
    /// How many workers share them; at least 1.
    pub workers: u32,
}

impl Peak {
    /// Mean load over peak load, 1 at best.
    pub fn balance(&self, total: u64, shards: u32) -> f64 {
        if total == 0 {
            return 1.0;
        }
        (total as f64 * f64::from(self.workers)) / (f64::from(shards) * self.rows as f64)
    }
}

impl PartialOrd for Peak {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Peak {
    fn cmp(&self, other: &Self) -> Ordering {
        let cross = |peak: &Peak, by: &Peak| u128::from(peak.rows) * u128::from(by.workers);
        cross(self, other).cmp(&cross(other, self)).then(self.workers.cmp(&other.workers))
    }
}

/// The peak of a layer.
///
/// Newton's method on `max over T of f(T) / |T|`, where `f(T)` are the rows of the experts whose holders all lie in the
/// set of workers `T`: begin with the mean; while a flow with that capacity leaves rows behind, its least cut is a `T`
/// with a larger quotient. Integers only, so it is exact and the same everywhere.
///
/// Rows of experts without holders, or with one beyond `shards`, are left out.
/// Exact while all rows together, times `shards`, are below 2^62; beyond, all are scaled down first.
pub fn peak(loads: &[u64], holders: &[Vec<u32>], shards: u32) -> Peak {
    let total: u128 = loads.iter().map(|rows| u128::from(*rows)).sum();
    let shift = (128 - (total * u128::from(shards.max(1))).leading_zeros()).saturating_sub(62);
    let mut flow = Flow::new(loads.iter().map(|rows| rows >> shift), holders, shards as usize);
    let mut peak = Peak { rows: flow.rows(), workers: shards.max(1) };
    while let Some(tighter) = flow.tighter_than(peak) {
        debug_assert!(tighter > peak, "a cut below the flow is a larger quotient");
        peak = tighter;
    }
    Peak { rows: peak.rows.saturating_mul(1 << shift), ..peak }
}

/// The mean over the layers of [`Peak::balance`]: 1 if every worker can always have the same load. The loads are rows by
/// layer, in the order of the placement's, and expert.
pub fn balance(placement: &Placement, loads: &[Vec<u64>]) -> f64 {
    let of = |(layer, rows): (&LayerPlacement, &Vec<u64>)| {
        peak(rows, &layer.experts, placement.shards)
            .balance(rows.iter().fold(0, |sum: u64, rows| sum.saturating_add(*rows)), placement.shards)
    };
    let all: Vec<f64> = placement.layers.iter().zip(loads).map(of).collect();
    if all.is_empty() { 1.0 } else { all.iter().sum::<f64>() / all.len() as f64 }
}

/// What all layers in a row cost the fullest workers, and would at best, in thousandths of a row.
pub fn peaks(placement: &Placement, loads: &[Vec<u64>]) -> (u128, u128) {
    let (mut peaks, mut best) = (0, 0);
    for (layer, rows) in placement.layers.iter().zip(loads) {
        let peak = peak(rows, &layer.experts, placement.shards);
        peaks += u128::from(peak.rows) * 1000 / u128::from(peak.workers.max(1));
        best += rows.iter().map(|rows| u128::from(*rows)).sum::<u128>() * 1000 / u128::from(placement.shards.max(1));
    }
    (peaks, best)
}

/// By how many percent the fullest worker has more than the mean, over all layers, if the rows are split as well as can
/// be. `None` if no rows were measured.
pub fn skew_percent(placement: &Placement, loads: &[Vec<u64>]) -> Option<u32> {
    let (peaks, best) = peaks(placement, loads);
    (best > 0).then(|| u32::try_from(peaks.saturating_sub(best) * 100 / best).unwrap_or(u32::MAX))
}

/// Rows on their way to workers. An expert with one holder is a fixed load; the others are nodes of a flow.
struct Flow<'a> {
    fixed: Vec<u64>,
    movable: Vec<(u64, &'a [u32])>,
    /// For each worker the movable experts that it holds, and the place of the worker among their holders.
    held: Vec<Vec<(usize, usize)>>,
}

impl<'a> Flow<'a> {
    fn new(loads: impl Iterator<Item = u64>, holders: &'a [Vec<u32>], shards: usize) -> Self {
        let mut flow = Flow { fixed: vec![0; shards], movable: Vec::new(), held: vec![Vec::new(); shards] };
        for (load, holders) in loads.zip(holders).filter(|(load, _)| *load > 0) {
            match holders.as_slice() {
                _ if holders.iter().any(|holder| *holder as usize >= shards) => {}
                [] => {}
                [holder] => flow.fixed[*holder as usize] += load,
                several => {
                    for (place, holder) in several.iter().enumerate() {
                        flow.held[*holder as usize].push((flow.movable.len(), place));
                    }
                    flow.movable.push((load, several));
                }
            }
        }
        flow
    }

    fn rows(&self) -> u64 {
        self.fixed.iter().sum::<u64>() + self.movable.iter().map(|(rows, _)| rows).sum::<u64>()
    }

    /// A set of workers that `at` is too little for, as the peak of that set; `None` if all rows find room.
    fn tighter_than(&mut self, at: Peak) -> Option<Peak> {
        let scale = u64::from(at.workers);
        // room[w] < 0: more than its part already.
        let room: Vec<i64> = self.fixed.iter().map(|fixed| at.rows as i64 - (fixed * scale) as i64).collect();
        if let Some(worst) = (0..room.len()).filter(|worker| room[*worker] < 0).max_by_key(|worker| self.fixed[*worker])
        {
            return Some(Peak { rows: self.fixed[worst], workers: 1 });
        }
        let (mut room, mut sent) = (room, Vec::with_capacity(self.movable.len()));
        let mut left: Vec<i64> = Vec::with_capacity(self.movable.len());
        for (load, holders) in &self.movable {
            let mut rest = (load * scale) as i64;
            let mut given = vec![0_i64; holders.len()];
            for (place, holder) in holders.iter().enumerate() {
                let part = rest.min(room[*holder as usize]);
                given[place] = part;
                room[*holder as usize] -= part;
                rest -= part;
            }
            sent.push(given);
            left.push(rest);
        }
        for expert in 0..self.movable.len() {
            while left[expert] > 0 {
                if let Some(reached) = self.augment(expert, &mut left, &mut room, &mut sent) {
                    return Some(self.peak_of(&reached));
                }
            }
        }
        None
    }

    /// Sends what is left of an expert along a shortest path to a worker with room; if there is none, the workers that
    /// were reached.
    fn augment(&self, expert: usize, left: &mut [i64], room: &mut [i64], sent: &mut [Vec<i64>]) -> Option<Vec<bool>> {
        let mut reached = vec![false; room.len()];
        let mut seen = vec![false; self.movable.len()];
        // How each worker was reached: the expert, and the place of the worker it comes from (none for the first).
        let mut came: Vec<(usize, usize, Option<usize>)> = vec![(0, 0, None); room.len()];
        let mut queue = VecDeque::new();
        let visit = |by: usize,
                     from: Option<usize>,
                     reached: &mut Vec<bool>,
                     queue: &mut VecDeque<usize>,
                     came: &mut Vec<(usize, usize, Option<usize>)>| {
            for (place, holder) in self.movable[by].1.iter().enumerate() {
                let worker = *holder as usize;
                if !reached[worker] {
                    reached[worker] = true;
                    came[worker] = (by, place, from);
                    queue.push_back(worker);
                }
            }
        };
        seen[expert] = true;
        visit(expert, None, &mut reached, &mut queue, &mut came);
        while let Some(worker) = queue.pop_front() {
            if room[worker] > 0 {
                self.send(expert, worker, &came, left, room, sent);
                return None;
            }
            for (other, place) in &self.held[worker] {
                if !seen[*other] && sent[*other][*place] > 0 {
                    seen[*other] = true;
                    visit(*other, Some(*place), &mut reached, &mut queue, &mut came);
                }
            }
        }
        Some(reached)
    }

    fn send(
        &self,
        expert: usize,
        end: usize,
        came: &[(usize, usize, Option<usize>)],
        left: &mut [i64],
        room: &mut [i64],
        sent: &mut [Vec<i64>],
    ) {
        let mut amount = left[expert].min(room[end]);
        let mut worker = end;
        while let (by, _, Some(from)) = came[worker] {
            amount = amount.min(sent[by][from]);
            worker = self.movable[by].1[from] as usize;
        }
        let mut worker = end;
        loop {
            let (by, place, from) = came[worker];
            sent[by][place] += amount;
            let Some(from) = from else { break };
            sent[by][from] -= amount;
            worker = self.movable[by].1[from] as usize;
        }
        left[expert] -= amount;
        room[end] -= amount;
    }

    fn peak_of(&self, workers: &[bool]) -> Peak {
        let fixed: u64 = self.fixed.iter().zip(workers).filter(|(_, is_in)| **is_in).map(|(rows, _)| rows).sum();
        let inside = |holders: &[u32]| holders.iter().all(|holder| workers[*holder as usize]);
        let movable: u64 = self.movable.iter().filter(|(_, holders)| inside(holders)).map(|(rows, _)| rows).sum();
        Peak { rows: fixed + movable, workers: workers.iter().filter(|is_in| **is_in).count() as u32 }
    }
}
