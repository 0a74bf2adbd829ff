//! A collector: takes traces, metrics and logs over OTLP/gRPC, keeps what the tests ask for, and answers over HTTP.

use std::{
    collections::BTreeSet,
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::{
            ExportLogsServiceRequest, ExportLogsServiceResponse,
            logs_service_server::{LogsService, LogsServiceServer},
        },
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::{KeyValue, any_value},
    resource::v1::Resource,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Spans and bytes of text beyond this are dropped.
const MAX_SPANS: usize = 100_000;
const MAX_TEXT: usize = 256 << 20;

/// What came. Clones are the same one.
#[derive(Clone, Default)]
pub struct Collector(Arc<Mutex<Received>>);

#[derive(Default)]
struct Received {
    spans: Vec<Value>,
    metrics: BTreeSet<String>,
    log_records: usize,
    /// All that came, as text, to look for what should not be there.
    text: String,
}

/// Takes OTLP on `otlp`, answers on `http`:
/// `/traces/ID` (the spans of a trace), `/metrics` (their names), `/logs` (how many), `/contains/TEXT` (anywhere).
///
/// # Errors
/// If one of the listeners fails.
pub async fn serve(http: TcpListener, otlp: TcpListener) -> anyhow::Result<()> {
    let collector = Collector::default();
    let routes = Router::new()
        .route("/traces/{id}", get(trace))
        .route("/metrics", get(metrics))
        .route("/logs", get(logs))
        .route("/contains/{text}", get(contains))
        .with_state(collector.clone());
    tokio::select! {
        result = async { axum::serve(http, routes).await } => result?,
        result = collector.take(otlp) => result?,
    }
    Ok(())
}

impl Collector {
    /// Takes OTLP on `otlp`, for ever.
    ///
    /// # Errors
    /// If the listener fails.
    pub async fn take(&self, otlp: TcpListener) -> anyhow::Result<()> {
        tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(self.clone()))
            .add_service(MetricsServiceServer::new(self.clone()))
            .add_service(LogsServiceServer::new(self.clone()))
            .serve_with_incoming(TcpListenerStream::new(otlp))
            .await?;
        Ok(())
    }

    /// The spans of the trace with this id, in hex.
    pub fn trace(&self, id: &str) -> Vec<Value> {
        self.received().spans.iter().filter(|span| span["trace"] == id).cloned().collect()
    }

    /// Names of all metrics.
    pub fn metrics(&self) -> Vec<String> {
        self.received().metrics.iter().cloned().collect()
    }

    /// How many log records came.
    pub fn log_records(&self) -> usize {
        self.received().log_records
    }

    /// Whether `text` is anywhere in what came.
    pub fn contains(&self, text: &str) -> bool {
        self.received().text.contains(text)
    }

    fn received(&self) -> MutexGuard<'_, Received> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, message: &impl Debug) {
        let mut received = self.received();
        if received.text.len() < MAX_TEXT {
            received.text += &format!("{message:?}\n");
        }
    }
}

async fn trace(State(collector): State<Collector>, Path(id): Path<String>) -> Json<Vec<Value>> {
    Json(collector.trace(&id))
}

async fn metrics(State(collector): State<Collector>) -> Json<Vec<String>> {
    Json(collector.metrics())
}

async fn logs(State(collector): State<Collector>) -> Json<usize> {
    Json(collector.log_records())
}

async fn contains(State(collector): State<Collector>, Path(text): Path<String>) -> Json<bool> {
    Json(collector.contains(&text))
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let address = request.remote_addr();
        let sender = address.map(|address| address.ip().to_string());
        let connection = address.map(|address| address.to_string());
        let request = request.into_inner();
        self.note(&request);
        let mut received = self.received();
        for group in request.resource_spans {
            let service = attribute(&group.resource, "service.name");
            let spans = group.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let room = MAX_SPANS.saturating_sub(received.spans.len());
            received.spans.extend(spans.take(room).map(|span| {
                json!({
                    "trace": hex(&span.trace_id), "span": hex(&span.span_id), "parent": hex(&span.parent_span_id),
                    "name": span.name, "kind": span.kind, "service": service, "sender": sender,
                    "connection": connection,
                })
            }));
        }
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let request = request.into_inner();
        self.note(&request);
        let scopes = request.resource_metrics.into_iter().flat_map(|group| group.scope_metrics);
        self.received().metrics.extend(scopes.flat_map(|scope| scope.metrics).map(|metric| metric.name));
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Collector {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        let request = request.into_inner();
        self.note(&request);
        let scopes = request.resource_logs.iter().flat_map(|group| &group.scope_logs);
        self.received().log_records += scopes.map(|scope| scope.log_records.len()).sum::<usize>();
        Ok(Response::new(Default::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attribute(resource: &Option<Resource>, key: &str) -> String {
    let attributes: &[KeyValue] = resource.as_ref().map_or(&[], |resource| &resource.attributes);
    let value = attributes.iter().find(|attribute| attribute.key == key).and_then(|attribute| attribute.value.as_ref());
    match value.and_then(|value| value.value.as_ref()) {
        Some(any_value::Value::StringValue(text)) => text.clone(),
        _ => String::new(),
    }
}
