//! Starts and ends telemetry: logs to standard error, Prometheus metrics, and OTLP by the standard `OTEL_*` variables.
//!
//! Nothing is exported unless an OTLP endpoint is set or `OTEL_{TRACES,METRICS,LOGS}_EXPORTER` names `otlp`. Protocols
//! are `grpc`, the default as our processes speak it anyway, and `http/protobuf`. A setting that cannot be honoured is
//! told on standard error and costs its signal at most, never the process. `OTEL_SDK_DISABLED` ends exports; `/metrics`
//! stays. A collector that is gone or hangs delays nothing: what does not fit the queue is dropped and counted in
//! `modelfleet_telemetry_dropped_total`.
//!
//! Architecture Invariant: no prompt, token or secret is handed to this module; spans and logs carry ids, names,
//! counts and reasons.

mod drops;
mod fields;
mod otlp;
mod propagation;
mod settings;

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use futures::future::join_all;
use opentelemetry::{
    Key, global,
    metrics::{Meter, MeterProvider as _},
    trace::TracerProvider as _,
};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{LogExporter, MetricExporter, SpanExporter};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkError,
    logs::{BatchLogProcessor, SdkLoggerProvider},
    metrics::{PeriodicReader, SdkMeterProvider},
    trace::{BatchSpanProcessor, SdkTracerProvider},
};
use prometheus::Registry;
use tokio::task::spawn_blocking;
use tracing::{Subscriber, warn};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{LevelFilter, Targets},
    fmt,
    layer::{Filter, SubscriberExt as _},
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

pub use propagation::{Carrier, extract, inject};

use drops::Drops;
use fields::Fields;
use settings::{Settings, Signal};

const FLUSH: Duration = Duration::from_secs(5);
/// What the SDK calls a service that nobody named.
const UNNAMED: &str = "unknown_service";
/// What carries telemetry itself must not make telemetry.
const QUIET: [&str; 10] = [
    "h2",
    "hyper",
    "hyper_util",
    "tonic",
    "tower",
    "opentelemetry",
    "opentelemetry_sdk",
    "opentelemetry_otlp",
    "reqwest",
    "rustls",
];

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The Prometheus registry refused the exporter.
    #[error("building the Prometheus exporter")]
    Prometheus(#[source] OTelSdkError),
    /// Telemetry was started twice in this process.
    #[error("installing the log subscriber")]
    Subscriber(#[source] tracing_subscriber::util::TryInitError),
}

/// What runs. [`Telemetry::shutdown`] flushes it; dropping it does not.
#[derive(Debug)]
pub struct Telemetry {
    registry: Registry,
    metrics: SdkMeterProvider,
    traces: Option<SdkTracerProvider>,
    logs: Option<SdkLoggerProvider>,
    service: &'static str,
}

/// Starts telemetry for a program called `service`, unless the variables name it otherwise. Must run inside tokio.
///
/// # Errors
/// See [`Error`]. Neither a collector that cannot be reached nor a setting of one that cannot be honoured is one.
pub fn start(service: &'static str) -> Result<Telemetry, Error> {
    // what is wrong with the variables is told before the subscriber stands that they ask for
    let early = tracing_subscriber::registry().with(standard_error());
    let telemetry = tracing::subscriber::with_default(early, || Telemetry::build(service))?;
    global::set_meter_provider(telemetry.metrics.clone());

    let quiet = || {
        let targets = Targets::new().with_default(LevelFilter::INFO);
        targets.with_targets(QUIET.map(|target| (target, LevelFilter::OFF)))
    };
    let spans = telemetry.traces.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("modelfleet"))
            .with_location(false)
            .with_threads(false)
            .with_filter(quiet())
    });
    let bridge = telemetry.logs.as_ref().map(|provider| OpenTelemetryTracingBridge::new(provider).with_filter(quiet()));
    tracing_subscriber::registry()
        .with(standard_error())
        .with(spans)
        .with(bridge)
        .try_init()
        .map_err(Error::Subscriber)?;
    Ok(telemetry)
}

/// Logs as text, as `RUST_LOG` says.
fn standard_error<S: Subscriber + for<'a> LookupSpan<'a>>() -> impl Layer<S> {
    let filter: Box<dyn Filter<S> + Send + Sync> = match EnvFilter::try_from_default_env() {
        Ok(asked) => Box::new(asked),
        Err(_) => Box::new(LevelFilter::INFO), // an `EnvFilter` looks every span up whenever it is entered or left
    };
    let text = fmt::layer().fmt_fields(Fields).with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    text.with_filter(filter)
}

impl Telemetry {
    fn build(service: &'static str) -> Result<Self, Error> {
        let settings = Settings::of_process();
        let resource = resource(service);
        let registry = Registry::new();
        let metrics = metrics(&resource, &registry, exported(Signal::Metrics, otlp::metrics(&settings)))?;
        let drops = Drops::new(&metrics.meter("modelfleet"));
        let traces = exported(Signal::Traces, otlp::spans(&settings)).map(|to| traces(&resource, &drops, to));
        let logs = exported(Signal::Logs, otlp::logs(&settings)).map(|to| logs(&resource, &drops, to));
        Ok(Self { registry, metrics, traces, logs, service })
    }

    /// The metrics, for `/metrics`.
    pub fn registry(&self) -> Registry {
        self.registry.clone()
    }

    /// Makes instruments whose values go to Prometheus and, if set, to OTLP.
    pub fn meter(&self) -> Meter {
        self.metrics.meter(self.service)
    }

    /// Sends what is queued, for at most a few seconds, and ends. The last thing a program does.
    pub async fn shutdown(self) {
        let Self { metrics, traces, logs, .. } = self;
        // errors are a collector's that is gone, and nobody is left to tell
        let ends = [
            spawn_blocking(move || drop(metrics.shutdown_with_timeout(FLUSH))),
            spawn_blocking(move || drop(traces.map(|traces| traces.shutdown_with_timeout(FLUSH)))),
            spawn_blocking(move || drop(logs.map(|logs| logs.shutdown_with_timeout(FLUSH)))),
        ];
        let _ = tokio::time::timeout(FLUSH, join_all(ends)).await;
    }
}

/// Who this process is, by the variables or by its own name.
fn resource(service: &'static str) -> Resource {
    let told = Resource::builder().build();
    let named = told.get(&Key::from_static_str("service.name")).is_some_and(|name| !name.as_str().starts_with(UNNAMED));
    if named { told } else { Resource::builder().with_service_name(service).build() }
}

/// The exporter of a signal; one that cannot be made is told and left out.
fn exported<E>(signal: Signal, exporter: Result<Option<E>, otlp::Error>) -> Option<E> {
    exporter.unwrap_or_else(|error| {
        let error: &dyn std::error::Error = &error;
        warn!(%signal, error, "not exported");
        None
    })
}

fn metrics(
    resource: &Resource,
    registry: &Registry,
    exporter: Option<MetricExporter>,
) -> Result<SdkMeterProvider, Error> {
    let prometheus =
        opentelemetry_prometheus::exporter().with_registry(registry.clone()).build().map_err(Error::Prometheus)?;
    let provider = SdkMeterProvider::builder().with_resource(resource.clone()).with_reader(prometheus);
    Ok(match exporter {
        Some(exporter) => provider.with_reader(PeriodicReader::builder(exporter).build()).build(),
        None => provider.build(),
    })
}

fn traces(resource: &Resource, drops: &Drops, exporter: SpanExporter) -> SdkTracerProvider {
    let queue = drops.queue(Signal::Traces, "OTEL_BSP_MAX_QUEUE_SIZE");
    let batches = BatchSpanProcessor::builder(queue.before(exporter)).build();
    SdkTracerProvider::builder().with_resource(resource.clone()).with_span_processor(queue.before(batches)).build()
}

fn logs(resource: &Resource, drops: &Drops, exporter: LogExporter) -> SdkLoggerProvider {
    let queue = drops.queue(Signal::Logs, "OTEL_BLRP_MAX_QUEUE_SIZE");
    let batches = BatchLogProcessor::builder(queue.before(exporter)).build();
    SdkLoggerProvider::builder().with_resource(resource.clone()).with_log_processor(queue.before(batches)).build()
}
