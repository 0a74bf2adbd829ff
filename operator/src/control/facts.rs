//! What the reconciler (or local mode) knows of a model and tells the fleet. Snapshots are made from it.

use std::{net::IpAddr, time::Duration};

use wire::proto;

pub use proto::model_snapshot::Availability;

/// A process whose hello counts: with this id, from this address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The pod's UID, or the random token that local mode gave the process.
    pub id: String,
    /// Where it must come from; `None` (local mode) for anywhere.
    pub ip: Option<IpAddr>,
}

/// One model, as far as routers and workers must know it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelFacts {
    /// The names that clients may use beside NAMESPACE/NAME.
    pub served_names: Vec<String>,
    /// Unix time in seconds.
    pub created: i64,
    /// What a request meets when no worker is there.
    pub availability: Availability,
    /// Requests that may wait, over all routers; each live router gets its share.
    pub max_pending: u32,
    /// How long a request may wait.
    pub max_wait: Duration,
    /// Longest context in tokens; 0: not known yet.
    pub max_context_tokens: u32,
    /// How often a stream may go on at another worker; 0: never.
    pub migration_attempts: u32,
    /// How long a sequence waits for an expert that nobody holds; `None`: the worker's default.
    pub expert_wait: Option<Duration>,
    /// Every replica of every revision that has workers, those on their way out too.
    pub replicas: Vec<ReplicaFacts>,
}

/// One replica: workers that share the experts of one placement.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplicaFacts {
    /// Unique among the model's replicas of one revision.
    pub replica: u32,
    /// What its workers run.
    pub revision: String,
    /// The model files that its workers must have.
    pub content_hash: String,
    /// Which ordinals are asked for which experts.
    pub placement: planner::Placement,
    /// Experts that workers hold besides, while the placement changes.
    pub also_hold: Option<planner::Placement>,
    /// Takes no new requests, because it goes away; may be taken back.
    pub draining: bool,
    /// Its workers, until their pods are gone: a terminating worker still serves its experts.
    pub workers: Vec<WorkerFacts>,
}

/// One worker, from its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerFacts {
    /// The pod's UID, or the local token.
    pub id: String,
    /// IP:PORT of its gRPC; empty: what its hello says.
    pub address: String,
    /// HOST:PORT to use if the address fails; may be empty.
    pub dns_name: String,
    /// Its place in the replica.
    pub ordinal: u32,
    /// Its own readiness probe succeeds. Counts as loaded until the worker has spoken to this operator, so that a
    /// restarted operator takes no worker from the routers.
    pub ready: bool,
    /// It is about to go, because its replica becomes narrower: it takes no new requests.
    pub leaves: bool,
}
