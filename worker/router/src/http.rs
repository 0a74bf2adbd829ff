//! OpenAI's HTTP interface: routes, headers, bodies.

use std::{
    convert::Infallible,
    pin::pin,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use serde_json::json;
use tracing::{Instrument as _, Span, field::Empty, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use wire::{openai::ErrorObject, proto::Endpoint, telemetry};

use crate::{
    admit::BODY_BYTES,
    ask::{Asked, ask, operation, request_id},
    pieces::{Piece, Pieces, whole},
    refusal::Refusal,
    router::Router,
};

const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// What is read of a body that is too large, so that a client that only writes still gets to read why.
const DISCARDED_BYTES: usize = 4 * BODY_BYTES;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(2);
const REQUEST_ID: &str = "x-request-id";
const DONE: &[u8] = b"data: [DONE]\n\n";

/// The body of a response.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What a path asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route<'a> {
    Generate(Endpoint),
    Models,
    Model(&'a str),
}

impl<'a> Route<'a> {
    fn find(path: &'a str) -> Option<Self> {
        match path {
            "/v1/chat/completions" => Some(Self::Generate(Endpoint::ChatCompletions)),
            "/v1/completions" => Some(Self::Generate(Endpoint::Completions)),
            "/v1/models" => Some(Self::Models),
            _ => path.strip_prefix("/v1/models/").filter(|name| !name.is_empty()).map(Self::Model),
        }
    }

    /// The path as spans name it, which have no room for what clients may write.
    fn pattern(self) -> &'static str {
        match self {
            Self::Generate(Endpoint::ChatCompletions) => "/v1/chat/completions",
            Self::Generate(_) => "/v1/completions",
            Self::Models => "/v1/models",
            Self::Model(_) => "/v1/models/{model}",
        }
    }

    /// What is done there, if a model does it.
    fn operation(self) -> Option<&'static str> {
        match self {
            Self::Generate(endpoint) => Some(operation(endpoint)),
            Self::Models | Self::Model(_) => None,
        }
    }

    fn method(self) -> Method {
        if matches!(self, Self::Generate(_)) { Method::POST } else { Method::GET }
    }
}

/// Answers one request. Every error has OpenAI's shape.
pub async fn respond(router: Router, request: Request<Incoming>) -> Response<Body> {
    let arrived = Instant::now();
    let id = request_id(request.headers().get(REQUEST_ID).map(HeaderValue::as_bytes));
    let path = request.uri().path().to_owned();
    let route = Route::find(&path);
    let pattern = route.map_or("", Route::pattern);
    let span = info_span!(
        "request",
        otel.name = format!("{} {pattern}", request.method()).trim_end(), // it counts only from the beginning
        otel.kind = "server",
        otel.status_code = Empty,
        http.request.method = request.method().as_str(),
        http.route = pattern,
        http.response.status_code = Empty,
        gen_ai.operation.name = route.and_then(Route::operation),
        gen_ai.request.model = Empty,
        modelfleet.request.id = id,
    );
    let _ = span.set_parent(telemetry::extract(request.headers())); // fails only if nothing is exported
    let answer = pin!(answer(&router, route, request, &id, arrived));
    let mut response = answer.instrument(span.clone()).await.unwrap_or_else(|refusal| refused(&refusal));
    span.record("http.response.status_code", response.status().as_u16());
    if let Ok(id) = HeaderValue::try_from(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

async fn answer(
    router: &Router,
    route: Option<Route<'_>>,
    request: Request<Incoming>,
    id: &str,
    arrived: Instant,
) -> Result<Response<Body>, Refusal> {
    let count = |refusal: Refusal| {
        router.metrics().rejected(refusal.reason);
        refusal
    };
    match routed(route, request.method()).map_err(count)? {
        Route::Generate(endpoint) => {
            let asked = read(router, endpoint, request, id, arrived).await.map_err(count)?;
            generate(router, asked).await
        }
        Route::Models => models(router).map_err(count),
        Route::Model(name) => model(router, name).map_err(count),
    }
}

fn routed<'a>(route: Option<Route<'a>>, method: &Method) -> Result<Route<'a>, Refusal> {
    let no_route = || Refusal::protocol(StatusCode::NOT_FOUND, "There is nothing at this path", "no_route");
    let route = route.ok_or_else(no_route)?;
    if *method == route.method() {
        return Ok(route);
    }
    Err(Refusal::wrong_method(route.method()))
}

async fn read(
    router: &Router,
    endpoint: Endpoint,
    request: Request<Incoming>,
    id: &str,
    arrived: Instant,
) -> Result<Asked, Refusal> {
    check_headers(request.headers())?;
    let body = read_body(request.into_body()).await?;
    let asked = ask(router, endpoint, body, id, arrived)?;
    Span::current().record("gen_ai.request.model", &asked.call.model);
    Ok(asked)
}

fn check_headers(headers: &HeaderMap) -> Result<(), Refusal> {
    let unsupported = |message: String| Refusal::protocol(StatusCode::UNSUPPORTED_MEDIA_TYPE, message, "content_type");
    if let Some(kind) = headers.get(header::CONTENT_TYPE) {
        let essence = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            return Err(unsupported("The content type must be application/json".to_owned()));
        }
    }
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            Err(unsupported("The body must not be compressed: leave out content-encoding".to_owned()))
        }
        _ => Ok(()),
    }
}

/// The whole body, within its size and time.
async fn read_body(mut body: Incoming) -> Result<Bytes, Refusal> {
    let claimed = body.size_hint().lower();
    let read = async {
        if claimed > BODY_BYTES as u64 {
            return Err(too_large());
        }
        let mut frames: Vec<Bytes> = Vec::new();
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Refusal::invalid(None, "The body ended early"))?;
            if let Ok(data) = frame.into_data() {
                length += data.len();
                if length > BODY_BYTES {
                    return Err(too_large());
                }
                frames.push(data);
            }
        }
        Ok(joined(frames, length))
    };
    let late = || Refusal::protocol(StatusCode::REQUEST_TIMEOUT, "The body took too long to come", "body_timeout");
    let read = tokio::time::timeout(BODY_TIMEOUT, read).await.unwrap_or_else(|_| Err(late()));
    if read.as_ref().is_err_and(|refusal| refusal.status == StatusCode::PAYLOAD_TOO_LARGE) {
        discard(body).await;
    }
    read
}

fn joined(mut frames: Vec<Bytes>, length: usize) -> Bytes {
    if frames.len() == 1 {
        return frames.swap_remove(0);
    }
    let mut whole = Vec::with_capacity(length);
    frames.iter().for_each(|frame| whole.extend_from_slice(frame));
    whole.into()
}

async fn discard(mut body: Incoming) {
    let mut left = DISCARDED_BYTES;
    let read = async {
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(DISCARD_TIMEOUT, read).await;
}

fn too_large() -> Refusal {
    let message = format!("The body is larger than {BODY_BYTES} bytes");
    Refusal::protocol(StatusCode::PAYLOAD_TOO_LARGE, message, "body_too_large")
}

async fn generate(router: &Router, asked: Asked) -> Result<Response<Body>, Refusal> {
    if !asked.stream {
        let body = whole(router, asked).await?;
        return Ok(json_response(StatusCode::OK, body));
    }
    let include_usage = asked.include_usage;
    let mut pieces = Pieces::new(router, asked);
    match pieces.next().await {
        Some(Piece::Failed(refusal)) => Err(refusal), // nothing was sent yet, so it has its own status
        first => Ok(events(first, pieces, include_usage)),
    }
}

/// Server-sent events: `first`, then what comes.
fn events(first: Option<Piece>, pieces: Pieces, include_usage: bool) -> Response<Body> {
    let pieces = Box::new(pieces); // it moves at each step
    let frames = stream::unfold((first, pieces), move |(first, mut pieces)| async move {
        let piece = match first {
            Some(piece) => piece,
            None => pieces.next().await?,
        };
        Some((Ok(Frame::data(event(&piece, include_usage))), (None, pieces)))
    });
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no")); // or nginx holds tokens back
    response
}

/// One piece as the client gets it. A stream that failed has no `[DONE]`.
fn event(piece: &Piece, include_usage: bool) -> Bytes {
    match piece {
        Piece::Waiting => Bytes::from_static(b": waiting\n\n"),
        Piece::Delta(chunk) if include_usage => framed(&with_null_usage(&chunk.json)),
        Piece::Delta(chunk) => framed(&chunk.json),
        Piece::Usage(chunk) if include_usage => [b"data: ", &*chunk.json, b"\n\n", DONE].concat().into(),
        Piece::Usage(_) => Bytes::from_static(DONE),
        Piece::Failed(refusal) => [b"event: error\ndata: ", &*refusal.error.to_json(), b"\n\n"].concat().into(),
    }
}

fn framed(json: &[u8]) -> Bytes {
    [b"data: ", json, b"\n\n"].concat().into()
}

/// With `include_usage` every piece has a `usage`, which is null in all but the last.
fn with_null_usage(json: &[u8]) -> Vec<u8> {
    let has_usage = memchr::memmem::find(json, b"\"usage\":").is_some();
    match json.strip_suffix(b"}") {
        Some(open) if !has_usage => [open, b",\"usage\":null}"].concat(),
        _ => json.to_vec(),
    }
}

fn models(router: &Router) -> Result<Response<Body>, Refusal> {
    if !router.is_synced() {
        return Err(Refusal::not_ready());
    }
    let table = router.table();
    let models = table.names().into_iter().map(|(name, line)| shown(name, line.model().created));
    let list = json!({"object": "list", "data": models.collect::<Vec<_>>()});
    Ok(json_response(StatusCode::OK, list.to_string().into_bytes()))
}

fn model(router: &Router, name: &str) -> Result<Response<Body>, Refusal> {
    if !router.is_synced() {
        return Err(Refusal::not_ready());
    }
    let name = unescaped(name).ok_or_else(|| Refusal::no_model(name))?;
    let line = router.find(&name).ok_or_else(|| Refusal::no_model(&name))?;
    Ok(json_response(StatusCode::OK, shown(&name, line.model().created).to_string().into_bytes()))
}

fn shown(name: &str, created: i64) -> serde_json::Value {
    json!({"id": name, "object": "model", "created": created, "owned_by": "modelfleet"})
}

/// Percent-decodes a part of a path, as clients write the slash of `NAMESPACE/NAME`.
fn unescaped(part: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first == b'%' {
            let digit = |index: usize| after.get(index).and_then(|&digit| char::from(digit).to_digit(16));
            bytes.push((digit(0)? * 16 + digit(1)?) as u8);
            rest = &after[2..];
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

fn json_response(status: StatusCode, body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(body)).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn refused(refusal: &Refusal) -> Response<Body> {
    let error: &ErrorObject = &refusal.error;
    let mut response = json_response(refusal.status, error.to_json());
    let headers = response.headers_mut();
    if let Some(seconds) = refusal.retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if let Some(Ok(allowed)) = refusal.allow.as_ref().map(|method| HeaderValue::from_str(method.as_str())) {
        headers.insert(header::ALLOW, allowed);
    }
    if matches!(refusal.reason, "body_too_large" | "body_timeout") {
        // what is left of the body is not worth reading
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_paths_are_routes() {
        assert_eq!(Route::find("/v1/chat/completions"), Some(Route::Generate(Endpoint::ChatCompletions)));
        assert_eq!(Route::find("/v1/models/ns/m"), Some(Route::Model("ns/m")));
        for path in ["/", "//v1/models", "/v1/models/", "/v1/completions/", "/v1/./models", "/V1/models", "/metrics"] {
            assert_eq!(Route::find(path), None, "{path}");
        }
    }

    #[test]
    fn escapes_in_names_are_read_and_broken_ones_are_no_name() {
        assert_eq!(unescaped("ns%2Fm").as_deref(), Some("ns/m"));
        for broken in ["%", "%2", "%zz", "%ff", "%+1"] {
            assert_eq!(unescaped(broken), None, "{broken}");
        }
    }

    #[test]
    fn usage_is_null_where_it_is_not_known_yet() {
        assert_eq!(with_null_usage(br#"{"id":"x"}"#), br#"{"id":"x","usage":null}"#);
        assert_eq!(with_null_usage(br#"{"id":"x","usage":null}"#), br#"{"id":"x","usage":null}"#);
        let quoted = br#"{"text":"\"usage\": 1"}"#;
        assert_eq!(with_null_usage(quoted), br#"{"text":"\"usage\": 1","usage":null}"#);
    }
}
