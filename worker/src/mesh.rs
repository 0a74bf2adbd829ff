//! Who holds which experts: the placement of this replica, and its workers, as the newest snapshot says.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use engine::Held;
use serde::Deserialize;
use wire::proto;

/// Which ordinals of a replica hold which experts, by layer and expert.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// Workers of a replica.
    pub shards: u32,
    layers: BTreeMap<u32, Vec<Vec<u32>>>,
}

/// Why a placement file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// The file cannot be read.
    #[error("cannot read the placement file")]
    Read(#[from] io::Error),
    /// The file is no placement.
    #[error("the placement file is not a placement")]
    Parse(#[from] serde_json::Error),
}

/// What a worker knows of its mesh.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    /// Of the snapshot, or of the placement file.
    pub version: proto::Version,
    /// Of this worker's replica.
    pub placement: Placement,
    /// All workers with the same model files; empty before the first snapshot.
    pub peers: Vec<proto::Peer>,
    /// Whether this replica goes away.
    pub drain: bool,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    version: FileVersion,
    shards: u32,
    #[serde(default)]
    layers: Vec<FileLayer>,
}

#[derive(Deserialize, Default)]
struct FileVersion {
    epoch: u64,
    sequence: u64,
}

#[derive(Deserialize)]
struct FileLayer {
    layer: u32,
    experts: Vec<Vec<u32>>,
}

impl Placement {
    /// Ordinals that hold an expert; none if the placement does not know it.
    pub fn holders(&self, layer: u32, expert: u32) -> &[u32] {
        let experts = self.layers.get(&layer);
        experts.and_then(|experts| experts.get(expert as usize)).map_or(&[], Vec::as_slice)
    }

    /// What the worker with this ordinal keeps in memory: everything, if it is alone.
    pub fn held(&self, ordinal: u32) -> Held {
        if self.shards <= 1 {
            return Held::all();
        }
        Held::from_layers(
            self.layers.iter().map(|(&layer, experts)| (layer as usize, mine(experts, ordinal))).collect(),
        )
    }

    /// Whether two placements give a worker the same experts.
    pub fn same_for(&self, other: &Self, ordinal: u32) -> bool {
        self.held(ordinal) == other.held(ordinal)
    }

    /// Experts that a worker keeps, over all layers.
    pub fn count(&self, ordinal: u32) -> usize {
        self.layers.values().map(|experts| mine(experts, ordinal).len()).sum()
    }
}

fn mine(experts: &[Vec<u32>], ordinal: u32) -> BTreeSet<usize> {
    let held = experts.iter().enumerate().filter(|(_, holders)| holders.contains(&ordinal));
    held.map(|(expert, _)| expert).collect()
}

impl From<&proto::Placement> for Placement {
    fn from(placement: &proto::Placement) -> Self {
        let experts = |layer: &proto::LayerPlacement| layer.experts.iter().map(|e| e.ordinals.clone()).collect();
        Self {
            shards: placement.shards,
            layers: placement.layers.iter().map(|layer| (layer.layer, experts(layer))).collect(),
        }
    }
}

impl Mesh {
    /// What the placement file says, which a worker uses until its first snapshot.
    ///
    /// # Errors
    /// If the file cannot be read or is no placement.
    pub fn from_file(path: &Path) -> Result<Self, PlacementError> {
        Ok(Self::from_json(&fs::read(path)?)?)
    }

    fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
        let file: File = serde_json::from_slice(json)?;
        let layers = file.layers.into_iter().map(|layer| (layer.layer, layer.experts)).collect();
        Ok(Self {
            version: proto::Version { epoch: file.version.epoch, sequence: file.version.sequence },
            placement: Placement { shards: file.shards, layers },
            peers: Vec::new(),
            drain: false,
        })
    }

    /// The mesh of a snapshot; without a placement in it, the one known stays.
    pub fn from_snapshot(snapshot: proto::MeshSnapshot, known: &Self) -> Self {
        Self {
            version: snapshot.version.unwrap_or_default(),
            placement: snapshot.placement.as_ref().map_or_else(|| known.placement.clone(), Placement::from),
            peers: snapshot.peers,
            drain: snapshot.drain,
        }
    }

    /// Whether this mesh is newer than another.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        let order = |mesh: &Self| (mesh.version.epoch, mesh.version.sequence);
        order(self) > order(other)
    }

    /// Whether any worker but this one may still need experts from it.
    pub fn others_run(&self, own_id: &str) -> bool {
        self.peers.iter().any(|peer| peer.running && peer.id != own_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"{"version":{"epoch":2,"sequence":7},"shards":2,
        "layers":[{"layer":1,"experts":[[0],[1],[0,1],[]]},{"layer":2,"experts":[[1],[1],[1],[1]]}]}"#;

    #[test]
    fn the_file_says_who_holds_what() {
        let mesh = Mesh::from_json(FILE.as_bytes()).unwrap();
        assert_eq!(mesh.version, proto::Version { epoch: 2, sequence: 7 });
        assert_eq!(mesh.placement.holders(1, 2), [0, 1]);
        assert!(mesh.placement.holders(1, 3).is_empty() && mesh.placement.holders(1, 99).is_empty());
        assert!(mesh.placement.holders(9, 0).is_empty());
        assert_eq!((mesh.placement.count(0), mesh.placement.count(1)), (2, 6));
        let held = BTreeMap::from([(1, BTreeSet::from([0, 2])), (2, BTreeSet::new())]);
        assert_eq!(mesh.placement.held(0), Held::from_layers(held));
    }

    #[test]
    fn a_worker_that_is_alone_holds_everything() {
        let mesh = Mesh::from_json(br#"{"shards":1}"#).unwrap();
        assert_eq!(mesh.placement.held(0), Held::all());
        assert!(Mesh::from_json(b"[]").is_err());
    }

    #[test]
    fn newer_means_a_higher_epoch_or_a_later_sequence() {
        let at = |epoch, sequence| Mesh { version: proto::Version { epoch, sequence }, ..Mesh::default() };
        assert!(at(2, 0).is_newer_than(&at(1, 9)) && at(1, 2).is_newer_than(&at(1, 1)));
        assert!(!at(1, 1).is_newer_than(&at(1, 1)) && !at(1, 9).is_newer_than(&at(2, 0)));
    }

    #[test]
    fn only_running_peers_other_than_us_count() {
        let peer = |id: &str, running| proto::Peer { id: id.into(), running, ..proto::Peer::default() };
        let mesh = |peers| Mesh { peers, ..Mesh::default() };
        assert!(mesh(vec![peer("a", true), peer("b", false)]).others_run("b"));
        assert!(!mesh(vec![peer("a", true), peer("b", false)]).others_run("a"));
    }
}
