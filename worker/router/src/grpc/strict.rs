//! Statuses that the transport gives for messages that it cannot read, in the words of our interface: a message that is
//! too large exhausts a resource, and one that is cut or garbled is the caller's fault, not an internal error.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use tonic::{Code, Status, body::Body, server::NamedService};
use tower::Service;

/// A gRPC service whose decoding errors are put right.
#[derive(Clone)]
pub(super) struct Strict<S>(pub(super) S);

impl<S: NamedService> NamedService for Strict<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Strict<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.0.call(request);
        Box::pin(async { Ok(put_right(answer.await?)) })
    }
}

fn put_right(response: Response<Body>) -> Response<Body> {
    let Some(status) = Status::from_header_map(response.headers()) else {
        return response;
    };
    match right(&status) {
        Some(status) => status.into_http(),
        None => response,
    }
}

fn right(status: &Status) -> Option<Status> {
    let of_decoding = ["failed to decode", "Unexpected EOF", "protocol error", "Missing request message"];
    match status.code() {
        Code::OutOfRange => Some(Status::resource_exhausted("The message is too large")),
        Code::Internal if of_decoding.iter().any(|words| status.message().starts_with(words)) => {
            Some(Status::invalid_argument("The message cannot be read"))
        }
        _ => None,
    }
}
