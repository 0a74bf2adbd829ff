//! What is measured. Labels are bounded: models that exist, and reasons from a small set.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Meter},
};
use wire::genai::{Instruments, Outcome};

use crate::{
    resume::Reason,
    snapshot::{Model, Table},
};

/// The router's instruments.
#[derive(Debug)]
pub struct Metrics {
    requests: Instruments,
    retries: Counter<u64>,
    resumed: Counter<u64>,
    not_resumed: Counter<u64>,
    rejected: Counter<u64>,
}

impl Metrics {
    /// Makes the instruments; queued and running requests are read from `table` when somebody looks.
    pub fn new(meter: &Meter, table: &Arc<ArcSwap<Table>>) -> Self {
        let gauge = |name: &'static str, description: &'static str, of: fn((u64, u64)) -> u64| {
            let table = table.clone();
            let observe = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
                for line in table.load().lines() {
                    let model = KeyValue::new("model", line.model().name.clone());
                    observer.observe(of(line.counts()), &[model]);
                }
            };
            meter.u64_observable_gauge(name).with_description(description).with_callback(observe).build();
        };
        gauge("modelfleet_router_queued_requests", "Requests that wait for a worker", |counts| counts.0);
        gauge("modelfleet_router_running_requests", "Requests that run on a worker", |counts| counts.1);
        let counter = |name: &'static str, description| meter.u64_counter(name).with_description(description).build();
        Self {
            requests: Instruments::new(meter),
            retries: counter("modelfleet_router_retries", "Attempts that went to another worker"),
            resumed: counter("modelfleet_router_resumed_streams", "Answers that went on at another worker, by reason"),
            not_resumed: counter(
                "modelfleet_router_unresumed_streams",
                "Answers that lost their worker and did not go on, by reason",
            ),
            rejected: counter("modelfleet_router_rejected_requests", "Requests that got an error, by reason"),
        }
    }

    /// A request goes to another worker.
    pub fn retried(&self, model: &str) {
        self.retries.add(1, &[KeyValue::new("model", model.to_owned())]);
    }

    /// An answer that left its worker goes on at another one, or does not.
    pub fn resumed(&self, model: &str, reason: Reason, goes_on: bool) {
        let labels = [KeyValue::new("model", model.to_owned()), KeyValue::new("reason", reason.label())];
        if goes_on { self.resumed.add(1, &labels) } else { self.not_resumed.add(1, &labels) }
    }

    /// A request gets an error.
    pub fn rejected(&self, reason: &'static str) {
        self.rejected.add(1, &[KeyValue::new("reason", reason)]);
    }

    /// Begins to measure a request of a model that exists.
    pub fn begin(self: &Arc<Self>, operation: &'static str, model: Arc<Model>, arrived: Instant) -> Measured {
        Measured {
            metrics: self.clone(),
            operation,
            model,
            arrived,
            first_token: None,
            usage: None,
            end: Some("cancelled"),
        }
    }
}

/// A request under way; recorded when it drops, as cancelled unless it was told how it ended.
#[derive(Debug)]
pub struct Measured {
    metrics: Arc<Metrics>,
    operation: &'static str,
    model: Arc<Model>,
    arrived: Instant,
    first_token: Option<Duration>,
    usage: Option<(u64, u64)>,
    end: Option<&'static str>,
}

impl Measured {
    /// A piece of the answer came.
    pub fn piece(&mut self) {
        if self.first_token.is_none() {
            self.first_token = Some(self.arrived.elapsed());
        }
    }

    /// It ended well, with this many tokens taken and given.
    pub fn done(&mut self, usage: Option<(u64, u64)>) {
        (self.usage, self.end) = (usage, None);
    }

    /// It ended with an error.
    pub fn failed(&mut self, reason: &'static str) {
        self.end = Some(reason);
        self.metrics.rejected(reason);
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        self.metrics.requests.record(&Outcome {
            operation: self.operation,
            model: &self.model.name,
            duration: self.arrived.elapsed().as_secs_f64(),
            first_token: self.first_token.map(|first| first.as_secs_f64()),
            usage: self.usage,
            error: self.end,
        });
    }
}
