//! Even loads: by the split of rows among the copies that are there, then by copies that change place.

use super::{LEVEL, Split};

/// How often all splits are levelled, one after the other, before the loads are looked at.
const SWEEPS: usize = 6;
/// Exchanges of copies in a layer at most, and with how many idle workers each is tried.
const EXCHANGES: usize = 96;
const TRIES: usize = 4;

impl Split<'_> {
    /// Splits the rows of each expert with several copies so that its holders come out level, as far as they can.
    pub(super) fn level(&mut self) {
        let several: Vec<usize> = (0..self.holders.len()).filter(|expert| self.holders[*expert].len() > 1).collect();
        let mut others = Vec::new();
        for _ in 0..SWEEPS {
            let mut moved = 0;
            for expert in &several {
                moved += self.level_one(*expert, &mut others);
            }
            if moved <= self.mean() / LEVEL {
                return;
            }
        }
    }

    /// Fills the holders of an expert like connected vessels; returns the rows that changed their holder. `others` is
    /// room for what else each of them has.
    fn level_one(&mut self, expert: usize, others: &mut Vec<(u64, usize)>) -> u64 {
        let (holders, parts) = (&self.holders[expert], &mut self.parts[expert]);
        others.clear();
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

    /// Moves a copy from the fullest worker to an idle one, or exchanges two, while that brings the loads nearer to each
    /// other and they are not level.
    pub(super) fn improve(&mut self) {
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
            self.level();
            if self.squares() < squares {
                return true;
            }
            self.apply(Exchange { from: exchange.to, to: exchange.from, ..exchange });
            self.level();
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
