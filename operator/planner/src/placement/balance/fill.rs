//! What copies stay, and where those go that are missing.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Split;

impl Split<'_> {
    /// Takes copies away: those beyond an expert's count from its fullest holder, and what a worker has no slot for, the
    /// idlest first.
    pub(super) fn keep(&mut self, counts: &[usize]) {
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

    /// Gives the experts the copies that they lack. Those with extra copies first, each to a worker far from the others
    /// that hold the expert, so that load can flow from any worker to any other over few between; then the busiest, to
    /// the idlest worker.
    pub(super) fn fill(&mut self, counts: &[usize]) -> Option<()> {
        let mut order: Vec<usize> = (0..counts.len()).filter(|e| self.holders[*e].len() < counts[*e]).collect();
        order.sort_unstable_by_key(|e| (counts[*e] == self.task.copies, Reverse(self.task.rows[*e]), *e));
        let (hot, cold): (Vec<usize>, Vec<usize>) = order.into_iter().partition(|e| counts[*e] > self.task.copies);
        for expert in hot {
            while self.holders[expert].len() < counts[expert] {
                match self.to_connect(expert, counts[expert]) {
                    Some(worker) => self.add_copy(expert, worker as u32),
                    // it may go without its extra copies
                    None if self.domains_without(expert, u32::MAX) >= self.task.copies => break,
                    None => return None,
                }
            }
        }
        self.fill_cold(&cold)
    }

    /// The worker for another copy of a hot expert: of most distance to its holders less copies that it has.
    fn to_connect(&self, expert: usize, count: usize) -> Option<usize> {
        let left = count - self.holders[expert].len();
        let distances = self.distances(expert);
        let able = |worker: &usize| {
            (self.held[*worker].len() as u32) < self.task.slots[*worker] && self.can_add(expert, *worker as u32, left)
        };
        let rank = |worker: &usize| {
            let nearness = self.held.len() - distances[*worker];
            (self.held[*worker].len() + nearness, self.load[*worker], *worker)
        };
        (0..self.held.len()).filter(able).min_by_key(rank)
    }

    /// How far each worker is from the nearest holder of an expert, if two workers that hold a common expert are one
    /// apart; as many as there are workers where no chain leads.
    fn distances(&self, expert: usize) -> Vec<usize> {
        let workers = self.held.len();
        let mut distances = vec![workers; workers];
        let mut reached = self.holders[expert].clone();
        for holder in &reached {
            distances[*holder as usize] = 0;
        }
        let mut looked_at = 0;
        while looked_at < reached.len() && reached.len() < workers {
            let from = reached[looked_at] as usize;
            let next = distances[from] + 1;
            for common in &self.held[from] {
                for worker in &self.holders[*common] {
                    if distances[*worker as usize] > next {
                        distances[*worker as usize] = next;
                        reached.push(*worker);
                    }
                }
            }
            looked_at += 1;
        }
        distances
    }

    /// Each copy that must be goes to the idlest worker that may have it.
    fn fill_cold(&mut self, experts: &[usize]) -> Option<()> {
        let mut idlest: BinaryHeap<Reverse<(u64, u32)>> =
            (0..).zip(&self.load).map(|(worker, load)| Reverse((*load, worker))).collect();
        let mut passed = Vec::new();
        for expert in experts {
            while self.holders[*expert].len() < self.task.copies {
                let left = self.task.copies - self.holders[*expert].len();
                let worker = loop {
                    let Reverse((load, worker)) = idlest.pop()?;
                    let at = worker as usize;
                    // a load that is not the worker's any more has a newer entry
                    if self.load[at] != load || self.held[at].len() as u32 >= self.task.slots[at] {
                        continue;
                    }
                    if self.can_add(*expert, worker, left) {
                        break worker;
                    }
                    passed.push(Reverse((load, worker)));
                };
                self.add_copy(*expert, worker);
                idlest.extend(passed.drain(..));
                idlest
                    .extend(self.holders[*expert].iter().map(|holder| Reverse((self.load[*holder as usize], *holder))));
            }
        }
        Some(())
    }
}
