//! From a request to the worker that answers it: waiting, picking, calling, trying another.
//!
//! This module answers for the time until the first piece that a worker sends; from then on the stream belongs to
//! whoever sends it to the client, and the [`Grant`] in it gives the place back.

use std::{
    future::Future,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{StatusCode, uri::PathAndQuery};
use tokio::sync::oneshot;
use tonic::{Code, Request, Status, Streaming, client::Grpc};
use tower::ServiceExt as _;
use tracing::{Instrument as _, Span, debug, field::Empty, info_span};
use wire::{
    MAX_MESSAGE_BYTES,
    openai::ErrorObject,
    proto::{Endpoint, GenerateCall, GenerateReply, Resume, chunk::Kind, generate_reply::Reply},
};

use crate::{
    ahead::Ahead,
    codec::Fitting,
    line::{Entered, Entry, Line, Turn, Waiter},
    load::{Grant, WorkerLoad},
    pick::Why,
    queue::Ticket,
    refusal::Refusal,
    resume::{Journey, Reason},
    router::Router,
    running::{Broken, Running},
};

/// How often a request may be brought to a worker until one begins to answer.
const ATTEMPTS: u32 = 32;
const GENERATE: &str = "/modelfleet.v1.Worker/Generate";
/// How often those in line are looked at though nothing was freed: suspicions end by time.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A request that is let in: what the worker gets, and what the router decided.
#[derive(Clone, Debug)]
pub struct Call {
    /// What is asked for.
    pub endpoint: Endpoint,
    /// The client's bytes.
    pub body: Bytes,
    /// The model as the client named it.
    pub model: String,
    /// The model's own name, by which it is found from here on: another one may take over the name that the client used.
    pub own_name: String,
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

/// Why an attempt came to nothing.
enum Failed {
    /// Nobody answered at the worker's address.
    NobodyThere,
    /// It does not take this request: it drains, is full, has other files, or gives no sign of life. What stops a whole
    /// worker was there before the request.
    NotTaken,
    /// It was lost with the request.
    Lost,
    /// Another worker would say the same.
    Final(Refusal),
}

/// Brings `call` to a worker, and returns when the answer, or the rest of it, has begun to come. Each attempt is a span
/// below `parent`.
///
/// 1. Get a grant: at once if a worker is free, else in the queue, for at most the model's `maxWait`.
/// 2. Call the worker, with what the client has already. If it refuses the request itself, so do we.
/// 3. If it cannot be reached, drains, hangs, is silent or lost, go back to 1, before all others; it is suspect for a while.
///
/// # Errors
/// What the client is to be told.
pub async fn begin(router: &Router, call: &Call, journey: &mut Journey, parent: &Span) -> Result<Running, Refusal> {
    let mut waits_since = if journey.content().is_some() { Instant::now() } else { call.arrived };
    for attempt in 1..=ATTEMPTS {
        let grant = admit(router, call, turn(journey, attempt), waits_since).await?;
        let span = info_span!(
            parent: parent,
            "call worker",
            otel.name = "modelfleet.v1.Worker/Generate",
            otel.kind = "client",
            otel.status_code = Empty,
            server.address = grant.worker().target(),
            modelfleet.worker.id = grant.worker().id,
            modelfleet.attempt = attempt,
        );
        let resume = journey.resume();
        // pinned where it is made, here and below: it is large, and each layer around it would copy it
        let tried = pin!(async {
            let replies = ask(router, call, resume, &grant).await;
            let replies = replies.inspect_err(|failed| failed.mark(router, &grant.worker().load))?;
            let mut running = Running::new(router, replies, grant, call.deadline, span.clone());
            let begun = first_piece(router, &mut running).await;
            begun.inspect_err(|failed| failed.mark(router, &running.grant().worker().load))?;
            Ok(running)
        });
        let failed = match tried.instrument(span.clone()).await {
            Ok(running) => return Ok(running),
            Err(failed) => failed,
        };
        span.record("otel.status_code", "ERROR");
        match failed {
            Failed::Final(refusal) => return Err(refusal),
            Failed::NobodyThere | Failed::NotTaken => {}
            Failed::Lost if journey.moves_on() => waits_since = Instant::now(),
            Failed::Lost => return Err(Refusal::workers_failed()),
        }
        router.metrics().retried(&call.own_name);
    }
    Err(Refusal::workers_failed())
}

fn turn(journey: &Journey, attempt: u32) -> Turn {
    match journey.content() {
        Some(content) => Turn::Resume(content.clone()),
        None if attempt > 1 || journey.was_lost() => Turn::Retry,
        None => Turn::First,
    }
}

impl Failed {
    /// Tells the worker's load, before its place is given to another request.
    fn mark(&self, router: &Router, load: &WorkerLoad) {
        match self {
            Self::Final(_) => load.answered(),
            Self::NobodyThere => load.failed(router.now(), true),
            Self::NotTaken | Self::Lost => load.failed(router.now(), false),
        }
    }
}

async fn first_piece(router: &Router, running: &mut Running) -> Result<(), Failed> {
    let refusal = match running.begin(router).await {
        Ok(first) if first.kind() == Kind::Error => Refusal::of_stream(ErrorObject::from_json(&first.json)),
        Ok(_) => {
            running.grant().worker().load.answered();
            return Ok(());
        }
        Err(Broken::Deadline) => Refusal::deadline(),
        Err(Broken::Leaves(Reason::Draining | Reason::Silent)) => return Err(Failed::NotTaken),
        Err(Broken::Leaves(_)) => return Err(Failed::Lost),
    };
    Err(Failed::Final(refusal))
}

/// A worker for `call`, after a wait if need be.
async fn admit(router: &Router, call: &Call, turn: Turn, waits_since: Instant) -> Result<Grant, Refusal> {
    let line = router.find(&call.own_name).ok_or_else(|| Refusal::no_model(&call.model))?;
    let (sender, granted) = oneshot::channel();
    let waiter = || -> Waiter { Box::new(move |grant| sender.send(grant)) };
    let entry = Entry { weight: call.choices, arrived: router.since_start(call.arrived), turn };
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
    let patience = waits_since + line.model().max_wait;
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

/// Calls a worker, which says in time whether it takes the request.
async fn ask(
    router: &Router,
    call: &Call,
    resume: Option<Resume>,
    grant: &Grant,
) -> Result<Streaming<GenerateReply>, Failed> {
    let began = Instant::now();
    let limit = began + grant.line().pace.limit(call.body.len(), router.patience());
    let ends = call.deadline.map_or(limit, |deadline| deadline.min(limit));
    let life = &grant.worker().load.life;
    let head = pin!(head(router, call, resume, grant));
    let asked = pin!(async {
        tokio::select! {
            biased;
            head = head => head,
            () = life.silence() => {
                debug!("a worker that was to take the request gives no sign of life");
                Err(Failed::NotTaken)
            }
        }
    });
    match until(Some(ends), asked).await {
        Some(Ok(replies)) => {
            life.heard();
            grant.line().pace.took(began.elapsed());
            Ok(replies)
        }
        Some(Err(failed)) => Err(failed),
        None if ends < limit => Err(Failed::Final(Refusal::deadline())),
        None => {
            debug!("a worker did not take the request in time");
            Err(Failed::Lost)
        }
    }
}

async fn head(
    router: &Router,
    call: &Call,
    resume: Option<Resume>,
    grant: &Grant,
) -> Result<Streaming<GenerateReply>, Failed> {
    let worker = grant.worker();
    let remaining = call.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let mut request = Request::new(GenerateCall {
        endpoint: call.endpoint.into(),
        body: call.body.clone(),
        request_id: call.id.clone(),
        created: call.created,
        remaining_ms: remaining.map_or(0, |remaining| remaining.as_millis().max(1) as u64),
        model: call.model.clone(),
        content_hash: worker.content.hash.clone(),
        resume,
    });
    wire::telemetry::inject(request.metadata_mut());
    let codec = Fitting::<_, GenerateReply>::to(request.get_ref());
    let channel = router.channels().get(worker.target());
    let mut client = Grpc::new(channel.map_request(|call: http::Request<_>| call.map(Ahead::of)))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    client.ready().await.map_err(|error| refused(&Status::unknown(error.to_string())))?;
    let replies = client.server_streaming(request, PathAndQuery::from_static(GENERATE), codec).await;
    let mut replies = replies.map_err(|status| refused(&status))?.into_inner();
    let head = match replies.message().await {
        Ok(Some(GenerateReply { reply: Some(Reply::Head(head)) })) => head,
        Ok(None) => return Err(Failed::Lost), // without a word, as behind the head
        Ok(Some(_)) => return Err(Failed::Final(Refusal::broken())),
        Err(status) => return Err(lost(&status)),
    };
    match StatusCode::from_u16(head.status as u16) {
        Ok(StatusCode::OK) => Ok(replies),
        Ok(StatusCode::SERVICE_UNAVAILABLE) => Err(Failed::NotTaken),
        Ok(status) if status.is_client_error() || status.is_server_error() => {
            let error = ErrorObject::from_json(&head.body);
            Err(Failed::Final(Refusal::of_worker(status, error)))
        }
        _ => Err(Failed::Final(Refusal::broken())),
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
