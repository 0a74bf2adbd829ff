//! Calls of several callers, over the small model's files.

use std::{path::Path, time::Duration};

use engine::Held;
use opentelemetry::metrics::MeterProvider as _;
use tokio::sync::oneshot;

use super::*;

fn experts() -> Arc<Experts> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/models/tiny-r1");
    let options =
        engine::Options { kv_cache_tokens: 64, max_context_tokens: None, max_sequences: 1, prefill_chunk: 16 };
    engine::load(&folder, &Held::all(), &options, &mut |_, _| {}).unwrap().1
}

/// A call of rows that differ by `seed`, one for each pair.
fn call(layer: u32, seed: u8, pair_experts: &[u32]) -> RunCall {
    let rows: Vec<u8> =
        (0..512 * pair_experts.len()).map(|at| ((at * 7 + usize::from(seed) * 13) % 60) as u8).collect();
    RunCall {
        sequence: u64::from(seed),
        layer,
        rows: rows.into(),
        pair_rows: (0..).take(pair_experts.len()).collect(),
        pair_experts: pair_experts.to_vec(),
        ..RunCall::default()
    }
}

fn job(call: RunCall, deadline: Option<Instant>) -> (Job, oneshot::Receiver<RunReply>) {
    let (sender, receiver) = oneshot::channel();
    let reply = Box::new(move |reply| drop(sender.send(reply)));
    (Job { call, deadline, reply, span: Span::none() }, receiver)
}

/// Without threads.
fn pool() -> Pool {
    let compute = Arc::new(Compute { experts: experts(), metrics: metrics() });
    Pool { queue: Arc::new(Queue::of(1)), compute }
}

fn queue_of(calls: &[RunCall]) -> Waiting {
    Waiting { jobs: calls.iter().map(|call| job(call.clone(), None).0).collect(), ..Waiting::default() }
}

fn sequences(jobs: &[Job]) -> Vec<u64> {
    jobs.iter().map(|job| job.call.sequence).collect()
}

#[test]
fn calls_computed_together_get_the_bits_of_each_alone() {
    let experts = experts();
    let mut repeated = call(2, 9, &[3, 3, 7]);
    repeated.pair_rows = vec![0, 2, 2];
    let calls = [call(2, 1, &[3, 7]), repeated, call(2, 4, &[0, 7, 15]), call(2, 5, &[])];
    let together = run_together(&experts, &calls.each_ref()).unwrap();
    let alone: Vec<RunReply> = calls.iter().map(|call| run(&experts, call)).collect();
    assert!(alone.iter().all(|reply| reply.refusal.is_none()));
    assert_eq!(together, alone);
}

#[test]
fn one_bad_call_spoils_no_other() {
    let experts = experts();
    experts.forget(2, 7);
    let calls = [call(2, 1, &[3]), call(2, 2, &[3, 7])];
    assert_eq!(run_together(&experts, &calls.each_ref()), None);
    let pool = Pool::start(&experts, 1, metrics()).unwrap();
    let mut replies = Vec::new();
    for call in calls {
        let (job, receiver) = job(call, None);
        assert!(pool.submit(job).is_none());
        replies.push(receiver);
    }
    let reason = |reply: RunReply| reply.refusal.map(|refusal| refusal.reason());
    let reasons = replies.into_iter().map(|reply| reason(reply.blocking_recv().unwrap()));
    assert_eq!(reasons.collect::<Vec<_>>(), [None, Some(Reason::NotHeld)]);
}

fn metrics() -> Arc<Metrics> {
    Metrics::new(&opentelemetry::metrics::noop::NoopMeterProvider::new().meter("test"))
}

#[test]
fn only_calls_that_share_an_expert_are_put_together() {
    let mut waiting =
        queue_of(&[call(1, 1, &[3, 4]), call(1, 2, &[9]), call(2, 3, &[3]), call(1, 4, &[4, 5]), call(1, 5, &[5])]);
    assert_eq!(sequences(&waiting.take_together().unwrap()), [1, 4, 5]);
    assert_eq!(sequences(&waiting.take_together().unwrap()), [2]);
    assert_eq!(sequences(&waiting.take_together().unwrap()), [3]);
    assert!(waiting.take_together().is_none());
    let many = vec![6; TOGETHER_PAIRS / 2];
    let mut waiting = queue_of(&[call(1, 1, &many), call(1, 2, &many), call(1, 3, &many)]);
    assert_eq!(sequences(&waiting.take_together().unwrap()), [1, 2]);
}

#[test]
fn a_call_that_nobody_waits_for_any_more_is_not_computed_and_a_probe_is_answered_first() {
    let pool = pool();
    let now = Instant::now();
    let jobs = [
        (call(1, 1, &[3]), Some(now)),
        (call(1, 2, &[3]), Some(now + Duration::from_secs(3600))),
        (call(0, 3, &[]), None),
    ];
    let mut replies = Vec::new();
    for (call, deadline) in jobs {
        let (job, receiver) = job(call, deadline);
        assert!(pool.submit(job).is_none());
        replies.push(receiver);
    }
    for next in [3, 2] {
        assert_eq!(sequences(&pool.queue.next().unwrap()), [next]);
        pool.queue.done();
    }
    let refusal = replies[0].try_recv().unwrap().refusal.unwrap();
    assert_eq!(refusal.reason(), Reason::Expired);
    assert_eq!(lock(&pool.queue.waiting).bytes, 0);
}

#[test]
fn more_than_fits_is_given_back() {
    let pool = pool();
    let large = RunCall { rows: vec![0; QUEUE_BYTES / 2 + 1].into(), ..call(1, 1, &[3]) };
    assert!(pool.submit(job(large.clone(), None).0).is_none());
    assert!(pool.submit(job(large, None).0).is_some(), "its bytes are too many");
    for _ in 1..QUEUE_CALLS {
        assert!(pool.submit(job(call(1, 1, &[3]), None).0).is_none());
    }
    assert!(pool.submit(job(call(1, 1, &[3]), None).0).is_some(), "one call too many");
}

#[test]
fn who_reads_a_small_call_computes_it_unless_others_wait_or_compute() {
    let pool = pool();
    let computed = |call: &RunCall| {
        let (job, mut reply) = job(call.clone(), None);
        assert!(pool.compute(job).is_none());
        reply.try_recv().ok()
    };
    let small = call(1, 1, &[3, 4]);
    assert_eq!(computed(&small), Some(run(&pool.compute.experts, &small)));
    assert_eq!(computed(&call(1, 2, &[3; SMALL_PAIRS + 1])), None, "it is not small");
    assert_eq!(computed(&small), None, "another one waits");
    assert_eq!(sequences(&pool.queue.next().unwrap()), [2, 1]);
    assert_eq!(computed(&small), None, "the only thread computes");
    pool.queue.done();
    assert_eq!(sequences(&pool.queue.next().unwrap()), [1]);
    pool.queue.done();
    assert_eq!(computed(&small), Some(run(&pool.compute.experts, &small)));
}

#[test]
fn who_computes_a_call_itself_takes_the_place_of_a_thread() {
    let pool = pool();
    let rests = || lock(&pool.queue.waiting).rests();
    assert!(pool.queue.begin());
    assert!(pool.submit(job(call(1, 1, &[3]), None).0).is_none());
    assert!(rests(), "as many compute as there are threads");
    pool.queue.done();
    assert!(!rests());
}
