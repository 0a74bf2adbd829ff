//! `modelfleet.v1.Inference` for clients, with health and reflection. It goes the same way as HTTP: a typed request
//! becomes the OpenAI body, and the pieces of the answer become typed responses.

mod convert;
mod strict;

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use futures::{Stream, stream};
use http::StatusCode;
use tokio::sync::watch;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap, metadata::MetadataValue, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{Instrument as _, Span, field::Empty, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use wire::{
    proto::{
        self, GenerateRequest, GenerateResponse,
        inference_server::{Inference, InferenceServer},
    },
    telemetry,
};

use crate::{
    admit::BODY_BYTES,
    ask::{ask, operation, request_id},
    pieces::{Piece, Pieces},
    refusal::Refusal,
    router::Router,
};
use strict::Strict;

/// The service's name, for health.
pub const SERVICE: &str = "modelfleet.v1.Inference";

/// All that is served on the gRPC port, and what keeps its health up to date: a future that never ends.
///
/// # Errors
/// The descriptors that are built in cannot be read.
pub fn routes(router: &Router) -> Result<(Routes, impl Future<Output = ()> + use<>), tonic_reflection::server::Error> {
    let inference = InferenceServer::new(Service(router.clone())).max_decoding_message_size(BODY_BYTES);
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::INFERENCE_DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let routes = Routes::new(Strict(inference))
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    Ok((routes, report(reporter, router.readiness())))
}

async fn report(reporter: HealthReporter, mut ready: watch::Receiver<bool>) {
    loop {
        let is_ready = *ready.borrow_and_update();
        let status = if is_ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in ["", SERVICE] {
            reporter.set_service_status(service, status).await;
        }
        if ready.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

struct Service(Router);

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let arrived = Instant::now();
        let id = request_id(request.metadata().get("x-request-id").map(|id| id.as_encoded_bytes()));
        let span = info_span!(
            "request",
            otel.name = "modelfleet.v1.Inference/Generate",
            otel.kind = "server",
            otel.status_code = Empty,
            rpc.system = "grpc",
            rpc.service = SERVICE,
            rpc.method = "Generate",
            gen_ai.operation.name = Empty,
            gen_ai.request.model = Empty,
            modelfleet.request.id = id,
        );
        let _ = span.set_parent(telemetry::extract(request.metadata())); // fails only if nothing is exported
        let answer = self.answer(request, id.clone(), arrived).instrument(span).await;
        let mut response = answer.map_err(|refusal| Status::from(&refusal))?;
        if let Ok(id) = MetadataValue::try_from(id) {
            response.metadata_mut().insert("x-request-id", id);
        }
        Ok(response)
    }
}

impl Service {
    async fn answer(
        &self,
        request: Request<GenerateRequest>,
        id: String,
        arrived: Instant,
    ) -> Result<Response<<Self as Inference>::GenerateStream>, Refusal> {
        let count = |refusal: Refusal| {
            self.0.metrics().rejected(refusal.reason);
            refusal
        };
        let timeout = timeout(request.metadata());
        let (endpoint, body) = convert::body(request.get_ref()).map_err(count)?;
        let mut asked = ask(&self.0, endpoint, body.into(), &id, arrived).map_err(count)?;
        asked.call.deadline = timeout.and_then(|timeout| arrived.checked_add(timeout));
        let span = Span::current();
        span.record("gen_ai.operation.name", operation(endpoint));
        span.record("gen_ai.request.model", &asked.call.model);
        let mut pieces = Pieces::new(&self.0, asked);
        let first = loop {
            match pieces.next().await {
                Some(Piece::Waiting) => {} // headers come with the first piece, or a status
                Some(Piece::Failed(refusal)) => return Err(refusal),
                first => break first,
            }
        };
        let pieces = Box::new(pieces); // it moves at each step
        let responses = stream::unfold((first, pieces), move |(first, mut pieces)| {
            let id = id.clone();
            async move {
                let piece = match first {
                    Some(piece) => piece,
                    None => pieces.next().await?,
                };
                let response = match piece {
                    Piece::Failed(refusal) => Err(Status::from(&refusal)),
                    Piece::Delta(chunk) | Piece::Usage(chunk) => {
                        convert::response(&id, endpoint, chunk).map_err(|_| Status::from(&Refusal::broken()))
                    }
                    Piece::Waiting => Ok(GenerateResponse::default()),
                };
                Some((response, (None, pieces)))
            }
        });
        Ok(Response::new(Box::pin(responses)))
    }
}

impl From<&Refusal> for Status {
    fn from(refusal: &Refusal) -> Self {
        let code = match refusal.status {
            StatusCode::BAD_REQUEST => Code::InvalidArgument,
            StatusCode::NOT_FOUND => Code::NotFound,
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::TOO_MANY_REQUESTS => Code::ResourceExhausted,
            StatusCode::SERVICE_UNAVAILABLE if refusal.reason == "queue_timeout" => Code::DeadlineExceeded,
            StatusCode::SERVICE_UNAVAILABLE => Code::Unavailable,
            StatusCode::GATEWAY_TIMEOUT => Code::DeadlineExceeded,
            status if status.is_client_error() => Code::InvalidArgument,
            _ => Code::Internal,
        };
        let mut metadata = MetadataMap::new();
        if let Some(seconds) = refusal.retry_after {
            metadata.insert("retry-after", seconds.into());
        }
        Status::with_metadata(code, refusal.error.message.clone(), metadata)
    }
}

/// The client's deadline: up to eight digits and a unit.
fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    let value = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_in_all_units() {
        let read = |value: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", value.parse().unwrap());
            timeout(&metadata)
        };
        assert_eq!(read("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(read("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(read("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for bad in ["", "S", "1", "-1S", "123456789S", "1X", "+1S"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
