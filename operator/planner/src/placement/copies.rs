//! The copies that must be, without regard to load: shares, what stays, what fills. The phases are those of `README.md`.

use std::cmp::Reverse;
use std::collections::VecDeque;

use super::balance::Task;
use super::peak::peaks;
use super::{LayerPlacement, Placement, Problem, Unplaceable};
use crate::model::MoeLayer;
use crate::units::Bytes;

/// For each expert of a layer the ordinals of its holders.
pub(super) type Holders = Vec<Vec<u32>>;

/// Places what must be placed; see [`super::place`].
pub(super) fn place(problem: &Problem<'_>, previous: Option<&Placement>) -> Result<Placement, Unplaceable> {
    let domains = Domains::of(problem);
    if problem.copies() > domains.count {
        let (copies, experts) = (problem.copies(), problem.experts);
        return Err(Unplaceable::TooFewDomains { copies, experts, domains: domains.count });
    }
    let mut bytes = vec![Bytes(0); problem.workers()];
    let mut layers = Vec::with_capacity(problem.layers.len());
    let weight = |layers: &[MoeLayer]| layers.iter().map(|l| u128::from(l.expert_bytes.0)).sum::<u128>();
    let (mut upto, all) = (0, weight(problem.layers));
    for index in 0..problem.layers.len() {
        upto += weight(&problem.layers[index..=index]);
        let layer = Layer { problem, index, domains: &domains, weights: (upto, all) };
        let experts = layer.place(&mut bytes, previous).ok_or_else(|| no_room(problem, &domains))?;
        layers.push(LayerPlacement { layer: problem.layers[index].layer, experts });
    }
    let placed = Placement { shards: problem.workers() as u32, layers };
    Ok(match (previous, problem.room, problem.loads) {
        (Some(before), Some(_), Some(loads)) if before.meets(problem) && !is_better(&placed, before, loads) => {
            before.clone()
        }
        _ => placed,
    })
}

/// Whether a placement is better than the one before, over all layers: layers that share the room could give it to each
/// other for ever if each were judged alone.
fn is_better(placed: &Placement, before: &Placement, loads: &[Vec<u64>]) -> bool {
    let copies = |of: &Placement| of.layers.iter().flat_map(|layer| &layer.experts).map(Vec::len).sum::<usize>();
    let rank = |of: &Placement| (peaks(of, loads).0, Reverse(copies(of)));
    rank(placed) < rank(before)
}

impl Problem<'_> {
    pub(super) fn workers(&self) -> usize {
        self.shards.max(1) as usize
    }

    /// Copies of each expert that must be.
    pub(super) fn copies(&self) -> u32 {
        self.redundancy.saturating_add(1)
    }

    fn largest(&self) -> Bytes {
        self.layers.iter().map(|layer| layer.expert_bytes).max().unwrap_or_default()
    }
}

/// The failure domain of each worker, numbered from 0.
pub(super) struct Domains {
    pub(super) of: Vec<usize>,
    pub(super) count: u32,
}

impl Domains {
    pub(super) fn of(problem: &Problem<'_>) -> Domains {
        let known = problem.domains.unwrap_or_default();
        let mut names: Vec<u32> = known.iter().copied().take(problem.workers()).collect();
        names.sort_unstable();
        names.dedup();
        let number = |worker: usize| match known.get(worker) {
            Some(name) => names.binary_search(name).expect("each name is listed"),
            None => names.len() + worker - known.len(),
        };
        let of: Vec<usize> = (0..problem.workers()).map(number).collect();
        let count = of.iter().max().map_or(0, |most| most + 1) as u32;
        Domains { of, count }
    }
}

/// The answer if the shares cannot be had: what an even share would be, and where there is room for it.
fn no_room(problem: &Problem<'_>, domains: &Domains) -> Unplaceable {
    let copies = u64::from(problem.copies());
    let all: Bytes = problem.layers.iter().map(|l| l.expert_bytes.times(u64::from(problem.experts))).sum();
    let need = Bytes(all.times(copies).0.div_ceil(problem.workers() as u64));
    let room = problem.room.unwrap_or_default();
    let mut roomy: Vec<usize> =
        domains.of.iter().zip(room).filter(|(_, room)| **room >= need).map(|(domain, _)| *domain).collect();
    roomy.sort_unstable();
    roomy.dedup();
    Unplaceable::TooLittleRoom {
        copies: problem.copies(),
        experts: problem.experts,
        workers: problem.workers() as u32,
        need,
        domains: roomy.len() as u32,
    }
}

/// A layer of a problem.
struct Layer<'a> {
    problem: &'a Problem<'a>,
    index: usize,
    domains: &'a Domains,
    /// Bytes of an expert of each layer up to this one, added up, and of all layers.
    weights: (u128, u128),
}

impl Layer<'_> {
    /// The holders of each expert; adds to the workers' bytes. `None` if there is no room.
    fn place(&self, bytes: &mut [Bytes], previous: Option<&Placement>) -> Option<Holders> {
        let mut holders = match self.rows() {
            Some(rows) => self.by_load(&rows, bytes, previous)?,
            None => self.required(bytes, previous)?,
        };
        for holder in holders.iter().flatten() {
            bytes[*holder as usize] = bytes[*holder as usize].plus(self.expert_bytes());
        }
        holders.iter_mut().for_each(|holders| holders.sort_unstable());
        Some(holders)
    }

    /// The copies that must be, and no more.
    fn required(&self, bytes: &[Bytes], previous: Option<&Placement>) -> Option<Holders> {
        let mut before = self.holders_before(previous);
        before.iter_mut().for_each(|holders| holders.truncate(self.problem.copies() as usize));
        let shares = self.shares(&before, bytes)?;
        let mut filling = Filling::new(self, before, &shares);
        filling.fill();
        debug_assert!(
            filling.holders.iter().all(|h| h.len() == self.problem.copies() as usize),
            "every copy has a home"
        );
        Some(filling.holders)
    }

    /// Copies by load, in all the room there is. Where domains or room leave them no simple way, the required ones are
    /// placed first, without regard to load.
    fn by_load(&self, rows: &[u64], bytes: &[Bytes], previous: Option<&Placement>) -> Option<Holders> {
        let (copies, domains) = (self.problem.copies() as usize, self.domains);
        let mut slots = match self.problem.room {
            Some(_) => (0..bytes.len()).map(|worker| self.part_of_room(worker, bytes[worker]).0).collect(),
            None => self.shares(&self.holders_before(previous), bytes)?,
        };
        if let Some(placed) = (Task { rows, slots: &slots, copies, domains }).place(self.holders_before(previous)) {
            return Some(placed);
        }
        let required = self.required(bytes, previous)?;
        for (worker, slots) in (0..).zip(&mut slots) {
            *slots = (*slots).max(required.iter().filter(|holders| holders.contains(&worker)).count() as u32);
        }
        Some(Task { rows, slots: &slots, copies, domains }.place(required.clone()).unwrap_or(required))
    }

    /// The measured rows of each expert, if there are any, scaled down so that sums and products stay far below 2^64.
    fn rows(&self) -> Option<Vec<u64>> {
        let measured = self.problem.loads?.get(self.index)?;
        let total: u128 = measured.iter().map(|rows| u128::from(*rows)).sum();
        let shift = (128 - total.leading_zeros()).saturating_sub(40);
        let rows = |expert| measured.get(expert as usize).map_or(0, |rows| rows >> shift);
        (total > 0).then(|| (0..self.problem.experts).map(rows).collect())
    }

    fn expert_bytes(&self) -> Bytes {
        self.problem.layers[self.index].expert_bytes
    }

    /// For each expert the holders that may stay: they exist; those in different domains first, and others only if the
    /// copies that must be are in different ones.
    fn holders_before(&self, previous: Option<&Placement>) -> Holders {
        let number = self.problem.layers[self.index].layer;
        let before = previous.and_then(|p| p.layers.iter().find(|l| l.layer == number));
        let holders = |expert: u32| {
            let before = before.and_then(|b| b.experts.get(expert as usize)).map_or(&[][..], Vec::as_slice);
            let exist = || before.iter().copied().filter(|holder| (*holder as usize) < self.problem.workers());
            let mut kept: Vec<u32> = Vec::with_capacity(before.len());
            for holder in exist() {
                if self.is_apart(&kept, holder) {
                    kept.push(holder);
                }
            }
            if kept.len() >= self.problem.copies() as usize {
                for holder in exist() {
                    if !kept.contains(&holder) {
                        kept.push(holder);
                    }
                }
            }
            kept
        };
        (0..self.problem.experts).map(holders).collect()
    }

    /// Whether none of the holders is in the worker's domain.
    fn is_apart(&self, holders: &[u32], worker: u32) -> bool {
        let of = &self.domains.of;
        holders.iter().all(|holder| of[*holder as usize] != of[worker as usize])
    }

    /// How many copies each worker gets.
    fn shares(&self, before: &Holders, bytes: &[Bytes]) -> Option<Vec<u32>> {
        let copies = u64::from(self.problem.experts) * u64::from(self.problem.copies());
        let workers = self.problem.workers() as u64;
        let (base, left_over) = ((copies / workers) as u32, (copies % workers) as usize);
        let mut held = vec![0; bytes.len()];
        for holder in before.iter().flatten() {
            held[*holder as usize] += 1;
        }
        let has_more: Vec<bool> = held.iter().map(|count| *count > base).collect();
        let lucky = choose(bytes, &has_more, left_over, self.expert_bytes(), self.problem.largest());
        let even: Vec<u32> = lucky.into_iter().map(|lucky| base + u32::from(lucky)).collect();
        let most: Vec<u32> = (0..bytes.len()).map(|worker| self.part_of_room(worker, bytes[worker]).1).collect();
        let is_within = even.iter().zip(&most).all(|(share, most)| share <= most)
            && self.by_domain(&even).iter().all(|share| *share <= self.problem.experts);
        if is_within {
            return Some(even);
        }
        // Where domains or room bind there is no even share, so what fits stays.
        let stays = before.iter().all(|holders| holders.len() == self.problem.copies() as usize)
            && held.iter().zip(&most).all(|(held, most)| held <= most);
        if stays { Some(held) } else { self.capped_shares(copies, &held, bytes, &most) }
    }

    /// How many copies fit a worker's part of its room for all layers up to this one: for certain, and at most.
    fn part_of_room(&self, worker: usize, has: Bytes) -> (u32, u32) {
        let Some(room) = self.problem.room.and_then(|room| room.get(worker)) else { return (u32::MAX, u32::MAX) };
        let (upto, all) = self.weights;
        let (part, one) = (u128::from(room.0) * upto / all.max(1), u128::from(self.expert_bytes().0.max(1)));
        let (part, left) = (part.saturating_sub(u128::from(has.0)), u128::from(room.minus(has).0) / one);
        let count = |copies: u128| copies.min(u128::from(self.problem.experts)) as u32;
        (count(left.min(part / one)), count(left.min(part.div_ceil(one))))
    }

    fn by_domain(&self, shares: &[u32]) -> Vec<u32> {
        let mut sums = vec![0_u32; self.domains.count as usize];
        for (worker, share) in shares.iter().enumerate() {
            sums[self.domains.of[worker]] += share;
        }
        sums
    }

    /// One copy after the other to the worker with the fewest, where the worker and its domain have room.
    fn capped_shares(&self, copies: u64, held: &[u32], bytes: &[Bytes], most: &[u32]) -> Option<Vec<u32>> {
        let (mut shares, mut in_domain) = (vec![0_u32; bytes.len()], vec![0; self.domains.count as usize]);
        for _ in 0..copies {
            let able = |worker: &usize| {
                shares[*worker] < most[*worker] && in_domain[self.domains.of[*worker]] < self.problem.experts
            };
            let rank = |worker: &usize| (shares[*worker], held[*worker] <= shares[*worker], bytes[*worker], *worker);
            let next = (0..bytes.len()).filter(able).min_by_key(rank)?;
            shares[next] += 1;
            in_domain[self.domains.of[next]] += 1;
        }
        Some(shares)
    }
}

/// The `count` workers that get one expert more: the emptiest, unless one that has it may keep it in balance.
fn choose(bytes: &[Bytes], has_more: &[bool], count: usize, expert_bytes: Bytes, largest: Bytes) -> Vec<bool> {
    let balanced = |chosen: &[bool]| {
        let after = bytes.iter().zip(chosen);
        let after: Vec<Bytes> = after.map(|(b, lucky)| b.plus(expert_bytes.times(u64::from(*lucky)))).collect();
        spread(&after) <= largest
    };
    if has_more.iter().filter(|more| **more).count() == count && balanced(has_more) {
        return has_more.to_vec();
    }
    let mut emptiest: Vec<usize> = (0..bytes.len()).collect();
    emptiest.sort_by_key(|shard| (bytes[*shard], !has_more[*shard], *shard));
    let mut chosen = vec![false; bytes.len()];
    for shard in &emptiest[..count] {
        chosen[*shard] = true;
    }
    for keeper in emptiest.iter().filter(|shard| has_more[**shard]) {
        let given_up = emptiest.iter().rev().find(|shard| chosen[**shard] && !has_more[**shard]);
        let (false, Some(given_up)) = (chosen[*keeper], given_up) else {
            continue;
        };
        let mut swapped = chosen.clone();
        swapped.swap(*keeper, *given_up);
        if balanced(&swapped) {
            chosen = swapped;
        }
    }
    chosen
}

/// The fullest less the emptiest.
fn spread(bytes: &[Bytes]) -> Bytes {
    let most = bytes.iter().max().copied().unwrap_or_default();
    let least = bytes.iter().min().copied().unwrap_or_default();
    most.minus(least)
}

/// Copies on their way into the shares.
struct Filling<'a> {
    layer: &'a Layer<'a>,
    holders: Holders,
    room: Vec<u32>,
}

impl<'a> Filling<'a> {
    /// Takes from each worker what is above its share, the last experts first.
    fn new(layer: &'a Layer<'a>, mut holders: Holders, shares: &[u32]) -> Self {
        let mut room = shares.to_vec();
        for of_expert in &mut holders {
            of_expert.retain(|holder| {
                let left = &mut room[*holder as usize];
                let stays = *left > 0;
                *left -= u32::from(stays);
                stays
            });
        }
        Filling { layer, holders, room }
    }

    fn fill(&mut self) {
        for copies in 1..=self.layer.problem.copies() as usize {
            for expert in 0..self.holders.len() {
                if self.holders[expert].len() < copies {
                    self.add(expert, copies == 1);
                }
            }
        }
    }

    /// Gives the expert one holder more: the first with room, or the one with the most.
    fn add(&mut self, expert: usize, first: bool) {
        let workers = 0..self.room.len() as u32;
        let mut able = workers.filter(|worker| self.room[*worker as usize] > 0 && self.can_hold(expert, *worker));
        let rank = |worker: &u32| (std::cmp::Reverse(self.room[*worker as usize]), *worker);
        let found = if first { able.next() } else { able.min_by_key(rank) };
        let worker = found.unwrap_or_else(|| self.make_way(expert));
        self.room[worker as usize] -= 1;
        self.holders[expert].push(worker);
    }

    fn can_hold(&self, expert: usize, worker: u32) -> bool {
        self.layer.is_apart(&self.holders[expert], worker)
    }

    /// Moves copies along the shortest chain that ends in a worker with room; returns the worker that got room for the
    /// expert. It is the augmenting path of a flow from experts to domains, and exists because the shares of no domain
    /// exceed the experts.
    fn make_way(&mut self, expert: usize) -> u32 {
        let workers = self.room.len() as u32;
        // For each worker that can get room: which expert leaves whom to come to it.
        let mut came_by: Vec<Option<Option<(usize, u32)>>> = vec![None; workers as usize];
        let mut moved = vec![false; self.holders.len()];
        moved[expert] = true;
        let mut queue: VecDeque<u32> = (0..workers).filter(|worker| self.can_hold(expert, *worker)).collect();
        for worker in &queue {
            came_by[*worker as usize] = Some(None);
        }
        while let Some(from) = queue.pop_front() {
            if self.room[from as usize] > 0 {
                return self.shift(from, &came_by);
            }
            for (other, holders) in self.holders.iter().enumerate() {
                if moved[other] || !holders.contains(&from) {
                    continue;
                }
                moved[other] = true;
                let rest: Vec<u32> = holders.iter().copied().filter(|holder| *holder != from).collect();
                for to in 0..workers {
                    if to != from && came_by[to as usize].is_none() && self.layer.is_apart(&rest, to) {
                        came_by[to as usize] = Some(Some((other, from)));
                        queue.push_back(to);
                    }
                }
            }
        }
        unreachable!("the shares of no domain exceed the experts, so a chain exists")
    }

    /// Moves each expert of the chain one worker on; returns where the chain begins, which then has room.
    fn shift(&mut self, end: u32, came_by: &[Option<Option<(usize, u32)>>]) -> u32 {
        let mut to = end;
        while let Some(Some((expert, from))) = came_by[to as usize] {
            self.holders[expert].retain(|holder| *holder != from);
            self.holders[expert].push(to);
            self.room[to as usize] -= 1;
            self.room[from as usize] += 1;
            to = from;
        }
        to
    }
}
