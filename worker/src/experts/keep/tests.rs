//! Snapshots in every order, over the small model's files.

use std::{collections::BTreeSet, path::Path};

use engine::Held;
use opentelemetry::metrics::MeterProvider as _;
use wire::proto::{Holders, LayerPlacement, MeshSnapshot, Placement};

use super::*;

const WAIT: Duration = Duration::from_secs(20);

struct Kept {
    meshes: Meshes,
    experts: Arc<Experts>,
    loaded: watch::Receiver<Option<Version>>,
    wanted: mpsc::Sender<(u32, u32)>,
    changes: watch::Receiver<u64>,
}

/// A keeper of ordinal 0 that begins with the even experts of layer 1.
fn kept() -> Kept {
    kept_with(|| u64::MAX)
}

fn kept_with(room: impl Fn() -> u64 + Send + Sync + 'static) -> Kept {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1");
    let options =
        engine::Options { kv_cache_tokens: 64, max_context_tokens: None, max_sequences: 1, prefill_chunk: 16 };
    let held = crate::mesh::Placement::from(&even()).held(0);
    let (_, experts) = engine::load(&folder, &held, &options, &mut |_, _| {}).unwrap();
    let meshes = Meshes::new(Mesh::default());
    meshes.take(snapshot(1, even(), None)).unwrap();
    let (loaded, receiver) = watch::channel(None);
    let metrics = Metrics::new(&opentelemetry::metrics::noop::NoopMeterProvider::new().meter("test"));
    let (wanted, unheld) = mpsc::channel(8);
    let board = Board::new(metrics.clone());
    let changes = board.changes();
    let keeping = Keeping {
        replica: 0,
        ordinal: 0,
        meshes: meshes.clone(),
        experts: experts.clone(),
        loaded,
        board,
        wanted: unheld,
        room: Box::new(room),
        metrics,
    };
    tokio::spawn(Keeper::new(keeping).follow());
    Kept { meshes, experts, loaded: receiver, wanted, changes }
}

/// Layer 1 of 16 experts, of which ordinal 0 holds some and ordinal 1 the rest.
fn placement(mine: impl Fn(u32) -> bool) -> Placement {
    let experts = (0..16).map(|expert| Holders { ordinals: vec![u32::from(!mine(expert))] }).collect();
    Placement { shards: 2, layers: vec![LayerPlacement { layer: 1, experts }] }
}

fn even() -> Placement {
    placement(|expert| expert % 2 == 0)
}

fn low() -> Placement {
    placement(|expert| expert < 8)
}

fn snapshot(sequence: u64, placement: Placement, also_hold: Option<Placement>) -> MeshSnapshot {
    let version = Some(Version { epoch: 1, sequence });
    MeshSnapshot { version, placement: Some(placement), also_hold, ..MeshSnapshot::default() }
}

impl Kept {
    fn here(&self) -> BTreeSet<usize> {
        (0..16).filter(|&expert| self.experts.holds(1, expert)).collect()
    }

    async fn has_loaded(&mut self, sequence: u64) {
        let newest = |loaded: &Option<Version>| loaded.is_some_and(|version| version.sequence >= sequence);
        tokio::time::timeout(WAIT, self.loaded.wait_for(newest)).await.expect("it loads").unwrap();
    }

    async fn holds(&self, wanted: impl Fn(usize) -> bool) {
        let wanted: BTreeSet<usize> = (0..16).filter(|&expert| wanted(expert)).collect();
        let deadline = tokio::time::Instant::now() + WAIT;
        while self.here() != wanted {
            assert!(tokio::time::Instant::now() < deadline, "{:?} are here; wanted {wanted:?}", self.here());
            tokio::time::sleep(Duration::from_millis(2)).await; // polls
        }
    }
}

#[tokio::test]
async fn a_change_in_three_phases_loads_then_asks_then_forgets() {
    let mut kept = kept();
    kept.has_loaded(1).await;
    let bytes = kept.experts.weight().1;
    kept.meshes.take(snapshot(2, even(), Some(low()))).unwrap();
    kept.has_loaded(2).await;
    kept.holds(|expert| expert % 2 == 0 || expert < 8).await;
    assert_eq!(kept.experts.weight(), (12, bytes / 8 * 12));
    kept.meshes.take(snapshot(3, low(), Some(even()))).unwrap();
    kept.has_loaded(3).await;
    kept.holds(|expert| expert % 2 == 0 || expert < 8).await;
    kept.meshes.take(snapshot(4, low(), None)).unwrap();
    kept.holds(|expert| expert < 8).await;
    assert_eq!(kept.experts.weight(), (8, bytes));
}

#[tokio::test]
async fn nothing_is_forgotten_under_a_step_that_began_before() {
    let mut kept = kept();
    kept.has_loaded(1).await;
    kept.meshes.begin_step();
    kept.meshes.take(snapshot(2, low(), None)).unwrap();
    kept.has_loaded(2).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
        assert!((0..16).step_by(2).all(|expert| kept.experts.holds(1, expert)));
    }
    kept.meshes.end_step();
    kept.holds(|expert| expert < 8).await;
}

#[tokio::test]
async fn snapshots_that_repeat_skip_or_come_late_end_in_the_same_place() {
    let mut kept = kept();
    for sequence in [3, 2, 3, 9, 4, 9, 7, 30, 29, 31] {
        let wanted = if sequence % 2 == 0 { even() } else { placement(|expert| u64::from(expert) % 7 < sequence % 5) };
        let also = (sequence % 3 == 0).then(low);
        kept.meshes.take(snapshot(sequence, wanted, also));
        tokio::task::yield_now().await;
    }
    kept.has_loaded(31).await;
    kept.holds(|expert| expert % 7 < 1).await;
}

#[tokio::test]
async fn a_placement_that_does_not_fit_the_model_is_not_loaded_and_the_next_one_is() {
    let mut kept = kept();
    kept.has_loaded(1).await;
    let layers = vec![LayerPlacement { layer: 99, experts: vec![Holders { ordinals: vec![0] }] }];
    kept.meshes.take(snapshot(2, Placement { shards: 2, layers }, None)).unwrap();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(kept.loaded.borrow().map(|version| version.sequence), Some(1));
    kept.meshes.take(snapshot(3, low(), None)).unwrap();
    kept.has_loaded(3).await;
    assert!(kept.experts.missing(&Held::from_layers([(1, (0..8).collect())].into())).is_empty());
}

#[tokio::test]
async fn an_expert_that_nobody_answers_for_is_held_until_its_holder_is_back() {
    let mut kept = kept();
    kept.has_loaded(1).await;
    kept.holds(|expert| expert % 2 == 0).await;
    kept.changes.mark_unchanged();
    kept.wanted.send((1, 7)).await.unwrap();
    kept.holds(|expert| expert % 2 == 0 || expert == 7).await;
    kept.changes.changed().await.unwrap(); // steps that wait try again
    kept.meshes.take(snapshot(2, even(), None)).unwrap();
    kept.has_loaded(2).await;
    kept.holds(|expert| expert % 2 == 0 || expert == 7).await;
    let holder = wire::proto::Peer { id: "b".into(), ordinal: 1, loaded: true, ..Default::default() };
    tokio::time::pause();
    kept.meshes.take(MeshSnapshot { peers: vec![holder], ..snapshot(3, even(), None) }).unwrap();
    kept.holds(|expert| expert % 2 == 0).await;
}

#[tokio::test]
async fn an_expert_that_does_not_fit_is_left_to_others() {
    let mut kept = kept_with(|| 1000);
    kept.has_loaded(1).await;
    for expert in [7, 7, 99] {
        kept.wanted.send((1, expert)).await.unwrap();
    }
    kept.meshes.take(snapshot(2, low(), None)).unwrap();
    kept.has_loaded(2).await;
    kept.holds(|expert| expert < 8).await;
}
