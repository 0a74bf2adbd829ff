//! From a request to the worker that answers it: waiting, picking, calling, trying another.
//!
//! This module answers for the time until the first piece of an answer; from then on the stream belongs to whoever
//! sends it to the client, and the [`Grant`] in it gives the place back.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::StatusCode;
use tokio::sync::oneshot;
use tonic::{Code, Request, Status, Streaming, transport::Channel};
use tracing::{Instrument as _, Span, debug, field::Empty, info_span};
use wire::{
    MAX_MESSAGE_BYTES,
    openai::ErrorObject,
    proto::{
        Chunk, Endpoint, GenerateCall, GenerateReply, chunk::Kind, generate_reply::Reply, worker_client::WorkerClient,
    },
};

use crate::{
    line::{Entered, Entry, Line, Waiter},
    load::Grant,
    pick::Why,
    queue::Ticket,
    refusal::Refusal,
    router::Router,
};

/// How often a request may be lost by a worker that had taken it: one that kills its worker must not kill all.
const LOSSES: u32 = 3;
/// How often a request may be brought to a worker at all.
const ATTEMPTS: u32 = 32;

/// A request that is let in: what the worker gets, and what the router decided.
#[derive(Clone, Debug)]
pub struct Call {
    /// What is asked for.
    pub endpoint: Endpoint,
    /// The client's bytes.
    pub body: Bytes,
    /// The model as the client named it.
    pub model: String,
    /// `id` of every object in the answer.
    pub id: String,
    /// Unix time in seconds, `created` of every object in the answer.
    pub created: i64,
    /// Sequences.
    pub choices: u32,
    /// When it came.
    pub arrived: Instant,
    /// The client's deadline.
    pub deadline: Option<Instant>,
}

/// How often a request was lost so far. One for the whole life of a request.
#[derive(Debug)]
pub struct Trip {
    losses: u32,
    attempts: u32,
    waiting_since: Instant,
}

impl Trip {
    /// A request that comes now.
    pub fn new(arrived: Instant) -> Self {
        Self { losses: 0, attempts: 0, waiting_since: arrived }
    }

    /// A worker that had taken it was lost.
    ///
    /// # Errors
    /// It was too often.
    pub fn lost(&mut self) -> Result<(), Refusal> {
        self.losses += 1;
        self.waiting_since = Instant::now();
        if self.losses >= LOSSES { Err(Refusal::workers_failed()) } else { Ok(()) }
    }
}

/// An answer that has begun. Dropping it cancels at the worker.
#[derive(Debug)]
pub struct Running {
    first: Option<Chunk>,
    replies: Streaming<GenerateReply>,
    deadline: Option<Instant>,
    grant: Grant,
    span: Span,
}

/// A stream that ended before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The worker was lost.
    Lost,
    /// The client's deadline passed.
    Deadline,
}

impl Broken {
    /// What a client is told.
    pub fn refusal(self) -> Refusal {
        match self {
            Self::Lost => Refusal::workers_failed(),
            Self::Deadline => Refusal::deadline(),
        }
    }
}

impl Running {
    /// The next piece. After one that is not a delta there is none.
    ///
    /// # Errors
    /// The stream broke, or ended without a last piece.
    pub async fn next(&mut self) -> Result<Chunk, Broken> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        match until(self.deadline, self.replies.message()).await {
            None => Err(Broken::Deadline),
            Some(Ok(Some(GenerateReply { reply: Some(Reply::Chunk(chunk)) }))) => Ok(chunk),
            Some(other) => {
                self.span.in_scope(|| debug!(status = ?other.err().map(|status| status.code()), "lost a worker"));
                Err(Broken::Lost)
            }
        }
    }

    /// The worker was lost in the middle: it gets nothing for a while.
    pub fn blame(&self, router: &Router) {
        self.grant.worker().load.failed(router.now(), false);
    }
}

/// Why an attempt came to nothing.
enum Failed {
    /// Nobody answered at the worker's address.
    NobodyThere,
    /// It does not take this request: it drains, is full, or has other files.
    NotTaken,
    /// It was lost with the request.
    Lost,
    /// Another worker would say the same.
    Final(Refusal),
}

/// Brings `call` to a worker, and returns with the first piece of the answer.
///
/// 1. Get a grant: at once if a worker is free, else in the queue, for at most the model's `maxWait`.
/// 2. Call the worker. If it refuses the request itself, so do we.
/// 3. If it cannot be reached, drains or is lost, go back to 1, before all others; it is suspect for a while.
///
/// Assumes that nothing of the model was sent to the client yet.
///
/// # Errors
/// What the client is to be told.
pub async fn begin(router: &Router, call: &Call, trip: &mut Trip) -> Result<Running, Refusal> {
    loop {
        let grant = admit(router, call, trip).await?;
        trip.attempts += 1;
        let span = info_span!(
            "call worker",
            otel.name = "modelfleet.v1.Worker/Generate",
            otel.kind = "client",
            otel.status_code = Empty,
            server.address = grant.worker().target(),
            modelfleet.worker.id = grant.worker().id,
            modelfleet.attempt = trip.attempts,
        );
        let attempt = attempt(router, call, &grant).instrument(span.clone());
        let failed = match until(call.deadline, attempt).await {
            None => return Err(Refusal::deadline()),
            Some(Ok((first, replies))) => {
                grant.worker().load.answered();
                return Ok(Running { first: Some(first), replies, deadline: call.deadline, grant, span });
            }
            Some(Err(failed)) => failed,
        };
        span.record("otel.status_code", "ERROR");
        let load = &grant.worker().load;
        match failed {
            Failed::Final(refusal) => {
                load.answered();
                return Err(refusal);
            }
            Failed::NobodyThere => load.failed(router.now(), true),
            Failed::NotTaken => load.failed(router.now(), false),
            Failed::Lost => {
                load.failed(router.now(), false);
                trip.lost()?;
            }
        }
        if trip.attempts >= ATTEMPTS {
            return Err(Refusal::workers_failed());
        }
        router.metrics().retried(&call.model_label(router));
    }
}

impl Call {
    /// The model's own name for metrics, which have no room for what clients may write.
    fn model_label(&self, router: &Router) -> String {
        router.find(&self.model).map_or_else(String::new, |line| line.model().name.clone())
    }
}

/// A worker for `call`, after a wait if need be.
async fn admit(router: &Router, call: &Call, trip: &Trip) -> Result<Grant, Refusal> {
    let line = router.find(&call.model).ok_or_else(|| Refusal::no_model(&call.model))?;
    let (sender, granted) = oneshot::channel();
    let waiter = || -> Waiter { Box::new(move |grant| sender.send(grant)) };
    let entry = Entry { weight: call.choices, arrived: router.since_start(call.arrived), is_retry: trip.attempts > 0 };
    let (ticket, why) = match line.enter(entry, router.now(), fastrand::u64(..), waiter) {
        Entered::Granted(grant) => return Ok(grant),
        Entered::Full => return Err(Refusal::queue_full()),
        Entered::Off => return Err(Refusal::no_worker()),
        Entered::Waiting(ticket, why) => (ticket, why),
    };
    let _place = Place { line: &line, ticket };
    if why == Why::NoWorker {
        router.wake_operator();
    }
    let patience = trip.waiting_since + line.model().max_wait;
    let ends = call.deadline.map_or(patience, |deadline| deadline.min(patience));
    match until(Some(ends), granted).await {
        Some(Ok(grant)) => Ok(grant),
        Some(Err(_)) => Err(Refusal::no_model(&call.model)), // gone while it waited
        None if ends < patience => Err(Refusal::deadline()),
        None => Err(Refusal::waited_too_long()),
    }
}

/// A place in the queue, left when dropped: at a grant, a deadline or a disconnect.
struct Place<'a> {
    line: &'a Arc<Line>,
    ticket: Ticket,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.line.leave(self.ticket);
    }
}

async fn attempt(router: &Router, call: &Call, grant: &Grant) -> Result<(Chunk, Streaming<GenerateReply>), Failed> {
    let worker = grant.worker();
    let remaining = call.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let mut request = Request::new(GenerateCall {
        endpoint: call.endpoint.into(),
        body: call.body.clone(),
        request_id: call.id.clone(),
        created: call.created,
        remaining_ms: remaining.map_or(0, |remaining| remaining.as_millis().max(1) as u64),
        model: call.model.clone(),
        content_hash: worker.content_hash.clone(),
        resume: None,
    });
    wire::telemetry::inject(request.metadata_mut());
    let mut client = WorkerClient::new(router.channels().get(worker.target()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let mut replies = client.generate(request).await.map_err(|status| refused(&status))?.into_inner();
    let head = match replies.message().await {
        Ok(Some(GenerateReply { reply: Some(Reply::Head(head)) })) => head,
        Ok(_) => return Err(Failed::Final(Refusal::broken())),
        Err(status) => return Err(lost(&status)),
    };
    match StatusCode::from_u16(head.status as u16) {
        Ok(StatusCode::OK) => {}
        Ok(StatusCode::SERVICE_UNAVAILABLE) => return Err(Failed::NotTaken),
        Ok(status) if status.is_client_error() || status.is_server_error() => {
            let error = ErrorObject::from_json(&head.body);
            return Err(Failed::Final(Refusal::of_worker(status, error)));
        }
        _ => return Err(Failed::Final(Refusal::broken())),
    }
    match replies.message().await {
        Ok(Some(GenerateReply { reply: Some(Reply::Chunk(first)) })) => match first.kind() {
            Kind::Error => Err(Failed::Final(Refusal::of_stream(ErrorObject::from_json(&first.json)))),
            _ => Ok((first, replies)),
        },
        Ok(_) => Err(Failed::Lost),
        Err(status) => Err(lost(&status)),
    }
}

/// What a call that was not taken means.
fn refused(status: &Status) -> Failed {
    debug!(code = ?status.code(), "a worker did not take the request");
    match status.code() {
        Code::Unavailable => Failed::NobodyThere,
        Code::FailedPrecondition | Code::ResourceExhausted | Code::Aborted => Failed::NotTaken,
        Code::Unknown | Code::Cancelled | Code::Internal => Failed::Lost,
        _ => Failed::Final(Refusal::broken()),
    }
}

/// What the end of a call means that was taken, but not answered.
fn lost(status: &Status) -> Failed {
    debug!(code = ?status.code(), "lost a worker before its answer");
    match status.code() {
        Code::Unavailable | Code::FailedPrecondition | Code::ResourceExhausted | Code::Aborted => Failed::NotTaken,
        Code::DeadlineExceeded => Failed::Final(Refusal::deadline()),
        _ => Failed::Lost,
    }
}

async fn until<T>(deadline: Option<Instant>, future: impl Future<Output = T>) -> Option<T> {
    match deadline {
        None => Some(future.await),
        Some(deadline) => tokio::time::timeout_at(deadline.into(), future).await.ok(),
    }
}

/// One connection a worker, made at the first call.
#[derive(Debug, Default)]
pub struct Channels(Mutex<HashMap<String, Channel>>);

impl Channels {
    /// The channel to `address`.
    pub fn get(&self, address: &str) -> Channel {
        let mut channels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return channel.clone();
        }
        let channel = wire::connect(address);
        channels.insert(address.to_owned(), channel.clone());
        channel
    }

    /// Forgets those that are not `wanted`; calls that run keep theirs.
    pub fn retain(&self, wanted: impl Fn(&str) -> bool) {
        let mut channels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|address, _| wanted(address));
    }
}

/// How often those in line are looked at though nothing was freed: suspicions end by time.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);
