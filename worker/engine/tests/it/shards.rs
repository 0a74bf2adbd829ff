//! Whoever holds the experts, the answers are equal to the bit.

use engine::{Engine, ExpertBatch, ExpertsError, Held, LocalFiles, WireDtype, describe, load};

use crate::support::{Answer, ask, ask_alone, company, greedy, model, options, sharded, whole};

fn alone(name: &str) -> Vec<Answer> {
    let mut engine = whole(&model(name), &options());
    let vocab = engine::Engine::limits(&engine).vocab_size as u32;
    company(vocab).iter().map(|request| ask_alone(&mut engine, request)).collect()
}

fn any_number_of_shards_gives_the_same_bits(name: &str, shard_counts: &[usize]) {
    let expected = alone(name);
    for &shards in shard_counts {
        for member in &mut sharded(&model(name), shards, &options()) {
            let vocab = engine::Engine::limits(&member.engine).vocab_size as u32;
            let requests = company(vocab);
            let together = ask(&mut member.engine, &mut member.mesh, &requests);
            assert!(together == expected, "{name}: {shards} shards, in company");
            let solo = ask(&mut member.engine, &mut member.mesh, &requests[4..5]);
            assert!(solo[0] == expected[4], "{name}: {shards} shards, alone");
            assert_eq!(member.mesh.sent > 0, shards > 1);
        }
    }
}

#[test]
fn tiny_r1_in_1_2_4_and_8_shards_gives_the_same_bits() {
    any_number_of_shards_gives_the_same_bits("tiny-r1", &[1, 2, 4, 8]);
}

#[test]
fn f32_and_f16_models_in_shards_give_the_same_bits() {
    any_number_of_shards_gives_the_same_bits("yarn", &[1, 2, 8]);
    any_number_of_shards_gives_the_same_bits("grouped", &[3, 5, 12]);
}

#[test]
fn each_worker_has_only_its_experts_in_memory() {
    let dir = model("tiny-r1");
    let description = describe(&LocalFiles(dir.clone())).unwrap();
    let all: u64 = description.moe_layers.iter().map(|moe| moe.expert_bytes * description.experts).sum();
    let members = sharded(&dir, 4, &options());
    for (shard, member) in members.iter().enumerate() {
        assert_eq!(member.experts.weight(), (12, all / 4));
        for (layer, expert) in (0..5).flat_map(|layer| (0..17).map(move |expert| (layer, expert))) {
            let there = (1..4).contains(&layer) && expert < 16 && expert % 4 == shard;
            assert_eq!(member.experts.holds(layer, expert), there, "{layer} {expert}");
        }
    }
}

#[test]
fn experts_that_come_and_go_between_steps_change_no_bit() {
    let dir = model("tiny-r1");
    let expected = alone("tiny-r1");
    let mut member = sharded(&dir, 2, &options()).remove(0);
    let everything = load(&dir, &Held::all(), &options(), &mut |_, _| {}).unwrap().1;
    member.mesh.hold_too(everything);
    let requests = company(512);
    let ids: Vec<_> =
        requests.iter().map(|request| Engine::submit(&mut member.engine, request.clone()).unwrap()).collect();
    let mut answers = Default::default();
    for round in 0.. {
        if Engine::is_idle(&member.engine) {
            break;
        }
        // the other half of the experts in odd rounds, a few more or less in between
        let held = if round % 3 == 2 { Held::all() } else { crate::support::share(&dir, round % 2, 2) };
        for (layer, expert) in member.experts.missing(&held) {
            member.experts.load(layer, expert).unwrap();
        }
        for (layer, expert) in member.experts.beyond(&held) {
            member.experts.forget(layer, expert);
        }
        assert!(member.experts.missing(&held).is_empty() && member.experts.beyond(&held).is_empty());
        crate::support::step(&mut member.engine, &mut member.mesh, &mut answers);
    }
    assert!(member.mesh.sent > 0, "some experts were elsewhere");
    assert!(ids.iter().map(|id| answers[id].clone()).collect::<Vec<_>>() == expected);
}

#[test]
fn experts_come_and_go_while_others_compute_with_them() {
    let (_, experts) = load(&model("tiny-r1"), &Held::all(), &options(), &mut |_, _| {}).unwrap();
    let rows = (0..512).map(|at| (at * 7 % 60) as u8).collect();
    let batch = ExpertBatch { layer: 2, rows: &rows, pair_rows: &[0, 0], pair_experts: &[3, 7] };
    let expected = experts.run(&batch).unwrap();
    let (mut answered, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        let churn = scope.spawn(|| {
            for _ in 0..200 {
                experts.forget(2, 7);
                experts.load(2, 7).unwrap();
            }
        });
        while !churn.is_finished() || answered == 0 || refused == 0 {
            match experts.run(&batch) {
                Ok(rows) => {
                    assert_eq!(rows, expected);
                    answered += 1;
                }
                Err(error) => {
                    assert_eq!(error, ExpertsError::NotHeld { layer: 2, expert: 7 });
                    refused += 1;
                }
            }
            assert!(!churn.is_finished() || refused > 0, "no call came between");
        }
    });
}

#[test]
fn loading_tells_what_there_is_not() {
    let (_, experts) = load(&model("tiny-r1"), &Held::from_layers([].into()), &options(), &mut |_, _| {}).unwrap();
    assert_eq!(experts.weight(), (0, 0));
    for (layer, expert) in [(0, 0), (1, 16), (99, 0)] {
        assert!(experts.load(layer, expert).is_err() && experts.weigh(layer, expert).is_err());
        experts.forget(layer, expert);
    }
    let bytes = experts.weigh(1, 15).unwrap();
    experts.load(1, 15).unwrap();
    experts.load(1, 15).unwrap();
    assert_eq!(experts.weight(), (1, bytes));
    assert!(experts.check_held(&Held::from_layers([(1, [16].into())].into())).is_err());
}

#[test]
fn rows_are_counted_by_layer_and_expert_wherever_they_are_computed() {
    let dir = model("tiny-r1");
    let counts = |shards: usize| {
        let mut member = sharded(&dir, shards, &options()).remove(0);
        ask(&mut member.engine, &mut member.mesh, &company(512));
        member.experts.routed()
    };
    let counted = counts(1);
    assert_eq!(
        counted.iter().map(|(layer, rows)| (*layer, rows.len())).collect::<Vec<_>>(),
        [(1, 16), (2, 16), (3, 16)]
    );
    let totals: Vec<u64> = counted.iter().map(|(_, rows)| rows.iter().sum()).collect();
    assert!(totals[0] > 0 && totals.iter().all(|&total| total == totals[0]), "{totals:?}");
    assert_eq!(counts(4), counted);
}

#[test]
fn progress_counts_what_this_worker_reads() {
    let (dir, mut told) = (model("tiny-r1"), Vec::new());
    let held = crate::support::share(&dir, 0, 4);
    let (_, experts) = load(&dir, &held, &options(), &mut |done, total| told.push((done, total))).unwrap();
    let total = describe(&LocalFiles(dir)).unwrap().dense_bytes + experts.weight().1;
    assert!(told.is_sorted() && told.iter().all(|&(_, all)| all == total));
    assert_eq!(told.last(), Some(&(total, total)));
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let dir = model("tiny-r1");
    let (_, experts) = load(&dir, &Held::all(), &options(), &mut |_, _| {}).unwrap();
    assert_eq!((experts.dtype(), experts.hidden()), (WireDtype::Bf16, 256));
    let row = vec![0; 512];
    let run = |layer, rows: &[u8], pair_rows: &[u32], pair_experts: &[u32]| {
        experts.run(&ExpertBatch { layer, rows: &rows.to_vec().into(), pair_rows, pair_experts })
    };
    assert_eq!(run(1, &row, &[0, 0], &[3, 7]).unwrap().len(), 1024);
    assert_eq!(run(1, &[], &[], &[]), Ok(Vec::new()));
    assert_eq!(run(1, &row[1..], &[0], &[3]), Err(ExpertsError::Rows { bytes: 511, row: 512 }));
    for (layer, expert) in [(0, 3), (1, 16), (4, 0), (usize::MAX, 0)] {
        let refused = ExpertsError::NotHeld { layer, expert };
        assert_eq!(run(layer, &row, &[0], &[expert as u32]), Err(refused));
    }
    assert!(matches!(run(1, &row, &[1], &[3]), Err(ExpertsError::Pairs { .. })));
    assert!(matches!(run(1, &row, &[0], &[3, 4]), Err(ExpertsError::Pairs { .. })));
}

#[test]
fn a_sequence_whose_experts_are_nowhere_waits_unharmed() {
    let dir = model("tiny-r1");
    let members = sharded(&dir, 4, &options());
    let mut engine = members.into_iter().next().unwrap().engine;
    let request = greedy(&[0, 3, 314, 309], 4);
    let id = engine::Engine::submit(&mut engine, request).unwrap();
    let mut answers = Default::default();
    for _ in 0..3 {
        crate::support::step(&mut engine, &mut engine::NoPeers, &mut answers);
    }
    assert!(answers.is_empty());
    assert_eq!(engine.away(), [id]);
    assert_eq!(engine::Engine::load(&engine).running, 1);
    engine::Engine::cancel(&mut engine, id);
    assert!(engine::Engine::is_idle(&engine));
}
