//! Changes of a placement while requests run: as text, and against workers that lag, crash and come back.

#[path = "compare/transcript.rs"]
mod transcript;

use std::collections::BTreeSet;

use planner::live::{Published, Step, Workers, next_step};
use planner::placement::{LayerPlacement, Placement, Problem, place};
use planner::{Bytes, MoeLayer};
use proptest::prelude::*;

/// One layer, from the holders of each expert.
fn placement(shards: u32, experts: &[&[u32]]) -> Placement {
    let experts = experts.iter().map(|holders| holders.to_vec()).collect();
    Placement { shards, layers: vec![LayerPlacement { layer: 0, experts }] }
}

/// A worker that runs.
#[derive(Clone, Debug)]
struct Worker {
    /// The version it knows, and what it says.
    version: usize,
    published: Published,
    /// What the step that runs now asks by.
    table: Placement,
    held: BTreeSet<u32>,
    loaded: Option<usize>,
    acknowledged: usize,
}

impl Worker {
    fn start(version: usize, published: &Published) -> Self {
        Worker {
            version,
            published: published.clone(),
            table: published.placement.clone(),
            held: BTreeSet::new(),
            loaded: None,
            acknowledged: version,
        }
    }

    fn wants(&self, ordinal: u32) -> BTreeSet<u32> {
        let of = |placement: &Placement| placement.held_by(ordinal).into_values().flatten().collect::<Vec<u32>>();
        let also = self.published.also_hold.iter().flat_map(of);
        of(&self.published.placement).into_iter().chain(also).collect()
    }

    /// Drops at once what it need not hold any more, the worst it may do.
    fn hear(&mut self, ordinal: u32, version: usize, published: &Published) {
        (self.version, self.published) = (version, published.clone());
        let wants = self.wants(ordinal);
        self.held.retain(|expert| wants.contains(expert));
    }

    fn load(&mut self, ordinal: u32) {
        self.held = self.wants(ordinal);
        self.loaded = Some(self.version);
    }

    fn end_step(&mut self) {
        self.table = self.published.placement.clone();
        self.acknowledged = self.version;
    }
}

/// A replica and what its operator published.
#[derive(Clone, Debug)]
struct Replica {
    version: usize,
    published: Published,
    workers: Vec<Option<Worker>>,
}

impl Replica {
    fn new(placement: &Placement) -> Self {
        let published = Published::steady(placement.clone());
        let mut workers = vec![Some(Worker::start(0, &published)); placement.shards as usize];
        for (ordinal, worker) in (0..).zip(workers.iter_mut().flatten()) {
            worker.load(ordinal);
        }
        Replica { version: 0, published, workers }
    }

    fn seen(&self) -> Workers {
        let ordinals = |is: &dyn Fn(&Option<Worker>) -> bool| {
            (0..).zip(&self.workers).filter(|(_, worker)| is(worker)).map(|(ordinal, _)| ordinal).collect()
        };
        let reports = |version: Option<usize>| version.is_some_and(|version| version >= self.version);
        Workers {
            loaded: ordinals(&|worker| worker.as_ref().is_some_and(|worker| reports(worker.loaded))),
            acknowledged: ordinals(&|worker| worker.as_ref().is_some_and(|w| reports(Some(w.acknowledged)))),
            gone: ordinals(&Option::is_none),
        }
    }

    /// The operator looks once, and does what it finds; it remembers nothing but what is published.
    fn look(&mut self, wanted: &Placement) -> Step {
        let step = next_step(&self.published, wanted, &self.seen());
        if let Step::Publish(next, _) = &step {
            let asked_before = self.answered(&self.published.placement);
            (self.version, self.published) = (self.version + 1, next.clone());
            let asked = self.answered(&self.published.placement);
            assert!(asked_before.is_subset(&asked), "{asked_before:?} had a live holder, {asked:?} have one: {step}");
        }
        self.workers.resize(self.published.pods() as usize, None);
        step
    }

    /// The experts with a live holder that has them.
    fn answered(&self, table: &Placement) -> BTreeSet<u32> {
        let has = |(expert, holders): &(u32, &Vec<u32>)| holders.iter().any(|holder| self.holds(*holder, *expert));
        (0..).zip(&table.layers[0].experts).filter(has).map(|(expert, _)| expert).collect()
    }

    fn holds(&self, ordinal: u32, expert: u32) -> bool {
        self.workers.get(ordinal as usize).and_then(Option::as_ref).is_some_and(|worker| worker.held.contains(&expert))
    }

    /// No holder that runs and has loaded is asked for what it dropped, by any step that runs.
    fn check(&self) {
        for table in self.workers.iter().flatten().map(|worker| &worker.table) {
            for (expert, holders) in (0..).zip(&table.layers[0].experts) {
                for holder in holders {
                    assert!((*holder as usize) < self.workers.len(), "expert {expert} is asked of a pod that went");
                    let is_up = self.workers[*holder as usize].as_ref().is_some_and(|worker| worker.loaded.is_some());
                    assert!(!is_up || self.holds(*holder, expert), "worker {holder} dropped expert {expert} too early");
                }
            }
        }
    }

    fn worker(&mut self, ordinal: u32, does: What) {
        let (version, published) = (self.version, self.published.clone());
        let slot = &mut self.workers[ordinal as usize];
        match (does, slot.as_mut()) {
            (What::Crash, _) => *slot = None,
            (What::Start, None) => *slot = Some(Worker::start(version, &published)),
            (What::Hear, Some(worker)) => worker.hear(ordinal, version, &published),
            (What::Load, Some(worker)) => worker.load(ordinal),
            (What::EndStep, Some(worker)) => worker.end_step(),
            _ => {}
        }
    }

    /// All that was lost comes back, and everyone does what it should.
    fn settle(&mut self, wanted: &Placement) -> usize {
        for round in 0..20 {
            if self.look(wanted) == Step::Complete {
                return round;
            }
            for ordinal in 0..self.workers.len() as u32 {
                for does in [What::Start, What::Hear, What::Load, What::EndStep] {
                    self.worker(ordinal, does);
                    self.check();
                }
            }
        }
        panic!("it does not end: {:?}", self.published);
    }
}

#[derive(Clone, Copy, Debug)]
enum What {
    Hear,
    Load,
    EndStep,
    Crash,
    Start,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Look,
    Want(usize),
    Worker(u32, What),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let what = prop_oneof![
        4 => Just(What::Hear),
        4 => Just(What::Load),
        4 => Just(What::EndStep),
        1 => Just(What::Crash),
        2 => Just(What::Start)
    ];
    let event = prop_oneof![
        6 => Just(Event::Look),
        1 => (0..4_usize).prop_map(Event::Want),
        20 => (0..6_u32, what).prop_map(|(ordinal, what)| Event::Worker(ordinal, what))
    ];
    proptest::collection::vec(event, 0..200)
}

/// Placements of the same experts with other widths, copies and loads.
fn targets() -> impl Strategy<Value = Vec<Placement>> {
    let target = (1..=6_u32, 0..2_u32, proptest::collection::vec(1..100_u64, 6)).prop_map(|(shards, copies, loads)| {
        let layers = [MoeLayer { layer: 0, expert_bytes: Bytes(1) }];
        let (redundancy, loads) = (copies.min(shards - 1), [loads]);
        let problem =
            Problem { layers: &layers, experts: 6, shards, redundancy, loads: Some(&loads), ..Problem::default() };
        place(&problem, None).expect("there is room")
    });
    proptest::collection::vec(target, 4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn nobody_is_asked_for_what_it_dropped_and_every_change_ends(targets in targets(), events in events()) {
        let (mut replica, mut wanted) = (Replica::new(&targets[0]), 1);
        for event in events {
            match event {
                Event::Look => {
                    replica.look(&targets[wanted]);
                }
                Event::Want(other) => wanted = other,
                Event::Worker(ordinal, what) if (ordinal as usize) < replica.workers.len() => {
                    replica.worker(ordinal, what);
                }
                Event::Worker(..) => {}
            }
            replica.check();
        }
        replica.settle(&targets[wanted]);
        prop_assert_eq!(&replica.published, &Published::steady(targets[wanted].clone()));
        prop_assert_eq!(replica.workers.len() as u32, targets[wanted].shards);
    }
}

#[test]
fn an_undisturbed_change_is_three_versions() {
    let mut replica = Replica::new(&placement(2, &[&[0], &[1]]));
    assert_eq!(replica.settle(&placement(2, &[&[1], &[0]])), 3);
    assert_eq!(replica.version, 3);
}

#[test]
fn a_worker_that_never_came_does_not_hold_up_the_way_back() {
    let narrow = placement(2, &[&[0], &[1]]);
    let mut replica = Replica::new(&narrow);
    let wide = placement(3, &[&[2], &[1]]);
    replica.look(&wide);
    assert_eq!(replica.look(&wide).to_string(), "wait (worker 2 missing)");
    for ordinal in 0..2 {
        replica.worker(ordinal, What::Hear);
        replica.worker(ordinal, What::EndStep);
    }
    assert_eq!(replica.look(&narrow).to_string(), "publish 0 1, 2 pods (all ask the same holders)");
    assert_eq!(replica.look(&narrow), Step::Complete);
}

#[test]
fn what_is_published_is_kept_as_json() {
    let steady = Published::steady(placement(2, &[&[0], &[1]]));
    let text = serde_json::to_string(&steady).unwrap();
    assert_eq!(text, r#"{"placement":{"shards":2,"layers":[{"layer":0,"experts":[[0],[1]]}]}}"#);
    let moving = Published { also_hold: Some(placement(2, &[&[1], &[0]])), ..steady };
    assert_eq!(serde_json::from_str::<Published>(&serde_json::to_string(&moving).unwrap()).unwrap(), moving);
}

/// A replica whose every step is written down.
struct Told {
    replica: Replica,
    text: String,
}

impl Told {
    fn note(&mut self, text: &str) {
        self.text += &format!("{text}\n");
    }

    fn look(&mut self, wanted: &Placement) {
        let before = self.replica.published.to_string();
        let step = self.replica.look(wanted);
        self.text += &format!("  {before:<40} -> {step}\n");
    }

    fn all(&mut self, does: What) {
        for ordinal in 0..self.replica.workers.len() as u32 {
            self.replica.worker(ordinal, does);
            self.replica.check();
        }
    }

    /// A change in which nothing goes wrong, but that every answer takes its time.
    fn change(&mut self, wanted: &Placement) {
        self.look(wanted);
        self.look(wanted);
        self.all(What::Start);
        self.all(What::Hear);
        self.look(wanted);
        self.all(What::EndStep);
        self.all(What::Load);
        self.look(wanted);
        self.all(What::Hear);
        self.all(What::Load);
        self.look(wanted);
        self.all(What::EndStep);
        self.look(wanted);
        self.look(wanted);
    }
}

#[test]
fn changes_read_as_expected() {
    let four = placement(4, &[&[0], &[1], &[2], &[3]]);
    let six = placement(6, &[&[0], &[1], &[4], &[5]]);
    let mut told = Told { replica: Replica::new(&four), text: String::new() };
    told.note("rebalance: experts 0 and 3 change places");
    let even = placement(4, &[&[3], &[1], &[2], &[0]]);
    told.change(&even);
    told.note("wider: 4 to 6");
    told.change(&six);
    told.note("narrower: 6 to 3, with copies");
    let three = placement(3, &[&[0, 1], &[1, 2], &[0, 2], &[1, 2]]);
    told.change(&three);
    told.note("wider again; worker 1 is lost while others load, and comes back");
    told.look(&four);
    told.replica.worker(1, What::Crash);
    told.look(&four);
    told.all(What::Start);
    told.all(What::Hear);
    told.look(&four);
    told.all(What::Load);
    told.look(&four);
    told.note("the width is taken back before all ask the new holders");
    told.look(&three);
    told.all(What::Hear);
    told.all(What::Load);
    told.look(&three);
    told.all(What::EndStep);
    told.look(&three);
    told.look(&three);
    told.note("another placement is wanted while one loads; worker 2 is lost");
    told.look(&four);
    told.replica.worker(2, What::Crash);
    told.look(&six);
    told.all(What::Hear);
    told.all(What::EndStep);
    told.look(&six);
    told.all(What::Start);
    told.all(What::Hear);
    told.all(What::Load);
    told.look(&six);
    told.all(What::Hear);
    told.all(What::EndStep);
    told.look(&six);
    transcript::compare("live", &told.text);
}
