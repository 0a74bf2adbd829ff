//! A body becomes a request that is let in: the same for HTTP and gRPC.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use wire::{genai, proto::Endpoint};

use crate::{admit, dispatch::Call, metrics::Measured, refusal::Refusal, router::Router};

/// A request that is let in.
#[derive(Debug)]
pub struct Asked {
    /// For the worker.
    pub call: Call,
    /// Whether the answer is streamed.
    pub stream: bool,
    /// Whether the stream shows usage.
    pub include_usage: bool,
    /// Records how it ends.
    pub measured: Measured,
}

/// Checks `body` and finds its model.
///
/// # Errors
/// The body is at fault, no model has that name, or the router does not know the models yet.
pub fn ask(
    router: &Router,
    endpoint: Endpoint,
    body: Bytes,
    request_id: &str,
    arrived: Instant,
) -> Result<Asked, Refusal> {
    if !router.is_synced() {
        return Err(Refusal::not_ready());
    }
    let scan = admit::scan(&body)?;
    let line = router.find(&scan.model).ok_or_else(|| Refusal::no_model(&scan.model))?;
    let known = line.model();
    let own_name = known.name.clone();
    let measured = router.metrics().begin(operation(endpoint), known, arrived);
    let (model, stream, include_usage, choices) =
        (scan.model.into_owned(), scan.stream, scan.include_usage, scan.choices);
    let prefix = if endpoint == Endpoint::ChatCompletions { "chatcmpl" } else { "cmpl" };
    let call = Call {
        endpoint,
        body,
        model,
        own_name,
        id: format!("{prefix}-{request_id}"),
        created: unix_seconds(),
        choices,
        arrived,
        deadline: None,
    };
    Ok(Asked { call, stream, include_usage, measured })
}

/// The GenAI conventions' name of what an endpoint does.
pub fn operation(endpoint: Endpoint) -> &'static str {
    if endpoint == Endpoint::ChatCompletions { genai::CHAT } else { genai::TEXT_COMPLETION }
}

/// A name for a request: the client's, if it may stand in headers and logs as it is, else a new one.
pub fn request_id(given: Option<&[u8]>) -> String {
    let fits = |id: &&[u8]| {
        (1..=128).contains(&id.len()) && id.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(b))
    };
    match given.filter(fits).map(std::str::from_utf8) {
        Some(Ok(id)) => id.to_owned(),
        _ => format!("{:032x}", fastrand::u128(..)),
    }
}

fn unix_seconds() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_honoured_if_it_is_harmless() {
        assert_eq!(request_id(Some(b"run-7.a:b_c")), "run-7.a:b_c");
        let long = "x".repeat(129);
        for bad in ["", "a b", "a\"b", "ü", long.as_str()] {
            let made = request_id(Some(bad.as_bytes()));
            assert_ne!(made, bad);
            assert_eq!(made.len(), 32);
        }
        assert_ne!(request_id(None), request_id(None));
    }
}
