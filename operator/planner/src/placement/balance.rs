//! Copies for hot experts and an even load, from measured rows. Per layer: count, keep, fill, level, improve; the phases
//! are those of `README.md`. Integers only, so that the answer is the same everywhere.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::copies::{Domains, Holders};

/// A copy changes its expert only if the new one's copies are busier than this many eighths of the old one's.
const HOTTER_EIGHTHS: u128 = 10;
/// The load is level if no worker has more than the mean and this part of it.
const LEVEL: u64 = 128;
/// How often all splits are levelled, one after the other, before the loads are looked at.
const SWEEPS: usize = 6;
/// Exchanges of copies in a layer at most, and with how many idle workers each is tried.
const EXCHANGES: usize = 96;
const TRIES: usize = 4;

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
    /// What is complete and level stays as it is, and what is complete changes only for a lower peak.
    pub(super) fn place(&self, before: Holders) -> Option<Holders> {
        let counts = self.counts(&before);
        let mut old = Split::new(self, before);
        let is_complete = old.is_complete();
        if is_complete {
            old.level(SWEEPS);
            if old.peak() <= old.level_mark() {
                return Some(old.holders);
            }
        }
        let mut new = Split::new(self, old.holders.clone());
        new.keep(&counts);
        new.fill(&counts)?;
        new.level(SWEEPS);
        new.improve();
        new.holders.iter_mut().for_each(|holders| holders.sort_unstable());
        if is_complete {
            let mut placed = Split::new(self, new.holders);
            placed.level(SWEEPS);
            return Some(if placed.peak() + placed.mean() / LEVEL < old.peak() { placed } else { old }.holders);
        }
        Some(new.holders)
    }

    /// How many copies each expert gets: all slots are used, for the experts whose copies would be busiest. A copy that
    /// is there changes its expert only for a clearly busier one.
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

    /// Rows of each copy if the expert had one less than it has, if it can.
    fn spared(&self, counts: &[usize], expert: usize) -> Option<(u64, usize)> {
        let count = counts[expert];
        (count > self.copies).then(|| (self.rows[expert] / (count as u64 - 1), expert))
    }

    /// Rows of each copy now, if another one would help.
    fn busy(&self, counts: &[usize], expert: usize) -> Option<(u64, Reverse<usize>)> {
        let rows = self.rows[expert];
        (rows > 0 && counts[expert] < self.slots.len())
            .then(|| (rows.checked_div(counts[expert] as u64).unwrap_or(rows), Reverse(expert)))
    }
}

/// A layer on its way: who holds what, and how the rows are split.
struct Split<'a> {
    task: &'a Task<'a>,
    holders: Holders,
    /// Rows of an expert on each of its holders, in their order.
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
        let parts = holders.iter().map(|of_expert| vec![0; of_expert.len()]).collect();
        let mut split = Split { task, holders, parts, held, load: vec![0; workers] };
        for expert in 0..split.holders.len() {
            split.part_evenly(expert);
        }
        split
    }

    /// Takes copies away: those beyond an expert's count from its fullest holder, and what a worker has no slot for, the
    /// idlest first.
    fn keep(&mut self, counts: &[usize]) {
        for (expert, count) in counts.iter().enumerate() {
            while self.holders[expert].len() > *count {
                let spare = |holder: &&u32| self.domains_without(expert, **holder) >= self.task.copies;
                let rank = |holder: &&u32| {
                    let worker = **holder as usize;
                    (self.held[worker].len() as u32 > self.task.slots[worker], self.load[worker], **holder)
                };
                let Some(gone) = self.holders[expert].iter().filter(spare).max_by_key(rank).copied() else { break };
                self.drop_copy(expert, gone);
            }
        }
        for worker in 0..self.held.len() {
            while self.held[worker].len() as u32 > self.task.slots[worker] {
                let idlest =
                    self.held[worker].iter().copied().min_by_key(|expert| (self.task.rows[*expert], Reverse(*expert)));
                self.drop_copy(idlest.expect("it holds more than its slots"), worker as u32);
            }
        }
    }

    /// Gives the experts the copies that they lack. Those with extra copies first, to workers that no split connects
    /// yet, so that load can flow from any worker to any other; then the busiest, to the idlest worker.
    fn fill(&mut self, counts: &[usize]) -> Option<()> {
        let mut connected = Components::new(self.held.len());
        for holders in &self.holders {
            connected.join(holders);
        }
        let mut order: Vec<usize> = (0..counts.len()).filter(|e| self.holders[*e].len() < counts[*e]).collect();
        order.sort_unstable_by_key(|e| (counts[*e] == self.task.copies, Reverse(self.task.rows[*e]), *e));
        for expert in order {
            while self.holders[expert].len() < counts[expert] {
                let left = counts[expert] - self.holders[expert].len();
                let is_hot = counts[expert] > self.task.copies;
                let own: Vec<usize> = self.holders[expert].iter().map(|holder| connected.root(*holder)).collect();
                let mut best = None;
                for worker in 0..self.held.len() {
                    let held = self.held[worker].len();
                    if held as u32 >= self.task.slots[worker] || !self.can_add(expert, worker as u32, left) {
                        continue;
                    }
                    let joins = !is_hot || own.contains(&connected.root(worker as u32));
                    let rank = (joins, if is_hot { held } else { 0 }, self.load[worker], worker);
                    if best.is_none_or(|best| rank < best) {
                        best = Some(rank);
                    }
                }
                match best {
                    Some((_, _, _, worker)) => self.add_copy(expert, worker as u32),
                    None if self.holders[expert].len() >= self.task.copies => break,
                    None => return None,
                }
                connected.join(&self.holders[expert]);
            }
        }
        Some(())
    }

    /// Splits the rows of each expert with several copies so that its holders come out level, as far as they can.
    fn level(&mut self, sweeps: usize) {
        for _ in 0..sweeps {
            let mut moved = 0;
            for expert in 0..self.holders.len() {
                if self.holders[expert].len() > 1 {
                    moved += self.level_one(expert);
                }
            }
            if moved <= self.mean() / LEVEL {
                return;
            }
        }
    }

    /// Fills the holders of an expert like connected vessels; returns the rows that changed their holder.
    fn level_one(&mut self, expert: usize) -> u64 {
        let (holders, parts) = (&self.holders[expert], &mut self.parts[expert]);
        let mut others: Vec<(u64, usize)> = Vec::with_capacity(holders.len());
        for (place, holder) in holders.iter().enumerate() {
            others.push((self.load[*holder as usize] - parts[place], place));
        }
        others.sort_unstable();
        let (mut below, mut wet) = (0, 0);
        let rows = self.task.rows[expert];
        while wet < others.len() && others[wet].0 * wet as u64 <= below + rows {
            below += others[wet].0;
            wet += 1;
        }
        let (water, mut rest) = ((below + rows) / wet as u64, (below + rows) % wet as u64);
        let mut moved = 0;
        for (rank, (other, place)) in others.iter().enumerate() {
            let odd = u64::from(rest > 0 && rank < wet);
            rest -= odd;
            let part = if rank < wet { water + odd - other } else { 0 };
            moved += part.saturating_sub(parts[*place]);
            let load = &mut self.load[holders[*place] as usize];
            *load = *load - parts[*place] + part;
            parts[*place] = part;
        }
        moved
    }

    /// Whether every worker has copies in all its slots and no more, and every expert in as many domains as it must.
    fn is_complete(&self) -> bool {
        let wanted = (0..self.holders.len()).filter(|expert| self.task.rows[*expert] > 0).count() * self.held.len();
        let slots: usize = self.task.slots.iter().map(|slots| *slots as usize).sum();
        let held: usize = self.held.iter().map(Vec::len).sum();
        held >= slots.min(wanted)
            && self.held.iter().zip(self.task.slots).all(|(held, slots)| held.len() as u32 <= *slots)
            && (0..self.holders.len()).all(|expert| self.domains_without(expert, u32::MAX) >= self.task.copies)
    }

    /// Moves a copy from the fullest worker to an idle one, or exchanges two, while that brings the loads nearer to each
    /// other and they are not level.
    fn improve(&mut self) {
        for _ in 0..EXCHANGES {
            if self.peak() <= self.level_mark() || !self.improve_once() {
                return;
            }
        }
    }

    fn improve_once(&mut self) -> bool {
        let squares = self.squares();
        let mut idle: Vec<usize> = (0..self.load.len()).collect();
        idle.sort_unstable_by_key(|worker| (self.load[*worker], *worker));
        let Some(from) = idle.pop() else { return false };
        for to in idle.into_iter().take(TRIES) {
            let Some(exchange) = self.best_exchange(from, to) else { continue };
            self.apply(exchange);
            self.level(SWEEPS);
            if self.squares() < squares {
                return true;
            }
            self.apply(Exchange { from: exchange.to, to: exchange.from, ..exchange });
            self.level(SWEEPS);
        }
        false
    }

    /// What moves the most of half the gap between two workers.
    fn best_exchange(&self, from: usize, to: usize) -> Option<Exchange> {
        let gap = self.load[from].saturating_sub(self.load[to]);
        let has_slot = (self.held[to].len() as u32) < self.task.slots[to];
        let mut best: Option<(u64, Exchange)> = None;
        for given in &self.held[from] {
            let rows = self.part(*given, from);
            if rows == 0 || !self.can_replace(*given, from, to) {
                continue;
            }
            if has_slot {
                offer(&mut best, rows, gap, Exchange { from, to, given: *given, taken: None });
            }
            for taken in &self.held[to] {
                let back = self.part(*taken, to);
                if back < rows && self.can_replace(*taken, to, from) {
                    offer(&mut best, rows - back, gap, Exchange { from, to, given: *given, taken: Some(*taken) });
                }
            }
        }
        best.map(|(_, exchange)| exchange)
    }

    fn apply(&mut self, exchange: Exchange) {
        let Exchange { from, to, given, taken } = exchange;
        self.drop_copy(given, from as u32);
        if let Some(taken) = taken {
            self.drop_copy(taken, to as u32);
            self.add_copy(taken, from as u32);
        }
        self.add_copy(given, to as u32);
    }

    fn part(&self, expert: usize, worker: usize) -> u64 {
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
        for (holder, part) in self.holders[expert].iter().zip(&self.parts[expert]) {
            self.load[*holder as usize] -= part;
        }
    }

    /// Gives each holder the same; those that come first one row more, if it does not come out even.
    fn part_evenly(&mut self, expert: usize) {
        let (count, rows) = (self.holders[expert].len() as u64, self.task.rows[expert]);
        self.parts[expert].clear();
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

/// A copy of `given` goes from one worker to another, perhaps for one of `taken`.
#[derive(Clone, Copy)]
struct Exchange {
    from: usize,
    to: usize,
    given: usize,
    taken: Option<usize>,
}

/// Keeps the offer that brings two workers nearest to each other.
fn offer(best: &mut Option<(u64, Exchange)>, moved: u64, gap: u64, exchange: Exchange) {
    let after = gap.abs_diff(moved.saturating_mul(2));
    if moved < gap && best.is_none_or(|(found, _)| after < found) {
        *best = Some((after, exchange));
    }
}

/// Which workers are connected by experts that they both hold.
struct Components {
    parents: Vec<u32>,
}

impl Components {
    fn new(workers: usize) -> Self {
        Components { parents: (0..workers as u32).collect() }
    }

    fn root(&mut self, worker: u32) -> usize {
        let mut at = worker;
        while self.parents[at as usize] != at {
            self.parents[at as usize] = self.parents[self.parents[at as usize] as usize];
            at = self.parents[at as usize];
        }
        at as usize
    }

    fn join(&mut self, holders: &[u32]) {
        for pair in holders.windows(2) {
            let (one, other) = (self.root(pair[0]), self.root(pair[1]));
            self.parents[one.max(other)] = one.min(other) as u32;
        }
    }
}
