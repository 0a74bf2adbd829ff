//! Drives the engine on a thread of its own: requests in, events out, one step after the other.
//!
//! Each sequence has a bounded buffer of events. Whoever drops the receiving end cancels the sequence before the next
//! step; whoever does not read loses it. A sequence whose experts stay away for [`STALL_WAIT`] fails with an error.
//!
//! Architecture Invariant: text, protocol and clients' deadlines are not known here.

use std::{collections::BTreeMap, future::Future, panic::AssertUnwindSafe, sync::Arc, thread, time::Duration};

use engine::{Engine, Event, Exchange, Finish, Load, NoPeers, Refusal, Request, SequenceId, TokenLogprob};
use futures::FutureExt as _;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tracing::{Span, error, warn};

use crate::{experts::exchange::MeshExchange, metrics::Metrics};

/// How long sequences wait for a holder of experts that is away, if their client does not give up sooner.
pub const STALL_WAIT: Duration = Duration::from_secs(30);
/// Events of a sequence that its reader may be behind.
const EVENTS: usize = 1024;
/// How often stalled sequences are tried, if nothing is heard of their holders.
const RETRY_EVERY: Duration = Duration::from_millis(100);
/// Steps of a request whose calls to holders get spans, so that a long answer does not fill a trace.
const TRACED_STEPS: usize = 8;

/// What happens to a sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// The prompt is read; only if it was asked for.
    Prompt(Vec<Option<TokenLogprob>>),
    /// One more token.
    Token(u32, Option<TokenLogprob>),
    /// The last: it ended as asked.
    Finished(Finish),
    /// The last: it cannot go on. The words are for the client.
    Failed(String),
}

/// One sequence's events. Dropping it cancels the sequence. Ends without a last event if the reader was too slow or the
/// engine is gone.
pub type Sequence = mpsc::Receiver<Progress>;

/// Why sequences were not taken.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The engine refuses one of them.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The engine has ended.
    #[error("the engine has ended")]
    Ended,
}

/// An exchange that knows when it lacks peers.
pub trait Peers: Exchange {
    /// Before each step; calls become children of `span`, unless it is none.
    fn begin_step(&mut self, span: Span);
    /// After each step: since when rows have been missing, if they still are.
    fn end_step(&mut self) -> Option<Instant>;
    /// Waits until trying again makes sense.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
}

impl Peers for MeshExchange {
    fn begin_step(&mut self, span: Span) {
        Self::begin_step(self, span);
    }

    fn end_step(&mut self) -> Option<Instant> {
        Self::end_step(self)
    }

    async fn changed(&mut self) {
        Self::changed(self).await;
    }
}

impl Peers for NoPeers {
    fn begin_step(&mut self, _: Span) {}

    fn end_step(&mut self) -> Option<Instant> {
        None
    }

    async fn changed(&mut self) {
        std::future::pending().await
    }
}

/// Talks to the engine's thread.
#[derive(Clone)]
pub struct Driver {
    commands: mpsc::UnboundedSender<Submission>,
    load: watch::Receiver<Load>,
    limits: engine::Limits,
}

struct Submission {
    requests: Vec<Request>,
    span: Span,
    accepted: oneshot::Sender<Result<Vec<Sequence>, Refusal>>,
}

impl Driver {
    /// Starts the thread. It ends when all clones of the driver are gone.
    ///
    /// # Errors
    /// If the system has no more threads.
    pub fn start<E, X>(engine: E, exchange: X, metrics: Arc<Metrics>) -> std::io::Result<Self>
    where
        E: Engine + Send + 'static,
        X: Peers + Send + 'static,
    {
        Self::start_with(engine, exchange, metrics, STALL_WAIT)
    }

    fn start_with<E, X>(engine: E, exchange: X, metrics: Arc<Metrics>, stall_wait: Duration) -> std::io::Result<Self>
    where
        E: Engine + Send + 'static,
        X: Peers + Send + 'static,
    {
        let (commands, submissions) = mpsc::unbounded_channel();
        let (load, loads) = watch::channel(engine.load());
        let limits = engine.limits();
        let runtime = Handle::current();
        let steps = Steps { engine, exchange, submissions, load, metrics, stall_wait, sequences: BTreeMap::new() };
        thread::Builder::new().name("engine".into()).spawn(move || runtime.block_on(steps.run()))?;
        Ok(Self { commands, load: loads, limits })
    }

    /// Hands over the sequences of one request, all or none. How many wait is the caller's to bound.
    ///
    /// # Errors
    /// The engine's refusal, or that it has ended.
    pub async fn submit(&self, requests: Vec<Request>, span: Span) -> Result<Vec<Sequence>, SubmitError> {
        let (accepted, answer) = oneshot::channel();
        self.commands.send(Submission { requests, span, accepted }).map_err(|_| SubmitError::Ended)?;
        Ok(answer.await.map_err(|_| SubmitError::Ended)??)
    }

    /// What the engine has to do now.
    pub fn load(&self) -> Load {
        *self.load.borrow()
    }

    /// What requests must keep to.
    pub fn limits(&self) -> engine::Limits {
        self.limits
    }

    /// Waits until the engine ends, which it does only by a fault.
    pub async fn ended(&self) {
        self.commands.closed().await;
    }
}

struct Steps<E, X> {
    engine: E,
    exchange: X,
    submissions: mpsc::UnboundedReceiver<Submission>,
    load: watch::Sender<Load>,
    metrics: Arc<Metrics>,
    stall_wait: Duration,
    sequences: BTreeMap<SequenceId, Entry>,
}

struct Entry {
    events: mpsc::Sender<Progress>,
    moved: Instant,
    span: Span,
    traced: usize,
}

impl<E: Engine, X: Peers> Steps<E, X> {
    /// 1. Takes new requests, and forgets sequences that nobody reads any more.
    /// 2. Runs a step, and hands out its events.
    /// 3. If experts are away and nothing moved, waits for them; fails what waited too long.
    ///
    /// A panic of the engine ends all sequences and the thread: its state cannot be trusted.
    async fn run(mut self) {
        loop {
            self.publish();
            if self.engine.is_idle() {
                let Some(submission) = self.submissions.recv().await else {
                    return;
                };
                self.accept(submission);
            }
            while let Ok(submission) = self.submissions.try_recv() {
                self.accept(submission);
            }
            self.forget_unread();
            let span = self.span();
            self.exchange.begin_step(span);
            let step = AssertUnwindSafe(self.engine.step(&mut self.exchange)).catch_unwind().await;
            let missing = self.exchange.end_step();
            let events = match step {
                Ok(Ok(events)) => events,
                Ok(Err(error)) => {
                    error!(error = &error as &dyn std::error::Error, "a step failed");
                    self.fail_all();
                    continue;
                }
                Err(_) => {
                    error!("the engine panicked");
                    self.fail_all();
                    return;
                }
            };
            let moved = !events.is_empty();
            events.into_iter().for_each(|event| self.deliver(event));
            if let Some(since) = missing {
                self.fail_stalled(since);
                if !moved {
                    self.wait().await;
                }
            }
        }
    }

    fn publish(&self) {
        let load = self.engine.load();
        self.metrics.load(&load);
        self.load.send_replace(load);
    }

    fn accept(&mut self, submission: Submission) {
        let mut ids = Vec::new();
        let mut sequences = Vec::new();
        for request in submission.requests {
            match self.engine.submit(request) {
                Ok(id) => {
                    let (events, sequence) = mpsc::channel(EVENTS);
                    let span = submission.span.clone();
                    self.sequences.insert(id, Entry { events, moved: Instant::now(), span, traced: 0 });
                    ids.push(id);
                    sequences.push(sequence);
                }
                Err(refusal) => {
                    ids.into_iter().for_each(|id| self.cancel(id));
                    let _ = submission.accepted.send(Err(refusal)); // the caller may be gone
                    return;
                }
            }
        }
        // if the caller is gone, the receivers are dropped here, and the sequences with them
        let _ = submission.accepted.send(Ok(sequences));
    }

    fn cancel(&mut self, id: SequenceId) {
        self.engine.cancel(id);
        self.sequences.remove(&id);
    }

    fn forget_unread(&mut self) {
        let unread: Vec<_> = self.sequences.iter().filter(|(_, e)| e.events.is_closed()).map(|(&id, _)| id).collect();
        unread.into_iter().for_each(|id| self.cancel(id));
    }

    /// The span of a traced request whose calls to holders are still to be seen.
    fn span(&mut self) -> Span {
        let traced = |entry: &&mut Entry| entry.traced < TRACED_STEPS && !entry.span.is_none();
        self.sequences.values_mut().find(traced).map_or_else(Span::none, |entry| {
            entry.traced += 1;
            entry.span.clone()
        })
    }

    fn deliver(&mut self, event: Event) {
        let last = event.ends();
        let (id, progress) = match event {
            Event::Token { sequence, token, logprob } => (sequence, Progress::Token(token, logprob)),
            Event::Prompt { sequence, logprobs } => (sequence, Progress::Prompt(logprobs)),
            Event::Finished { sequence, reason } => (sequence, Progress::Finished(reason)),
            Event::Failed { sequence, error } => {
                error!(error = &error as &dyn std::error::Error, "a sequence failed");
                (sequence, Progress::Failed("the model could not go on with this request".into()))
            }
        };
        let Some(entry) = self.sequences.get_mut(&id) else {
            return;
        };
        entry.moved = Instant::now();
        let sent = entry.events.try_send(progress).is_ok();
        match last {
            Some(_) => drop(self.sequences.remove(&id)),
            None if !sent => self.cancel(id),
            None => {}
        }
    }

    fn fail_stalled(&mut self, since: Instant) {
        let wait = self.stall_wait;
        if since.elapsed() < wait {
            return;
        }
        let stalled: Vec<_> =
            self.sequences.iter().filter(|(_, e)| e.moved.elapsed() >= wait).map(|(&id, _)| id).collect();
        if !stalled.is_empty() {
            warn!(sequences = stalled.len(), "no holder of experts came back in time");
        }
        for id in stalled {
            self.fail(id, "a part of the model is not reachable; try again later");
        }
    }

    fn fail_all(&mut self) {
        while let Some((&id, _)) = self.sequences.first_key_value() {
            self.fail(id, "the model could not go on with this request");
        }
    }

    fn fail(&mut self, id: SequenceId, message: &str) {
        if let Some(entry) = self.sequences.get(&id) {
            let _ = entry.events.try_send(Progress::Failed(message.into())); // unread: it ends without
        }
        self.cancel(id);
    }

    async fn wait(&mut self) {
        tokio::select! {
            () = self.exchange.changed() => {}
            () = tokio::time::sleep(RETRY_EVERY) => {}
            Some(submission) = self.submissions.recv() => self.accept(submission),
        }
    }
}

#[cfg(test)]
mod tests;
