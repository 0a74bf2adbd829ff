//! Threads that compute expert rows for peers, and the bounded queue before them.
//!
//! They are none of the runtime's, and none of the step loop: a peer waits for neither.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

use engine::{ExpertBatch, Experts, ExpertsError};
use tokio::sync::mpsc;
use tonic::Status;
use tracing::{Span, error};
use wire::proto::{Refusal, RunCall, RunReply, refusal::Reason};

use crate::metrics::Metrics;

/// Calls that wait, of all peers.
const QUEUE_CALLS: usize = 4096;
/// Bytes of rows that wait, of all peers.
const QUEUE_BYTES: usize = 256 << 20;

/// A call that was checked, and where its reply goes.
pub(super) struct Job {
    pub(super) call: RunCall,
    pub(super) deadline: Option<Instant>,
    pub(super) reply: mpsc::OwnedPermit<Result<RunReply, Status>>,
    pub(super) span: Span,
}

/// The threads. Dropping it ends them after what they compute.
pub struct Pool {
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    bytes: usize,
    ended: bool,
}

impl Pool {
    /// Starts `threads` threads that share `experts`.
    ///
    /// # Errors
    /// If the system has no more threads.
    pub fn start(experts: &Arc<Experts>, threads: usize, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        let pool = Self { queue: Arc::default() };
        for index in 0..threads.max(1) {
            let (queue, experts, metrics) = (pool.queue.clone(), experts.clone(), metrics.clone());
            thread::Builder::new().name(format!("experts-{index}")).spawn(move || {
                while let Some(job) = queue.next() {
                    let reply = job.span.in_scope(|| run_caught(&experts, &job));
                    metrics.rows_served(job.call.pair_rows.len());
                    job.reply.send(Ok(reply));
                }
            })?;
        }
        Ok(pool)
    }

    /// Takes a job, or gives it back if too much waits already.
    pub(super) fn submit(&self, job: Job) -> Option<Job> {
        let mut waiting = self.queue.lock();
        let bytes = job.call.rows.len();
        if waiting.jobs.len() >= QUEUE_CALLS || waiting.bytes + bytes > QUEUE_BYTES {
            return Some(job);
        }
        waiting.bytes += bytes;
        waiting.jobs.push_back(job);
        drop(waiting);
        self.queue.more.notify_one();
        None
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue.lock().ended = true;
        self.queue.more.notify_all();
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Job> {
        let empty = |waiting: &mut Waiting| waiting.jobs.is_empty() && !waiting.ended;
        let mut waiting = self.more.wait_while(self.lock(), empty).unwrap_or_else(PoisonError::into_inner);
        let job = waiting.jobs.pop_front()?;
        waiting.bytes -= job.call.rows.len();
        Some(job)
    }
}

/// A panic harms the call that caused it, not the thread.
fn run_caught(experts: &Experts, job: &Job) -> RunReply {
    catch_unwind(AssertUnwindSafe(|| run(experts, job))).unwrap_or_else(|_| {
        error!(layer = job.call.layer, "computing rows of experts panicked");
        refuse(&job.call, Reason::Unspecified, "the rows cannot be computed")
    })
}

fn run(experts: &Experts, job: &Job) -> RunReply {
    let call = &job.call;
    if job.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
        return refuse(call, Reason::Expired, "the call waited longer than its caller does");
    }
    let batch = ExpertBatch {
        layer: call.layer as usize,
        rows: &call.rows,
        pair_rows: &call.pair_rows,
        pair_experts: &call.pair_experts,
    };
    match experts.run(&batch) {
        Ok(rows) => RunReply { sequence: call.sequence, layer: call.layer, rows: rows.into(), refusal: None },
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
