//! What must hold of every plan, rollout and scaling, whatever the numbers.

use planner::autoscale::{self, History, Load, Policy};
use planner::placement::{Placement, Problem, place};
use planner::rollout::{Replica, ReplicaId, State, Step, Wanted, next_step};
use planner::{Bytes, Millis, ModelDescription, MoeLayer, Outcome, Request, Tokens, plan};
use proptest::prelude::*;

fn layers() -> impl Strategy<Value = Vec<MoeLayer>> {
    let bytes = proptest::collection::vec(1..5_u64, 1..8);
    bytes.prop_map(|all| {
        let layer = |(layer, bytes)| MoeLayer { layer, expert_bytes: Bytes(bytes) };
        (0..).zip(all).map(layer).collect()
    })
}

/// Layers, experts, and two numbers of workers.
fn problems() -> impl Strategy<Value = (Vec<MoeLayer>, u32, u32, u32)> {
    (layers(), 1..40_u32).prop_flat_map(|(layers, experts)| (Just(layers), Just(experts), 1..=experts, 1..=experts))
}

fn placed(layers: &[MoeLayer], experts: u32, shards: u32, previous: Option<&Placement>) -> Placement {
    place(&Problem { layers, experts, shards, ..Problem::default() }, previous).expect("one copy always has room")
}

fn spread(placement: &Placement, layers: &[MoeLayer]) -> u64 {
    let bytes = placement.expert_bytes(layers);
    let most = bytes.iter().max().map_or(0, |bytes| bytes.0);
    most - bytes.iter().min().map_or(0, |bytes| bytes.0)
}

fn largest(layers: &[MoeLayer]) -> u64 {
    layers.iter().map(|layer| layer.expert_bytes.0).max().unwrap_or_default()
}

proptest! {
    #[test]
    fn every_expert_of_every_layer_is_placed_once((layers, experts, shards, _) in problems()) {
        let placement = placed(&layers, experts, shards, None);
        prop_assert_eq!(placement.layers.len(), layers.len());
        for (layer, expected) in placement.layers.iter().zip(&layers) {
            prop_assert_eq!(layer.layer, expected.layer);
            prop_assert_eq!(layer.experts.len(), experts as usize);
            prop_assert!(layer.experts.iter().all(|holders| holders.len() == 1 && holders[0] < shards));
        }
        prop_assert_eq!(placement.covered(|_| true), Some(experts));
    }

    #[test]
    fn bytes_are_balanced_within_one_expert((layers, experts, shards, others) in problems()) {
        let first = placed(&layers, experts, shards, None);
        prop_assert!(spread(&first, &layers) <= largest(&layers));
        let second = placed(&layers, experts, others, Some(&first));
        prop_assert!(spread(&second, &layers) <= largest(&layers));
    }

    #[test]
    fn no_layer_gives_a_worker_two_experts_more_than_another((layers, experts, shards, others) in problems()) {
        let first = placed(&layers, experts, shards, None);
        let second = placed(&layers, experts, others, Some(&first));
        for layer in &second.layers {
            let held = |ordinal| layer.experts.iter().filter(|holders| holders[0] == ordinal).count();
            let counts: Vec<usize> = (0..others).map(held).collect();
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
        }
    }

    #[test]
    fn a_first_placement_is_contiguous((layers, experts, shards, _) in problems()) {
        for layer in placed(&layers, experts, shards, None).layers {
            prop_assert!(layer.experts.windows(2).all(|pair| pair[0][0] <= pair[1][0]));
        }
    }

    #[test]
    fn placing_again_moves_nothing((layers, experts, shards, others) in problems()) {
        let first = placed(&layers, experts, shards, None);
        prop_assert_eq!(&placed(&layers, experts, shards, Some(&first)), &first);
        let second = placed(&layers, experts, others, Some(&first));
        prop_assert_eq!(&placed(&layers, experts, others, Some(&second)), &second);
    }

    #[test]
    fn a_new_width_moves_no_more_than_shares_and_balance_ask((layers, experts, shards, others) in problems()) {
        let before = placed(&layers, experts, shards, None);
        let after = placed(&layers, experts, others, Some(&before));
        // What no placement can spare: experts of workers that go, and shares of workers that come.
        let (common, per_layer) = (shards.min(others), |placement: &Placement, from: u32| {
            placement.layers.iter().map(|l| l.experts.iter().filter(|h| h[0] >= from).count()).sum::<usize>()
        });
        let forced = per_layer(&before, common).max(per_layer(&after, common));
        // And in each layer, the workers that get the odd expert may change.
        let odd = layers.len() * (experts % others) as usize;
        prop_assert!(after.moved_from(&before) <= forced + odd, "{} > {forced} + {odd}", after.moved_from(&before));
    }

    #[test]
    fn a_placement_of_another_model_does_no_harm(
        (layers, experts, shards, _) in problems(), (others, other_experts, other_shards, _) in problems()
    ) {
        let previous = placed(&others, other_experts, other_shards, None);
        let placement = placed(&layers, experts, shards, Some(&previous));
        prop_assert_eq!(placement.covered(|ordinal| ordinal < shards), Some(experts));
    }
}

fn descriptions() -> impl Strategy<Value = ModelDescription> {
    (layers(), 0..32_u32, 0..1000_u64, 1..100_u64, 1..500_u64).prop_map(|(layers, experts, dense, kv, context)| {
        ModelDescription {
            experts,
            experts_per_token: experts.min(4),
            dense_bytes: Bytes(dense << 20),
            kv_bytes_per_token: Bytes(kv << 10),
            max_context_tokens: Tokens(context),
            hidden_size: 64,
            vocab_size: 512,
            moe_layers: layers
                .into_iter()
                .map(|layer| MoeLayer { expert_bytes: Bytes(layer.expert_bytes.0 << 20), ..layer })
                .collect(),
            ..ModelDescription::default()
        }
    })
}

proptest! {
    #[test]
    fn a_plan_fits_its_limit_and_no_smaller_number_of_workers_would(
        model in descriptions(), limit in 1..4000_u64
    ) {
        let limit = Bytes(limit << 20);
        let request = Request { worker_memory: Some(limit), ..Request::default() };
        match plan(&model, &request) {
            Outcome::Planned(planned) => {
                prop_assert!(planned.fullest().total() <= limit);
                prop_assert!(planned.kv_cache_tokens >= planned.max_context_tokens);
                prop_assert_eq!(planned.workers.len(), planned.shards as usize);
                if planned.shards > 1 {
                    let fewer = Request { shards: Some(planned.shards - 1), ..request };
                    prop_assert!(matches!(plan(&model, &fewer), Outcome::NoRoom(_)));
                }
            }
            Outcome::NoRoom(_) => {
                let most = if model.is_dense() { 1 } else { model.experts };
                let widest = Request { shards: Some(most), ..request };
                prop_assert!(matches!(plan(&model, &widest), Outcome::NoRoom(_)));
            }
        }
    }

    #[test]
    fn absurd_numbers_are_an_answer_too(bytes: u64, kv: u64, context: u64, width: u64, limit: u64) {
        let model = ModelDescription {
            experts: 4,
            dense_bytes: Bytes(bytes),
            kv_bytes_per_token: Bytes(kv),
            max_context_tokens: Tokens(context),
            hidden_size: width,
            vocab_size: width,
            moe_layers: vec![MoeLayer { layer: 0, expert_bytes: Bytes(bytes) }],
            ..ModelDescription::default()
        };
        for worker_memory in [None, Some(Bytes(limit))] {
            plan(&model, &Request { worker_memory, ..Request::default() });
        }
    }
}

/// A fleet that does what it is told, and now and then something else.
#[derive(Debug, Clone)]
struct World {
    replicas: Vec<Replica>,
    now: Millis,
}

impl World {
    fn apply(&mut self, step: &Step) {
        self.replicas.retain(|r| !step.delete.contains(&r.id));
        for replica in &mut self.replicas {
            if step.take_back.contains(&replica.id) {
                replica.state = State::Ready;
            }
            if step.drain.contains(&replica.id) {
                replica.state = State::Draining { since: self.now, empty: false };
            }
        }
        for id in &step.create {
            self.replicas.push(Replica { id: id.clone(), state: State::Starting, running: 0 });
        }
    }

    /// Something happens: a replica gets ready, empties, or loses a worker.
    fn happen(&mut self, which: usize, what: u8) {
        self.now = Millis(self.now.0 + 1000);
        let count = self.replicas.len().max(1);
        let Some(replica) = self.replicas.get_mut(which % count) else {
            return;
        };
        replica.state = match (replica.state, what) {
            (State::Starting, _) => State::Ready,
            (State::Ready, 0) => State::Starting,
            (State::Draining { since, .. }, _) => State::Draining { since, empty: true },
            (state, _) => state,
        };
    }

    fn drains(&self, id: &ReplicaId) -> bool {
        self.replicas.iter().any(|r| r.id == *id && matches!(r.state, State::Draining { .. }))
    }

    fn ready(&self) -> u32 {
        self.replicas.iter().filter(|r| r.state == State::Ready).count() as u32
    }
}

fn wants() -> impl Strategy<Value = Wanted> {
    ("[ab]", 0..5_u32, 0..3_u32, 0..3_u32).prop_map(|(revision, replicas, surge, missing)| Wanted {
        revision,
        replicas,
        max_surge: if missing == 0 { surge.max(1) } else { surge },
        max_unavailable: missing,
        drain_timeout: Millis::from_secs(30),
    })
}

fn settled(wanted: &Wanted, replicas: u32) -> World {
    let id = |index| ReplicaId { revision: wanted.revision.clone(), index };
    let replica = |index| Replica { id: id(index), state: State::Ready, running: 0 };
    World { replicas: (0..replicas).map(replica).collect(), now: Millis(0) }
}

proptest! {
    #[test]
    fn no_step_breaks_the_bounds_of_a_rollout(
        from in wants(), to in wants(), events in proptest::collection::vec((0..9_usize, 0..4_u8), 0..60)
    ) {
        let mut world = settled(&from, from.replicas);
        for (which, what) in events {
            let before = world.ready();
            let existing = world.replicas.len();
            let step = next_step(&to, &world.replicas, world.now);
            prop_assert!(step.delete.iter().all(|id| world.drains(id)));
            world.apply(&step);
            let ceiling = (to.replicas + to.max_surge) as usize;
            prop_assert!(step.create.is_empty() || world.replicas.len() <= ceiling);
            prop_assert!(world.replicas.len() <= existing.max(ceiling));
            let floor = to.replicas.saturating_sub(to.max_unavailable);
            prop_assert!(world.ready() >= before.min(floor), "{} < {before}, {floor}", world.ready());
            let mut ids: Vec<&ReplicaId> = world.replicas.iter().map(|r| &r.id).collect();
            ids.sort();
            ids.dedup();
            prop_assert_eq!(ids.len(), world.replicas.len());
            world.happen(which, what);
        }
    }

    #[test]
    fn every_rollout_ends_once_replicas_get_ready(from in wants(), to in wants(), turn in 0..9_usize) {
        let mut world = settled(&from, from.replicas);
        for i in 0..200 {
            let step = next_step(&to, &world.replicas, world.now);
            world.apply(&step);
            world.happen(turn + i, 1);
        }
        prop_assert_eq!(world.replicas.len(), to.replicas as usize);
        prop_assert!(world.replicas.iter().all(|r| r.id.revision == to.revision && r.state == State::Ready));
        prop_assert_eq!(next_step(&to, &world.replicas, world.now), Step::default());
    }

    #[test]
    fn a_revision_that_never_gets_ready_leaves_what_was_ready(replicas in 1..5_u32, surge in 1..3_u32) {
        let old = Wanted {
            revision: "a".into(), replicas, max_surge: surge, max_unavailable: 0, drain_timeout: Millis(1),
        };
        let bad = Wanted { revision: "b".into(), ..old.clone() };
        let mut world = settled(&old, replicas);
        for _ in 0..20 {
            let step = next_step(&bad, &world.replicas, world.now);
            world.apply(&step);
            world.now = Millis(world.now.0 + 60_000);
        }
        prop_assert_eq!(world.ready(), replicas);
        // And taking the change back ends where it began.
        for _ in 0..20 {
            let step = next_step(&old, &world.replicas, world.now);
            world.apply(&step);
            world.now = Millis(world.now.0 + 60_000);
        }
        prop_assert_eq!(world.replicas, settled(&old, replicas).replicas);
    }
}

fn policies() -> impl Strategy<Value = Policy> {
    (0..3_u32, 1..6_u32, 1..9_u32, 0..60_u64, 0..60_u64).prop_map(|(min, more, target, window, idle)| Policy {
        min,
        max: min + more,
        target,
        window: Millis::from_secs(window),
        idle_after: Millis::from_secs(idle),
    })
}

proptest! {
    #[test]
    fn a_decision_stays_in_bounds_and_never_shrinks_blindly(
        policy in policies(), loads in proptest::collection::vec(proptest::option::of((0..50_u64, 0..50_u64, 0..6_u64)), 1..80)
    ) {
        let (mut current, mut now) = (policy.min, Millis(0));
        let mut history = History::new(current, now);
        for load in loads {
            now = Millis(now.0 + 2_000);
            let load = load.map(|(queued, running, age)| {
                Load { queued, running, at: Millis(now.0.saturating_sub(age * 1000)) }
            });
            let decision = autoscale::decide(&policy, current, load.as_ref(), &mut history, now);
            prop_assert_eq!(decision.from, current);
            prop_assert!((policy.min..=policy.max).contains(&decision.to));
            let fresh = load.is_some_and(|load| now.since(load.at) <= autoscale::STALE_AFTER);
            prop_assert!(fresh || decision.to >= current);
            if let Some(load) = load.filter(|_| fresh) {
                let work = load.queued + load.running;
                let target = u64::from(policy.target);
                // Up at once, to what the work asks.
                let asked = work.div_ceil(target).min(u64::from(policy.max));
                prop_assert!(u64::from(decision.to) >= asked);
                // Never twice what is asked, unless it was that much before.
                prop_assert!(decision.to <= current.max(asked as u32).max(policy.min));
                // Down only onto what is below the target.
                if decision.to < current && decision.to > policy.min.max(1) {
                    prop_assert!(work < target * u64::from(decision.to));
                }
                prop_assert!(work == 0 || decision.to > 0);
            }
            current = decision.to;
        }
    }

    #[test]
    fn a_load_that_flaps_within_the_window_turns_once(period in 1..10_u64, target in 1..8_u32) {
        let policy = Policy {
            min: 1, max: 9, target, window: Millis::from_secs(60), idle_after: Millis(0),
        };
        let (mut current, mut history, mut turns, mut rising) = (1, History::new(1, Millis(0)), 0, true);
        for second in (0..300).step_by(2) {
            let now = Millis::from_secs(second);
            let busy = (second / (2 * period)) % 2 == 0;
            let load = Load { queued: if busy { 5 * u64::from(target) } else { 0 }, running: 0, at: now };
            let to = autoscale::decide(&policy, current, Some(&load), &mut history, now).to;
            if to != current {
                turns += usize::from((to > current) != rising);
                rising = to > current;
            }
            current = to;
        }
        prop_assert_eq!(turns, 0);
    }
}
