//! What each role is told of a model: pure, from facts and from what its workers said.

use std::collections::{BTreeMap, BTreeSet};

use wire::proto::{self, MeshSnapshot, ModelSnapshot, Peer, WorkerEntry};

use super::{ModelFacts, ReplicaFacts, WorkerFacts, WorkerPhase};

/// What a worker said, as far as others must know it.
#[derive(Clone, Debug)]
pub(super) struct Word {
    pub(super) phase: WorkerPhase,
    pub(super) address: String,
    pub(super) content_hash: String,
    /// Has no request of its own.
    pub(super) idle: bool,
}

/// Words of workers by id. Who is absent has not spoken yet.
pub(super) type Words = BTreeMap<String, Word>;

/// What routers are told, without the version, and with `max_pending` of all of them.
///
/// Workers are listed once they have their experts. One that goes away, or whose replica lacks a holder of some expert,
/// takes no new requests: those that it runs go on.
pub(super) fn for_routers(model: &str, facts: &ModelFacts, words: &Words) -> ModelSnapshot {
    let mut workers = Vec::new();
    for replica in &facts.replicas {
        let takes = !replica.draining && covered(replica, words);
        for worker in replica.workers.iter().filter(|worker| loaded(replica, worker, words)) {
            workers.push(WorkerEntry {
                id: worker.id.clone(),
                address: address(worker, words),
                dns_name: worker.dns_name.clone(),
                replica: replica.replica,
                ordinal: worker.ordinal,
                draining: !takes || worker.leaves || phase(replica, worker, words) == WorkerPhase::Draining,
                content_hash: replica.content_hash.clone(),
                revision: replica.revision.clone(),
            });
        }
    }
    ModelSnapshot {
        model: model.to_owned(),
        version: None,
        served_names: facts.served_names.clone(),
        created: facts.created,
        availability: facts.availability.into(),
        max_pending: facts.max_pending,
        max_wait_ms: u64::try_from(facts.max_wait.as_millis()).unwrap_or(u64::MAX),
        workers,
        max_context_tokens: facts.max_context_tokens,
        migration_attempts: facts.migration_attempts,
    }
}

/// What a worker is told, without the version: its placement, the others of its replica, and those of other replicas
/// that hold the same experts.
pub(super) fn for_worker(
    model: &str,
    facts: &ModelFacts,
    replica: &ReplicaFacts,
    worker: &WorkerFacts,
    words: &Words,
) -> MeshSnapshot {
    let of = |one: &ReplicaFacts| {
        let peers = one.workers.iter().filter(|peer| peer.id != worker.id);
        peers.map(|peer| self::peer(one, peer, words)).collect::<Vec<_>>()
    };
    let others: Vec<&ReplicaFacts> = facts.replicas.iter().filter(|other| stands_in(other, replica)).collect();
    let other = |other: &&ReplicaFacts| proto::ReplicaPlacement {
        replica: other.replica,
        placement: Some(placement(&other.placement)),
    };
    MeshSnapshot {
        model: model.to_owned(),
        version: None,
        placement: Some(placement(&replica.placement)),
        peers: of(replica).into_iter().chain(others.iter().flat_map(|other| of(other))).collect(),
        drain: replica.draining,
        also_hold: replica.also_hold.as_ref().map(placement),
        others: others.iter().map(other).collect(),
        max_wait_ms: facts.expert_wait.map_or(0, |wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
    }
}

/// Tells whether the experts of `other` can be asked for those of `replica`. Replicas are numbered by revision, so those
/// of another one are not told apart by their number.
fn stands_in(other: &ReplicaFacts, replica: &ReplicaFacts) -> bool {
    let same = other.revision == replica.revision && other.content_hash == replica.content_hash;
    same && other.replica != replica.replica && !other.placement.layers.is_empty()
}

fn peer(replica: &ReplicaFacts, worker: &WorkerFacts, words: &Words) -> Peer {
    let phase = phase(replica, worker, words);
    let running = match phase {
        WorkerPhase::Serving => true,
        WorkerPhase::Draining => words.get(&worker.id).is_none_or(|word| !word.idle),
        WorkerPhase::Unspecified | WorkerPhase::Loading | WorkerPhase::Drained => false,
    };
    Peer {
        id: worker.id.clone(),
        address: address(worker, words),
        dns_name: worker.dns_name.clone(),
        replica: replica.replica,
        ordinal: worker.ordinal,
        loaded: loaded(replica, worker, words),
        running,
        leaving: matches!(phase, WorkerPhase::Draining | WorkerPhase::Drained),
    }
}

/// Each router's part of the requests that may wait. The parts add up to `total`, but none is 0 unless `total` is.
pub(super) fn shares(total: u32, routers: &BTreeSet<String>) -> BTreeMap<String, u32> {
    let count = u32::try_from(routers.len()).unwrap_or(u32::MAX).max(1);
    let (each, more) = (total / count, total % count);
    let share = |index: usize| each + u32::from((index as u64) < u64::from(more));
    routers.iter().enumerate().map(|(index, id)| (id.clone(), share(index).max(total.min(1)))).collect()
}

/// Every expert of the placement is in memory somewhere in the replica.
fn covered(replica: &ReplicaFacts, words: &Words) -> bool {
    let loaded: BTreeSet<u32> =
        replica.workers.iter().filter(|worker| loaded(replica, worker, words)).map(|worker| worker.ordinal).collect();
    let held = |holders: &Vec<u32>| holders.iter().any(|ordinal| loaded.contains(ordinal));
    replica.placement.layers.iter().flat_map(|layer| &layer.experts).all(held)
}

fn loaded(replica: &ReplicaFacts, worker: &WorkerFacts, words: &Words) -> bool {
    matches!(phase(replica, worker, words), WorkerPhase::Serving | WorkerPhase::Draining)
}

/// As the worker said; as its readiness probe says while it has not spoken; nothing if it has other model files.
fn phase(replica: &ReplicaFacts, worker: &WorkerFacts, words: &Words) -> WorkerPhase {
    match words.get(&worker.id) {
        Some(word) if word.content_hash != replica.content_hash => WorkerPhase::Unspecified,
        Some(word) if word.phase != WorkerPhase::Unspecified => word.phase,
        _ if worker.ready => WorkerPhase::Serving,
        _ => WorkerPhase::Unspecified,
    }
}

fn address(worker: &WorkerFacts, words: &Words) -> String {
    match words.get(&worker.id) {
        Some(word) if worker.address.is_empty() => word.address.clone(),
        _ => worker.address.clone(),
    }
}

fn placement(placement: &planner::Placement) -> proto::Placement {
    let holders = |ordinals: &Vec<u32>| proto::Holders { ordinals: ordinals.clone() };
    let layer = |layer: &planner::placement::LayerPlacement| proto::LayerPlacement {
        layer: layer.layer,
        experts: layer.experts.iter().map(holders).collect(),
    };
    proto::Placement { shards: placement.shards, layers: placement.layers.iter().map(layer).collect() }
}
