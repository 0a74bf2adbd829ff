//! `modelfleet.v1.Experts`: computes rows for peers, over gRPC and in frames.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use engine::Experts;
use futures::{FutureExt as _, future::BoxFuture};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap};
use tracing::{Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use wire::{
    connections::framed::Connection,
    proto::{self, RunCall, RunReply, refusal::Reason},
};

use super::{
    dtype, peer,
    pool::{Job, Pool, SendReply, refuse},
};

/// Calls of one stream that are computed, wait, or have replies that the peer has not read.
pub(super) const STREAM_CALLS: usize = 64;

/// Serves the experts of one worker.
#[derive(Clone)]
pub struct ExpertsService {
    experts: Arc<Experts>,
    pool: Arc<Pool>,
    content_hash: Arc<str>,
    asked: Arc<AtomicU64>,
}

impl ExpertsService {
    /// Serves `experts` of the model files with this content hash.
    pub fn new(experts: Arc<Experts>, pool: Pool, content_hash: &str) -> Self {
        Self { experts, pool: Arc::new(pool), content_hash: content_hash.into(), asked: Arc::default() }
    }

    /// Counts the rows that peers ask for.
    pub fn asked(&self) -> Arc<AtomicU64> {
        self.asked.clone()
    }

    /// Checks everything about a call that can be checked without computing.
    fn check(&self, call: &RunCall) -> Result<(), (Reason, String)> {
        let malformed = |message: String| Err((Reason::Malformed, message));
        if *call.content_hash != *self.content_hash {
            return Err((Reason::OtherContent, "this worker serves other model files".into()));
        }
        if call.dtype() != dtype(self.experts.dtype()) {
            return malformed(format!("rows are {:?}; this model's are {:?}", call.dtype(), self.experts.dtype()));
        }
        let row = self.experts.hidden() * self.experts.dtype().size();
        if !call.rows.len().is_multiple_of(row) {
            return malformed(format!("{} bytes are not whole rows of {row} bytes", call.rows.len()));
        }
        if call.pair_rows.len() != call.pair_experts.len() {
            let (rows, experts) = (call.pair_rows.len(), call.pair_experts.len());
            return malformed(format!("pairs have {rows} rows and {experts} experts"));
        }
        let rows = call.rows.len() / row;
        if let Some(beyond) = call.pair_rows.iter().find(|&&at| at as usize >= rows) {
            return malformed(format!("a pair names row {beyond} of {rows}"));
        }
        // a reply has a row a pair, so their number is bounded by what a message may hold
        if call.pair_rows.len() > wire::MAX_MESSAGE_BYTES / row {
            return malformed(format!("{} pairs are more than a reply can hold", call.pair_rows.len()));
        }
        let mut experts = call.pair_experts.chunk_by(|a, b| a == b).map(|pairs| pairs[0]);
        if let Some(expert) = experts.find(|&expert| !self.experts.holds(call.layer as usize, expert as usize)) {
            return Err((Reason::NotHeld, format!("expert {expert} of layer {} is not held here", call.layer)));
        }
        Ok(())
    }

    /// Serves peers that speak frames.
    pub fn frames(&self) -> impl Fn(Connection) -> BoxFuture<'static, ()> + Send + Sync + use<> {
        let service = self.clone();
        move |connection| peer::serve(service.clone(), connection).boxed()
    }

    /// Queues a call, if there is a place for its reply; `Some` is the reply to one that is not computed.
    pub(super) fn queue(&self, call: RunCall, place: Option<SendReply>) -> Option<RunReply> {
        self.take(call, place, Pool::submit)
    }

    /// As [`ExpertsService::queue`], on a thread that may compute.
    pub(super) fn compute(&self, call: RunCall, place: Option<SendReply>) -> Option<RunReply> {
        self.take(call, place, Pool::compute)
    }

    fn take(
        &self,
        call: RunCall,
        place: Option<SendReply>,
        hand_over: impl FnOnce(&Pool, Job) -> Option<Job>,
    ) -> Option<RunReply> {
        self.asked.fetch_add(call.pair_rows.len() as u64, Ordering::Relaxed);
        if let Err((reason, message)) = self.check(&call) {
            return Some(refuse(&call, reason, &message));
        }
        let deadline = (call.remaining_ms > 0).then(|| Duration::from_millis(call.remaining_ms));
        let deadline = deadline.and_then(|remaining| Instant::now().checked_add(remaining));
        let Some(reply) = place else {
            return Some(refuse(&call, Reason::Busy, "too many replies of this stream wait to be read"));
        };
        let span = server_span(&call);
        let rejected = hand_over(&self.pool, Job { call, deadline, reply, span })?;
        Some(refuse(&rejected.call, Reason::Busy, "more rows wait here than this worker takes"))
    }
}

#[tonic::async_trait]
impl proto::experts_server::Experts for ExpertsService {
    type RunStream = ReceiverStream<Result<RunReply, Status>>;

    async fn run(&self, request: Request<Streaming<RunCall>>) -> Result<Response<Self::RunStream>, Status> {
        let mut calls = request.into_inner();
        let (replies, outgoing) = mpsc::channel(STREAM_CALLS);
        let service = self.clone();
        tokio::spawn(async move {
            loop {
                let call = tokio::select! {
                    call = calls.message() => call,
                    () = replies.closed() => return,
                };
                // the end of the calls is the end of the stream: replies on their way still go out
                let Ok(Some(call)) = call else { return };
                let place = replies.clone().try_reserve_owned().ok();
                let place = place.map(|place| -> SendReply { Box::new(move |reply| drop(place.send(Ok(reply)))) });
                if let Some(refusal) = service.queue(call, place)
                    && replies.send(Ok(refusal)).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// The span of a call whose request is traced; none for the others.
fn server_span(call: &RunCall) -> Span {
    let Ok(parent) = call.traceparent.parse() else {
        return Span::none();
    };
    if call.traceparent.is_empty() {
        return Span::none();
    }
    let mut metadata = MetadataMap::new();
    metadata.insert("traceparent", parent);
    let span = info_span!(
        parent: None,
        "experts.run",
        otel.kind = "server",
        layer = call.layer,
        pairs = call.pair_experts.len()
    );
    let _ = span.set_parent(wire::telemetry::extract(&metadata)); // without an exporter there is nothing to set
    span
}
