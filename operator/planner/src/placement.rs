//! Which worker of a replica holds which experts. `README.md` states the problem; the phases below are its phases.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::model::MoeLayer;
use crate::units::Bytes;

mod balance;
mod copies;
mod peak;

pub use peak::{Peak, balance, peak, peaks, skew_percent};

/// What is to be placed: every expert of every layer, `redundancy + 1` times, on `shards` workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Problem<'a> {
    /// The layers that have routed experts.
    pub layers: &'a [MoeLayer],
    /// Experts of each layer.
    pub experts: u32,
    /// Workers, at least 1.
    pub shards: u32,
    /// Copies of each expert beyond the first, all in different failure domains.
    pub redundancy: u32,
    /// The failure domain of each ordinal, any numbers. Where they are not known, and for ordinals beyond the end, each
    /// worker is a domain of its own.
    pub domains: Option<&'a [u32]>,
    /// Measured rows, by layer in the order of `layers`, and by expert; what is missing counts as none. `None`: not
    /// measured, every expert counts the same.
    pub loads: Option<&'a [Vec<u64>]>,
    /// How many bytes of experts each ordinal may hold, all layers together. `None`: as many as the copies need, and no
    /// copies beyond those.
    pub room: Option<&'a [Bytes]>,
}

/// Why the experts cannot be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unplaceable {
    /// There are fewer failure domains than copies.
    #[error("{copies} copies of {experts} experts need {copies} failure domains, there are {domains}")]
    TooFewDomains {
        /// Copies of each expert.
        copies: u32,
        /// Experts of a layer.
        experts: u32,
        /// Domains that the workers are in.
        domains: u32,
    },
    /// The workers, or the domains that the copies must be spread over, have too little room.
    #[error(
        "{copies} copies of {experts} experts need {workers} workers with {need} for experts on {copies} failure \
         domains, {domains} have it"
    )]
    TooLittleRoom {
        /// Copies of each expert.
        copies: u32,
        /// Experts of a layer.
        experts: u32,
        /// Workers that there are.
        workers: u32,
        /// Bytes of experts that each of them would hold.
        need: Bytes,
        /// Domains with a worker that has that room.
        domains: u32,
    },
}

/// Where experts are. In JSON, with a version added by the operator, this is the file that a worker starts from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// Workers of the replica.
    pub shards: u32,
    /// Layers in the model's order.
    pub layers: Vec<LayerPlacement>,
}

/// Where the experts of one layer are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerPlacement {
    /// Index of the transformer layer.
    pub layer: u32,
    /// For each expert the ordinals of its holders.
    pub experts: Vec<Vec<u32>>,
}

impl Placement {
    /// The experts that a worker holds, by layer, both ascending.
    pub fn held_by(&self, ordinal: u32) -> BTreeMap<u32, Vec<u32>> {
        self.layers
            .iter()
            .map(|layer| {
                let experts = (0..).zip(&layer.experts);
                let held = experts.filter(|(_, holders)| holders.contains(&ordinal));
                (layer.layer, held.map(|(expert, _)| expert).collect())
            })
            .collect()
    }

    /// The weights of the experts that each worker holds, by ordinal.
    pub fn expert_bytes(&self, layers: &[MoeLayer]) -> Vec<Bytes> {
        let weights: BTreeMap<u32, Bytes> = layers.iter().map(|layer| (layer.layer, layer.expert_bytes)).collect();
        let mut bytes = vec![Bytes(0); self.shards as usize];
        for layer in &self.layers {
            let weight = weights.get(&layer.layer).copied().unwrap_or_default();
            for holder in layer.experts.iter().flatten() {
                if let Some(sum) = bytes.get_mut(*holder as usize) {
                    *sum = sum.plus(weight);
                }
            }
        }
        bytes
    }

    /// The workers that hold an expert, ascending.
    pub fn holders(&self) -> BTreeSet<u32> {
        self.layers.iter().flat_map(|layer| layer.experts.iter().flatten().copied()).collect()
    }

    /// The least, over the layers, of experts with a holder that `live` knows. `None` for a dense model.
    pub fn covered(&self, live: impl Fn(u32) -> bool) -> Option<u32> {
        let of = |layer: &LayerPlacement| {
            let covered = layer.experts.iter().filter(|holders| holders.iter().any(|h| live(*h)));
            covered.count() as u32
        };
        self.layers.iter().map(of).min()
    }

    /// The least, over all experts, of holders that `live` knows. `None` for a dense model.
    pub fn min_copies(&self, live: impl Fn(u32) -> bool) -> Option<u32> {
        let experts = self.layers.iter().flat_map(|layer| &layer.experts);
        experts.map(|holders| holders.iter().filter(|holder| live(**holder)).count() as u32).min()
    }

    /// Whether it has all that the problem asks for: its layers and experts, its workers and no others, as many copies in
    /// as many failure domains, each worker within its room. If not, it must be placed anew, whatever the load.
    pub fn meets(&self, problem: &Problem<'_>) -> bool {
        let numbers = problem.layers.iter().map(|layer| layer.layer);
        let experts = problem.experts as usize;
        let domains = copies::Domains::of(problem);
        let is_apart = |holders: &Vec<u32>| {
            let of: BTreeSet<usize> = holders.iter().filter_map(|h| domains.of.get(*h as usize).copied()).collect();
            let workers: BTreeSet<&u32> = holders.iter().collect();
            of.len() >= problem.copies() as usize && workers.len() == holders.len()
        };
        let within = |(held, room): (Bytes, &Bytes)| held <= *room;
        self.shards == problem.shards
            && self.layers.iter().map(|layer| layer.layer).eq(numbers)
            && self.layers.iter().all(|layer| layer.experts.len() == experts && layer.experts.iter().all(is_apart))
            && self.holders().into_iter().all(|holder| holder < self.shards)
            && self.expert_bytes(problem.layers).into_iter().zip(problem.room.unwrap_or_default()).all(within)
    }

    /// The bytes that workers have to load which hold what is `before`.
    pub fn bytes_from(&self, before: &Placement, layers: &[MoeLayer]) -> Bytes {
        self.loads_from(before, layers).into_iter().sum()
    }

    /// The bytes that each worker has to load, by ordinal, if it holds what is `before`.
    pub fn loads_from(&self, before: &Placement, layers: &[MoeLayer]) -> Vec<Bytes> {
        let then: BTreeMap<u32, &LayerPlacement> = before.layers.iter().map(|layer| (layer.layer, layer)).collect();
        let come = |layer: &LayerPlacement| {
            let of = |(expert, holders): (usize, &Vec<u32>)| {
                let had = then.get(&layer.layer).and_then(|then| then.experts.get(expert));
                let new = |holder: &u32| !had.is_some_and(|had| had.contains(holder));
                holders.iter().copied().filter(new).collect()
            };
            LayerPlacement { layer: layer.layer, experts: layer.experts.iter().enumerate().map(of).collect() }
        };
        let new = Placement { shards: self.shards, layers: self.layers.iter().map(come).collect() };
        new.expert_bytes(layers)
    }

    /// How many experts, over all layers, have a holder here that they had not in `before`.
    pub fn moved_from(&self, before: &Placement) -> usize {
        let then: BTreeMap<u32, &LayerPlacement> = before.layers.iter().map(|layer| (layer.layer, layer)).collect();
        let moved_in = |layer: &LayerPlacement| {
            let old = then.get(&layer.layer);
            let came = |(expert, holders): &(usize, &Vec<u32>)| {
                let had = old.and_then(|old| old.experts.get(*expert));
                holders.iter().any(|holder| !had.is_some_and(|had| had.contains(holder)))
            };
            layer.experts.iter().enumerate().filter(came).count()
        };
        self.layers.iter().map(moved_in).sum()
    }
}

/// Places `redundancy + 1` copies of every expert of every layer, each in another failure domain.
///
/// 1. *Share*: each worker gets the floor of its share of a layer's copies; those that are left over go to the workers
///    with the fewest bytes so far, rather to one that holds them already. A domain gets each expert once at most, a
///    worker what it has room for; the others take the rest.
/// 2. *Keep*: a copy stays where it is, while its worker exists, its share lasts and its domain has no other.
/// 3. *Fill*: the first copies that are missing go, ascending, to the workers with room, ascending, so a first placement
///    is contiguous. Further copies go to the workers with the most room, so that the copies of what one worker holds
///    are spread over many. A copy that finds only domains that hold its expert moves another out of its way.
///
/// # Guarantees
/// No worker holds an expert twice. The same problem placed again moves nothing. Equal inputs give equal answers. Where
/// neither a domain nor the room binds, the bytes of two workers differ by at most the largest expert, and in no layer
/// does the number of their experts differ by more than one.
/// # Errors
/// [`Unplaceable`], with what would be needed.
/// # Assumptions
/// `previous` may be of any other problem; what does not fit is ignored.
pub fn place(problem: &Problem<'_>, previous: Option<&Placement>) -> Result<Placement, Unplaceable> {
    copies::place(problem, previous)
}
