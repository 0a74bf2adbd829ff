//! Experts that move while requests run: what a replica's placement should be, and the next version on the way there.
//!
//! Pure. The planner places and says in which steps a placement changes; this file knows which workers there are, in
//! which failure domains, and what they said.
//!
//! 1. A placement that still is what the spec asks for stays; else the planner makes another from it.
//! 2. A worker that would need more memory than its pod asked for cannot get it while it runs: then the rollout
//!    replaces the replica instead, by one that asks for as much.
//! 3. Each version is kept in the ConfigMap of the replica before it is published, so that whoever leads goes on from it.

use std::collections::{BTreeMap, BTreeSet};

use crds::Rebalance;
use planner::{
    Bytes, ModelDescription, Need, NoRoom, Placement, Plan,
    live::{self, Published, Step, Why, Workers},
    placement::{Problem, place},
    rebalance::{self, Policy, Running},
};

use crate::{
    control::{ExpertLoadView, WorkerPhase},
    observe::{Observed, node_of},
    render::Record,
    replica::{Replica, Worker},
    validate::{ValidModel, memory_bytes},
};

/// Of workers that have read their weights.
const LOADED: [WorkerPhase; 3] = [WorkerPhase::Serving, WorkerPhase::Draining, WorkerPhase::Drained];

/// The plan whose experts workers hold besides those that they are asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Besides {
    /// The one that they are about to be asked by.
    Next(Plan),
    /// The one that they were asked by before.
    Last(Plan),
}

impl Besides {
    /// The plan itself.
    pub fn plan(&self) -> &Plan {
        match self {
            Self::Next(plan) | Self::Last(plan) => plan,
        }
    }
}

/// Where a replica is on the way to the plan that is wanted of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Move {
    /// What to keep from now on: the plan by which workers ask, and the one whose experts they hold besides.
    pub plan: Plan,
    /// See `plan`.
    pub also: Option<Besides>,
    /// What is done or waited for; `None`: nothing moves.
    pub why: Option<Why>,
    /// How much faster experts would be by the measured load, in percent, if they moved; only where that is to be told.
    pub advice: Option<u64>,
}

/// Why a replica cannot come to the wanted plan where it is.
#[derive(Debug, Clone, PartialEq)]
pub enum Stuck {
    /// Its pods are too small, so others must take its place, whose fullest worker needs this much.
    Outgrown(Bytes),
    /// No pods would do: there are too few failure domains, or too little memory in them.
    NoRoom(NoRoom),
}

/// What a replica runs, and what each of its pods asked of its node, if it is ours to ask for.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'a> {
    /// The replica.
    pub replica: &'a Replica,
    /// Of its revision.
    pub record: &'a Record,
}

impl Standing<'_> {
    /// `None`: the user wrote how much, so other pods would ask for no more.
    fn memory_request(&self) -> Option<Bytes> {
        self.replica.memory_request().filter(|_| !self.record.asks_for_memory())
    }
}

/// The next version of a replica's placement, if `wanted` is what the spec asks for now.
///
/// # Errors
/// [`Stuck`], if it cannot be reached by moving experts.
pub fn next(standing: Standing<'_>, wanted: &Plan, model: &ValidModel, seen: &Observed) -> Result<Option<Move>, Stuck> {
    let (replica, description) = (standing.replica, &standing.record.description);
    let Some(plan) = &replica.plan else {
        return Ok(None);
    };
    let domains = domains(replica, wanted.shards, model, seen);
    let loads = loads(replica, description, seen);
    let room = model.worker_memory.map(|limit| plan.expert_room(limit));
    let each = |bytes: Bytes| vec![bytes; wanted.shards as usize];
    let (steady, meanwhile) = (room.map(|room| each(room.steady)), room.map(|room| each(room.moving)));
    let problem = Problem {
        layers: &description.moe_layers,
        experts: description.experts,
        shards: wanted.shards,
        redundancy: model.redundancy,
        domains: domains.as_deref(),
        ..Problem::default()
    };
    let mut advice = None;
    let target = match kept(replica, plan, &problem) {
        Some(kept) if replica.also.is_none() && model.rebalance != Rebalance::Disabled => {
            let problem = Problem { loads: loads.as_deref(), room: steady.as_deref(), ..problem };
            let changed = seen.moved.get(&(replica.revision.to_string(), replica.index)).copied();
            let running = Running { placement: &kept.placement, changed, room: meanwhile.as_deref() };
            let decision = rebalance::decide(&problem, &running, &Policy::default());
            match (decision.to, model.rebalance) {
                (Some(placement), Rebalance::Apply) => {
                    let moved = with(placement, plan, wanted, description);
                    if fits(standing, plan, &moved, wanted, model).is_ok() { moved } else { kept }
                }
                (Some(_), _) => {
                    advice = Some(advised(decision.figures.gain_permille));
                    kept
                }
                (None, _) => kept,
            }
        }
        Some(kept) => kept,
        None => with(placed(&problem, plan, wanted, model)?, plan, wanted, description),
    };
    if target.placement != plan.placement {
        fits(standing, plan, &target, wanted, model)?;
    }
    if !replica.began() {
        // nobody asks by any table yet, so the first one may as well be another
        return Ok(Some(Move { plan: target, ..Move::default() }));
    }
    let published = Published {
        placement: plan.placement.clone(),
        also_hold: replica.also.as_ref().map(|also| also.plan().placement.clone()),
    };
    let step = live::next_step(&published, &target.placement, &workers(replica, published.pods()));
    let known = [Some(&target), Some(plan), replica.also.as_ref().map(Besides::plan)];
    let named = |placement: &Placement| known.into_iter().flatten().find(|plan| plan.placement == *placement).cloned();
    let (published, why) = match step {
        Step::Publish(next, why) => (next, Some(why)),
        Step::Wait(why) => (published, Some(why)),
        Step::Complete => (published, None),
    };
    let besides = |plan: Plan| match (&why, &replica.also) {
        (Some(Why::Load), _) => Besides::Next(plan),
        (Some(Why::Switch), _) | (_, None | Some(Besides::Last(_))) => Besides::Last(plan),
        (_, Some(Besides::Next(_))) => Besides::Next(plan),
    };
    let also = published.also_hold.as_ref().and_then(named).map(besides);
    Ok(named(&published.placement).map(|plan| Move { plan, also, why, advice }))
}

/// A gain in percent, as it is told: in fives, or each report of a load would be another status.
fn advised(gain_permille: u64) -> u64 {
    gain_permille / 50 * 5
}

/// How many pods the StatefulSet has while `next` is the next version. It grows before a wider placement is published,
/// and shrinks after a narrower one is and the routers know that the last ordinals take no more requests.
pub fn width(replica: &Replica, next: &Move, seen: &Observed) -> u32 {
    let pods = |plan: &Plan, also: Option<&Besides>| also.map_or(0, |also| also.plan().shards).max(plan.shards);
    let needed = pods(&next.plan, next.also.as_ref());
    let kept = replica.plan.as_ref().map_or(0, |plan| pods(plan, replica.also.as_ref()));
    let leaving = replica.workers.iter().filter(|worker| worker.ordinal >= kept);
    let routed = |worker: &Worker| worker.view.as_ref().is_some_and(|view| view.routed);
    let version = seen.fleet.version;
    let told = version.is_some() && seen.fleet.routers.iter().all(|router| router.acknowledged == version);
    let free = told && !leaving.clone().any(routed);
    needed.max(if free { kept } else { kept.max(replica.pods()) })
}

/// What a replica has or is about to have, if it still is what the spec asks for.
fn kept(replica: &Replica, plan: &Plan, problem: &Problem<'_>) -> Option<Plan> {
    let plans = match &replica.also {
        Some(Besides::Next(next)) => [Some(next), Some(plan)],
        Some(Besides::Last(last)) => [Some(plan), Some(last)],
        None => [Some(plan), None],
    };
    let copies = problem.redundancy as usize + 1;
    // more copies than asked for are there because of the load, but then not of every expert
    let fewest = |plan: &Plan| plan.placement.layers.iter().flat_map(|layer| &layer.experts).map(Vec::len).min();
    let fits = |plan: &&Plan| plan.placement.meets(problem) && fewest(plan).is_none_or(|fewest| fewest == copies);
    plans.into_iter().flatten().find(fits).cloned()
}

fn placed(problem: &Problem<'_>, plan: &Plan, wanted: &Plan, model: &ValidModel) -> Result<Placement, Stuck> {
    place(problem, Some(&plan.placement)).map_err(|why| {
        let distinct = |domains: &[u32]| count(domains.iter().collect::<BTreeSet<_>>().len());
        let apart = problem.domains.map_or(problem.shards, distinct);
        let domains = wanted.spread_over(model.redundancy, domain_name(&model.spread_across), apart);
        Stuck::NoRoom(domains.unwrap_or(NoRoom::Copies(why)))
    })
}

/// The wanted plan with another placement, and with the cache that the workers of `plan` have.
fn with(placement: Placement, plan: &Plan, wanted: &Plan, description: &ModelDescription) -> Plan {
    let base = Need { kv_cache: plan.fullest().kv_cache, ..wanted.fullest() };
    let experts = placement.expert_bytes(&description.moe_layers).into_iter();
    Plan {
        shards: wanted.shards,
        max_context_tokens: plan.max_context_tokens,
        kv_cache_tokens: plan.kv_cache_tokens,
        workers: experts.map(|experts| Need { experts, ..base }).collect(),
        placement,
    }
}

/// The measured load of a replica's experts, by layer in the order of the description; `None`: nothing was measured.
pub fn loads(replica: &Replica, description: &ModelDescription, seen: &Observed) -> Option<Vec<Vec<u64>>> {
    let ours = |view: &&ExpertLoadView| view.revision == replica.revision.as_str() && view.replica == replica.index;
    let view = seen.fleet.expert_loads.iter().find(ours)?;
    let layers = description.moe_layers.iter();
    Some(layers.map(|layer| view.rows.get(&layer.layer).cloned().unwrap_or_default()).collect())
}

/// The failure domain of each ordinal; `None` until all of its pods have a node, and where there are no copies.
fn domains(replica: &Replica, shards: u32, model: &ValidModel, seen: &Observed) -> Option<Vec<u32>> {
    if model.redundancy == 0 {
        return None;
    }
    let mut numbers = BTreeMap::new();
    let domain = |ordinal: u32| {
        let node = node_of(replica.worker(ordinal)?.pod.as_ref())?;
        // a node without the label is a domain of its own
        let label = seen.nodes.get(node).and_then(|view| view.labels.get(&model.spread_across));
        Some(label.map_or_else(|| format!("node {node}"), Clone::clone))
    };
    let names: Vec<String> = (0..shards).map(domain).collect::<Option<_>>()?;
    let next = names.into_iter().map(|name| {
        let new = count(numbers.len());
        *numbers.entry(name).or_insert(new)
    });
    Some(next.collect())
}

/// Whether the workers have room for the target, and for what both plans hold while experts move.
fn fits(standing: Standing<'_>, plan: &Plan, target: &Plan, wanted: &Plan, model: &ValidModel) -> Result<(), Stuck> {
    let total = target.fullest().total();
    let within =
        |limit: Bytes| total <= limit && (!standing.replica.began() || meanwhile(standing, plan, target) <= limit);
    let is_granted = standing.memory_request().is_none_or(|asked| total <= asked);
    if is_granted && model.worker_memory.is_none_or(within) {
        return Ok(());
    }
    // as other pods would be made: with the cache of the wanted plan
    let need = Need { experts: target.fullest().experts, ..wanted.fullest() };
    match model.worker_memory.filter(|limit| need.total() > *limit) {
        Some(limit) => Err(Stuck::NoRoom(NoRoom::MemoryTooSmall { limit, shards: target.shards, need, enough: None })),
        None => Err(Stuck::Outgrown(need.total())),
    }
}

/// What the fullest worker needs that holds the experts of both plans.
fn meanwhile(standing: Standing<'_>, plan: &Plan, target: &Plan) -> Bytes {
    let layers = &standing.record.description.moe_layers;
    let weights: BTreeMap<u32, Bytes> = layers.iter().map(|layer| (layer.layer, layer.expert_bytes)).collect();
    let held = |ordinal: u32| {
        let mut held: BTreeSet<(u32, u32)> = BTreeSet::new();
        for placement in [&plan.placement, &target.placement] {
            let experts = placement.held_by(ordinal).into_iter();
            held.extend(experts.flat_map(|(layer, experts)| experts.into_iter().map(move |expert| (layer, expert))));
        }
        held.iter().map(|(layer, _)| weights.get(layer).copied().unwrap_or_default()).sum::<Bytes>()
    };
    let most = (0..plan.shards.max(target.shards)).map(held).max().unwrap_or_default();
    let rest = target.fullest();
    rest.total().minus(rest.experts).plus(most)
}

/// What the workers said of the published version.
fn workers(replica: &Replica, pods: u32) -> Workers {
    let mut workers = Workers::default();
    for ordinal in 0..pods {
        match replica.worker(ordinal).map(|worker| worker.view.as_ref()) {
            None => {
                workers.gone.insert(ordinal);
            }
            Some(None) => {
                // without a node no process of it ever ran
                if replica.worker(ordinal).is_some_and(|worker| node_of(&worker.pod).is_none()) {
                    workers.gone.insert(ordinal);
                }
            }
            Some(Some(view)) => {
                if view.placement_loaded {
                    workers.loaded.insert(ordinal);
                }
                if view.switched {
                    workers.acknowledged.insert(ordinal);
                }
            }
        }
    }
    workers
}

/// `zone` of `topology.kubernetes.io/zone`, `node` of a host name.
fn domain_name(label: &str) -> &str {
    match label.rsplit('/').next() {
        Some("hostname") | None => "node",
        Some(name) => name,
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Replica {
    /// A request may have run on it: some worker has loaded, or the routers were told of it.
    pub fn began(&self) -> bool {
        let loaded = |worker: &Worker| worker.view.as_ref().is_some_and(|view| LOADED.contains(&view.phase));
        self.workers.iter().any(|worker| worker.gated() || worker.probed() || loaded(worker))
    }

    /// Pods that its StatefulSet makes.
    pub fn pods(&self) -> u32 {
        let sized = self.set.as_ref().and_then(|set| set.spec.as_ref()).and_then(|spec| spec.replicas);
        sized.unwrap_or(0).max(0).unsigned_abs()
    }

    /// What each of its pods asks of its node, as they were made.
    pub fn memory_request(&self) -> Option<Bytes> {
        let template = &self.set.as_ref()?.spec.as_ref()?.template;
        let container = template.spec.as_ref()?.containers.iter().find(|one| one.name == crate::render::WORKER)?;
        memory_bytes(container.resources.as_ref()?.requests.as_ref()?.get("memory")?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gain_that_is_worth_a_move_is_told_as_more_than_none() {
        assert_eq!(advised(Policy::default().least_gain_permille), 5);
        assert_eq!(advised(349), 30, "in fives");
    }
}
