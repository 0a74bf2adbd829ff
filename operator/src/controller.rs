//! The control plane's loop: what wakes a ModelDeployment, what is done with it, and what follows an error.

mod scope;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    future::Future,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crds::{ModelDeployment, ModelDeploymentSpec, Reason};
use futures::{FutureExt, StreamExt};
use k8s_openapi::{
    api::core::v1::{Pod, PodCondition},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource,
    runtime::{
        Controller,
        controller::{self, Action},
        events::{Event, EventType, Recorder},
        reflector::{ObjectRef, Store},
    },
};
use planner::{Millis, autoscale::History, rollout::Why};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, error, info, warn};

use self::scope::{Scopes, follow_leadership, wake_by_fleet};
use crate::{
    apply::{Applied, CALL, StatusWrite, Writer},
    backoff::{self, Backoff},
    control::Fleet,
    decide::{Decision, Target, decide},
    error::{Class, Error},
    facts::{facts, unruled},
    lease::{self, Candidate, Leadership},
    moving::Besides,
    observe::{Guarded, Look, Observed, Stores, observe, watch_deployments},
    render::{self, Install, Names, ROUTED, read_accepted},
    replica::{Replica, Worker, replicas},
    report::{Case, Note, notes, refused, report},
    served,
    validate::{Place, Refusal, ValidModel, validate},
};

/// Objects that are reconciled at once, over each scope.
const CONCURRENCY: u16 = 20;
/// Wake-ups of one object that come together are one.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// The next look while something moves, for what only time decides: drains, windows, deadlines.
const TICK: Duration = Duration::from_secs(2);
/// The next look after a write that the watch has not confirmed.
const CONFIRM: Duration = Duration::from_secs(1);
/// The next look at an object at rest: finds what a missed event hid.
const REST: Duration = Duration::from_secs(300);
/// The next look after a bug of ours.
const AFTER_BUG: Duration = backoff::CAP;

/// What the operator is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The namespaces to watch; empty for all.
    pub namespaces: Vec<String>,
    /// The operator's own namespace, where routers and the Lease are.
    pub namespace: String,
    /// Selects the pods of the routers.
    pub router_selector: String,
    /// Name of the Lease.
    pub lease: String,
    /// Unique among the operators that live: the pod's name.
    pub identity: String,
    /// The spans of the election.
    pub timing: lease::Timing,
    /// What the install adds to workers.
    pub install: Install,
}

/// When the experts of each replica of a model, by revision and index, last began to move.
type Moved = BTreeMap<(String, u32), tokio::time::Instant>;

/// When pods of a model, by UID, were first seen on their way out.
type Leaving = BTreeMap<String, tokio::time::Instant>;

/// What a reconcile works with.
struct Context {
    fleet: Fleet,
    writer: Writer,
    leadership: Leadership,
    install: Install,
    recorder: Recorder,
    stores: Stores,
    look: Look,
    deployments: Arc<Mutex<Vec<Store<Guarded>>>>,
    backoff: Backoff<ObjectRef<Guarded>>,
    histories: Arc<Mutex<HashMap<String, History>>>,
    moved: Mutex<HashMap<String, Moved>>,
    leaving: Mutex<HashMap<String, Leaving>>,
    roster: Arc<Notify>,
}

/// Runs the control plane until `shutdown`; gives the Lease back at its end.
///
/// 1. Watches each scope (a namespace, or all of them): ModelDeployments, and what is ours.
/// 2. Takes part in the election. Leading or not, the stores are kept, so a new leader acts at once.
/// 3. While leading: reconciles each object that a watch, the control stream or time wakes.
///
/// # Guarantees
/// One object that cannot be read, panics or fails holds up no other. Nothing is written while another leads.
pub async fn run(client: Client, settings: Settings, fleet: Fleet, shutdown: impl Future<Output = ()>) {
    let (claim, leadership) = lease::leadership();
    let candidate = Candidate {
        leases: Api::namespaced(client.clone(), &settings.namespace),
        name: settings.lease.clone(),
        identity: settings.identity.clone(),
        timing: settings.timing,
    };
    let mut tasks = JoinSet::new();
    let scopes = Scopes::start(&client, &settings, &fleet, &leadership, &mut tasks);
    tasks.spawn(follow_leadership(leadership, fleet.clone(), scopes.clone()));
    tasks.spawn(wake_by_fleet(fleet, scopes));
    lease::elect(&candidate, &claim, shutdown).await;
    // dropped tasks end at their next await; what they wrote is whole
    tasks.shutdown().await;
}

/// Reconciles what is woken in one scope.
async fn control(
    client: Client,
    namespace: Option<String>,
    woken: mpsc::Receiver<ObjectRef<Guarded>>,
    context: Arc<Context>,
    scopes: Scopes,
) {
    context.stores.ready().await;
    let (reader, deployments) = watch_deployments(&client, namespace.as_deref());
    let controller = Controller::for_stream(deployments, reader)
        .with_config(controller::Config::default().debounce(DEBOUNCE).concurrency(CONCURRENCY))
        .reconcile_on(ReceiverStream::new(woken));
    lock(&context.deployments).push(controller.store());
    let mut results = std::pin::pin!(controller.run(reconcile, error_policy, context.clone()));
    while let Some(result) = results.next().await {
        match result {
            Ok(_) => {}
            Err(controller::Error::ObjectNotFound(gone)) => {
                let (namespace, name) = (gone.namespace.clone().unwrap_or_default(), gone.name.clone());
                if context.forget(&namespace, &name) {
                    // a name that it held may be another's now
                    scopes.wake_all().await;
                }
            }
            Err(controller::Error::ReconcilerFailed(error, object)) => {
                debug!(%object, error = error.chain(), "failed")
            }
            Err(error) => warn!(%error, "the watch of ModelDeployments broke and begins anew"),
        }
    }
}

/// Reconciles one ModelDeployment, if this process leads. A panic is an error like others.
async fn reconcile(object: Arc<Guarded>, context: Arc<Context>) -> Result<Action, Error> {
    context.roster.notify_one();
    if let Some(action) = unless_leading(&context.leadership) {
        return Ok(action);
    }
    let pass = AssertUnwindSafe(pass(&object, &context)).catch_unwind().await;
    let action = pass.unwrap_or_else(|panic| Err(Error::Panic(text(panic.as_ref()))))?;
    context.backoff.succeeded(&ObjectRef::from_obj(object.as_ref()));
    Ok(action)
}

/// What follows where this process must not act; `None`: it leads.
fn unless_leading(leadership: &Leadership) -> Option<Action> {
    match leadership.term() {
        Some(_) => None,
        // a term that is renewed late goes on, and wakes nobody
        None if leadership.lapsed() => Some(Action::requeue(CONFIRM)),
        None => Some(Action::await_change()),
    }
}

/// One pass: from what there is to what should be.
///
/// 1. Observe, and take the spec, or the one that was accepted last if this one is refused.
/// 2. Decide, and tell routers and workers at once: they need no API server.
/// 3. Apply the objects, then the readiness gates.
/// 4. Report, whatever came of the writes.
async fn pass(object: &Guarded, context: &Context) -> Result<Action, Error> {
    let (md, unreadable) = readable(object, context);
    let names = Names::of(&md);
    if md.metadata.deletion_timestamp.is_some() {
        context.fleet.remove(names.path());
        return Ok(Action::await_change());
    }
    let mut seen = observe(&md, &context.stores, &context.fleet);
    let (md, accepted) = accept(md, unreadable, &names, &seen, context);
    let accepted = match accepted {
        Ok(accepted) => accepted,
        Err(refusals) => return refuse(&md, &names, &refusals, &seen, context).await,
    };
    look_closer(&md, &accepted.model, &mut seen, context).await?;
    let now = now();
    let before = md.status.as_ref().and_then(|status| status.desired_replicas).map(|count| count.max(0).unsigned_abs());
    let decision = context.with_history(names.path(), |history| {
        decide(&names, &accepted.model, &context.install, &seen, before, history, now)
    });
    log(&names, &decision);

    let created = md.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let told = facts(&names, &accepted.model, accepted.served_names.clone(), created, &decision);
    context.fleet.publish(names.path(), told);

    context.remember_moves(names.path(), &decision);
    let desired = render::objects(&names, &accepted.model, &context.install, &decision);
    let applied = context.writer.apply(&md, &desired, &seen.owned).await;
    let gated = open_gates(&decision, context, now).await;
    let buried = bury(&md, &decision, &seen, context).await;
    let outcome = applied.and_then(|applied| gated.and(buried).map(|()| applied));

    let status = report(&Case {
        md: &md,
        names: &names,
        model: &accepted.model,
        refusals: &accepted.refusals,
        remark: accepted.remark.as_deref(),
        install: &context.install,
        seen: &seen,
        decision: &decision,
        outcome: outcome.as_ref(),
        now,
    });
    let written = write_status(&md, &status, context).await;
    let leaving = seen.pods.iter().any(|pod| pod.metadata.deletion_timestamp.is_some());
    next(&decision, leaving, outcome?, written?)
}

/// Adds what no watch shows and this model needs: the claim of its source, and nodes.
async fn look_closer(
    md: &ModelDeployment,
    model: &ValidModel,
    seen: &mut Observed,
    context: &Context,
) -> Result<(), Error> {
    seen.claim = context.look.claim(md).await?;
    if let Some(moved) = lock(&context.moved).get(Names::of(md).path()) {
        let ago = |at: &tokio::time::Instant| Millis(u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX));
        seen.moved = moved.iter().map(|(replica, at)| (replica.clone(), ago(at))).collect();
    }
    seen.leaving = context.leaving(Names::of(md).path(), &seen.pods);
    let matters = |pod: &&Pod| model.spreads_over_labels() || pod.metadata.deletion_timestamp.is_some();
    let pods: Vec<&Pod> = seen.pods.iter().map(AsRef::as_ref).filter(matters).collect();
    seen.nodes = context.look.nodes(&pods).await?;
    Ok(())
}

/// When to look again, if nothing wakes us before.
fn next(decision: &Decision, leaving: bool, applied: Applied, written: StatusWrite) -> Result<Action, Error> {
    // nothing wakes us when a node gets another label
    let apart = decision.together.is_none();
    let rests = decision.step.why == Why::Complete && decision.moving.is_none() && apart && !leaving;
    let moving = !rests || decision.running.is_none() || decision.scaling.is_some();
    let pause = if applied.unconfirmed || written == StatusWrite::Postponed {
        CONFIRM
    } else if moving {
        TICK
    } else {
        REST + backoff::pause(9, backoff::draw()) / 4
    };
    Ok(Action::requeue(pause))
}

/// What follows an error.
fn error_policy(object: Arc<Guarded>, error: &Error, context: Arc<Context>) -> Action {
    let key = ObjectRef::from_obj(object.as_ref());
    match error.class() {
        Class::Invalid => Action::await_change(),
        Class::Transient => {
            let pause = context.backoff.failed(key.clone(), &error.to_string());
            warn!(object = %key, error = error.chain(), ?pause, "tries again");
            Action::requeue(pause)
        }
        Class::Bug => {
            error!(object = %key, error = error.chain(), "bug");
            Action::requeue(AFTER_BUG)
        }
    }
}

/// The model that runs.
struct Accepted {
    model: ValidModel,
    served_names: Vec<String>,
    /// Why the present spec is not the one that runs.
    refusals: Vec<Refusal>,
    remark: Option<String>,
}

/// The object with the status that was written last, and why its spec cannot be read if so.
fn readable(object: &Guarded, context: &Context) -> (ModelDeployment, Option<Refusal>) {
    let (mut md, unreadable) = match &object.0 {
        Ok(md) => (md.clone(), None),
        Err(invalid) => {
            let md = ModelDeployment {
                metadata: invalid.metadata.clone(),
                spec: ModelDeploymentSpec::default(),
                status: None,
            };
            let refusal =
                Refusal { reason: Reason::Unparsable, field: "spec".to_owned(), message: invalid.error.clone() };
            (md, Some(refusal))
        }
    };
    md.status = context.writer.status_of(&md);
    (md, unreadable)
}

type Verdict = Result<Accepted, Vec<Refusal>>;

/// Takes the spec; if it is refused the one that was accepted last, so that what runs goes on.
fn accept(
    mut md: ModelDeployment,
    unreadable: Option<Refusal>,
    names: &Names,
    seen: &Observed,
    context: &Context,
) -> (ModelDeployment, Verdict) {
    let taken = context.taken(&md);
    let mut refusals = match unreadable {
        Some(refusal) => vec![refusal],
        None => match validate(&md, Place::Cluster) {
            Ok(model) if served::refusals(&md, &taken).is_empty() => {
                let remark = served::remark(&md, &taken);
                let served_names = context.free(&md);
                let accepted = Accepted { model, served_names, refusals: Vec::new(), remark };
                return (md, Ok(accepted));
            }
            Ok(_) => served::refusals(&md, &taken),
            Err(refusals) => refusals,
        },
    };
    match read_accepted(names, &seen.owned.config_maps) {
        Ok(Some(spec)) => md.spec = spec,
        Ok(None) => return (md, Err(refusals)),
        Err(error) => {
            let message = error.to_string();
            refusals.push(Refusal { reason: Reason::Unparsable, field: "spec".to_owned(), message });
            return (md, Err(refusals));
        }
    }
    let served_names = context.free(&md);
    let verdict = match validate(&md, Place::Cluster) {
        Ok(model) => Ok(Accepted { model, served_names, refusals, remark: None }),
        Err(_) => Err(refusals),
    };
    (md, verdict)
}

/// Shows why a spec is refused of which no accepted version is known, and waits for a change. What exists stays, and the
/// routers hear of it.
async fn refuse(
    md: &ModelDeployment,
    names: &Names,
    refusals: &[Refusal],
    seen: &Observed,
    context: &Context,
) -> Result<Action, Error> {
    let created = md.metadata.creation_timestamp.as_ref().map(|time| time.0);
    context.fleet.publish(names.path(), unruled(names, context.free(md), created, &replicas(names, seen)));
    let messages: Vec<&str> = refusals.iter().map(|refusal| refusal.message.as_str()).collect();
    let reason = refusals.first().map_or(Reason::Unparsable, |refusal| refusal.reason);
    let status = refused(md, reason, &messages.join("; "), now());
    match write_status(md, &status, context).await? {
        StatusWrite::Postponed => Ok(Action::requeue(CONFIRM)),
        StatusWrite::Same | StatusWrite::Written => Ok(Action::await_change()),
    }
}

/// Opens the gate of each worker that every router knows, and shuts those of replicas that drain.
async fn open_gates(decision: &Decision, context: &Context, now: Timestamp) -> Result<(), Error> {
    for replica in decision.replicas.iter().filter(|replica| replica.stands()) {
        for worker in replica.workers.iter().filter(|worker| !worker.terminating()) {
            if let Some(gate) = gate(replica, worker, decision, now) {
                context.writer.write_gate(&worker.pod, &gate).await?;
            }
        }
    }
    Ok(())
}

/// Deletes pods that hang on nodes that are gone, so that others take their place: a StatefulSet waits for them for ever.
/// Experts hold no state, and a twin that comes back is told from its successor.
async fn bury(md: &ModelDeployment, decision: &Decision, seen: &Observed, context: &Context) -> Result<(), Error> {
    for worker in decision.replicas.iter().flat_map(|replica| &replica.workers) {
        if worker.hangs(seen) {
            info!(pod = worker.pod.metadata.name, "hangs on a node that is gone, so it is deleted");
            context.writer.bury(md, &worker.pod).await?;
        }
    }
    Ok(())
}

/// What the gate of a worker should be; `None`: as it is. Once open it stays so until the replica drains.
fn gate(replica: &Replica, worker: &Worker, decision: &Decision, now: Timestamp) -> Option<PodCondition> {
    let target = decision.targets.iter().find(|one| one.revision == replica.revision && one.index == replica.index);
    let drains = target.is_none_or(|target| target.draining_since.is_some());
    let routed = worker.view.as_ref().is_some_and(|view| view.routed);
    let (status, reason) = match (drains, routed) {
        (true, _) if worker.gated() => ("False", "Draining"),
        (false, true) => ("True", "Routed"),
        _ => return None,
    };
    Some(PodCondition {
        type_: ROUTED.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        last_transition_time: Some(Time(now)),
        ..PodCondition::default()
    })
}

async fn write_status(
    md: &ModelDeployment,
    status: &crds::ModelDeploymentStatus,
    context: &Context,
) -> Result<StatusWrite, Error> {
    let written = context.writer.write_status(md, status).await?;
    if written == StatusWrite::Written {
        for note in notes(md.status.as_ref(), status) {
            publish(md, note, context).await;
        }
    }
    Ok(written)
}

/// Tells an Event. One that is lost is lost: the condition says the same.
async fn publish(md: &ModelDeployment, note: Note, context: &Context) {
    let event = Event {
        type_: if note.warning { EventType::Warning } else { EventType::Normal },
        reason: note.reason,
        note: Some(note.message.chars().take(1000).collect()),
        action: note.action,
        secondary: None,
    };
    let reference = md.object_ref(&());
    match tokio::time::timeout(CALL, context.recorder.publish(&event, &reference)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(%error, reason = event.reason, "could not publish an Event"),
        Err(_) => warn!(reason = event.reason, "no answer when publishing an Event"),
    }
}

impl Context {
    fn all_deployments(&self) -> Vec<Arc<Guarded>> {
        lock(&self.deployments).iter().flat_map(Store::state).collect()
    }

    fn taken(&self, md: &ModelDeployment) -> Vec<served::Taken> {
        let all = self.all_deployments();
        served::taken(md, all.iter().filter_map(|object| object.0.as_ref().ok()))
    }

    /// The names that `md` asks for and no older one has.
    fn free(&self, md: &ModelDeployment) -> Vec<String> {
        let taken = self.taken(md);
        served::asked(md).into_iter().filter(|name| !taken.iter().any(|one| one.name == *name)).collect()
    }

    fn with_history<T>(&self, model: &str, act: impl FnOnce(&mut Option<History>) -> T) -> T {
        let mut history = lock(&self.histories).remove(model);
        let result = act(&mut history);
        if let Some(history) = history {
            lock(&self.histories).insert(model.to_owned(), history);
        }
        result
    }

    /// Notes whose experts begin to move, so that none move again before that has paid for itself.
    fn remember_moves(&self, model: &str, decision: &Decision) {
        let replica = |target: &Target| (target.revision.to_string(), target.index);
        let mut all = lock(&self.moved);
        let moved = all.entry(model.to_owned()).or_default();
        moved.retain(|known, _| decision.targets.iter().any(|target| replica(target) == *known));
        let begins = |target: &&Target| matches!(target.also, Some(Besides::Next(_)));
        let begun = decision.targets.iter().filter(begins);
        moved.extend(begun.map(|target| (replica(target), tokio::time::Instant::now())));
        if moved.is_empty() {
            all.remove(model);
        }
    }

    /// How long each of a model's pods is known to be on its way out, by UID: its own times are of another clock.
    fn leaving(&self, model: &str, pods: &[Arc<Pod>]) -> BTreeMap<String, Duration> {
        let leaving = pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_some());
        let leaving: BTreeSet<String> = leaving.filter_map(|pod| pod.metadata.uid.clone()).collect();
        let mut all = lock(&self.leaving);
        let mut known = all.remove(model).unwrap_or_default();
        known.retain(|uid, _| leaving.contains(uid));
        for uid in leaving {
            known.entry(uid).or_insert_with(tokio::time::Instant::now);
        }
        let ages = known.iter().map(|(uid, since)| (uid.clone(), since.elapsed())).collect();
        if !known.is_empty() {
            all.insert(model.to_owned(), known);
        }
        ages
    }

    /// Forgets a model that is gone; says whether it was known.
    fn forget(&self, namespace: &str, name: &str) -> bool {
        let path = format!("{namespace}/{name}");
        self.fleet.remove(&path);
        lock(&self.histories).remove(&path);
        lock(&self.moved).remove(&path);
        lock(&self.leaving).remove(&path);
        self.backoff.succeeded(&ObjectRef::new(name).within(namespace));
        self.roster.notify_one();
        self.writer.forget(namespace, name)
    }
}

fn log(names: &Names, decision: &Decision) {
    let step = &decision.step;
    if let Some(scaling) = decision.scaling.filter(|scaling| scaling.from != scaling.to) {
        info!(model = names.path(), from = scaling.from, to = scaling.to, why = ?scaling.why, "scaled");
    }
    if ![&step.create, &step.drain, &step.take_back, &step.delete].iter().all(|ids| ids.is_empty()) {
        info!(model = names.path(), %step, wanted = decision.wanted, "changes replicas");
    }
}

/// The present in whole seconds, as the API server keeps times.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

fn text(panic: &(dyn std::any::Any + Send)) -> String {
    let message = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    message.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".to_owned())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_woken_while_the_lease_has_lapsed_is_looked_at_again() {
        let (claim, leadership) = lease::leadership();
        let now = tokio::time::Instant::now();
        assert_eq!(unless_leading(&leadership), Some(Action::await_change()));
        claim.lead(1, now);
        assert_eq!(unless_leading(&leadership), Some(Action::requeue(CONFIRM)));
        claim.lead(1, now + Duration::from_secs(60));
        assert_eq!(unless_leading(&leadership), None);
    }
}
