//! The engine's way to experts that are not here.
//!
//! A batch is parted by holder, each holder gets one message with each row once, all are asked at once. Which holder is
//! asked is decided in one place, `MeshExchange::holder`. Rows whose holder cannot be reached, refuses or does not
//! answer in time come back as missing.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use engine::{Exchange, ExpertBatch, Replies, WireDtype};
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};
use tonic::metadata::MetadataMap;
use tracing::{Span, field, info_span, warn};
use wire::proto::{self, RunCall, RunReply, refusal::Reason};

use super::{dtype, link::Link};
use crate::{
    mesh::{Mesh, Meshes},
    metrics::{CallResult, Metrics},
};

/// How long a holder that is connected may take for one message; pings notice one that is dead or stopped sooner.
const CALL_WAIT: Duration = Duration::from_secs(10);

/// Who this worker is, and what it runs.
#[derive(Debug, Clone)]
pub struct Own {
    /// Index of the replica.
    pub replica: u32,
    /// Index in the replica.
    pub ordinal: u32,
    /// Of the model files.
    pub content_hash: String,
    /// Values of a row.
    pub hidden: usize,
    /// How rows travel.
    pub dtype: WireDtype,
}

/// Sends rows to holders and gathers what comes back.
pub struct MeshExchange {
    own: Own,
    meshes: Meshes,
    newest: watch::Receiver<Arc<Mesh>>,
    /// What the running step goes by.
    mesh: Arc<Mesh>,
    links: BTreeMap<u32, Link>,
    changes: watch::Sender<u64>,
    changed: watch::Receiver<u64>,
    sequence: u64,
    span: Span,
    missing_since: Option<Instant>,
    missed: bool,
    metrics: Arc<Metrics>,
}

/// A batch on its way.
pub struct Ticket {
    pairs: usize,
    asked: Vec<Asked>,
    unasked: Vec<u32>,
}

struct Asked {
    /// Indices in the batch, in the order of the call.
    pairs: Vec<u32>,
    reply: oneshot::Receiver<RunReply>,
    span: Span,
    deadline: Instant,
}

impl MeshExchange {
    /// Follows the newest of `meshes`. Must be used inside tokio.
    pub fn new(own: Own, meshes: Meshes, metrics: Arc<Metrics>) -> Self {
        let (changes, changed) = watch::channel(0);
        Self {
            own,
            newest: meshes.follow(),
            mesh: meshes.newest(),
            meshes,
            links: BTreeMap::new(),
            changes,
            changed,
            sequence: 0,
            span: Span::none(),
            missing_since: None,
            missed: false,
            metrics,
        }
    }

    /// Begins a step: follows the newest snapshot. Calls of the step become children of `span`, unless that is none.
    pub fn begin_step(&mut self, span: Span) {
        self.span = span;
        self.missed = false;
        self.newest.mark_unchanged();
        let mesh = self.meshes.begin_step();
        if !Arc::ptr_eq(&mesh, &self.mesh) || self.links.is_empty() {
            self.follow(&mesh);
        }
        self.mesh = mesh;
    }

    /// Ends a step; returns since when rows have been missing in every step, if some were missing in this one.
    pub fn end_step(&mut self) -> Option<Instant> {
        self.meshes.end_step();
        self.missing_since = self.missed.then(|| self.missing_since.unwrap_or_else(Instant::now));
        self.missing_since
    }

    /// Waits until a holder came or went, or a snapshot arrived.
    pub async fn changed(&mut self) {
        tokio::select! {
            _ = self.changed.changed() => {}
            Ok(()) = self.newest.changed() => self.newest.mark_changed(),
        }
    }

    /// One link to each other worker of our replica. A worker that restarted elsewhere gets a new one at once.
    fn follow(&mut self, mesh: &Mesh) {
        let own = &self.own;
        let ours = |peer: &&proto::Peer| peer.replica == own.replica && peer.ordinal != own.ordinal;
        let peers: HashMap<u32, &proto::Peer> = mesh.peers.iter().filter(ours).map(|p| (p.ordinal, p)).collect();
        self.links.retain(|ordinal, link| peers.get(ordinal).is_some_and(|peer| peer.address == link.address));
        for (ordinal, peer) in peers {
            match self.links.get(&ordinal) {
                Some(link) if peer.loaded => link.hurry(),
                Some(_) => {}
                None => {
                    let link = Link::open(peer.address.clone(), &peer.dns_name, self.changes.clone());
                    self.links.insert(ordinal, link);
                }
            }
        }
    }

    /// The worker that is asked for an expert: the first of its holders that is connected.
    fn holder(&self, mesh: &Mesh, layer: u32, expert: u32) -> Option<u32> {
        let holders = mesh.placement.holders(layer, expert);
        holders.iter().copied().find(|ordinal| self.links.get(ordinal).is_some_and(Link::is_up))
    }

    fn ask(&mut self, batch: &ExpertBatch<'_>, layer: u32, ordinal: u32, pairs: Vec<u32>) -> Result<Asked, Vec<u32>> {
        let Some(link) = self.links.get(&ordinal) else {
            return Err(pairs);
        };
        self.sequence += 1;
        let mut call = self.own.call(self.sequence, layer, batch, &pairs);
        let span = call_span(&self.span, layer, &link.address, pairs.len());
        call.traceparent = span.in_scope(traceparent);
        let rows = call.rows.len() / self.own.row_bytes();
        match link.send(call) {
            Some(reply) => {
                self.metrics.rows_sent(rows);
                Ok(Asked { pairs, reply, span, deadline: Instant::now() + CALL_WAIT })
            }
            None => Err(pairs),
        }
    }
}

impl Exchange for MeshExchange {
    type Ticket = Ticket;

    fn send(&mut self, batch: &ExpertBatch<'_>) -> Ticket {
        let layer = u32::try_from(batch.layer).unwrap_or(u32::MAX);
        let mesh = self.mesh.clone();
        let mut by_holder: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        let mut ticket = Ticket { pairs: batch.pair_experts.len(), asked: Vec::new(), unasked: Vec::new() };
        for (pair, &expert) in (0..).zip(batch.pair_experts) {
            match self.holder(&mesh, layer, expert) {
                Some(ordinal) => by_holder.entry(ordinal).or_default().push(pair),
                None => ticket.unasked.push(pair),
            }
        }
        for (ordinal, pairs) in by_holder {
            match self.ask(batch, layer, ordinal, pairs) {
                Ok(asked) => ticket.asked.push(asked),
                Err(pairs) => ticket.unasked.extend(pairs),
            }
        }
        ticket
    }

    async fn join(&mut self, ticket: Ticket) -> Replies {
        let row = self.own.row_bytes();
        let mut replies = Replies { rows: vec![0; ticket.pairs * row], missing: ticket.unasked };
        self.metrics.calls(CallResult::Unreachable, usize::from(!replies.missing.is_empty()));
        for asked in ticket.asked {
            let reply = tokio::time::timeout_at(asked.deadline, asked.reply).await;
            let result = match &reply {
                Err(_) => CallResult::Late,
                Ok(Err(_)) => CallResult::Lost,
                Ok(Ok(reply)) => result(reply, asked.pairs.len() * row),
            };
            asked.span.record("result", result.name());
            self.metrics.calls(result, 1);
            match reply {
                Ok(Ok(reply)) if result == CallResult::Answered => {
                    for (&pair, bytes) in asked.pairs.iter().zip(reply.rows.chunks_exact(row)) {
                        replies.rows[pair as usize * row..][..row].copy_from_slice(bytes);
                    }
                }
                _ => replies.missing.extend(asked.pairs),
            }
        }
        replies.missing.sort_unstable();
        self.missed |= !replies.missing.is_empty();
        replies
    }
}

impl Own {
    fn row_bytes(&self) -> usize {
        self.hidden * self.dtype.size()
    }

    /// The call for some pairs of a batch, each of their rows once.
    fn call(&self, sequence: u64, layer: u32, batch: &ExpertBatch<'_>, pairs: &[u32]) -> RunCall {
        let row = self.row_bytes();
        let mut rows = Vec::new();
        let mut places: HashMap<u32, u32> = HashMap::new();
        let mut place = |from: u32| {
            *places.entry(from).or_insert_with(|| {
                rows.extend_from_slice(&batch.rows[from as usize * row..][..row]);
                u32::try_from(rows.len() / row - 1).unwrap_or(u32::MAX)
            })
        };
        let pair_rows = pairs.iter().map(|&pair| place(batch.pair_rows[pair as usize])).collect();
        RunCall {
            sequence,
            layer,
            content_hash: self.content_hash.clone(),
            remaining_ms: u64::try_from(CALL_WAIT.as_millis()).unwrap_or(u64::MAX),
            dtype: dtype(self.dtype).into(),
            rows: rows.into(),
            pair_rows,
            pair_experts: pairs.iter().map(|&pair| batch.pair_experts[pair as usize]).collect(),
            traceparent: String::new(),
        }
    }
}

/// What a reply counts as. A refusal that no snapshot explains is a fault of ours, and is said once a message.
fn result(reply: &RunReply, bytes: usize) -> CallResult {
    let Some(refusal) = &reply.refusal else {
        if reply.rows.len() == bytes {
            return CallResult::Answered;
        }
        warn!(layer = reply.layer, got = reply.rows.len(), want = bytes, "a holder answered with other rows");
        return CallResult::Malformed;
    };
    match refusal.reason() {
        Reason::Busy => CallResult::Busy,
        Reason::Expired => CallResult::Expired,
        Reason::NotHeld => CallResult::NotHeld,
        reason @ (Reason::OtherContent | Reason::Malformed | Reason::Unspecified) => {
            warn!(layer = reply.layer, ?reason, "a holder refused rows");
            if reason == Reason::OtherContent { CallResult::OtherContent } else { CallResult::Malformed }
        }
    }
}

fn call_span(parent: &Span, layer: u32, peer: &str, pairs: usize) -> Span {
    if parent.is_none() {
        return Span::none();
    }
    info_span!(parent: parent, "experts.run", otel.kind = "client", layer, peer, pairs, result = field::Empty)
}

fn traceparent() -> String {
    let mut metadata = MetadataMap::new();
    if !Span::current().is_none() {
        wire::telemetry::inject(&mut metadata);
    }
    metadata.get("traceparent").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}
