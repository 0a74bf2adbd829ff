//! One published model: its facts, the snapshots made from them, and their versions.

use std::collections::{BTreeMap, BTreeSet};

use planner::Placement;
use wire::proto::{MeshSnapshot, ModelSnapshot};

use super::{
    ModelFacts, Version,
    snapshot::{self, Words},
};

/// A replica of a revision.
type ReplicaKey = (String, u32);
/// Who is asked, and what is held besides.
type Held = (Placement, Option<Placement>);

pub(super) struct Model {
    pub(super) facts: ModelFacts,
    sequence: u64,
    routers: Option<(Version, ModelSnapshot)>,
    shares: BTreeMap<String, u32>,
    meshes: BTreeMap<String, Mesh>,
    /// What the workers of a replica are to hold, and since when.
    placements: BTreeMap<ReplicaKey, (Version, Held)>,
    /// Since when routers are told that a worker takes requests.
    taking: BTreeMap<String, Version>,
}

struct Mesh {
    version: Version,
    snapshot: MeshSnapshot,
    replica: ReplicaKey,
}

impl Model {
    pub(super) fn new(facts: ModelFacts) -> Self {
        Self {
            facts,
            sequence: 0,
            routers: None,
            shares: BTreeMap::new(),
            meshes: BTreeMap::new(),
            placements: BTreeMap::new(),
            taking: BTreeMap::new(),
        }
    }

    /// Everything is sent again, in a new epoch.
    pub(super) fn forget_versions(&mut self) {
        let facts = self.facts.clone();
        *self = Self::new(facts);
    }

    /// Makes the snapshots anew. What changed gets the next version; whether anything did is returned.
    pub(super) fn refresh(&mut self, name: &str, epoch: u64, words: &Words, live_routers: &BTreeSet<String>) -> bool {
        let next = Version { epoch, sequence: self.sequence + 1 };
        let routers = self.refresh_routers(name, next, words, live_routers);
        let workers = self.refresh_workers(name, next, words);
        if routers || workers {
            self.sequence = next.sequence;
        }
        routers || workers
    }

    fn refresh_routers(&mut self, name: &str, next: Version, words: &Words, live: &BTreeSet<String>) -> bool {
        let shares = snapshot::shares(self.facts.max_pending, live);
        let fresh = snapshot::for_routers(name, &self.facts, words);
        if self.shares == shares && self.routers.as_ref().is_some_and(|(_, known)| *known == fresh) {
            return false;
        }
        let takes = fresh.workers.iter().filter(|worker| !worker.draining);
        let since = |id: &String| self.taking.get(id).copied().unwrap_or(next);
        self.taking = takes.map(|worker| (worker.id.clone(), since(&worker.id))).collect();
        self.shares = shares;
        self.routers = Some((next, fresh));
        true
    }

    fn refresh_workers(&mut self, name: &str, next: Version, words: &Words) -> bool {
        let mut before = std::mem::take(&mut self.meshes);
        let mut placements = std::mem::take(&mut self.placements);
        let mut changed = false;
        for replica in &self.facts.replicas {
            let key = (replica.revision.clone(), replica.replica);
            let held = (replica.placement.clone(), replica.also_hold.clone());
            let known = placements.remove(&key).filter(|(_, before)| *before == held);
            let known = known.unwrap_or((next, held));
            self.placements.insert(key.clone(), known);
            for worker in &replica.workers {
                let snapshot = snapshot::for_worker(name, &self.facts, replica, worker, words);
                let same = before.remove(&worker.id).filter(|mesh| mesh.snapshot == snapshot);
                changed |= same.is_none();
                let mesh = same.unwrap_or_else(|| Mesh { version: next, snapshot, replica: key.clone() });
                self.meshes.insert(worker.id.clone(), mesh);
            }
        }
        changed
    }

    /// What a live router is told; nothing for one whose lease ended, until it speaks again.
    pub(super) fn for_router(&self, id: &str) -> Option<(Version, ModelSnapshot)> {
        let (version, snapshot) = self.routers.as_ref()?;
        let share = *self.shares.get(id)?;
        Some((*version, ModelSnapshot { version: Some((*version).into()), max_pending: share, ..snapshot.clone() }))
    }

    /// What a worker is told; nothing for one that is not in the facts.
    pub(super) fn for_worker(&self, id: &str) -> Option<(Version, MeshSnapshot)> {
        let mesh = self.meshes.get(id)?;
        Some((mesh.version, MeshSnapshot { version: Some(mesh.version.into()), ..mesh.snapshot.clone() }))
    }

    pub(super) fn version(&self) -> Option<Version> {
        self.routers.as_ref().map(|(version, _)| *version)
    }

    /// Since when routers are told that this worker takes requests.
    pub(super) fn taking_since(&self, worker: &str) -> Option<Version> {
        self.taking.get(worker).copied()
    }

    /// The newest mesh of a worker.
    pub(super) fn mesh_version(&self, worker: &str) -> Option<Version> {
        self.meshes.get(worker).map(|mesh| mesh.version)
    }

    /// Since when the worker's replica has its present placement.
    pub(super) fn placed_since(&self, worker: &str) -> Option<Version> {
        let mesh = self.meshes.get(worker)?;
        self.placements.get(&mesh.replica).map(|(version, _)| *version)
    }
}
