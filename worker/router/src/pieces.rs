//! An answer as it comes: the wait for it, its pieces, its end. HTTP and gRPC put it into their own frames.

use std::{fmt, future::Future, pin::Pin, time::Duration};

use serde::Deserialize;
use tracing::{Instrument as _, Span, warn};
use wire::{
    openai::ErrorObject,
    proto::{Chunk, chunk::Kind},
};

use crate::{
    aggregate::Whole,
    ask::Asked,
    dispatch::{Broken, Call, Running, Trip, begin},
    metrics::Measured,
    refusal::Refusal,
    router::Router,
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

type Beginning = Pin<Box<dyn Future<Output = Result<Running, Refusal>> + Send>>;

/// An answer under way. Dropping it cancels the request, wherever it is.
pub struct Pieces {
    router: Router,
    phase: Phase,
    patience: Duration,
    measured: Measured,
    span: Span,
}

enum Phase {
    Beginning(Beginning),
    Running(Box<Running>),
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
        let span = Span::current();
        let (state, call) = (router.clone(), asked.call);
        let beginning = async move { begin(&state, &call, &mut Trip::new(call.arrived)).await };
        Self {
            router: router.clone(),
            phase: Phase::Beginning(Box::pin(beginning.instrument(span.clone()))),
            patience: PATIENCE,
            measured: asked.measured,
            span,
        }
    }

    /// The next piece; `None` after the last.
    pub async fn next(&mut self) -> Option<Piece> {
        loop {
            match &mut self.phase {
                Phase::Ended => return None,
                Phase::Beginning(beginning) => match tokio::time::timeout(self.patience, beginning).await {
                    Err(_) => {
                        self.patience = REMIND_EVERY;
                        return Some(Piece::Waiting);
                    }
                    Ok(Ok(running)) => self.phase = Phase::Running(Box::new(running)),
                    Ok(Err(refusal)) => return Some(self.fail(refusal)),
                },
                Phase::Running(running) => {
                    let next = running.next().await;
                    if next == Err(Broken::Lost) {
                        running.blame(&self.router);
                    }
                    return Some(self.took(next));
                }
            }
        }
    }

    fn took(&mut self, next: Result<Chunk, Broken>) -> Piece {
        match next {
            Err(broken) => self.fail(broken.refusal()),
            Ok(chunk) => match chunk.kind() {
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
            },
        }
    }

    fn fail(&mut self, refusal: Refusal) -> Piece {
        self.measured.failed(refusal.reason);
        self.span.record("otel.status_code", "ERROR");
        self.phase = Phase::Ended;
        Piece::Failed(refusal)
    }
}

/// The answer in one body. Nothing is sent before it is whole, so a worker lost on the way is no loss to the client.
///
/// # Errors
/// What the client is to be told.
pub async fn whole(router: &Router, asked: Asked) -> Result<Vec<u8>, Refusal> {
    let mut measured = asked.measured;
    let answer = collect(router, &asked.call, &mut measured).await;
    if let Err(refusal) = &answer {
        measured.failed(refusal.reason);
        Span::current().record("otel.status_code", "ERROR");
    }
    answer
}

async fn collect(router: &Router, call: &Call, measured: &mut Measured) -> Result<Vec<u8>, Refusal> {
    let mut trip = Trip::new(call.arrived);
    loop {
        let mut running = begin(router, call, &mut trip).await?;
        let mut whole = Whole::new(call.endpoint);
        let broken = loop {
            let chunk = match running.next().await {
                Ok(chunk) => chunk,
                Err(broken) => break broken,
            };
            let added = match chunk.kind() {
                Kind::Error => return Err(Refusal::of_stream(ErrorObject::from_json(&chunk.json))),
                Kind::Usage => {
                    measured.done(usage(&chunk.json));
                    return whole.finish(&chunk.json).map_err(|error| unreadable(&error));
                }
                Kind::Delta | Kind::Unspecified => {
                    measured.piece();
                    whole.add(&chunk.json)
                }
            };
            added.map_err(|error| unreadable(&error))?;
        };
        if broken == Broken::Deadline {
            return Err(broken.refusal());
        }
        running.blame(router);
        drop(running);
        trip.lost()?;
    }
}

fn unreadable(error: &crate::aggregate::Error) -> Refusal {
    warn!(%error, "a worker answered what cannot be read"); // the error's source would quote the answer
    Refusal::broken()
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
