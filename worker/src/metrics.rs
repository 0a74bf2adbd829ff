//! What a worker measures, besides the instruments of the GenAI conventions in `wire`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use engine::{Experts, Load};
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram, Meter},
};
use wire::genai::Instruments;

/// How a call to a holder of experts ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallResult {
    /// With rows.
    Answered,
    /// No holder was connected.
    Unreachable,
    /// The stream ended before the reply.
    Lost,
    /// The holder took too long.
    Late,
    /// Refused: too much waits there.
    Busy,
    /// Refused: it waited too long there.
    Expired,
    /// Refused: the expert is not there.
    NotHeld,
    /// Refused: the holder runs other model files.
    OtherContent,
    /// Refused, or answered with something that is no answer.
    Malformed,
}

impl CallResult {
    /// The label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Unreachable => "unreachable",
            Self::Lost => "lost",
            Self::Late => "late",
            Self::Busy => "busy",
            Self::Expired => "expired",
            Self::NotHeld => "not_held",
            Self::OtherContent => "other_content",
            Self::Malformed => "malformed",
        }
    }
}

/// The instruments of one worker.
pub struct Metrics {
    meter: Meter,
    /// Those of the GenAI conventions.
    pub requests: Instruments,
    calls: Counter<u64>,
    rows: Counter<u64>,
    bytes: Counter<u64>,
    resent: Counter<u64>,
    suspected: Counter<u64>,
    adopted: Counter<u64>,
    steps: Counter<u64>,
    waits: Histogram<f64>,
    gauges: Arc<Gauges>,
}

#[derive(Default)]
struct Gauges {
    running: AtomicU64,
    waiting: AtomicU64,
    kv_tokens: AtomicU64,
    dense_bytes: AtomicU64,
    expert_bytes: AtomicU64,
    experts: AtomicU64,
    suspects: AtomicU64,
    away: AtomicU64,
}

impl Metrics {
    /// Makes the instruments of `meter`.
    pub fn new(meter: &Meter) -> Arc<Self> {
        let gauges: Arc<Gauges> = Arc::default();
        let gauge =
            |name: &'static str, unit: &'static str, description: &'static str, read: fn(&Gauges) -> &AtomicU64| {
                let gauges = gauges.clone();
                let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
                    observer.observe(read(&gauges).load(Ordering::Relaxed), &[]);
                };
                meter
                    .u64_observable_gauge(name)
                    .with_unit(unit)
                    .with_description(description)
                    .with_callback(observe)
                    .build();
            };
        gauge("modelfleet_worker_running_sequences", "", "Sequences that have a place in a step", |g| &g.running);
        gauge("modelfleet_worker_waiting_sequences", "", "Sequences that wait for a place in a step", |g| &g.waiting);
        gauge("modelfleet_worker_kv_tokens", "", "Tokens of KV cache in use", |g| &g.kv_tokens);
        gauge("modelfleet_worker_dense_weights_bytes", "", "Bytes of dense weights in memory", |g| &g.dense_bytes);
        gauge("modelfleet_worker_expert_weights_bytes", "", "Bytes of experts in memory", |g| &g.expert_bytes);
        gauge("modelfleet_worker_experts_held", "", "Experts in memory, over all layers", |g| &g.experts);
        gauge("modelfleet_worker_suspect_peers", "", "Peers not asked now because they failed", |g| &g.suspects);
        gauge("modelfleet_worker_stalled_sequences", "", "Sequences that wait for experts", |g| &g.away);
        let counter = |name, description| meter.u64_counter(name).with_description(description).build();
        Arc::new(Self {
            meter: meter.clone(),
            requests: Instruments::new(meter),
            calls: counter("modelfleet_worker_expert_calls", "Calls to holders of experts, by result"),
            rows: counter(
                "modelfleet_worker_expert_rows",
                "Rows sent to holders of experts, and rows computed for peers",
            ),
            bytes: counter(
                "modelfleet_worker_expert_bytes",
                "Bytes of rows sent to holders of experts, and received from them",
            ),
            resent: counter("modelfleet_worker_expert_resent_rows", "Rows sent again to another holder, by reason"),
            suspected: counter(
                "modelfleet_worker_peer_suspicions",
                "Times that a peer failed and was not asked any more",
            ),
            adopted: counter("modelfleet_worker_experts_adopted", "Experts loaded here because nobody else held them"),
            steps: counter("modelfleet_worker_steps", "Steps of several sequences, by the parts they went in"),
            waits: meter
                .f64_histogram("modelfleet_worker_expert_wait_duration")
                .with_unit("s")
                .with_description("How long a layer of a step waited for experts elsewhere, after its own were done")
                .with_boundaries(vec![0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
                .build(),
            gauges,
        })
    }

    /// What the engine has to do now.
    pub fn load(&self, load: &Load) {
        let set = |gauge: &AtomicU64, value: usize| gauge.store(value as u64, Ordering::Relaxed);
        set(&self.gauges.running, load.running);
        set(&self.gauges.waiting, load.waiting);
        set(&self.gauges.kv_tokens, load.kv_tokens_used);
    }

    /// Bytes of the dense part in memory.
    pub fn dense_weights(&self, bytes: u64) {
        self.gauges.dense_bytes.store(bytes, Ordering::Relaxed);
    }

    /// How many experts are in memory, over all layers, and their bytes.
    pub fn experts(&self, (count, bytes): (u64, u64)) {
        self.gauges.experts.store(count, Ordering::Relaxed);
        self.gauges.expert_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Counts calls to holders.
    pub fn calls(&self, result: CallResult, count: usize) {
        if count > 0 {
            self.calls.add(count as u64, &[KeyValue::new("result", result.name())]);
        }
    }

    /// Counts rows sent to holders, and their bytes.
    pub fn rows_sent(&self, rows: usize, bytes: usize) {
        self.rows.add(rows as u64, &[KeyValue::new("direction", "sent")]);
        self.bytes.add(bytes as u64, &[KeyValue::new("direction", "sent")]);
    }

    /// Counts bytes of rows that holders answered with.
    pub fn bytes_received(&self, bytes: usize) {
        self.bytes.add(bytes as u64, &[KeyValue::new("direction", "received")]);
    }

    /// Counts pairs of row and expert sent again, after a call that ended so.
    pub fn resent(&self, why: CallResult, pairs: usize) {
        self.resent.add(pairs as u64, &[KeyValue::new("reason", why.name())]);
    }

    /// A peer failed and is not asked any more.
    pub fn suspected(&self) {
        self.suspected.add(1, &[]);
    }

    /// How many peers are not asked now because they failed.
    pub fn suspects(&self, count: usize) {
        self.gauges.suspects.store(count as u64, Ordering::Relaxed);
    }

    /// How many sequences wait for experts.
    pub fn stalled(&self, count: usize) {
        self.gauges.away.store(count as u64, Ordering::Relaxed);
    }

    /// An expert was loaded because nobody else held it.
    pub fn adopted(&self) {
        self.adopted.add(1, &[]);
    }

    /// A step of several sequences went in two halves, or whole.
    pub fn step(&self, in_halves: bool) {
        self.steps.add(1, &[KeyValue::new("parts", if in_halves { 2_i64 } else { 1 })]);
    }

    /// How long a layer waited for experts elsewhere.
    pub fn waited(&self, wait: Duration) {
        self.waits.record(wait.as_secs_f64(), &[]);
    }

    /// Lets rows by layer be read from `experts` whenever they are asked for: those of all experts, and of the busiest. The
    /// load of each expert, thousands of numbers, goes to the operator on the control stream instead.
    pub fn routed(&self, experts: &Arc<Experts>) {
        let by_layer = |name: &'static str, description: &'static str, fold: fn(&[u64]) -> u64| {
            let experts = experts.clone();
            let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
                for (layer, rows) in experts.routed() {
                    observer.observe(fold(&rows), &[KeyValue::new("layer", layer as i64)]);
                }
            };
            self.meter.u64_observable_counter(name).with_description(description).with_callback(observe).build();
        };
        let (all, busiest) = (|rows: &[u64]| rows.iter().sum(), |rows: &[u64]| rows.iter().copied().max().unwrap_or(0));
        by_layer("modelfleet_worker_routed_rows", "Rows that own sequences gave to experts, by layer", all);
        by_layer("modelfleet_worker_busiest_expert_rows", "Rows given to the busiest expert, by layer", busiest);
    }

    /// Counts rows computed for peers.
    pub fn rows_served(&self, rows: usize) {
        self.rows.add(rows as u64, &[KeyValue::new("direction", "served")]);
    }
}
