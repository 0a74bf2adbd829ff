//! An answer under way at one worker: its pieces, and whether its worker is still there.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use tokio::time::Sleep;
use tonic::Streaming;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tracing::{Span, debug};
use wire::proto::{Chunk, GenerateReply, generate_reply::Reply};

use crate::{
    load::Grant,
    resume::{Reason, Sight, leave},
    router::Router,
};

/// An answer that a worker has taken. Dropping it cancels there.
pub struct Running {
    first: Option<Chunk>,
    replies: Streaming<GenerateReply>,
    deadline: Option<Instant>,
    grant: Grant,
    span: Span,
    /// Rings a few times in each silence, not for each piece.
    alarm: Pin<Box<Sleep>>,
    /// How often it rang since the last piece.
    rings: u32,
    probe: Option<Pin<Box<dyn Future<Output = bool> + Send>>>,
    is_dumb: bool,
    has_tokens: bool,
}

/// A stream that ends here before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// It leaves its worker.
    Leaves(Reason),
    /// The client's deadline passed.
    Deadline,
}

/// How often the alarm rings in the time of a silence.
const RINGS: u32 = 4;

impl Running {
    pub(crate) fn new(
        router: &Router,
        replies: Streaming<GenerateReply>,
        grant: Grant,
        deadline: Option<Instant>,
        span: Span,
    ) -> Self {
        let rings = Instant::now() + interval(router);
        let alarm = Box::pin(tokio::time::sleep_until(deadline.map_or(rings, |deadline| deadline.min(rings)).into()));
        Self {
            first: None,
            replies,
            deadline,
            grant,
            span,
            alarm,
            rings: 0,
            probe: None,
            is_dumb: false,
            has_tokens: false,
        }
    }

    /// Waits for the first piece, which [`Running::next`] then returns.
    ///
    /// # Errors
    /// As [`Running::next`].
    pub(crate) async fn begin(&mut self, router: &Router) -> Result<&Chunk, Broken> {
        let first = self.next(router, true).await?;
        Ok(self.first.insert(first))
    }

    /// The next piece. After one that is not a delta there is none. With `may_leave` it looks for a reason to go on
    /// elsewhere, where that is possible.
    ///
    /// # Errors
    /// The stream broke, ended without a last piece, or had better go on elsewhere.
    pub async fn next(&mut self, router: &Router, may_leave: bool) -> Result<Chunk, Broken> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        if may_leave && self.grant.worker().load.is_leaving() {
            self.look(router)?;
        }
        loop {
            tokio::select! {
                biased;
                message = self.replies.message() => {
                    let Ok(Some(GenerateReply { reply: Some(Reply::Chunk(chunk)) })) = message else {
                        let code = message.err().map(|status| status.code());
                        self.span.in_scope(|| debug!(?code, "lost a worker"));
                        return Err(Broken::Leaves(Reason::Lost));
                    };
                    (self.rings, self.probe, self.is_dumb) = (0, None, false);
                    self.has_tokens |= !chunk.token_ids.is_empty();
                    return Ok(chunk);
                }
                answers = answer(&mut self.probe) => {
                    (self.probe, self.is_dumb) = (None, !answers);
                    if !answers {
                        self.blame(router);
                        if may_leave {
                            self.look(router)?;
                        }
                    }
                }
                () = &mut self.alarm => {
                    self.ring(router)?;
                    if may_leave {
                        self.look(router)?;
                    }
                }
            }
        }
    }

    /// Its worker gets nothing new for a while.
    pub(crate) fn blame(&self, router: &Router) {
        self.grant.worker().load.failed(router.now(), false);
    }

    pub(crate) fn grant(&self) -> &Grant {
        &self.grant
    }

    fn ring(&mut self, router: &Router) -> Result<(), Broken> {
        let now = Instant::now();
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Broken::Deadline);
        }
        self.rings += 1;
        if self.rings.is_multiple_of(RINGS) && self.probe.is_none() {
            let channel = router.channels().get(self.grant.worker().target());
            let within = router.patience().silence;
            self.probe = Some(Box::pin(async move {
                let check = async { HealthClient::new(channel).check(HealthCheckRequest::default()).await };
                // any answer is one: a connection that is lost breaks the stream itself
                tokio::time::timeout(within, check).await.is_ok()
            }));
        }
        let next = now + interval(router);
        self.alarm.as_mut().reset(self.deadline.map_or(next, |deadline| deadline.min(next)).into());
        Ok(())
    }

    fn look(&self, router: &Router) -> Result<(), Broken> {
        let sight = Sight {
            is_leaving: self.grant.worker().load.is_leaving(),
            is_dumb: self.is_dumb,
            silent_for: interval(router) * self.rings,
            has_tokens: self.has_tokens,
        };
        match leave(&sight, router.patience()) {
            Some(reason) if self.grant.has_other(router.now()) => Err(Broken::Leaves(reason)),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("worker", &self.grant.worker().id).finish_non_exhaustive()
    }
}

fn interval(router: &Router) -> Duration {
    router.patience().silence / RINGS
}

async fn answer(probe: &mut Option<Pin<Box<dyn Future<Output = bool> + Send>>>) -> bool {
    match probe {
        Some(probe) => probe.await,
        None => std::future::pending().await,
    }
}
