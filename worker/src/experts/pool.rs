//! Threads that compute expert rows for peers, and the bounded queue before them.
//!
//! They are none of the runtime's, and none of the step loop: a peer waits for neither. A thread that reads from a peer
//! computes a small call itself where it would be computed at once, as waking another thread takes longer than the way
//! over the network; it takes the place of one of ours meanwhile. Calls that wait for the same expert are computed
//! together, whoever they are of, so that its weights are read once; a row's bits do not depend on the rows beside it.
//! Nobody here waits for a peer: each call brings the place for its reply.

use std::{
    collections::{BTreeSet, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Instant,
};

use engine::{ExpertBatch, Experts, ExpertsError};
use tracing::{Span, error};
use wire::proto::{Refusal, RunCall, RunReply, refusal::Reason};

use super::lock;
use crate::metrics::Metrics;

/// Calls that wait, of all peers.
const QUEUE_CALLS: usize = 4096;
/// Bytes of rows that wait, of all peers.
const QUEUE_BYTES: usize = 256 << 20;
/// Calls are put together up to this many pairs of row and expert.
const TOGETHER_PAIRS: usize = 1024;

/// A call of up to so many pairs is small.
const SMALL_PAIRS: usize = 64;

/// A call that was checked, and where its reply goes.
pub(super) struct Job {
    pub(super) call: RunCall,
    pub(super) deadline: Option<Instant>,
    pub(super) reply: SendReply,
    pub(super) span: Span,
}

/// Sends a reply to where there is a place for it, without waiting.
pub(super) type SendReply = Box<dyn FnOnce(RunReply) + Send>;

/// The threads. Dropping it ends them after what they compute.
pub struct Pool {
    queue: Arc<Queue>,
    compute: Arc<Compute>,
}

struct Queue {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    bytes: usize,
    /// How many more may compute now.
    idle: usize,
    ended: bool,
}

struct Compute {
    experts: Arc<Experts>,
    metrics: Arc<Metrics>,
}

impl Pool {
    /// Starts `threads` threads that share `experts`.
    ///
    /// # Errors
    /// If the system has no more threads.
    pub fn start(experts: &Arc<Experts>, threads: usize, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let (queue, compute) = (Arc::new(Queue::of(threads)), Arc::new(Compute { experts: experts.clone(), metrics }));
        let pool = Self { queue, compute };
        for index in 0..threads {
            let (queue, compute) = (pool.queue.clone(), pool.compute.clone());
            thread::Builder::new().name(format!("experts-{index}")).spawn(move || {
                while let Some(jobs) = queue.next() {
                    compute.answer(jobs);
                    queue.done();
                }
            })?;
        }
        Ok(pool)
    }

    /// Computes a small job on this thread if nothing waits and not all threads compute; else as [`Pool::submit`].
    pub(super) fn compute(&self, job: Job) -> Option<Job> {
        if job.call.pair_rows.len() > SMALL_PAIRS || !self.queue.begin() {
            return self.submit(job);
        }
        self.compute.answer(vec![job]);
        self.queue.done();
        None
    }

    /// Takes a job, or gives it back if too much waits already.
    pub(super) fn submit(&self, job: Job) -> Option<Job> {
        let mut waiting = lock(&self.queue.waiting);
        let bytes = job.call.rows.len();
        if waiting.jobs.len() >= QUEUE_CALLS || waiting.bytes + bytes > QUEUE_BYTES {
            return Some(job);
        }
        waiting.bytes += bytes;
        match job.call.pair_rows.is_empty() {
            true => waiting.jobs.push_front(job), // a probe asks whether we live, not how much waits
            false => waiting.jobs.push_back(job),
        }
        drop(waiting);
        self.queue.more.notify_one();
        None
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.queue.waiting).ended = true;
        self.queue.more.notify_all();
    }
}

impl Compute {
    fn answer(&self, jobs: Vec<Job>) {
        self.metrics.rows_served(jobs.iter().map(|job| job.call.pair_rows.len()).sum());
        let calls: Vec<&RunCall> = jobs.iter().map(|job| &job.call).collect();
        let together = (calls.len() > 1).then(|| run_together(&self.experts, &calls)).flatten();
        let mut together = together.into_iter().flatten();
        for job in jobs {
            let alone = || job.span.in_scope(|| run_caught(&self.experts, &job.call));
            let reply = together.next().unwrap_or_else(alone);
            (job.reply)(reply);
        }
    }
}

impl Queue {
    fn of(threads: usize) -> Self {
        Self { waiting: Mutex::new(Waiting { idle: threads, ..Waiting::default() }), more: Condvar::new() }
    }

    /// The next call, and those that wait for the same experts. Calls that came too late are refused on the way.
    fn next(&self) -> Option<Vec<Job>> {
        loop {
            let (expired, jobs): (Vec<Job>, Vec<Job>) = self.take()?.into_iter().partition(Job::is_expired);
            for job in expired {
                let refusal = refuse(&job.call, Reason::Expired, "the call waited longer than its caller does");
                (job.reply)(refusal);
            }
            if !jobs.is_empty() {
                return Some(jobs);
            }
            self.done();
        }
    }

    fn take(&self) -> Option<Vec<Job>> {
        let waiting = self.more.wait_while(lock(&self.waiting), |waiting| waiting.rests());
        let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        let jobs = waiting.take_together()?;
        waiting.bytes -= jobs.iter().map(|job| job.call.rows.len()).sum::<usize>();
        waiting.idle = waiting.idle.saturating_sub(1); // at the end there may be none left
        Some(jobs)
    }

    /// Whether the caller may compute now; [`Queue::done`] must follow.
    fn begin(&self) -> bool {
        let mut waiting = lock(&self.waiting);
        let may = waiting.jobs.is_empty() && waiting.idle > 0;
        waiting.idle -= usize::from(may);
        may
    }

    fn done(&self) {
        let mut waiting = lock(&self.waiting);
        waiting.idle += 1;
        let more = !waiting.jobs.is_empty();
        drop(waiting);
        if more {
            self.more.notify_one();
        }
    }
}

impl Waiting {
    /// A thread has nothing to take.
    fn rests(&self) -> bool {
        (self.jobs.is_empty() || self.idle == 0) && !self.ended
    }

    fn take_together(&mut self) -> Option<Vec<Job>> {
        let first = self.jobs.pop_front()?;
        let layer = first.call.layer;
        let mut experts: BTreeSet<u32> = first.call.pair_experts.iter().copied().collect();
        let mut pairs = first.call.pair_experts.len();
        let mut jobs = vec![first];
        let mut at = 0;
        while let Some(call) = self.jobs.get(at).map(|job| &job.call) {
            let shares = call.layer == layer && call.pair_experts.iter().any(|expert| experts.contains(expert));
            if !shares || pairs + call.pair_experts.len() > TOGETHER_PAIRS {
                at += 1;
                continue;
            }
            pairs += call.pair_experts.len();
            experts.extend(&call.pair_experts);
            jobs.extend(self.jobs.remove(at));
        }
        Some(jobs)
    }
}

impl Job {
    fn is_expired(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

/// The replies to calls of one layer, computed in one batch; none if one of them cannot be computed.
fn run_together(experts: &Experts, calls: &[&RunCall]) -> Option<Vec<RunReply>> {
    let row = experts.hidden() * experts.dtype().size();
    let mut rows = Vec::with_capacity(calls.iter().map(|call| call.rows.len()).sum());
    // expert, call, pair of the call, row of the batch
    let mut pairs = Vec::new();
    for (number, call) in calls.iter().enumerate() {
        let first = u32::try_from(rows.len() / row).ok()?;
        let own = call.pair_experts.iter().zip(&call.pair_rows).enumerate();
        pairs.extend(own.map(|(pair, (&expert, &at))| (expert, number, pair, first + at)));
        rows.extend_from_slice(&call.rows);
    }
    pairs.sort_unstable();
    let pair_rows: Vec<u32> = pairs.iter().map(|pair| pair.3).collect();
    let pair_experts: Vec<u32> = pairs.iter().map(|pair| pair.0).collect();
    let (layer, rows) = (calls.first()?.layer as usize, rows.into());
    let batch = ExpertBatch { layer, rows: &rows, pair_rows: &pair_rows, pair_experts: &pair_experts };
    let answers = catch_unwind(AssertUnwindSafe(|| experts.run(&batch))).ok()?.ok()?;
    let mut replies: Vec<Vec<u8>> = calls.iter().map(|call| vec![0; call.pair_rows.len() * row]).collect();
    for (&(_, number, pair, _), answer) in pairs.iter().zip(answers.chunks_exact(row)) {
        replies[number][pair * row..][..row].copy_from_slice(answer);
    }
    Some(calls.iter().zip(replies).map(|(call, rows)| reply(call, rows)).collect())
}

fn reply(call: &RunCall, rows: Vec<u8>) -> RunReply {
    RunReply { sequence: call.sequence, layer: call.layer, rows: rows.into(), refusal: None }
}

/// A panic harms the call that caused it, not the thread.
fn run_caught(experts: &Experts, call: &RunCall) -> RunReply {
    catch_unwind(AssertUnwindSafe(|| run(experts, call))).unwrap_or_else(|_| {
        error!(layer = call.layer, "computing rows of experts panicked");
        refuse(call, Reason::Unspecified, "the rows cannot be computed")
    })
}

/// The reply to one call, computed alone.
pub(super) fn run(experts: &Experts, call: &RunCall) -> RunReply {
    let batch = ExpertBatch {
        layer: call.layer as usize,
        rows: &call.rows,
        pair_rows: &call.pair_rows,
        pair_experts: &call.pair_experts,
    };
    match experts.run(&batch) {
        Ok(rows) => reply(call, rows),
        Err(error @ ExpertsError::NotHeld { .. }) => refuse(call, Reason::NotHeld, &error.to_string()),
        Err(error @ (ExpertsError::Rows { .. } | ExpertsError::Pairs { .. })) => {
            refuse(call, Reason::Malformed, &error.to_string())
        }
    }
}

/// The reply that says why a call is not computed.
pub(super) fn refuse(call: &RunCall, reason: Reason, message: &str) -> RunReply {
    let refusal = Refusal { reason: reason.into(), message: message.to_owned() };
    RunReply { sequence: call.sequence, layer: call.layer, rows: Default::default(), refusal: Some(refusal) }
}

#[cfg(test)]
mod tests;
