//! What should be, from what was asked and what is there: which revision, how many replicas, which of them go.
//!
//! Pure but for the scaling history that it is handed. The decisions themselves are the planner's; this file asks it
//! in order and puts the answers together.

use std::{fmt, sync::Arc};

use k8s_openapi::{api::apps::v1::StatefulSet, jiff::Timestamp};
use kube::ResourceExt;
use planner::{
    Bytes, Millis, ModelDescription, NoRoom, Outcome, Plan, autoscale, live,
    rollout::{self, ReplicaId, State, Step, Wanted},
};

use crate::{
    control::LoadView,
    moving::{self, Besides, Move, Standing, Stuck},
    observe::Observed,
    render::{Install, Names, Record, Revision, Workload, template},
    replica::{Replica, replicas},
    validate::ValidModel,
};

/// What is known of the wanted revision.
#[derive(Debug, Clone, PartialEq)]
pub enum Planning {
    /// What the model weighs is being read.
    Describing,
    /// It cannot be read: the describer answered with something else than a description, or the record is none.
    Unreadable(String),
    /// It fits.
    Planned(Plan),
    /// It does not.
    NoRoom(NoRoom),
    /// The claim that holds the model can be mounted on one node only, and there is more than one worker.
    NotShared(NotShared),
}

/// A claim that not all workers can read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotShared {
    /// Its name.
    pub claim: String,
    /// How it may be mounted.
    pub modes: Vec<String>,
    /// Workers that are wanted: of each replica, and replicas.
    pub workers: (u32, u32),
}

impl fmt::Display for NotShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shards, replicas) = self.workers;
        write!(f, "spec.model.source names claim {}, which is {}; ", self.claim, self.modes.join(", "))?;
        write!(f, "{replicas} x {shards} workers need ReadOnlyMany or ReadWriteMany, so use such a claim or one worker")
    }
}

/// A replica that should exist.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// What it runs.
    pub revision: Revision,
    /// Its number within the revision.
    pub index: u32,
    /// What it is made of.
    pub plan: Plan,
    /// The plan whose experts its workers hold besides, while experts move.
    pub also: Option<Besides>,
    /// Its pods.
    pub pods: u32,
    /// What each pod asks of its node, if it was asked before the plan changed.
    pub request: Option<Bytes>,
    /// Since when it drains.
    pub draining_since: Option<Timestamp>,
}

impl Target {
    /// A replica that is new.
    pub fn new(revision: Revision, index: u32, plan: Plan) -> Self {
        Self { revision, index, pods: plan.shards, plan, also: None, request: None, draining_since: None }
    }

    /// What each pod asks of its node. It does not change while experts move, so that they can move back.
    pub fn memory_request(&self) -> Bytes {
        self.request.unwrap_or_else(|| self.plan.fullest().total())
    }
}

/// What should be.
#[derive(Debug, Clone)]
pub struct Decision {
    /// The revision that was asked for.
    pub revision: Revision,
    /// What is known of it.
    pub planning: Planning,
    /// A describer should run.
    pub describe: bool,
    /// The records that stay.
    pub records: Vec<Record>,
    /// What runs now, on which the decision rests.
    pub replicas: Vec<Replica>,
    /// The revision that replicas are made of: the asked one, or the one that runs while that cannot.
    pub running: Option<Revision>,
    /// How many replicas are wanted.
    pub wanted: u32,
    /// How that number came about, where the operator chooses it.
    pub scaling: Option<autoscale::Decision>,
    /// What is done about it now.
    pub step: Step,
    /// The replicas that should exist.
    pub targets: Vec<Target>,
    /// Why experts of a replica move, or wait to.
    pub moving: Option<live::Why>,
    /// What moving experts would bring, where that is only to be told: how much faster they would be, in percent.
    pub advice: Option<u64>,
    /// Why copies of experts cannot be kept apart.
    pub together: Option<NoRoom>,
    /// Objects that stay, and are not written from a record: of replicas whose record is lost or cannot be read, or of whose
    /// StatefulSet no watch told yet, and that record.
    pub left_alone: Vec<String>,
    /// StatefulSets among them that begin to drain, drain, or are taken back: each with the time since which it drains.
    pub marked: Vec<(Arc<StatefulSet>, Option<Timestamp>)>,
}

/// The plan under which a revision makes replicas, and whether an existing replica follows it.
struct Basis {
    revision: Revision,
    plan: Plan,
}

/// How the experts of each replica move, if they can, in the order of the replicas.
struct Moves(Vec<Result<Option<Move>, Stuck>>);

impl Moves {
    /// Those of the asked revision that stay come to its plan; others stay as they are.
    fn of(
        planning: &Planning,
        revision: &Revision,
        records: &[Record],
        replicas: &[Replica],
        model: &ValidModel,
        seen: &Observed,
    ) -> Self {
        let record = records.iter().find(|record| record.revision == *revision);
        let (Planning::Planned(plan), Some(record)) = (planning, record) else {
            return Self(replicas.iter().map(|_| Ok(None)).collect());
        };
        let stays = |one: &Replica| one.revision == *revision && one.stands() && one.draining_since.is_none();
        let next = |replica| moving::next(Standing { replica, record }, plan, model, seen);
        Self(replicas.iter().map(|one| if stays(one) { next(one) } else { Ok(None) }).collect())
    }

    fn why(&self) -> Option<live::Why> {
        self.0.iter().find_map(|one| one.as_ref().ok()?.as_ref()?.why.clone())
    }

    fn advice(&self) -> Option<u64> {
        self.0.iter().filter_map(|one| one.as_ref().ok()?.as_ref()?.advice).max()
    }

    fn together(&self) -> Option<NoRoom> {
        self.0.iter().find_map(|one| match one {
            Err(Stuck::NoRoom(why)) => Some(why.clone()),
            _ => None,
        })
    }

    /// What the pods of a new replica must ask for where those of another one are too small; `None`: what is planned.
    fn outgrown(&self) -> Option<Bytes> {
        let needed = self.0.iter().filter_map(|one| match one {
            Err(Stuck::Outgrown(needed)) => Some(*needed),
            _ => None,
        });
        needed.max()
    }
}

/// Decides what should be.
///
/// 1. The asked revision is the recorded one, or a new record if the describer has answered; until then it is
///    described.
/// 2. It is planned. While it cannot be, replicas are made of the revision that runs.
/// 3. The number is the user's or the autoscaler's; nothing if suspended.
/// 4. The rollout says which replicas are made, drained, taken back and deleted. While the asked revision is not known, its
///    own drain only if none is wanted.
pub fn decide(
    names: &Names,
    model: &ValidModel,
    install: &Install,
    seen: &Observed,
    desired_before: Option<u32>,
    history: &mut Option<autoscale::History>,
    now: Timestamp,
) -> Decision {
    let revision = Revision::of(model.revision_input.as_bytes());
    let mut replicas = replicas(names, seen);
    let mut records = recorded(names, &replicas, seen);
    for replica in &mut replicas {
        replica.plan = replica.plan.take().or_else(|| lost_plan(replica, &records, model));
    }
    let (planning, asked) = match Record::find(names, &revision, &seen.owned.config_maps) {
        Ok(record) => plan_asked(names, model, install, &revision, record, seen),
        Err(unreadable) => (Planning::Unreadable(unreadable.to_string()), None),
    };
    if let Some(record) = asked.filter(|record| !records.iter().any(|known| known.revision == record.revision)) {
        records.push(record);
    }
    let planning = shared(planning, model, seen);
    let basis = basis(&revision, &planning, &replicas);
    let (wanted, scaling) = wanted(model, seen.fleet.load.as_ref(), desired_before, history, now);
    let made = match planning {
        // what runs stays, and one replica more could not mount the claim
        Planning::NotShared(_) => wanted.min(count(replicas.iter().filter(|replica| replica.stands()))),
        _ => wanted,
    };
    let moves = Moves::of(&planning, &revision, &records, &replicas, model, seen);
    // to have none, nothing need be known
    let made_of = basis.as_ref().map(|basis| &basis.revision).or((wanted == 0).then_some(&revision));
    let step = made_of.map(|made_of| next_step(model, made_of, &replicas, &moves, seen, made, now));
    let mut step = step.unwrap_or_default();
    if wanted > 0 && matches!(planning, Planning::Describing | Planning::Unreadable(_)) {
        // they are what is asked for, though it is not known for now
        step.drain.retain(|one| one.revision != revision.as_str());
    }
    if replicas.iter().any(Replica::is_unseen) {
        // it may be the very one that would be made
        step.create.clear();
    }
    let targets = targets(&replicas, basis.as_ref(), &moves, &step, seen, now);
    let has_record = |replica: &Replica| records.iter().any(|record| record.revision == replica.revision);
    let stay = replicas.iter().zip(&moves.0).filter(|(replica, moves)| stays(replica, moves, &step));
    let unrecorded = stay.filter(|(replica, _)| !has_record(replica));
    let marked = unrecorded.clone().filter_map(|(replica, moves)| {
        let since = draining_since(replica, moves, &step, now);
        let set = replica.set.as_ref().filter(|_| since.is_some() || replica.draining_since.is_some())?;
        Some((set.clone(), since))
    });
    let left_alone = unrecorded
        .map(|(replica, _)| replica)
        .chain(replicas.iter().filter(|replica| replica.is_unseen()))
        .flat_map(|replica| [names.replica(&replica.revision, replica.index), names.revision(&replica.revision)]);
    Decision {
        describe: planning == Planning::Describing && !described_in_vain(names, &revision, seen),
        moving: moves.why(),
        advice: moves.advice(),
        together: moves.together(),
        marked: marked.collect(),
        left_alone: left_alone.collect(),
        running: basis.map(|basis| basis.revision),
        revision,
        planning,
        records,
        replicas,
        wanted,
        scaling,
        step,
        targets,
    }
}

/// The describer ended, and its answer did not reach us: another one asks again.
fn described_in_vain(names: &Names, revision: &Revision, seen: &Observed) -> bool {
    let name = names.describe(revision);
    let job = seen.owned.jobs.iter().find(|job| job.name_any() == name);
    job.and_then(|job| job.status.as_ref()).is_some_and(|status| status.succeeded.unwrap_or(0) > 0)
}

/// The records of all revisions that have replicas, as far as they can be read.
fn recorded(names: &Names, replicas: &[Replica], seen: &Observed) -> Vec<Record> {
    let mut revisions: Vec<&Revision> = replicas.iter().map(|replica| &replica.revision).collect();
    revisions.dedup();
    let found = revisions.into_iter().map(|revision| Record::find(names, revision, &seen.owned.config_maps));
    found.filter_map(|record| record.ok().flatten()).collect()
}

/// The plan of a replica whose own record is lost: what it was made by, if the spec asks for the same and its experts were
/// placed otherwise neither by domains nor by load. It is recorded again. A row waits while no worker holds its expert.
fn lost_plan(replica: &Replica, records: &[Record], model: &ValidModel) -> Option<Plan> {
    replica.stands().then_some(())?;
    let record = records.iter().find(|record| record.revision == replica.revision)?;
    let request = planner::Request { shards: Some(replica.pods()), ..model.request(None) };
    match planner::plan(&record.description, &request) {
        Outcome::Planned(plan) => Some(plan),
        Outcome::NoRoom(_) => None,
    }
}

fn plan_asked(
    names: &Names,
    model: &ValidModel,
    install: &Install,
    revision: &Revision,
    recorded: Option<Record>,
    seen: &Observed,
) -> (Planning, Option<Record>) {
    if let Some(record) = recorded {
        return (planned(planner::plan(&record.description, &model.request(None))), Some(record));
    }
    let mut told = seen.fleet.descriptions.iter();
    let Some(told) = told.find(|description| description.revision == revision.as_str()) else {
        return (Planning::Describing, None);
    };
    let description: ModelDescription = match serde_json::from_slice(&told.json) {
        Ok(description) => description,
        Err(error) => return (Planning::Unreadable(error.to_string()), None),
    };
    let planning = planned(planner::plan(&description, &model.request(None)));
    let record = match &planning {
        Planning::Planned(plan) => {
            let workload = Workload { names, model, install, revision };
            let template = template(&workload, &description, plan);
            Some(Record::new(revision.clone(), description, template))
        }
        // Not recorded: a later spec of the same revision (other shards) is planned anew.
        _ => None,
    };
    (planning, record)
}

/// Refuses a claim that only one node can mount, unless one worker is all there is to be.
fn shared(planning: Planning, model: &ValidModel, seen: &Observed) -> Planning {
    let shards = match &planning {
        Planning::Planned(plan) => plan.shards,
        Planning::Describing => model.shards.unwrap_or(1),
        _ => return planning,
    };
    let Some(claim) = &seen.claim else { return planning };
    let replicas = model.autoscaling.as_ref().map_or(model.replicas, |policy| policy.max);
    let many = claim.modes.iter().any(|mode| mode.ends_with("Many"));
    if many || claim.modes.is_empty() || shards.saturating_mul(replicas) <= 1 {
        return planning;
    }
    let (claim, modes) = (claim.name.clone(), claim.modes.clone());
    Planning::NotShared(NotShared { claim, modes, workers: (shards, replicas) })
}

fn count<T>(all: impl Iterator<Item = T>) -> u32 {
    u32::try_from(all.count()).unwrap_or(u32::MAX)
}

fn planned(outcome: Outcome) -> Planning {
    match outcome {
        Outcome::Planned(plan) => Planning::Planned(plan),
        Outcome::NoRoom(why) => Planning::NoRoom(why),
    }
}

/// What replicas are made of now: the asked revision if it is planned, else the one with the most ready replicas.
fn basis(asked: &Revision, planning: &Planning, replicas: &[Replica]) -> Option<Basis> {
    if let Planning::Planned(plan) = planning {
        return Some(Basis { revision: asked.clone(), plan: plan.clone() });
    }
    let standing = replicas.iter().filter(|replica| replica.stands() && replica.plan.is_some());
    let best = standing.max_by_key(|replica| {
        let ready = |one: &&Replica| one.revision == replica.revision && one.ready();
        (replica.draining_since.is_none(), replicas.iter().filter(ready).count())
    })?;
    Some(Basis { revision: best.revision.clone(), plan: best.plan.clone()? })
}

fn wanted(
    model: &ValidModel,
    load: Option<&LoadView>,
    before: Option<u32>,
    history: &mut Option<autoscale::History>,
    now: Timestamp,
) -> (u32, Option<autoscale::Decision>) {
    let Some(policy) = &model.autoscaling else {
        *history = None;
        return (if model.spec.suspend { 0 } else { model.replicas }, None);
    };
    if model.spec.suspend {
        *history = None;
        return (0, None);
    }
    let (now, current) = (millis(now), before.unwrap_or(model.replicas).clamp(policy.min, policy.max));
    // The control stream hands out no load that is stale.
    let load = load.map(|load| autoscale::Load { queued: load.queued, running: load.running, at: now });
    let history = history.get_or_insert_with(|| autoscale::History::new(current, now));
    let decision = autoscale::decide(policy, current, load.as_ref(), history, now);
    (decision.to, Some(decision))
}

fn next_step(
    model: &ValidModel,
    made_of: &Revision,
    replicas: &[Replica],
    moves: &Moves,
    seen: &Observed,
    replicas_wanted: u32,
    now: Timestamp,
) -> Step {
    let wanted = Wanted {
        revision: made_of.to_string(),
        replicas: replicas_wanted,
        max_surge: model.max_surge,
        max_unavailable: model.max_unavailable,
        drain_timeout: Millis(u64::try_from(model.drain_timeout.as_millis()).unwrap_or(u64::MAX)),
    };
    let known = replicas.iter().zip(&moves.0).filter(|(replica, _)| replica.stands());
    let known: Vec<_> = known.map(|(one, moves)| of(one, moves, seen)).collect();
    rollout::next_step(&wanted, &known, millis(now))
}

fn of(replica: &Replica, moves: &Result<Option<Move>, Stuck>, seen: &Observed) -> rollout::Replica {
    let state = match replica.draining_since {
        Some(since) => State::Draining { since: millis(since), empty: routers_know(seen) && replica.empty() },
        None if replica.ready() => State::Ready,
        None => State::Starting,
    };
    rollout::Replica { id: id(replica, moves), state, running: replica.running() }
}

/// Every live router acts on the newest snapshot, so none sends anything to a replica that drains in it.
fn routers_know(seen: &Observed) -> bool {
    seen.fleet.version.is_some() && seen.fleet.routers.iter().all(|router| router.acknowledged == seen.fleet.version)
}

/// For a rollout, one that has outgrown its pods is of another revision.
fn id(replica: &Replica, moves: &Result<Option<Move>, Stuck>) -> ReplicaId {
    let revision = match moves {
        Err(Stuck::Outgrown(_)) => format!("{} too small", replica.revision),
        _ => replica.revision.to_string(),
    };
    ReplicaId { revision, index: replica.index }
}

/// The replicas that should exist after `step`.
fn targets(
    replicas: &[Replica],
    basis: Option<&Basis>,
    moves: &Moves,
    step: &Step,
    seen: &Observed,
    now: Timestamp,
) -> Vec<Target> {
    let kept = replicas.iter().zip(&moves.0).filter_map(|(replica, moves)| kept(replica, moves, step, seen, now));
    let mut targets: Vec<Target> = kept.collect();
    let Some(basis) = basis else { return targets };
    // An index is free once nothing of the replica that had it is left, its last pod included.
    let taken = |index: &u32| replicas.iter().any(|one| one.revision == basis.revision && one.index == *index);
    let free = (0..).filter(|index| !taken(index)).take(step.create.len());
    let request = moves.outgrown().map(|needed| needed.max(basis.plan.fullest().total()));
    let new = |index| Target { request, ..Target::new(basis.revision.clone(), index, basis.plan.clone()) };
    targets.extend(free.map(new));
    targets
}

fn kept(
    replica: &Replica,
    moves: &Result<Option<Move>, Stuck>,
    step: &Step,
    seen: &Observed,
    now: Timestamp,
) -> Option<Target> {
    if !stays(replica, moves, step) {
        return None;
    }
    let as_it_is = || Some(Move { plan: replica.plan.clone()?, also: replica.also.clone(), ..Move::default() });
    let next = moves.as_ref().ok().cloned().flatten().or_else(as_it_is)?;
    Some(Target {
        revision: replica.revision.clone(),
        index: replica.index,
        pods: moving::width(replica, &next, seen),
        plan: next.plan,
        also: next.also,
        request: replica.memory_request(),
        draining_since: draining_since(replica, moves, step, now),
    })
}

/// It stands, and does so after `step`.
fn stays(replica: &Replica, moves: &Result<Option<Move>, Stuck>, step: &Step) -> bool {
    replica.stands() && !step.delete.contains(&id(replica, moves))
}

/// Since when it drains after `step`.
fn draining_since(
    replica: &Replica,
    moves: &Result<Option<Move>, Stuck>,
    step: &Step,
    now: Timestamp,
) -> Option<Timestamp> {
    let id = id(replica, moves);
    if step.drain.contains(&id) {
        Some(now)
    } else if step.take_back.contains(&id) {
        None
    } else {
        replica.draining_since
    }
}

fn millis(time: Timestamp) -> Millis {
    Millis(u64::try_from(time.as_millisecond()).unwrap_or(0))
}
