//! An answer under way at one worker: its pieces, and whether it had better go on elsewhere.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use tokio::time::Sleep;
use tonic::Streaming;
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
    /// Its worker gives no sign of life; `None` once that was heard.
    silence: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
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

/// How often an answer to which nothing happens is looked at; what happens to it and its worker is told at once.
const LOOK_EVERY: Duration = Duration::from_millis(400);
/// How often the alarm rings at least until an answer is slow.
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
            silence: Some(Box::pin(grant.worker().load.life.silence())),
            replies,
            deadline,
            grant,
            span,
            alarm,
            rings: 0,
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
                    self.rings = 0;
                    let life = &self.grant.worker().load.life;
                    life.heard();
                    self.silence.get_or_insert_with(|| Box::pin(life.silence()));
                    self.has_tokens |= !chunk.token_ids.is_empty();
                    return Ok(chunk);
                }
                () = until(&mut self.silence) => {
                    self.silence = None;
                    if may_leave {
                        self.look(router)?;
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
        let next = now + interval(router);
        self.alarm.as_mut().reset(self.deadline.map_or(next, |deadline| deadline.min(next)).into());
        Ok(())
    }

    fn look(&self, router: &Router) -> Result<(), Broken> {
        let sight = Sight {
            is_leaving: self.grant.worker().load.is_leaving(),
            is_silent: self.grant.worker().load.life.is_silent(),
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
    (router.patience().slow / RINGS).min(LOOK_EVERY)
}

async fn until(silence: &mut Option<Pin<Box<dyn Future<Output = ()> + Send>>>) {
    match silence {
        Some(silence) => silence.await,
        None => std::future::pending().await,
    }
}
