//! What must hold of copies and of placements by load, whatever the numbers.

use std::collections::BTreeSet;

use planner::placement::{Placement, Problem, Unplaceable, balance, peak, place, skew_percent};
use planner::rebalance::{self, Policy, Running, Why};
use planner::{Bytes, Millis, MoeLayer};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    layers: Vec<MoeLayer>,
    experts: u32,
    shards: u32,
    redundancy: u32,
    domains: Option<Vec<u32>>,
    loads: Option<Vec<Vec<u64>>>,
    room: Option<Vec<Bytes>>,
}

impl Case {
    fn problem(&self) -> Problem<'_> {
        Problem {
            layers: &self.layers,
            experts: self.experts,
            shards: self.shards,
            redundancy: self.redundancy,
            domains: self.domains.as_deref(),
            loads: self.loads.as_deref(),
            room: self.room.as_deref(),
        }
    }

    fn domain(&self, worker: u32) -> u32 {
        let known = self.domains.as_ref().and_then(|domains| domains.get(worker as usize).copied());
        known.unwrap_or(1000 + worker)
    }

    fn domain_count(&self) -> usize {
        (0..self.shards).map(|worker| self.domain(worker)).collect::<BTreeSet<u32>>().len()
    }

    fn copies_bytes(&self) -> u64 {
        let all: u64 = self.layers.iter().map(|layer| layer.expert_bytes.0).sum();
        all * u64::from(self.experts) * u64::from(self.redundancy + 1)
    }
}

fn layers() -> impl Strategy<Value = Vec<MoeLayer>> {
    let numbered =
        |bytes: Vec<u64>| (0..).zip(bytes).map(|(layer, b)| MoeLayer { layer, expert_bytes: Bytes(b) }).collect();
    proptest::collection::vec(1..4_u64, 1..5).prop_map(numbered)
}

/// Problems of all kinds, also such that have no answer.
fn cases() -> impl Strategy<Value = Case> {
    (layers(), 1..24_u32, 1..9_u32, 0..3_u32).prop_flat_map(|(layers, experts, shards, redundancy)| {
        let domains = proptest::option::of(proptest::collection::vec(0..4_u32, 0..=shards as usize));
        let rows = prop_oneof![1 => Just(0_u64), 4 => 0..1000_u64, 1 => 0..1_000_000_u64];
        let loads = proptest::collection::vec(proptest::collection::vec(rows, experts as usize), layers.len());
        let room = proptest::option::of(proptest::collection::vec(80..250_u64, shards as usize));
        (domains, proptest::option::of(loads), room).prop_map(move |(domains, loads, room)| {
            let mut case = Case { layers: layers.clone(), experts, shards, redundancy, domains, loads, room: None };
            let even = case.copies_bytes() / u64::from(shards) + 1;
            case.room = room.map(|parts| parts.into_iter().map(|part| Bytes(even * part / 100)).collect());
            case
        })
    })
}

/// A problem, and another of the same model.
fn pairs() -> impl Strategy<Value = (Case, Case)> {
    (cases(), cases()).prop_map(|(one, other)| {
        let loads = other.loads.clone().map(|loads| {
            let of = |layer: usize| loads.get(layer).cloned().unwrap_or_else(|| vec![1; one.experts as usize]);
            (0..one.layers.len()).map(of).collect()
        });
        let same = Case { layers: one.layers.clone(), experts: one.experts, loads, room: None, ..other };
        (one, same)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn copies_are_apart_and_within_the_room_or_the_answer_is_no((first, second) in pairs()) {
        let before = place(&first.problem(), None).ok();
        for (case, previous) in [(&first, None), (&second, before.as_ref()), (&first, before.as_ref())] {
            let copies = case.redundancy as usize + 1;
            match place(&case.problem(), previous) {
                Ok(placement) => {
                    prop_assert!(placement.meets(&case.problem()), "{placement:?}");
                    for holders in placement.layers.iter().flat_map(|layer| &layer.experts) {
                        let domains: BTreeSet<u32> = holders.iter().map(|holder| case.domain(*holder)).collect();
                        let workers: BTreeSet<&u32> = holders.iter().collect();
                        prop_assert!(domains.len() >= copies && workers.len() == holders.len(), "{holders:?}");
                    }
                    prop_assert!(placement.min_copies(|_| true) >= Some(copies as u32));
                    let held = placement.expert_bytes(&case.layers);
                    for (held, room) in held.iter().zip(case.room.iter().flatten()) {
                        prop_assert!(held <= room, "{held} of {room}");
                    }
                }
                Err(Unplaceable::TooFewDomains { .. }) => prop_assert!(case.domain_count() < copies),
                Err(Unplaceable::TooLittleRoom { .. }) => prop_assert!(case.room.is_some()),
            }
        }
    }

    #[test]
    fn equal_problems_have_equal_answers((first, second) in pairs()) {
        let before = place(&first.problem(), None).ok();
        prop_assert_eq!(place(&second.problem(), before.as_ref()), place(&second.problem(), before.as_ref()));
        let scaled = second.loads.as_ref().map(|loads| {
            loads.iter().map(|rows| rows.iter().map(|rows| rows << 40).collect()).collect()
        });
        let scaled = Case { loads: scaled, ..second };
        prop_assert!(place(&scaled.problem(), before.as_ref()).is_ok() == (scaled.domain_count() > scaled.redundancy as usize));
    }

    #[test]
    fn placing_copies_again_comes_to_rest(case in cases()) {
        let Ok(mut placement) = place(&case.problem(), None) else { return Ok(()) };
        for round in 0.. {
            let again = place(&case.problem(), Some(&placement)).expect("it is one already");
            if again == placement {
                break;
            }
            prop_assert!(case.loads.is_some() && round < 64, "round {}", round);
            placement = again;
        }
    }

    #[test]
    fn the_peak_is_the_densest_set_of_workers(
        rows in proptest::collection::vec(0..50_u64, 1..12), seed in proptest::collection::vec(1..32_u32, 12)
    ) {
        let holders: Vec<Vec<u32>> =
            seed.iter().take(rows.len()).map(|bits| (0..5).filter(|worker| bits >> worker & 1 == 1).collect()).collect();
        let found = peak(&rows, &holders, 5);
        let dense = |set: u32| {
            let inside = |holders: &Vec<u32>| holders.iter().all(|holder| set >> holder & 1 == 1);
            let rows: u64 = rows.iter().zip(&holders).filter(|(_, holders)| inside(holders)).map(|(rows, _)| rows).sum();
            (rows, set.count_ones())
        };
        // By hand: the largest quotient over all sets of workers.
        let more = |(rows, workers): (u64, u32)| rows * u64::from(found.workers) > found.rows * u64::from(workers);
        prop_assert!((1..32).map(dense).all(|set| !more(set)));
        prop_assert!((1..32).map(dense).any(|(rows, workers)| rows * u64::from(found.workers) == found.rows * u64::from(workers)));
    }
}

/// Log-normal loads of one seed: the same on every machine that rounds as IEEE 754 says, and only used with margins.
fn log_normal(draws: &mut impl FnMut() -> f64, sigma: f64) -> f64 {
    let (one, two) = (draws(), draws());
    ((-2.0 * one.ln()).sqrt() * (std::f64::consts::TAU * two).cos() * sigma).exp()
}

fn draws(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64 + f64::EPSILON
    }
}

/// Balance as planned and after drift, of 8 layers with 256 experts of skewed load.
fn drifted(shards: u32, slots: u32, drift: f64) -> (f64, f64) {
    let mut draws = draws(3);
    let loads: Vec<Vec<u64>> =
        (0..8).map(|_| (0..256).map(|_| (log_normal(&mut draws, 1.0) * 1e4) as u64 + 1).collect()).collect();
    let after: Vec<Vec<u64>> = loads
        .iter()
        .map(|layer| layer.iter().map(|rows| (*rows as f64 * log_normal(&mut draws, drift)) as u64 + 1).collect())
        .collect();
    let layers: Vec<MoeLayer> = (0..8).map(|layer| MoeLayer { layer, expert_bytes: Bytes(1) }).collect();
    let room = vec![Bytes(u64::from(8 * slots / shards)); shards as usize];
    let problem =
        Problem { layers: &layers, experts: 256, shards, loads: Some(&loads), room: Some(&room), ..Problem::default() };
    let placement = place(&problem, None).expect("there is room");
    (balance(&placement, &loads), balance(&placement, &after))
}

#[test]
fn balance_lasts_when_the_load_drifts() {
    for (shards, slots, drift, least) in [
        (8, 288, 0.15, 0.99),
        (8, 288, 0.40, 0.99),
        (32, 288, 0.15, 0.95),
        (32, 320, 0.15, 0.99),
        (32, 320, 0.40, 0.98),
    ] {
        let (planned, after) = drifted(shards, slots, drift);
        assert!(planned > 0.99 && after > least, "{shards} workers, {slots} slots, drift {drift}: {planned} {after}");
    }
}

/// All ways to hold each of the experts once or more on three workers with so many slots.
fn all_placements(experts: usize, slots: [usize; 3]) -> Vec<Placement> {
    let mut all = vec![Vec::new()];
    for _ in 0..experts {
        let with = |placed: &Vec<u32>| (1..8_u32).map(|set| [&placed[..], &[set]].concat()).collect::<Vec<Vec<u32>>>();
        all = all.iter().flat_map(with).collect();
    }
    let fits = |sets: &&Vec<u32>| {
        (0..3).all(|worker| sets.iter().filter(|set| **set >> worker & 1 == 1).count() <= slots[worker])
    };
    let placement = |sets: &Vec<u32>| Placement {
        shards: 3,
        layers: vec![planner::placement::LayerPlacement {
            layer: 0,
            experts: sets.iter().map(|set| (0..3).filter(|worker| set >> worker & 1 == 1).collect()).collect(),
        }],
    };
    all.iter().filter(fits).map(placement).collect()
}

#[test]
fn few_more_copies_move_than_the_least_that_reaches_the_balance() {
    let layers = [MoeLayer { layer: 0, expert_bytes: Bytes(1) }];
    let room = [Bytes(3), Bytes(2), Bytes(2)];
    let all = all_placements(5, [3, 2, 2]);
    let (mut moved, mut least_moved) = (0, 0);
    for seed in 0..60 {
        let mut draws = draws(seed);
        let mut loads = || [(0..5).map(|_| (log_normal(&mut draws, 1.0) * 1000.0) as u64).collect::<Vec<u64>>()];
        let (first, then) = (loads(), loads());
        let problem = |loads| Problem {
            layers: &layers,
            experts: 5,
            shards: 3,
            loads: Some(loads),
            room: Some(&room),
            ..Problem::default()
        };
        let running = place(&problem(&first), None).expect("there is room");
        let next = place(&problem(&then), Some(&running)).expect("there is room");
        let reached = balance(&next, &then);
        let as_good = all.iter().filter(|other| balance(other, &then) >= reached);
        let least = as_good.map(|other| other.bytes_from(&running, &layers).0).min().expect("ours is one of them");
        let ours = next.bytes_from(&running, &layers).0;
        assert!(ours <= 2 * least + 3, "seed {seed}: {ours} moved, {least} would do");
        (moved, least_moved) = (moved + ours, least_moved + least);
    }
    assert!(moved <= 2 * least_moved, "{moved} moved in all, {least_moved} would do");
}

#[test]
fn one_lost_worker_is_replaced_by_many() {
    let layers = [MoeLayer { layer: 0, expert_bytes: Bytes(1) }];
    let problem = Problem { layers: &layers, experts: 16, shards: 4, redundancy: 1, ..Problem::default() };
    let placement = place(&problem, None).expect("there is room");
    for lost in 0..4 {
        assert_eq!(placement.covered(|ordinal| ordinal != lost), Some(16));
        assert_eq!(placement.min_copies(|ordinal| ordinal != lost), Some(1));
        let others: BTreeSet<u32> = placement.layers[0]
            .experts
            .iter()
            .filter(|holders| holders.contains(&lost))
            .flat_map(|holders| holders.iter().copied().filter(|holder| *holder != lost))
            .collect();
        assert!(others.len() >= 2, "worker {lost} shares with {others:?} only");
    }
}

#[test]
fn copies_that_cannot_be_are_told_with_numbers() {
    let layers = [MoeLayer { layer: 0, expert_bytes: Bytes(1 << 20) }];
    let ask = Problem { layers: &layers, experts: 16, shards: 4, redundancy: 2, ..Problem::default() };
    let text = |problem: &Problem<'_>| place(problem, None).expect_err("it cannot be placed").to_string();
    assert_eq!(
        text(&Problem { domains: Some(&[7, 9, 7, 9]), ..ask }),
        "3 copies of 16 experts need 3 failure domains, there are 2"
    );
    assert_eq!(
        text(&Problem { room: Some(&[Bytes(12 << 20), Bytes(4 << 20), Bytes(12 << 20), Bytes(0)]), ..ask }),
        "3 copies of 16 experts need 4 workers with 12Mi for experts on 3 failure domains, 2 have it"
    );
}

#[test]
fn skew_is_what_the_fullest_worker_has_above_the_mean() {
    let placement = Placement {
        shards: 2,
        layers: vec![planner::placement::LayerPlacement { layer: 0, experts: vec![vec![0], vec![1], vec![0, 1]] }],
    };
    assert_eq!(skew_percent(&placement, &[vec![60, 20, 0]]), Some(50));
    assert_eq!(skew_percent(&placement, &[vec![60, 20, 40]]), Some(0));
    assert_eq!(skew_percent(&placement, &[vec![0, 0, 0]]), None);
    assert_eq!(skew_percent(&placement, &[]), None);
    assert_eq!(skew_percent(&placement, &[vec![u64::MAX, u64::MAX, u64::MAX]]), Some(0));
}

/// Four experts on two workers, hot ones together: worth a move.
struct Uneven {
    layers: [MoeLayer; 1],
    loads: [Vec<u64>; 1],
    running: Placement,
}

impl Uneven {
    fn new() -> Self {
        let layers = [MoeLayer { layer: 0, expert_bytes: Bytes(100 << 20) }];
        let problem = Problem { layers: &layers, experts: 4, shards: 2, ..Problem::default() };
        let running = place(&problem, None).expect("there is room");
        Uneven { layers, loads: [vec![4000, 4000, 1000, 1000]], running }
    }

    fn decide(&self, running: Running<'_>, policy: &Policy) -> String {
        let (layers, loads) = (&self.layers, Some(&self.loads[..]));
        let problem = Problem { layers, experts: 4, shards: 2, loads, ..Problem::default() };
        rebalance::decide(&problem, &running, policy).to_string()
    }
}

#[test]
fn a_move_is_made_if_it_pays_and_told_why_if_not() {
    let uneven = Uneven::new();
    let running = Running { placement: &uneven.running, changed: None, room: None };
    let policy = Policy::default();
    let slow = Policy { load_rate: Bytes(1 << 10), ..policy };
    let tight = [Bytes(250 << 20), Bytes(300 << 20)];
    let cases = [
        (running, policy, "move 200Mi in 500 ms: balance 62.5% -> 100.0%, 60.0% faster (worth the move)"),
        (
            running,
            Policy { rows_an_expert: 9000, ..policy },
            "stay at 0.0% (2500 rows an expert measured, 9000 needed)",
        ),
        (
            Running { changed: Some(Millis::from_secs(60)), ..running },
            policy,
            "stay at 62.5% (changed lately, 540 s left)",
        ),
        (running, Policy { least_gain_permille: 700, ..policy }, "stay at 62.5% (less than 70.0% faster)"),
        (running, slow, "stay at 62.5% (the move costs 20480000 ms, the gain is 360000 ms)"),
        (
            Running { room: Some(&tight), ..running },
            policy,
            "stay at 62.5% (worker 0 would need 300Mi for old and new experts, it has 250Mi)",
        ),
    ];
    for (running, policy, text) in cases {
        assert_eq!(uneven.decide(running, &policy), text);
    }
}

proptest! {
    #[test]
    fn what_was_just_moved_for_a_load_stays_for_that_load(case in cases(), rows in proptest::collection::vec(64..9000_u64, 24)) {
        let loads = vec![rows[..case.experts as usize].to_vec(); case.layers.len()];
        let case = Case { loads: Some(loads), ..case };
        let plain = Case { loads: None, ..case.clone() };
        let Ok(running) = place(&plain.problem(), None) else { return Ok(()) };
        let policy = Policy { least_gain_permille: 20, ..Policy::default() };
        let decide = |placement| rebalance::decide(&case.problem(), &Running { placement, changed: None, room: None }, &policy);
        let first = decide(&running);
        if let Some(moved) = &first.to {
            prop_assert!(moved.meets(&case.problem()));
            let second = decide(moved);
            prop_assert!(matches!(second.why, Why::GainTooSmall { .. }), "{first}, then {second}");
        }
    }
}
