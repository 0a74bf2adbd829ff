//! Queues before the batch processors of OpenTelemetry: they never block, and count what they drop.
//!
//! The processors' own queues drop without a count that one can read. These stand before them and let in no more than
//! those hold, so every drop happens, and is counted, here or in the exporter.

use std::{
    env,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use opentelemetry::{
    Context, InstrumentationScope, KeyValue,
    metrics::{Counter, Meter},
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{LogBatch, LogExporter, LogProcessor, SdkLogRecord},
    trace::{Span, SpanData, SpanExporter, SpanProcessor},
};

use super::settings::Signal;

/// What the processors' queues hold unless their variable says otherwise.
const DEFAULT_CAPACITY: usize = 2048;

/// Counts what was dropped, by signal.
#[derive(Clone, Debug)]
pub(super) struct Drops(Counter<u64>);

impl Drops {
    pub(super) fn new(meter: &Meter) -> Self {
        let counter = meter.u64_counter("modelfleet_telemetry_dropped");
        Self(counter.with_description("Spans and logs that the collector did not take").build())
    }

    /// The queue of one signal, as large as the variable says.
    pub(super) fn queue(&self, signal: Signal, capacity: &str) -> Queue {
        let capacity = env::var(capacity).ok().and_then(|value| value.parse().ok());
        self.queue_of(signal, capacity.unwrap_or(DEFAULT_CAPACITY))
    }

    fn queue_of(&self, signal: Signal, capacity: usize) -> Queue {
        Queue { pending: Arc::default(), capacity, drops: self.0.clone(), signal }
    }
}

/// How many items wait for the collector.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    pending: Arc<AtomicUsize>,
    capacity: usize,
    drops: Counter<u64>,
    signal: Signal,
}

impl Queue {
    /// Stands before a processor, which then gets what finds room, or before its exporter, which tells what left.
    pub(super) fn before<T>(&self, inner: T) -> Queued<T> {
        Queued { inner, queue: self.clone() }
    }

    fn admits(&self) -> bool {
        let admitted = self.pending.fetch_update(Relaxed, Relaxed, |n| (n < self.capacity).then_some(n + 1)).is_ok();
        if !admitted {
            self.dropped(1);
        }
        admitted
    }

    fn left(&self, items: usize, sent: bool) {
        self.pending.fetch_sub(items, Relaxed);
        if !sent {
            self.dropped(items);
        }
    }

    fn dropped(&self, items: usize) {
        self.drops.add(items as u64, &[KeyValue::new("signal", self.signal.to_string())]);
    }
}

/// A processor or an exporter with a queue before it.
#[derive(Debug)]
pub(super) struct Queued<T> {
    inner: T,
    queue: Queue,
}

/// What both do beside taking items is theirs.
macro_rules! the_rest {
    () => {
        fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
            self.inner.shutdown_with_timeout(timeout)
        }

        fn set_resource(&mut self, resource: &Resource) {
            self.inner.set_resource(resource);
        }
    };
}

impl<P: SpanProcessor> SpanProcessor for Queued<P> {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.inner.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        // the processor leaves out what is not sampled, so it would never leave the queue
        if span.span_context.is_sampled() && self.queue.admits() {
            self.inner.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    the_rest!();
}

impl<P: LogProcessor> LogProcessor for Queued<P> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if self.queue.admits() {
            self.inner.emit(record, scope);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    the_rest!();
}

impl<E: SpanExporter> SpanExporter for Queued<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let items = batch.len();
        let result = self.inner.export(batch).await;
        self.queue.left(items, result.is_ok());
        result
    }

    the_rest!();
}

impl<E: LogExporter> LogExporter for Queued<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let items = batch.iter().count();
        let result = self.inner.export(batch).await;
        self.queue.left(items, result.is_ok());
        result
    }

    the_rest!();
}

#[cfg(test)]
mod tests {
    use opentelemetry::metrics::MeterProvider as _;
    use opentelemetry_sdk::metrics::SdkMeterProvider;
    use prometheus::Registry;

    use super::*;

    #[test]
    fn a_collector_that_hangs_costs_drops_that_are_counted() {
        let registry = Registry::new();
        let reader = opentelemetry_prometheus::exporter().with_registry(registry.clone()).build().unwrap();
        let provider = SdkMeterProvider::builder().with_reader(reader).build();
        let queue = Drops::new(&provider.meter("test")).queue_of(Signal::Traces, 2);

        let admitted = (0..5).filter(|_| queue.admits()).count();
        assert_eq!(admitted, 2);
        queue.left(1, true);
        queue.left(1, false);
        assert!(queue.admits());

        let family = registry.gather().into_iter().find(|f| f.name() == "modelfleet_telemetry_dropped_total").unwrap();
        assert_eq!(family.get_metric()[0].get_counter().get_value(), 4.0, "three found no room, one was not taken");
    }
}
