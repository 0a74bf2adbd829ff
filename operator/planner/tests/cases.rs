//! The cases that a reader asks for first, one test a promise.

use planner::autoscale::{Decision, History, Load, Policy, Why, decide};
use planner::rollout::{self, Replica, ReplicaId, State, Wanted, next_step};
use planner::{Bytes, Millis, ModelDescription, MoeLayer, NoRoom, Outcome, Plan, Request, Tokens, plan};

/// Like tiny-r1: one dense layer, three with 16 experts.
fn tiny() -> ModelDescription {
    ModelDescription {
        dense_bytes: Bytes(3 << 20),
        kv_bytes_per_token: Bytes(1152),
        max_context_tokens: Tokens(1024),
        vocab_size: 512,
        hidden_size: 256,
        layers: 4,
        experts: 16,
        experts_per_token: 4,
        moe_layers: (1..4).map(|layer| MoeLayer { layer, expert_bytes: Bytes(98_304) }).collect(),
        ..ModelDescription::default()
    }
}

fn planned(model: &ModelDescription, request: &Request) -> Plan {
    match plan(model, request) {
        Outcome::Planned(plan) => plan,
        Outcome::NoRoom(why) => panic!("{why}"),
    }
}

fn refused(model: &ModelDescription, request: &Request) -> String {
    match plan(model, request) {
        Outcome::Planned(plan) => panic!("{plan:?}"),
        Outcome::NoRoom(why) => why.to_string(),
    }
}

#[test]
fn four_shards_hold_four_experts_a_layer_each() {
    let plan = planned(&tiny(), &Request { shards: Some(4), ..Request::default() });
    for ordinal in 0..4 {
        let held = plan.placement.held_by(ordinal);
        let experts: Vec<u32> = (4 * ordinal..4 * ordinal + 4).collect();
        assert_eq!(held.keys().copied().collect::<Vec<u32>>(), [1, 2, 3]);
        assert!(held.values().all(|held| *held == experts), "{held:?}");
    }
    assert_eq!(plan.workers[0].experts, Bytes(12 * 98_304));
    assert_eq!(plan.placement.covered(|ordinal| ordinal != 2), Some(12));
}

#[test]
fn a_placement_is_the_file_that_workers_read() {
    let model = ModelDescription { experts: 2, moe_layers: tiny().moe_layers[..1].to_vec(), ..tiny() };
    let plan = planned(&model, &Request { shards: Some(2), ..Request::default() });
    let text = serde_json::to_string(&plan.placement).unwrap();
    assert_eq!(text, r#"{"shards":2,"layers":[{"layer":1,"experts":[[0],[1]]}]}"#);
}

#[test]
fn nothing_asked_is_one_worker_with_a_cache_of_eight_contexts() {
    let plan = planned(&tiny(), &Request::default());
    assert_eq!((plan.shards, plan.kv_cache_tokens), (1, Tokens(8 * 1024)));
}

#[test]
fn a_limit_gives_the_fewest_workers_that_fit_and_the_rest_to_the_cache() {
    let whole = planned(&tiny(), &Request { kv_cache_tokens: Some(Tokens(1024)), ..Request::default() });
    let limit = Bytes(whole.fullest().total().0 - 1);
    let plan = planned(&tiny(), &Request { worker_memory: Some(limit), ..Request::default() });
    assert_eq!(plan.shards, 2);
    assert!(plan.kv_cache_tokens > Tokens(1024));
    assert!(plan.fullest().total() <= limit);
    assert!(plan.fullest().total().plus(Bytes(1152)) > limit, "one token more would not fit");
}

#[test]
fn a_dense_model_is_one_worker() {
    let dense = ModelDescription { experts: 0, moe_layers: Vec::new(), ..tiny() };
    let plan = planned(&dense, &Request { worker_memory: Some(Bytes(1 << 30)), ..Request::default() });
    assert_eq!((plan.shards, plan.placement.layers.len()), (1, 0));
    assert_eq!(plan.placement.covered(|_| true), None);
    let text = refused(&dense, &Request { shards: Some(2), ..Request::default() });
    assert_eq!(text, "spec.parallelism.expert.shards is 2; the model has no routed experts, so use 1");
}

#[test]
fn what_does_not_fit_is_told_with_numbers() {
    let ask = Request::default();
    let cases = [
        (
            Request { shards: Some(32), ..ask.clone() },
            "spec.parallelism.expert.shards is 32; the model has 16 experts a layer, so use at most 16",
        ),
        (
            Request { max_context_tokens: Some(Tokens(4096)), ..ask.clone() },
            "spec.model.maxContextTokens is 4096; the model takes 1024, so use at most 1024",
        ),
        (
            Request { kv_cache_tokens: Some(Tokens(512)), ..ask.clone() },
            "spec.memory.kvCacheTokens is 512; one request may be 1024 tokens long, so use at least 1024 or lower \
             spec.model.maxContextTokens",
        ),
        (
            Request { worker_memory: Some(Bytes(32 << 20)), shards: Some(4), ..ask },
            "spec.resources.limits.memory is 32Mi; with 4 shards a worker needs 62.3Mi (dense 3Mi, experts 1.2Mi, \
             cache 1.2Mi, activations 9Mi, program 48Mi), so use at least 62.3Mi",
        ),
    ];
    for (request, text) in cases {
        assert_eq!(refused(&tiny(), &request), text);
    }
}

#[test]
fn copies_need_workers_and_memory_and_are_refused_with_what_would_do() {
    let with = |redundancy, shards| Request { redundancy, shards, ..Request::default() };
    assert_eq!(planned(&tiny(), &with(1, None)).shards, 2);
    let four = planned(&tiny(), &with(1, Some(4)));
    assert_eq!(four.workers[0].experts, Bytes(2 * 12 * 98_304));
    assert_eq!(four.placement.min_copies(|_| true), Some(2));
    let cases = [
        (
            with(2, Some(2)),
            "spec.parallelism.expert.redundancy is 2; spec.parallelism.expert.shards is 2, so use at most 1, or at least 3 \
             shards",
        ),
        (
            with(16, None),
            "spec.parallelism.expert.redundancy is 16; the model has 16 experts a layer, so at most 16 shards, so use at \
             most 15",
        ),
    ];
    for (request, text) in cases {
        assert_eq!(refused(&tiny(), &request), text);
    }
    let dense = ModelDescription { experts: 0, moe_layers: Vec::new(), ..tiny() };
    let text = "spec.parallelism.expert.redundancy is 1; the model has no routed experts, so use 0";
    assert_eq!(refused(&dense, &with(1, None)), text);
}

#[test]
fn the_fewest_workers_hold_all_copies() {
    let two = planned(&tiny(), &Request { shards: Some(2), kv_cache_tokens: Some(Tokens(1024)), ..Request::default() });
    let limit = Some(two.fullest().total());
    let request = Request { redundancy: 1, worker_memory: limit, ..Request::default() };
    assert_eq!(planned(&tiny(), &request).shards, 4, "twice the copies in the same memory");
}

#[test]
fn too_few_domains_are_told_with_what_the_workers_need() {
    let plan = planned(&tiny(), &Request { redundancy: 1, shards: Some(3), ..Request::default() });
    let told = plan.spread_over(1, "zone", 1).map(|why| why.to_string());
    let memory = plan.fullest().total();
    let text = format!("2 copies of 16 experts need 3 workers of {memory} on 2 zones, 1 zone has room");
    assert_eq!(told.as_deref(), Some(text.as_str()));
    assert_eq!(plan.spread_over(1, "zone", 2), None);
}

#[test]
fn an_eighth_of_the_room_stays_free_for_experts_on_the_move() {
    let plan = planned(&tiny(), &Request { redundancy: 1, shards: Some(4), ..Request::default() });
    let fullest = plan.fullest();
    let room = plan.expert_room(fullest.total().plus(Bytes(80 << 20)));
    assert_eq!(room.moving, fullest.experts.plus(Bytes(80 << 20)));
    assert_eq!(room.steady, Bytes(room.moving.0 - room.moving.0.div_ceil(8)));
    let tight = plan.expert_room(fullest.total());
    assert_eq!((tight.steady, tight.moving), (fullest.experts, fullest.experts));
}

#[test]
fn a_limit_that_is_too_small_for_the_shards_names_how_many_would_fit() {
    let whole = planned(&tiny(), &Request { kv_cache_tokens: Some(Tokens(1024)), ..Request::default() });
    let half = whole.fullest().total().minus(whole.fullest().experts).plus(Bytes(24 * 98_304));
    let request = |shards, redundancy| Request {
        shards: Some(shards),
        redundancy,
        worker_memory: Some(half),
        ..Request::default()
    };
    let one = refused(&tiny(), &request(1, 0));
    let wider = "; with 1 shard a worker needs 65.7Mi (dense 3Mi, experts 4.5Mi, cache 1.2Mi, activations 9Mi, \
         program 48Mi), so use at least 65.7Mi, or at least 2 in spec.parallelism.expert.shards";
    assert_eq!(one, format!("spec.resources.limits.memory is {half}{wider}"));
    let copied = refused(&tiny(), &request(3, 1));
    assert!(copied.ends_with(", or at least 4 in spec.parallelism.expert.shards"), "{copied}");
    planned(&tiny(), &request(2, 0));
    planned(&tiny(), &request(4, 1));
}

#[test]
fn a_limit_that_never_fits_names_the_widest_try() {
    let request = Request { worker_memory: Some(Bytes(1 << 20)), ..Request::default() };
    let Outcome::NoRoom(NoRoom::MemoryTooSmall { shards, .. }) = plan(&tiny(), &request) else { panic!() };
    assert_eq!(shards, 16);
}

const POLICY: Policy = Policy { min: 0, max: 5, target: 4, window: Millis(60_000), idle_after: Millis(30_000) };

fn load(queued: u64, running: u64, at: u64) -> Load {
    Load { queued, running, at: Millis::from_secs(at) }
}

fn decided(current: u32, load: Option<Load>, history: &mut History, now: u64) -> (u32, Why) {
    let Decision { to, why, .. } = decide(&POLICY, current, load.as_ref(), history, Millis::from_secs(now));
    (to, why)
}

#[test]
fn one_decision_at_a_time_has_the_reason_that_a_person_expects() {
    let cases = [
        (0, Some(load(1, 0, 100)), (1, Why::Woken)),
        (0, Some(load(30, 0, 100)), (5, Why::Woken)),
        (0, Some(load(0, 0, 100)), (0, Why::Steady)),
        (1, Some(load(0, 4, 100)), (1, Why::Steady)),
        (1, Some(load(1, 4, 100)), (2, Why::ScaledUp)),
        (2, Some(load(90, 8, 100)), (5, Why::ScaledUp)),
        (5, Some(load(90, 20, 100)), (5, Why::AtMaximum)),
        (3, Some(load(0, 1, 100)), (3, Why::Stabilizing)),
        (3, Some(load(0, 8, 100)), (3, Why::RedistributionTooHigh)),
        (3, None, (3, Why::LoadMissing)),
        (3, Some(load(0, 0, 90)), (3, Why::LoadStale)),
        (7, None, (5, Why::AtMaximum)),
    ];
    for (current, load, expected) in cases {
        let mut history = History::new(current, Millis::from_secs(100));
        assert_eq!(decided(current, load, &mut history, 100), expected, "{current} {load:?}");
    }
}

#[test]
fn it_shrinks_to_the_largest_number_wanted_over_the_window() {
    let mut history = History::new(4, Millis(0));
    assert_eq!(decided(4, Some(load(0, 10, 30)), &mut history, 30), (4, Why::Stabilizing));
    assert_eq!(decided(4, Some(load(0, 1, 59)), &mut history, 59), (4, Why::Stabilizing));
    assert_eq!(decided(4, Some(load(0, 1, 60)), &mut history, 60), (3, Why::ScaledDown));
    assert_eq!(decided(3, Some(load(0, 1, 90)), &mut history, 90), (1, Why::ScaledDown));
}

#[test]
fn it_sleeps_only_after_the_idle_time_and_a_gap_in_the_load_begins_it_anew() {
    let mut history = History::new(1, Millis(0));
    assert_eq!(decided(1, Some(load(0, 1, 10)), &mut history, 10), (1, Why::Steady));
    assert_eq!(decided(1, Some(load(0, 0, 39)), &mut history, 39), (1, Why::Steady));
    assert_eq!(decided(1, None, &mut history, 40), (1, Why::LoadMissing));
    assert_eq!(decided(1, Some(load(0, 0, 69)), &mut history, 69), (1, Why::Steady));
    assert_eq!(decided(1, Some(load(0, 0, 70)), &mut history, 70), (0, Why::ScaledToZero));
}

#[test]
fn a_new_leader_watches_a_whole_window_before_it_shrinks() {
    let mut history = History::new(4, Millis::from_secs(1000));
    assert_eq!(decided(4, Some(load(0, 1, 1059)), &mut history, 1059), (4, Why::Stabilizing));
    assert_eq!(decided(4, Some(load(0, 1, 1060)), &mut history, 1060), (1, Why::ScaledDown));
}

fn replica(revision: &str, index: u32, state: State, running: u64) -> Replica {
    Replica { id: ReplicaId { revision: revision.to_owned(), index }, state, running }
}

fn wanted(replicas: u32) -> Wanted {
    Wanted { revision: "a".to_owned(), replicas, max_surge: 1, max_unavailable: 0, drain_timeout: Millis(60_000) }
}

#[test]
fn the_replica_with_the_least_to_do_goes_first() {
    let replicas = [
        replica("a", 0, State::Ready, 5),
        replica("a", 1, State::Ready, 2),
        replica("a", 2, State::Ready, 9),
        replica("a", 3, State::Starting, 0),
    ];
    let step = next_step(&wanted(2), &replicas, Millis(0));
    assert_eq!(step.to_string(), "drain a-3 a-1 (shrinking)");
}

#[test]
fn growth_takes_back_what_drains_before_it_makes_anything() {
    let draining = State::Draining { since: Millis(0), empty: false };
    let replicas = [replica("a", 0, State::Ready, 1), replica("a", 1, draining, 1)];
    let step = next_step(&wanted(3), &replicas, Millis(1_000));
    assert_eq!(step.to_string(), "take back a-1, make a-2 (growing)");
}

#[test]
fn nothing_is_deleted_before_it_is_empty_or_out_of_time() {
    let draining = State::Draining { since: Millis(0), empty: false };
    let replicas = [replica("a", 0, State::Ready, 1), replica("a", 1, draining, 1)];
    assert_eq!(next_step(&wanted(1), &replicas, Millis(59_999)).delete, []);
    assert_eq!(next_step(&wanted(1), &replicas, Millis(60_000)).to_string(), "delete a-1 (shrinking)");
    let empty = State::Draining { since: Millis(0), empty: true };
    let replicas = [replica("a", 0, State::Ready, 1), replica("a", 1, empty, 0)];
    assert_eq!(next_step(&wanted(1), &replicas, Millis(1)).to_string(), "delete a-1 (shrinking)");
}

#[test]
fn a_broken_old_replica_is_kept_while_the_new_one_is_not_ready_either() {
    let replicas = [
        replica("old", 0, State::Ready, 1),
        replica("old", 1, State::Starting, 0),
        replica("a", 0, State::Starting, 0),
    ];
    let step = next_step(&wanted(2), &replicas, Millis(0));
    assert_eq!(step.why, rollout::Why::Loading { replicas: 1 });
    assert!(step.drain.is_empty() && step.create.is_empty());
}

#[test]
fn a_revision_that_never_worked_is_replaced_by_one_that_does() {
    let replicas = [
        replica("old", 0, State::Starting, 0),
        replica("old", 1, State::Starting, 0),
        replica("a", 0, State::Ready, 0),
    ];
    let step = next_step(&wanted(2), &replicas, Millis(0));
    assert_eq!(step.to_string(), "drain old-1 (shrinking)");
}
