//! What routers and workers are told of a model: pure, from the decision and what is there.

use std::net::{IpAddr, SocketAddr};

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::{
    control::{Availability, ModelFacts, ReplicaFacts, WorkerFacts},
    decide::{Decision, Planning, Target},
    launch::WORKER_PORT,
    render::Names,
    replica::{Replica, Worker},
    validate::{MAX_PENDING, MAX_WAIT, ValidModel, attempts},
};

/// The facts of a model whose replicas are to become those of `decision`.
pub fn facts(
    names: &Names,
    model: &ValidModel,
    served_names: Vec<String>,
    created: Option<Timestamp>,
    decision: &Decision,
) -> ModelFacts {
    let context = match &decision.planning {
        Planning::Planned(plan) => plan.max_context_tokens.0,
        _ => 0,
    };
    ModelFacts {
        served_names,
        created: created.map_or(0, |time| time.as_second()),
        availability: availability(model, decision),
        max_pending: model.max_pending,
        max_wait: model.max_wait,
        max_context_tokens: u32::try_from(context).unwrap_or(u32::MAX),
        migration_attempts: model.migration_attempts,
        expert_wait: model.expert_wait,
        replicas: decision.replicas.iter().filter_map(|one| decided(names, one, decision)).collect(),
    }
}

/// The facts of a model of which no spec is known that could be used: what stands goes on, and the router keeps to the
/// limits of a spec that says nothing of them.
pub fn unruled(
    names: &Names,
    served_names: Vec<String>,
    created: Option<Timestamp>,
    replicas: &[Replica],
) -> ModelFacts {
    let stands = replicas.iter().any(Replica::stands);
    let facts = |one: &Replica| replica(names, one, one.draining_since.is_some() || !one.stands());
    ModelFacts {
        served_names,
        created: created.map_or(0, |time| time.as_second()),
        availability: if stands { Availability::Serving } else { Availability::Off },
        max_pending: MAX_PENDING,
        max_wait: MAX_WAIT,
        max_context_tokens: 0,
        migration_attempts: attempts(None),
        expert_wait: None,
        replicas: replicas.iter().filter_map(facts).collect(),
    }
}

fn availability(model: &ValidModel, decision: &Decision) -> Availability {
    let possible = matches!(decision.planning, Planning::Planned(_) | Planning::Describing);
    match decision.wanted {
        0 if model.autoscaling.is_some() && !model.spec.suspend => Availability::Asleep,
        0 => Availability::Off,
        // Requests wait for what is about to be there, not for what cannot be.
        _ if possible || decision.running.is_some() => Availability::Serving,
        _ => Availability::Off,
    }
}

fn decided(names: &Names, one: &Replica, decision: &Decision) -> Option<ReplicaFacts> {
    let target = decision.targets.iter().find(|target| target.revision == one.revision && target.index == one.index);
    if target.is_some_and(|target| is_placed_anew(one, target)) {
        return None;
    }
    replica(names, one, target.is_none_or(|target| target.draining_since.is_some()))
}

fn replica(names: &Names, replica: &Replica, draining: bool) -> Option<ReplicaFacts> {
    let plan = replica.plan.as_ref()?;
    Some(ReplicaFacts {
        replica: replica.index,
        revision: replica.revision.to_string(),
        content_hash: replica.content_hash()?.to_owned(),
        placement: plan.placement.clone(),
        also_hold: replica.also.as_ref().map(|also| also.plan().placement.clone()),
        draining,
        workers: replica.workers.iter().filter_map(|one| worker(names, replica, one)).collect(),
    })
}

/// Its first table gives way to another before anyone has asked by it, so nobody is told of that one any more.
fn is_placed_anew(replica: &Replica, target: &Target) -> bool {
    let differs = replica.plan.as_ref().is_some_and(|plan| plan.placement != target.plan.placement);
    differs && target.also.is_none() && !replica.began()
}

/// A worker, once it has an address.
fn worker(names: &Names, replica: &Replica, worker: &Worker) -> Option<WorkerFacts> {
    let pods = replica.also.as_ref().map_or(0, |also| also.plan().shards).max(replica.shards());
    let ip: IpAddr = worker.pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()?;
    Some(WorkerFacts {
        id: worker.pod.uid()?,
        address: SocketAddr::new(ip, WORKER_PORT).to_string(),
        dns_name: format!("{}:{WORKER_PORT}", names.worker_host(&worker.pod.name_any())),
        ordinal: worker.ordinal,
        ready: worker.probed(),
        leaves: worker.ordinal >= pods,
    })
}
