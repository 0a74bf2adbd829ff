//! W3C trace context, in and out of HTTP headers and gRPC metadata.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator as _},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::MetadataMap;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Headers: those of HTTP, or gRPC's metadata.
pub trait Carrier {
    /// The headers.
    fn headers(&self) -> &HeaderMap;
}

impl Carrier for HeaderMap {
    fn headers(&self) -> &HeaderMap {
        self
    }
}

impl Carrier for MetadataMap {
    fn headers(&self) -> &HeaderMap {
        self.as_ref()
    }
}

/// The caller's trace context, for `span.set_parent(..)` before the span is entered. Empty if there is none.
pub fn extract(carrier: &impl Carrier) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Reader(carrier.headers()))
}

/// Adds the current span's trace context to a call.
pub fn inject(metadata: &mut MetadataMap) {
    let context = Span::current().context();
    TraceContextPropagator::new().inject_context(&context, &mut Writer(metadata.as_mut()));
}

struct Reader<'a>(&'a HeaderMap);

impl Extractor for Reader<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct Writer<'a>(&'a mut HeaderMap);

impl Injector for Writer<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_call_carries_on_the_trace_of_the_request_it_serves() {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", HeaderValue::from_static(PARENT));
            let span = tracing::info_span!("request");
            span.set_parent(extract(&headers)).unwrap();
            let mut metadata = MetadataMap::new();
            span.in_scope(|| inject(&mut metadata));
            let sent = extract(&metadata).span().span_context().clone();
            assert_eq!(sent.trace_id().to_string(), &PARENT[3..35]);
            assert_ne!(sent.span_id().to_string(), &PARENT[36..52], "the span itself is the parent");
        });
    }

    #[test]
    fn a_broken_traceparent_starts_a_new_trace() {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", HeaderValue::from_static("00-zz-1-01"));
        assert!(!extract(&headers).span().span_context().is_valid());
    }
}
