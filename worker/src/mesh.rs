//! Who holds which experts: the placements, and the workers, as the newest snapshot says; and which snapshot is in use.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use engine::Held;
use serde::Deserialize;
use tokio::sync::watch;
use wire::proto;

/// How long sequences wait for a holder of experts that is away, if no snapshot says so.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// Which ordinals of a replica hold which experts, by layer and expert.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// Workers of a replica.
    pub shards: u32,
    layers: BTreeMap<u32, Vec<Vec<u32>>>,
}

/// What a worker knows of its mesh.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    /// Of the snapshot, or of the placement file.
    pub version: proto::Version,
    /// How many snapshots of it this worker took before.
    age: u64,
    /// Of this worker's replica: who is asked for an expert.
    pub placement: Placement,
    /// What workers of this replica hold besides.
    pub also_hold: Option<Placement>,
    /// Of the other replicas with the same model files, by their index.
    pub others: Vec<(u32, Placement)>,
    /// All workers with the same model files; empty before the first snapshot.
    pub peers: Vec<proto::Peer>,
    /// Whether this replica goes away.
    pub drain: bool,
    /// What the snapshot says of [`Mesh::max_wait`].
    max_wait: Option<Duration>,
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
    /// What a placement file says, which a worker uses until its first snapshot.
    ///
    /// # Errors
    /// If it is no placement.
    pub fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
        let file: File = serde_json::from_slice(json)?;
        let layers = file.layers.into_iter().map(|layer| (layer.layer, layer.experts)).collect();
        Ok(Self {
            version: proto::Version { epoch: file.version.epoch, sequence: file.version.sequence },
            placement: Placement { shards: file.shards, layers },
            ..Self::default()
        })
    }

    /// The mesh of a snapshot; without a placement in it, the one known stays.
    pub fn from_snapshot(snapshot: proto::MeshSnapshot, known: &Self) -> Self {
        Self {
            version: snapshot.version.unwrap_or_default(),
            age: known.age + 1,
            placement: snapshot.placement.as_ref().map_or_else(|| known.placement.clone(), Placement::from),
            also_hold: snapshot.also_hold.as_ref().map(Placement::from),
            others: snapshot.others.iter().filter_map(of_replica).collect(),
            peers: snapshot.peers,
            drain: snapshot.drain,
            max_wait: (snapshot.max_wait_ms > 0).then(|| Duration::from_millis(snapshot.max_wait_ms)),
        }
    }

    /// What the worker with this ordinal keeps in memory.
    pub fn held(&self, ordinal: u32) -> Held {
        let held = self.placement.held(ordinal);
        self.also_hold.iter().fold(held, |held, besides| held.and(besides.held(ordinal)))
    }

    /// How long a sequence waits for an expert that nobody holds.
    pub fn max_wait(&self) -> Duration {
        self.max_wait.unwrap_or(MAX_WAIT)
    }

    /// Whether this mesh is newer than another.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        let order = |mesh: &Self| (mesh.version.epoch, mesh.version.sequence);
        order(self) > order(other)
    }

    /// Whether any worker of `replica`, that of this one, may still need experts from it. Those of other replicas have
    /// holders of their own, and ask here only where those fail.
    pub fn others_run(&self, own_id: &str, replica: u32) -> bool {
        self.peers.iter().any(|peer| peer.running && peer.id != own_id && peer.replica == replica)
    }

    /// Whether each expert that the worker with this ordinal of `replica` holds is with another one too, which has it in
    /// memory and stays.
    pub fn others_hold(&self, ordinal: u32, replica: u32) -> bool {
        let stays = |peer: &&proto::Peer| peer.replica == replica && peer.loaded && !peer.leaving;
        let staying: BTreeSet<u32> = self.peers.iter().filter(stays).map(|peer| peer.ordinal).collect();
        let elsewhere = |holders: &Vec<u32>| holders.iter().any(|other| *other != ordinal && staying.contains(other));
        let mut experts = self.placement.layers.values().flatten();
        experts.all(|holders| !holders.contains(&ordinal) || elsewhere(holders))
    }
}

fn of_replica(other: &proto::ReplicaPlacement) -> Option<(u32, Placement)> {
    Some((other.replica, Placement::from(other.placement.as_ref()?)))
}

/// The newest mesh, and the one that the running step uses.
///
/// A step uses one mesh from its beginning to its end, so that no two of its layers disagree on who holds what.
#[derive(Debug, Clone)]
pub struct Meshes {
    newest: watch::Sender<Arc<Mesh>>,
    /// Age of the mesh of the step that runs.
    in_use: watch::Sender<Option<u64>>,
}

impl Meshes {
    /// Begins with what the placement file says.
    pub fn new(mesh: Mesh) -> Self {
        Self { newest: watch::Sender::new(Arc::new(mesh)), in_use: watch::Sender::new(None) }
    }

    /// The newest mesh.
    pub fn newest(&self) -> Arc<Mesh> {
        self.newest.borrow().clone()
    }

    /// The newest mesh, and every newer one.
    pub fn follow(&self) -> watch::Receiver<Arc<Mesh>> {
        self.newest.subscribe()
    }

    /// Takes a snapshot, unless as new a one is known. The first one counts whatever the placement file said.
    pub fn take(&self, snapshot: proto::MeshSnapshot) -> Option<Arc<Mesh>> {
        let known = self.newest();
        let mesh = Mesh::from_snapshot(snapshot, &known);
        if known.age > 0 && !mesh.is_newer_than(&known) {
            return None;
        }
        let mesh = Arc::new(mesh);
        self.newest.send_replace(mesh.clone());
        Some(mesh)
    }

    /// The mesh of a step that begins now.
    pub fn begin_step(&self) -> Arc<Mesh> {
        let mut mesh = self.newest();
        self.in_use.send_modify(|in_use| {
            mesh = self.newest(); // again under the lock: whoever saw no step run has published before
            *in_use = Some(mesh.age);
        });
        mesh
    }

    /// The step is over.
    pub fn end_step(&self) {
        self.in_use.send_replace(None);
    }

    /// Waits until no step runs on a mesh older than this one.
    pub async fn in_use_everywhere(&self, mesh: &Mesh) {
        let mut in_use = self.in_use.subscribe();
        let _ = in_use.wait_for(|in_use| in_use.is_none_or(|age| age >= mesh.age)).await; // the sender lives as we do
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
        let held = BTreeMap::from([(1, BTreeSet::from([0, 2])), (2, BTreeSet::new())]);
        assert_eq!(mesh.held(0), Held::from_layers(held));
    }

    fn snapshot(sequence: u64) -> proto::MeshSnapshot {
        proto::MeshSnapshot { version: Some(proto::Version { epoch: 1, sequence }), ..proto::MeshSnapshot::default() }
    }

    fn placement(experts: &[&[u32]]) -> proto::Placement {
        let experts = experts.iter().map(|ordinals| proto::Holders { ordinals: ordinals.to_vec() }).collect();
        proto::Placement { shards: 2, layers: vec![proto::LayerPlacement { layer: 1, experts }] }
    }

    #[test]
    fn what_is_also_held_is_kept_and_not_asked() {
        let snapshot = proto::MeshSnapshot {
            placement: Some(placement(&[&[0], &[1], &[1]])),
            also_hold: Some(placement(&[&[1], &[0], &[1]])),
            others: vec![proto::ReplicaPlacement { replica: 3, placement: Some(placement(&[&[1], &[1], &[0]])) }],
            max_wait_ms: 1500,
            ..snapshot(1)
        };
        let mesh = Mesh::from_snapshot(snapshot, &Mesh::default());
        assert_eq!(mesh.held(0), Held::from_layers([(1, [0, 1].into())].into()));
        assert_eq!(mesh.placement.holders(1, 1), [1]);
        assert_eq!((mesh.others[0].0, mesh.others[0].1.holders(1, 2)), (3, &[0][..]));
        assert_eq!(mesh.max_wait(), Duration::from_millis(1500));
        assert_eq!(Mesh::default().max_wait(), MAX_WAIT);
    }

    #[test]
    fn snapshots_count_in_any_order_and_the_newest_wins() {
        let file = Mesh { version: proto::Version { epoch: 9, sequence: 9 }, ..Mesh::default() };
        let meshes = Meshes::new(file);
        let took = |sequence| meshes.take(snapshot(sequence)).is_some();
        // the file is older than any snapshot; then repeats and old ones are nothing, and skips are no harm
        assert_eq!([3, 3, 1, 7, 5, 8].map(took), [true, false, false, true, false, true]);
        assert_eq!(meshes.newest().version.sequence, 8);
    }

    #[tokio::test]
    async fn a_mesh_is_everywhere_in_use_once_no_step_runs_on_an_older_one() {
        use futures::FutureExt as _;
        let meshes = Meshes::new(Mesh::default());
        let first = meshes.take(snapshot(1)).unwrap();
        assert!(meshes.in_use_everywhere(&first).now_or_never().is_some(), "no step runs");
        assert_eq!(meshes.begin_step().version, first.version);
        let second = meshes.take(snapshot(2)).unwrap();
        assert!(meshes.in_use_everywhere(&first).now_or_never().is_some());
        assert!(meshes.in_use_everywhere(&second).now_or_never().is_none(), "a step runs on the first");
        meshes.end_step();
        assert!(meshes.in_use_everywhere(&second).now_or_never().is_some());
        assert_eq!(meshes.begin_step().version, second.version);
        assert!(meshes.in_use_everywhere(&second).now_or_never().is_some());
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
    fn what_one_holds_is_elsewhere_only_with_peers_that_have_it_and_stay() {
        let peer = |ordinal, loaded, leaving| proto::Peer { ordinal, loaded, leaving, ..proto::Peer::default() };
        let mesh = |peers| {
            let placement = Some(placement(&[&[0, 1], &[1, 2], &[2]]));
            Mesh::from_snapshot(proto::MeshSnapshot { peers, placement, ..snapshot(1) }, &Mesh::default())
        };
        assert!(mesh(vec![peer(0, true, false), peer(2, true, false)]).others_hold(1, 0));
        assert!(!mesh(vec![peer(0, true, false), peer(1, true, false)]).others_hold(2, 0), "one expert is only there");
        assert!(!mesh(vec![peer(0, false, false), peer(2, true, false)]).others_hold(1, 0), "it still loads");
        assert!(!mesh(vec![peer(0, true, false), peer(2, true, true)]).others_hold(1, 0), "it ends too");
        assert!(
            !mesh(vec![peer(0, true, false), peer(2, true, false)]).others_hold(1, 1),
            "they are of another replica"
        );
    }

    #[test]
    fn only_running_peers_of_our_replica_other_than_us_count() {
        let peer = |id: &str, running| proto::Peer { id: id.into(), running, ..proto::Peer::default() };
        let mesh = |peers| Mesh { peers, ..Mesh::default() };
        assert!(mesh(vec![peer("a", true), peer("b", false)]).others_run("b", 0));
        assert!(!mesh(vec![peer("a", true), peer("b", false)]).others_run("a", 0));
        assert!(!mesh(vec![peer("a", true)]).others_run("b", 1));
    }
}
