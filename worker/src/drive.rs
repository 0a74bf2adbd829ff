//! Drives the engine on a thread of its own: requests in, events out, one step after the other.
//!
//! Each sequence has a bounded buffer of events. Whoever drops the receiving end cancels the sequence before the next
//! step; whoever does not read loses it. A sequence whose experts stay away for longer than its mesh allows fails with an
//! error that names one of them; the others do not notice.
//!
//! Architecture Invariant: text, protocol and clients' deadlines are not known here.

use std::{collections::BTreeMap, future::Future, sync::Arc, thread, time::Duration};

use engine::{Engine, Event, Exchange, Finish, Load, NoPeers, Refusal, Request, SequenceId, TokenLogprob};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tracing::{Span, error, warn};

use crate::{
    experts::exchange::{MeshExchange, Missing},
    metrics::Metrics,
};

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
    /// After each step: an expert that it lacked, if it lacked any.
    fn end_step(&mut self) -> Option<Missing>;
    /// Waits until trying again makes sense.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
}

impl Peers for MeshExchange {
    fn begin_step(&mut self, span: Span) {
        Self::begin_step(self, span);
    }

    fn end_step(&mut self) -> Option<Missing> {
        Self::end_step(self)
    }

    async fn changed(&mut self) {
        Self::changed(self).await;
    }
}

impl Peers for NoPeers {
    fn begin_step(&mut self, _: Span) {}

    fn end_step(&mut self) -> Option<Missing> {
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
        let (driver, steps) = Self::apart(engine, exchange, metrics);
        let runtime = Handle::current();
        thread::Builder::new().name("engine".into()).spawn(move || runtime.block_on(steps.run()))?;
        Ok(driver)
    }

    /// The driver, and the steps for the caller to run.
    pub(crate) fn apart<E: Engine, X: Peers>(engine: E, exchange: X, metrics: Arc<Metrics>) -> (Self, Steps<E, X>) {
        let (commands, submissions) = mpsc::unbounded_channel();
        let (load, loads) = watch::channel(engine.load());
        let limits = engine.limits();
        let steps = Steps { engine, exchange, submissions, load, metrics, sequences: BTreeMap::new() };
        (Self { commands, load: loads, limits }, steps)
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

/// The loop of steps.
pub(crate) struct Steps<E, X> {
    engine: E,
    exchange: X,
    submissions: mpsc::UnboundedReceiver<Submission>,
    load: watch::Sender<Load>,
    metrics: Arc<Metrics>,
    sequences: BTreeMap<SequenceId, Entry>,
}

struct Entry {
    events: mpsc::Sender<Progress>,
    /// Since when experts are away that it needs.
    away_since: Option<Instant>,
    span: Span,
    traced: usize,
}

impl<E: Engine, X: Peers> Steps<E, X> {
    /// 1. Takes new requests, and forgets sequences that nobody reads any more.
    /// 2. Runs a step, and hands out its events.
    /// 3. If experts are away and nothing moved, waits for them; fails what waited too long.
    ///
    /// A step that fails or panics is the last: the engine's state cannot be trusted. Its sequences end without a last
    /// event, as those of a lost worker do, so that they go on elsewhere.
    pub(crate) async fn run(mut self) {
        loop {
            self.publish();
            if self.engine.is_idle() {
                let Some(submission) = self.rest().await else {
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
            let step = self.engine.step(&mut self.exchange).await;
            let missing = self.exchange.end_step();
            let events = match step {
                Ok(events) => events,
                Err(error) => return error!(error = &error as &dyn std::error::Error, "a step failed"),
            };
            let moved = !events.is_empty();
            events.into_iter().for_each(|event| self.deliver(event));
            self.note_away();
            if let Some(missing) = missing {
                self.fail_stalled(&missing);
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
                    self.sequences.insert(id, Entry { events, away_since: None, span, traced: 0 });
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
        let sent = entry.events.try_send(progress).is_ok();
        match last {
            Some(_) => drop(self.sequences.remove(&id)),
            None if !sent => self.cancel(id),
            None => {}
        }
    }

    /// Notes which sequences left the step for want of experts.
    fn note_away(&mut self) {
        let away = self.engine.away();
        for (id, entry) in &mut self.sequences {
            entry.away_since = away.contains(id).then(|| entry.away_since.unwrap_or_else(Instant::now));
        }
        self.metrics.stalled(away.len());
    }

    fn fail_stalled(&mut self, missing: &Missing) {
        let Missing { layer, expert, max_wait } = *missing;
        let is_over = |entry: &Entry| entry.away_since.is_some_and(|since| since.elapsed() >= max_wait);
        let stalled: Vec<_> = self.sequences.iter().filter(|(_, entry)| is_over(entry)).map(|(&id, _)| id).collect();
        if stalled.is_empty() {
            return;
        }
        let seconds = max_wait.as_secs_f64();
        warn!(sequences = stalled.len(), layer, expert, seconds, "no holder of an expert came back in time");
        let message = format!("nobody held expert {expert} of layer {layer} for {seconds:.1} s; try again later");
        for id in stalled {
            self.fail(id, &message);
        }
    }

    fn fail(&mut self, id: SequenceId, message: &str) {
        if let Some(entry) = self.sequences.get(&id) {
            let _ = entry.events.try_send(Progress::Failed(message.into())); // unread: it ends without
        }
        self.cancel(id);
    }

    /// Until the next request. Peers that come and go meanwhile are followed, so that streams to them are there before
    /// a step needs them.
    async fn rest(&mut self) -> Option<Submission> {
        loop {
            tokio::select! {
                biased; // the same way each time, for simulations
                submission = self.submissions.recv() => return submission,
                () = self.exchange.changed() => {
                    self.exchange.begin_step(Span::none());
                    self.exchange.end_step();
                }
            }
        }
    }

    async fn wait(&mut self) {
        tokio::select! {
            biased; // the same way each time, for simulations
            () = self.exchange.changed() => {}
            () = tokio::time::sleep(RETRY_EVERY) => {}
            Some(submission) = self.submissions.recv() => self.accept(submission),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
