//! Starts and ends telemetry: logs to standard error, Prometheus metrics, and OTLP by the standard `OTEL_*` variables.
//!
//! Nothing is exported unless an OTLP endpoint is set. A collector that is gone or hangs delays nothing: what does not
//! fit the queue is dropped and counted in `modelfleet_telemetry_dropped_total`.
//!
//! Architecture Invariant: no prompt, token or secret is handed to this module; spans and logs carry ids, names,
//! counts and reasons.

mod drops;
mod propagation;

use std::{
    env,
    io::{self, IsTerminal as _},
    time::Duration,
};

use opentelemetry::{
    global,
    metrics::{Meter, MeterProvider as _},
    trace::TracerProvider as _,
};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{ExporterBuildError, LogExporter, MetricExporter, SpanExporter};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkError,
    logs::{BatchLogProcessor, SdkLoggerProvider},
    metrics::{PeriodicReader, SdkMeterProvider},
    trace::{BatchSpanProcessor, SdkTracerProvider},
};
use prometheus::Registry;
use tracing_subscriber::{EnvFilter, Layer as _, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

pub use propagation::{Carrier, extract, inject};

use drops::{Drops, LogQueue, SpanQueue};

const FLUSH: Duration = Duration::from_secs(5);
/// What carries telemetry itself must not make telemetry.
const QUIET: &str = "h2=off,hyper=off,hyper_util=off,tonic=off,tower=off,opentelemetry=off,opentelemetry_sdk=off,opentelemetry_otlp=off";

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `OTEL_EXPORTER_OTLP_PROTOCOL` names another protocol than the one we speak.
    #[error("OTEL_EXPORTER_OTLP_PROTOCOL is {0}; only grpc is supported")]
    Protocol(String),
    /// An exporter cannot be built from the `OTEL_*` variables.
    #[error("building the OTLP exporter of {signal}")]
    Exporter {
        /// traces, metrics or logs.
        signal: &'static str,
        /// What is wrong with them.
        source: ExporterBuildError,
    },
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

/// Starts telemetry for a program called `service` (`OTEL_SERVICE_NAME` overrules it). Must run inside tokio.
///
/// # Errors
/// See [`Error`]. A collector that cannot be reached is none.
pub fn start(service: &'static str) -> Result<Telemetry, Error> {
    let resource = resource(service);
    let registry = Registry::new();
    let metrics = metrics(&resource, &registry)?;
    global::set_meter_provider(metrics.clone());
    let drops = Drops::new(&metrics.meter("modelfleet"));
    let traces = exports("TRACES")?.then(|| traces(&resource, &drops)).transpose()?;
    let logs = exports("LOGS")?.then(|| logs(&resource, &drops)).transpose()?;

    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let quiet = || EnvFilter::new(format!("info,{QUIET}"));
    let spans = traces.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("modelfleet"))
            .with_location(false)
            .with_threads(false)
            .with_filter(quiet())
    });
    let bridge = logs.as_ref().map(|provider| OpenTelemetryTracingBridge::new(provider).with_filter(quiet()));
    tracing_subscriber::registry()
        .with(fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).with_filter(filter))
        .with(spans)
        .with(bridge)
        .try_init()
        .map_err(Error::Subscriber)?;
    Ok(Telemetry { registry, metrics, traces, logs, service })
}

impl Telemetry {
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
        let end = tokio::task::spawn_blocking(move || {
            // errors are a collector's that is gone, and nobody is left to tell
            if let Some(traces) = &self.traces {
                let _ = traces.shutdown_with_timeout(FLUSH);
            }
            if let Some(logs) = &self.logs {
                let _ = logs.shutdown_with_timeout(FLUSH);
            }
            let _ = self.metrics.shutdown_with_timeout(FLUSH);
        });
        let _ = tokio::time::timeout(FLUSH, end).await;
    }
}

fn resource(service: &'static str) -> Resource {
    let builder = Resource::builder();
    match env::var("OTEL_SERVICE_NAME") {
        Ok(name) if !name.is_empty() => builder.with_service_name(name).build(),
        _ => builder.with_service_name(service).build(),
    }
}

/// Whether `signal` (TRACES, METRICS or LOGS) is exported.
fn exports(signal: &str) -> Result<bool, Error> {
    exports_by(signal, |name| env::var(name).ok().filter(|value| !value.is_empty()))
}

fn exports_by(signal: &str, variable: impl Fn(&str) -> Option<String>) -> Result<bool, Error> {
    let either = |suffix: &str| {
        variable(&format!("OTEL_EXPORTER_OTLP_{signal}_{suffix}"))
            .or_else(|| variable(&format!("OTEL_EXPORTER_OTLP_{suffix}")))
    };
    let disabled = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let none = variable(&format!("OTEL_{signal}_EXPORTER")).is_some_and(|value| value == "none");
    if disabled || none || either("ENDPOINT").is_none() {
        return Ok(false);
    }
    match either("PROTOCOL") {
        Some(protocol) if protocol != "grpc" => Err(Error::Protocol(protocol)),
        _ => Ok(true),
    }
}

fn metrics(resource: &Resource, registry: &Registry) -> Result<SdkMeterProvider, Error> {
    let prometheus =
        opentelemetry_prometheus::exporter().with_registry(registry.clone()).build().map_err(Error::Prometheus)?;
    let provider = SdkMeterProvider::builder().with_resource(resource.clone()).with_reader(prometheus);
    if !exports("METRICS")? {
        return Ok(provider.build());
    }
    let exporter = MetricExporter::builder()
        .with_tonic()
        .build()
        .map_err(|source| Error::Exporter { signal: "metrics", source })?;
    Ok(provider.with_reader(PeriodicReader::builder(exporter).build()).build())
}

fn traces(resource: &Resource, drops: &Drops) -> Result<SdkTracerProvider, Error> {
    let exporter =
        SpanExporter::builder().with_tonic().build().map_err(|source| Error::Exporter { signal: "traces", source })?;
    let queue = drops.queue("traces", "OTEL_BSP_MAX_QUEUE_SIZE");
    let batches = BatchSpanProcessor::builder(queue.exporter(exporter)).build();
    let provider = SdkTracerProvider::builder().with_resource(resource.clone());
    Ok(provider.with_span_processor(SpanQueue::new(batches, queue)).build())
}

fn logs(resource: &Resource, drops: &Drops) -> Result<SdkLoggerProvider, Error> {
    let exporter =
        LogExporter::builder().with_tonic().build().map_err(|source| Error::Exporter { signal: "logs", source })?;
    let queue = drops.queue("logs", "OTEL_BLRP_MAX_QUEUE_SIZE");
    let batches = BatchLogProcessor::builder(queue.exporter(exporter)).build();
    let provider = SdkLoggerProvider::builder().with_resource(resource.clone());
    Ok(provider.with_log_processor(LogQueue::new(batches, queue)).build())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn traces_with(variables: &[(&str, &str)]) -> Result<bool, Error> {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        exports_by("TRACES", |name| variables.get(name).map(ToString::to_string))
    }

    #[test]
    fn nothing_is_exported_unless_an_endpoint_is_set() {
        assert!(!traces_with(&[]).unwrap());
        assert!(!traces_with(&[("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://c:4317")]).unwrap());
        assert!(traces_with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317")]).unwrap());
        assert!(traces_with(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:4317")]).unwrap());
    }

    #[test]
    fn standard_variables_turn_a_signal_off() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317");
        assert!(!traces_with(&[endpoint, ("OTEL_TRACES_EXPORTER", "none")]).unwrap());
        assert!(!traces_with(&[endpoint, ("OTEL_SDK_DISABLED", "true")]).unwrap());
    }

    #[test]
    fn a_protocol_that_we_do_not_speak_is_refused_by_name() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318");
        let refused = traces_with(&[endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")]).unwrap_err();
        assert_eq!(refused.to_string(), "OTEL_EXPORTER_OTLP_PROTOCOL is http/protobuf; only grpc is supported");
    }
}
