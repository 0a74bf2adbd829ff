//! Copies for hot experts and an even load, from measured rows. Per layer: count, keep, fill, level, improve; the phases
//! are those of `README.md`. Integers only, so that the answer is the same everywhere.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::copies::{Domains, Holders};

mod fill;
mod level;

/// A copy changes its expert only if it is worth more to the new one than this many eighths of its worth to the old one.
const HOTTER_EIGHTHS: u128 = 10;
/// The load is level if no worker has more than the mean and this part of it.
const LEVEL: u64 = 128;

/// What is to be placed in a layer.
pub(super) struct Task<'a> {
    /// Rows of each expert.
    pub rows: &'a [u64],
    /// Copies that each worker may hold.
    pub slots: &'a [u32],
    /// Copies that each expert must have, in as many domains.
    pub copies: usize,
    pub domains: &'a Domains,
}

impl Task<'_> {
    /// The holders of each expert, near those of `before`. `None` if a copy that must be found no slot this way.
    ///
    /// What fits, is full and level stays as it is; what fits changes only for more copies or a lower peak, so planning
    /// again and again comes to rest.
    pub(super) fn place(&self, before: Holders) -> Option<Holders> {
        let counts = self.counts(&before);
        let mut old = Split::new(self, before);
        let fits = old.fits();
        if fits {
            old.level();
            if old.is_full() && old.peak() <= old.level_mark() {
                return Some(old.holders);
            }
        }
        let mut new = Split::new(self, old.holders.clone());
        new.keep(&counts);
        if new.fill(&counts).is_none() {
            return fits.then_some(old.holders);
        }
        new.level();
        new.improve();
        new.holders.iter_mut().for_each(|holders| holders.sort_unstable());
        if !fits {
            return Some(new.holders);
        }
        // judged from the same start as the old one
        let mut new = Split::new(self, new.holders);
        new.level();
        let is_lower = new.peak() + new.mean() / LEVEL < old.peak();
        let has_more = new.copies() > old.copies() && new.peak() <= old.peak();
        Some(if is_lower || has_more { new } else { old }.holders)
    }

    /// How many copies each expert gets: all slots are used, where a copy is worth most. A copy that is there changes its
    /// expert only for one to which it is worth clearly more.
    fn counts(&self, before: &Holders) -> Vec<usize> {
        let slots: usize = self.slots.iter().map(|slots| *slots as usize).sum();
        let of = |(holders, rows): (&Vec<u32>, &u64)| {
            if *rows > 0 { holders.len().max(self.copies) } else { self.copies }
        };
        let mut counts: Vec<usize> = before.iter().zip(self.rows).map(of).collect();
        let mut used: usize = counts.iter().sum();
        let mut idlest: BinaryHeap<Reverse<(u64, usize)>> =
            (0..counts.len()).filter_map(|e| self.spared(&counts, e)).map(Reverse).collect();
        while used > slots
            && let Some(Reverse((_, expert))) = idlest.pop()
        {
            counts[expert] -= 1;
            used -= 1;
            idlest.extend(self.spared(&counts, expert).map(Reverse));
        }
        let mut busiest: BinaryHeap<(u64, Reverse<usize>)> =
            (0..counts.len()).filter_map(|e| self.busy(&counts, e)).collect();
        while let Some((busy, Reverse(expert))) = busiest.pop() {
            if used == slots {
                let Some(Reverse((spared, from))) = idlest.pop() else { break };
                if u128::from(busy) * 8 <= u128::from(spared) * HOTTER_EIGHTHS || from == expert {
                    break;
                }
                counts[from] -= 1;
                used -= 1;
                idlest.extend(self.spared(&counts, from).map(Reverse));
            }
            counts[expert] += 1;
            used += 1;
            busiest.extend(self.busy(&counts, expert));
        }
        counts
    }

    /// What the last copy is worth to an expert, if it can spare it.
    fn spared(&self, counts: &[usize], expert: usize) -> Option<(u64, usize)> {
        let count = counts[expert];
        (count > self.copies).then(|| (self.worth(expert, count - 1), expert))
    }

    /// What another copy is worth to an expert, if it would help.
    fn busy(&self, counts: &[usize], expert: usize) -> Option<(u64, Reverse<usize>)> {
        let is_able = self.rows[expert] > 0 && counts[expert] < self.slots.len();
        is_able.then(|| (self.worth(expert, counts[expert]), Reverse(expert)))
    }

    /// What a copy is worth to an expert that has `count` others: the rows of each. An eighth less if one of them is extra
    /// already: two experts with an extra copy each let more load flow than one with two.
    fn worth(&self, expert: usize, count: usize) -> u64 {
        let rows = self.rows[expert] / count as u64;
        if count > self.copies { rows - rows / 8 } else { rows }
    }
}

/// A layer on its way: who holds what, and how the rows are split.
struct Split<'a> {
    task: &'a Task<'a>,
    holders: Holders,
    /// Rows of an expert on each of its holders, in their order; empty where it has one.
    parts: Vec<Vec<u64>>,
    held: Vec<Vec<usize>>,
    load: Vec<u64>,
}

impl<'a> Split<'a> {
    fn new(task: &'a Task<'a>, holders: Holders) -> Self {
        let workers = task.slots.len();
        let mut held = vec![Vec::new(); workers];
        for (expert, of_expert) in holders.iter().enumerate() {
            for holder in of_expert {
                held[*holder as usize].push(expert);
            }
        }
        let parts = vec![Vec::new(); holders.len()];
        let mut split = Split { task, holders, parts, held, load: vec![0; workers] };
        for expert in 0..split.holders.len() {
            split.part_evenly(expert);
        }
        split
    }

    /// Whether no worker has more copies than slots, and every expert is in as many domains as it must.
    fn fits(&self) -> bool {
        self.held.iter().zip(self.task.slots).all(|(held, slots)| held.len() as u32 <= *slots)
            && (0..self.holders.len()).all(|expert| self.domains_without(expert, u32::MAX) >= self.task.copies)
    }

    /// Whether no expert with rows could have another copy.
    fn is_full(&self) -> bool {
        let slots: usize = self.task.slots.iter().map(|slots| *slots as usize).sum();
        let wanted = self.task.rows.iter().filter(|rows| **rows > 0).count() * self.held.len();
        self.copies() >= slots.min(wanted)
    }

    fn copies(&self) -> usize {
        self.held.iter().map(Vec::len).sum()
    }

    /// Rows of an expert on one of its holders.
    fn part(&self, expert: usize, worker: usize) -> u64 {
        if self.holders[expert].len() == 1 {
            return self.task.rows[expert];
        }
        let place = self.holders[expert].iter().position(|holder| *holder as usize == worker);
        place.map_or(0, |place| self.parts[expert][place])
    }

    /// Whether a copy may go from one worker to another.
    fn can_replace(&self, expert: usize, from: usize, to: usize) -> bool {
        let holders = &self.holders[expert];
        if holders.contains(&(to as u32)) {
            return false;
        }
        let of = &self.task.domains.of;
        let rest = self.domains_without(expert, from as u32);
        let is_new = holders.iter().all(|h| *h as usize == from || of[*h as usize] != of[to]);
        rest + usize::from(is_new) >= self.task.copies.min(holders.len())
    }

    /// Whether a worker may get a copy of an expert that lacks `left`: enough must be left for the domains it lacks.
    fn can_add(&self, expert: usize, worker: u32, left: usize) -> bool {
        let (holders, of) = (&self.holders[expert], &self.task.domains.of);
        if holders.contains(&worker) {
            return false;
        }
        let is_new = holders.iter().all(|holder| of[*holder as usize] != of[worker as usize]);
        is_new || self.domains_without(expert, worker) + left > self.task.copies
    }

    /// In how many domains the holders of an expert are, but for one of them.
    fn domains_without(&self, expert: usize, gone: u32) -> usize {
        let (holders, of) = (&self.holders[expert], &self.task.domains.of);
        let rest = holders.iter().enumerate().filter(|(_, holder)| **holder != gone);
        let is_first = |(place, holder): &(usize, &u32)| {
            holders[..*place].iter().all(|h| *h == gone || of[*h as usize] != of[**holder as usize])
        };
        rest.filter(is_first).count()
    }

    fn drop_copy(&mut self, expert: usize, holder: u32) {
        self.take_rows(expert);
        self.holders[expert].retain(|other| *other != holder);
        self.held[holder as usize].retain(|other| *other != expert);
        self.part_evenly(expert);
    }

    fn add_copy(&mut self, expert: usize, holder: u32) {
        self.take_rows(expert);
        self.holders[expert].push(holder);
        self.held[holder as usize].push(expert);
        self.part_evenly(expert);
    }

    fn take_rows(&mut self, expert: usize) {
        if let [only] = self.holders[expert][..] {
            self.load[only as usize] -= self.task.rows[expert];
        }
        for (holder, part) in self.holders[expert].iter().zip(&self.parts[expert]) {
            self.load[*holder as usize] -= part;
        }
    }

    /// Gives each holder the same; those that come first one row more, if it does not come out even.
    fn part_evenly(&mut self, expert: usize) {
        let rows = self.task.rows[expert];
        self.parts[expert].clear();
        if let [only] = self.holders[expert][..] {
            self.load[only as usize] += rows;
            return;
        }
        let count = self.holders[expert].len() as u64;
        for (place, holder) in (0..).zip(&self.holders[expert]) {
            let part = rows / count + u64::from(place < rows % count);
            self.load[*holder as usize] += part;
            self.parts[expert].push(part);
        }
    }

    fn peak(&self) -> u64 {
        self.load.iter().max().copied().unwrap_or_default()
    }

    /// Below it the load counts as level.
    fn level_mark(&self) -> u64 {
        self.mean() + self.mean() / LEVEL
    }

    /// The sum of the squares of the loads: less means nearer to each other.
    fn squares(&self) -> u128 {
        self.load.iter().map(|load| u128::from(*load) * u128::from(*load)).sum()
    }

    fn mean(&self) -> u64 {
        self.load.iter().sum::<u64>() / self.load.len().max(1) as u64
    }
}
