//! What a worker measures, besides the instruments of the GenAI conventions in `wire`.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use engine::Load;
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Meter},
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
    /// Those of the GenAI conventions.
    pub requests: Instruments,
    calls: Counter<u64>,
    rows: Counter<u64>,
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
        let counter = |name, description| meter.u64_counter(name).with_description(description).build();
        Arc::new(Self {
            requests: Instruments::new(meter),
            calls: counter("modelfleet_worker_expert_calls", "Calls to holders of experts, by result"),
            rows: counter(
                "modelfleet_worker_expert_rows",
                "Rows sent to holders of experts, and rows computed for peers",
            ),
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

    /// Counts rows sent to holders.
    pub fn rows_sent(&self, rows: usize) {
        self.rows.add(rows as u64, &[KeyValue::new("direction", "sent")]);
    }

    /// Counts rows computed for peers.
    pub fn rows_served(&self, rows: usize) {
        self.rows.add(rows as u64, &[KeyValue::new("direction", "served")]);
    }
}
