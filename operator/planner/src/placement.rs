//! Which worker of a replica holds which experts. `README.md` states the problem; the phases below are its phases.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::MoeLayer;
use crate::units::Bytes;

/// What is to be placed: every expert of every layer, exactly once, on `shards` workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem<'a> {
    /// The layers that have routed experts.
    pub layers: &'a [MoeLayer],
    /// Experts of each layer.
    pub experts: u32,
    /// Workers, at least 1.
    pub shards: u32,
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

    /// The least, over the layers, of experts with a holder that `live` knows. `None` for a dense model.
    pub fn covered(&self, live: impl Fn(u32) -> bool) -> Option<u32> {
        let of = |layer: &LayerPlacement| {
            let covered = layer.experts.iter().filter(|holders| holders.iter().any(|h| live(*h)));
            covered.count() as u32
        };
        self.layers.iter().map(of).min()
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

/// Places every expert of every layer exactly once.
///
/// 1. *Share*: each worker gets the floor of its share of a layer; the experts that are left over go to the workers
///    with the fewest bytes so far, rather to one that holds them already.
/// 2. *Keep*: an expert stays where it is, while its worker exists and its share lasts.
/// 3. *Fill*: the others go, ascending, to the workers with room, ascending. So a first placement is contiguous.
///
/// # Guarantees
/// The bytes of two workers differ by at most the largest expert. In no layer does the number of their experts differ
/// by more than one. The same problem placed again moves nothing. Equal inputs give equal answers.
/// # Assumptions
/// `shards` is at least 1. `previous` may be of any other problem; what does not fit is ignored.
pub fn place(problem: &Problem<'_>, previous: Option<&Placement>) -> Placement {
    let shards = problem.shards.max(1) as usize;
    let largest = problem.layers.iter().map(|layer| layer.expert_bytes).max().unwrap_or_default();
    let mut bytes = vec![Bytes(0); shards];
    let mut layers = Vec::with_capacity(problem.layers.len());
    for layer in problem.layers {
        let before = holders_before(problem, layer.layer, previous);
        let shares = share(problem.experts, &before, layer.expert_bytes, &mut bytes, largest);
        let homes = fill(keep(before, &shares), &shares);
        debug_assert!(homes.iter().all(|home| (*home as usize) < shards), "every expert has a home");
        let experts = homes.into_iter().map(|home| vec![home]).collect();
        layers.push(LayerPlacement { layer: layer.layer, experts });
    }
    debug_assert!(spread(&bytes) <= largest, "the bytes of two workers differ by one expert at most");
    Placement { shards: shards as u32, layers }
}

/// For each expert of a layer its holder, if that worker still exists.
fn holders_before(problem: &Problem<'_>, layer: u32, previous: Option<&Placement>) -> Vec<Option<u32>> {
    let before = previous.and_then(|p| p.layers.iter().find(|l| l.layer == layer));
    let holder = |expert: u32| {
        let holders = before?.experts.get(expert as usize)?;
        holders.iter().copied().find(|holder| *holder < problem.shards)
    };
    (0..problem.experts).map(holder).collect()
}

/// How many experts of a layer each worker gets, and what that adds to its bytes.
fn share(experts: u32, before: &[Option<u32>], expert_bytes: Bytes, bytes: &mut [Bytes], largest: Bytes) -> Vec<u32> {
    let shards = bytes.len() as u32;
    let (base, left_over) = (experts / shards, (experts % shards) as usize);
    let mut held = vec![0; bytes.len()];
    for holder in before.iter().flatten() {
        held[*holder as usize] += 1;
    }
    let has_more: Vec<bool> = held.iter().map(|count| *count > base).collect();
    let lucky = choose(bytes, &has_more, left_over, expert_bytes, largest);
    for (total, lucky) in bytes.iter_mut().zip(&lucky) {
        *total = total.plus(expert_bytes.times(u64::from(base) + u64::from(*lucky)));
    }
    lucky.into_iter().map(|lucky| base + u32::from(lucky)).collect()
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

/// Takes from each worker what is above its share, the last experts first.
fn keep(mut before: Vec<Option<u32>>, shares: &[u32]) -> Vec<Option<u32>> {
    let mut kept = vec![0; shares.len()];
    for home in &mut before {
        let Some(holder) = *home else { continue };
        if kept[holder as usize] == shares[holder as usize] {
            *home = None;
        } else {
            kept[holder as usize] += 1;
        }
    }
    before
}

/// Gives every expert without a home one, ascending.
fn fill(homes: Vec<Option<u32>>, shares: &[u32]) -> Vec<u32> {
    let mut room = shares.to_vec();
    for holder in homes.iter().flatten() {
        room[*holder as usize] -= 1;
    }
    let free = (0..).zip(room).flat_map(|(shard, room)| std::iter::repeat_n(shard, room as usize));
    let mut free = free.collect::<Vec<u32>>().into_iter();
    let next = |home: Option<u32>| home.unwrap_or_else(|| free.next().expect("the shares add up to the experts"));
    homes.into_iter().map(next).collect()
}

/// The fullest less the emptiest.
fn spread(bytes: &[Bytes]) -> Bytes {
    let most = bytes.iter().max().copied().unwrap_or_default();
    let least = bytes.iter().min().copied().unwrap_or_default();
    most.minus(least)
}
