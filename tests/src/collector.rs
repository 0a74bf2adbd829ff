//! A collector: takes traces, metrics and logs over OTLP by gRPC or HTTP, keeps what the tests ask for, and answers.

use std::{
    collections::{BTreeSet, VecDeque},
    fmt::Debug,
    io::{self, Read as _},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    routing::{MethodRouter, get, post},
};
use flate2::read::GzDecoder;
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
use prost::Message;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status, codec::CompressionEncoding, service::Routes, transport::server::TcpConnectInfo,
};

/// The oldest spans and texts beyond this are dropped.
const MAX_SPANS: usize = 100_000;
const MAX_TEXT: usize = 256 << 20;

/// What came. Clones are the same one.
#[derive(Clone, Default)]
pub struct Collector(Arc<Mutex<Received>>);

#[derive(Default)]
struct Received {
    spans: VecDeque<Value>,
    metrics: BTreeSet<String>,
    log_records: usize,
    /// What the headers of requests said of how they came.
    ways: BTreeSet<String>,
    /// All messages that came, as text, to look for what should not be there.
    texts: VecDeque<String>,
    /// Of `texts`.
    bytes: usize,
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
    /// Takes OTLP on `otlp`, for ever: gRPC and HTTP with protobuf, plain or by gzip.
    ///
    /// # Errors
    /// If the listener fails.
    pub async fn take(&self, otlp: TcpListener) -> anyhow::Result<()> {
        let (me, gzip) = (|| self.clone(), CompressionEncoding::Gzip);
        let http = Router::new()
            .route("/v1/traces", posted(Self::take_spans))
            .route("/v1/metrics", posted(Self::take_metrics))
            .route("/v1/logs", posted(Self::take_logs))
            .with_state(me());
        tonic::transport::Server::builder()
            .accept_http1(true)
            .add_routes(Routes::from(http))
            .add_service(TraceServiceServer::new(me()).accept_compressed(gzip))
            .add_service(MetricsServiceServer::new(me()).accept_compressed(gzip))
            .add_service(LogsServiceServer::new(me()).accept_compressed(gzip))
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

    /// How requests came: `CONTENT-TYPE ENCODING TENANT`, the last from the header `x-tenant`.
    pub fn ways(&self) -> Vec<String> {
        self.received().ways.iter().cloned().collect()
    }

    /// Whether `text` is anywhere in what came.
    pub fn contains(&self, text: &str) -> bool {
        self.received().texts.iter().any(|message| message.contains(text))
    }

    fn received(&self) -> MutexGuard<'_, Received> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, message: &impl Debug, headers: &HeaderMap) {
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("-");
        let encoding = [header("content-encoding"), header("grpc-encoding")].into_iter().find(|value| *value != "-");
        let way = [header("content-type"), encoding.unwrap_or("-"), header("x-tenant")].join(" ");
        let mut received = self.received();
        received.ways.insert(way);
        let text = format!("{message:?}");
        received.bytes += text.len();
        received.texts.push_back(text);
        while received.bytes > MAX_TEXT
            && let Some(oldest) = received.texts.pop_front()
        {
            received.bytes -= oldest.len();
        }
    }

    fn take_spans(&self, request: ExportTraceServiceRequest, headers: &HeaderMap, from: Option<SocketAddr>) {
        self.note(&request, headers);
        let sender = from.map(|address| address.ip().to_string());
        let connection = from.map(|address| address.to_string());
        let mut received = self.received();
        for group in request.resource_spans {
            let service = attribute(&group.resource, "service.name");
            let spans = group.scope_spans.into_iter().flat_map(|scope| scope.spans);
            received.spans.extend(spans.map(|span| {
                json!({
                    "trace": hex(&span.trace_id), "span": hex(&span.span_id), "parent": hex(&span.parent_span_id),
                    "name": span.name, "kind": span.kind, "service": service, "sender": sender,
                    "connection": connection,
                })
            }));
            let beyond = received.spans.len().saturating_sub(MAX_SPANS);
            received.spans.drain(..beyond);
        }
    }

    fn take_metrics(&self, request: ExportMetricsServiceRequest, headers: &HeaderMap, _: Option<SocketAddr>) {
        self.note(&request, headers);
        let scopes = request.resource_metrics.into_iter().flat_map(|group| group.scope_metrics);
        self.received().metrics.extend(scopes.flat_map(|scope| scope.metrics).map(|metric| metric.name));
    }

    fn take_logs(&self, request: ExportLogsServiceRequest, headers: &HeaderMap, _: Option<SocketAddr>) {
        self.note(&request, headers);
        let scopes = request.resource_logs.iter().flat_map(|group| &group.scope_logs);
        self.received().log_records += scopes.map(|scope| scope.log_records.len()).sum::<usize>();
    }
}

/// What takes a message of one signal.
type Take<M> = fn(&Collector, M, &HeaderMap, Option<SocketAddr>);

/// OTLP over HTTP.
fn posted<M: Message + Default + 'static>(take: Take<M>) -> MethodRouter<Collector> {
    let handler = async move |State(collector): State<Collector>,
                              Extension(connection): Extension<TcpConnectInfo>,
                              headers: HeaderMap,
                              body: Bytes| {
        let message = plain(&headers, &body).ok().and_then(|plain| M::decode(plain.as_slice()).ok());
        let Some(message) = message else {
            return StatusCode::BAD_REQUEST;
        };
        take(&collector, message, &headers, connection.remote_addr());
        StatusCode::OK
    };
    post(handler)
}

/// A body without its encoding.
fn plain(headers: &HeaderMap, body: &[u8]) -> io::Result<Vec<u8>> {
    let mut plain = Vec::new();
    match headers.get("content-encoding") {
        None => plain.extend_from_slice(body),
        Some(_) => {
            GzDecoder::new(body).read_to_end(&mut plain)?;
        }
    }
    Ok(plain)
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
        let from = request.remote_addr();
        let (metadata, _, message) = request.into_parts();
        self.take_spans(message, metadata.as_ref(), from);
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let from = request.remote_addr();
        let (metadata, _, message) = request.into_parts();
        self.take_metrics(message, metadata.as_ref(), from);
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Collector {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        let from = request.remote_addr();
        let (metadata, _, message) = request.into_parts();
        self.take_logs(message, metadata.as_ref(), from);
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
