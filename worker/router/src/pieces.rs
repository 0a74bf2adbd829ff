//! An answer as it comes: the wait for it, its pieces, its end. HTTP and gRPC put it into their own frames.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use serde::Deserialize;
use tracing::{Span, info, warn};
use wire::{
    openai::ErrorObject,
    proto::{Chunk, chunk::Kind},
};

use crate::{
    aggregate::Whole,
    ask::Asked,
    dispatch::{Call, begin},
    metrics::Measured,
    refusal::Refusal,
    resume::{Journey, Reason},
    router::Router,
    running::{Broken, Running},
};

/// How long a client hears nothing at first: until then a refusal still has its own status.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a client that waits hears that it does.
const REMIND_EVERY: Duration = Duration::from_secs(5);

/// What comes next.
#[derive(Debug)]
pub enum Piece {
    /// Nothing yet.
    Waiting,
    /// A piece of a choice.
    Delta(Chunk),
    /// The end: usage.
    Usage(Chunk),
    /// The end: an error.
    Failed(Refusal),
}

type Beginning = Pin<Box<dyn Future<Output = Result<(Running, Journey), Refusal>> + Send>>;

/// An answer under way, at one worker after the other if need be. Dropping it cancels the request, wherever it is.
pub struct Pieces {
    router: Router,
    call: Arc<Call>,
    phase: Phase,
    patience: Duration,
    measured: Measured,
    span: Span,
}

enum Phase {
    /// With the reason for which it left a worker.
    Beginning(Beginning, Option<Reason>),
    Running(Box<Running>, Journey),
    Ended,
}

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pieces").field("measured", &self.measured).finish_non_exhaustive()
    }
}

impl Pieces {
    /// Nothing happens before the first [`Pieces::next`].
    pub fn new(router: &Router, asked: Asked) -> Self {
        let call = Arc::new(asked.call);
        let line = router.find(&call.own_name);
        let migrations = line.map_or(0, |line| line.model().migration_attempts);
        let journey = if asked.stream { Journey::of_stream(migrations) } else { Journey::of_whole(migrations) };
        let mut pieces = Self {
            router: router.clone(),
            call,
            phase: Phase::Ended,
            patience: PATIENCE,
            measured: asked.measured,
            span: Span::current(),
        };
        pieces.begin(journey, None);
        pieces
    }

    /// The next piece; `None` after the last.
    pub async fn next(&mut self) -> Option<Piece> {
        loop {
            match &mut self.phase {
                Phase::Ended => return None,
                Phase::Beginning(beginning, why) => match tokio::time::timeout(self.patience, beginning).await {
                    Err(_) => {
                        self.patience = REMIND_EVERY;
                        return Some(Piece::Waiting);
                    }
                    Ok(begun) => {
                        if let Some(reason) = *why {
                            self.tell(reason, begun.is_ok());
                        }
                        match begun {
                            Ok((running, journey)) => self.phase = Phase::Running(Box::new(running), journey),
                            Err(refusal) => return Some(self.fail(refusal)),
                        }
                    }
                },
                Phase::Running(running, journey) => match running.next(&self.router, journey.may_move()).await {
                    Ok(chunk) => {
                        journey.took(&chunk, &running.grant().worker().content);
                        return Some(self.took(chunk));
                    }
                    Err(Broken::Deadline) => return Some(self.fail(Refusal::deadline())),
                    Err(Broken::Leaves(reason)) => {
                        if reason != Reason::Draining {
                            running.blame(&self.router);
                        }
                        if let Some(refusal) = self.leave(reason) {
                            return Some(self.fail(refusal));
                        }
                    }
                },
            }
        }
    }

    /// The worker is left, and the answer goes on at another one, or not.
    fn leave(&mut self, reason: Reason) -> Option<Refusal> {
        // what still comes from there is not heard any more, whatever happens here
        let Phase::Running(_, mut journey) = std::mem::replace(&mut self.phase, Phase::Ended) else {
            return None;
        };
        if journey.moves_on() {
            self.patience = PATIENCE;
            self.begin(journey, Some(reason));
            return None;
        }
        self.tell(reason, false);
        Some(Refusal::workers_failed())
    }

    fn begin(&mut self, mut journey: Journey, why: Option<Reason>) {
        let (router, call, span) = (self.router.clone(), self.call.clone(), self.span.clone());
        let beginning = async move {
            let running = begin(&router, &call, &mut journey, &span).await?;
            Ok((running, journey))
        };
        self.phase = Phase::Beginning(Box::pin(beginning), why);
    }

    fn tell(&self, reason: Reason, goes_on: bool) {
        self.router.metrics().resumed(&self.call.own_name, reason, goes_on);
        self.span.in_scope(|| info!(reason = reason.label(), goes_on, "an answer left its worker"));
    }

    fn took(&mut self, chunk: Chunk) -> Piece {
        match chunk.kind() {
            Kind::Delta | Kind::Unspecified => {
                self.measured.piece();
                Piece::Delta(chunk)
            }
            Kind::Usage => {
                self.measured.done(usage(&chunk.json));
                self.phase = Phase::Ended;
                Piece::Usage(chunk)
            }
            Kind::Error => self.fail(Refusal::of_stream(ErrorObject::from_json(&chunk.json))),
        }
    }

    fn fail(&mut self, refusal: Refusal) -> Piece {
        self.measured.failed(refusal.reason);
        self.span.record("otel.status_code", "ERROR");
        self.phase = Phase::Ended;
        Piece::Failed(refusal)
    }
}

/// The answer in one body.
///
/// # Errors
/// What the client is to be told.
pub async fn whole(router: &Router, asked: Asked) -> Result<Vec<u8>, Refusal> {
    let mut whole = Whole::new(asked.call.endpoint);
    let mut pieces = Pieces::new(router, asked);
    let unread = loop {
        match pieces.next().await {
            Some(Piece::Waiting) => {}
            Some(Piece::Delta(chunk)) => {
                if let Err(error) = whole.add(&chunk.json) {
                    break error;
                }
            }
            Some(Piece::Usage(chunk)) => match whole.finish(&chunk.json) {
                Ok(body) => return Ok(body),
                Err(error) => break error,
            },
            Some(Piece::Failed(refusal)) => return Err(refusal),
            None => return Err(Refusal::broken()),
        }
    };
    warn!(error = %unread, "a worker answered what cannot be read"); // the error's source would quote the answer
    let refusal = Refusal::broken();
    pieces.fail(refusal.clone());
    Err(refusal)
}

/// Tokens taken and given, for metrics.
fn usage(json: &[u8]) -> Option<(u64, u64)> {
    #[derive(Deserialize)]
    struct Last {
        usage: Usage,
    }
    #[derive(Deserialize)]
    struct Usage {
        prompt_tokens: u64,
        completion_tokens: u64,
    }
    let last: Last = serde_json::from_slice(json).ok()?;
    Some((last.usage.prompt_tokens, last.usage.completion_tokens))
}
