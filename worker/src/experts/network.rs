//! How a stream of calls to a holder is opened: over gRPC, or in a simulation without sockets.

use std::sync::Arc;

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::BoxStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::debug;
use wire::proto::{RunCall, RunReply, experts_client::ExpertsClient};

/// Calls on their way to a holder; a step sends one a layer, so more means that the holder does not read.
pub(super) const CALLS: usize = 256;

/// Where calls go in, and replies come out until the stream ends.
pub(super) type Open = (mpsc::Sender<RunCall>, BoxStream<'static, RunReply>);

/// Opens streams.
pub(super) trait Network: Send + Sync {
    /// Opens one to `HOST:PORT`; `None` if nobody answers there.
    fn open(&self, to: &str) -> BoxFuture<'static, Option<Open>>;
}

/// The one to use outside tests.
pub(super) fn grpc() -> Arc<dyn Network> {
    Arc::new(Grpc)
}

struct Grpc;

impl Network for Grpc {
    fn open(&self, to: &str) -> BoxFuture<'static, Option<Open>> {
        let to = to.to_owned();
        let mut client = ExpertsClient::new(wire::connect(&to))
            .max_decoding_message_size(wire::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(wire::MAX_MESSAGE_BYTES);
        async move {
            let (calls, outgoing) = mpsc::channel(CALLS);
            match client.run(ReceiverStream::new(outgoing)).await {
                Ok(replies) => {
                    let replies = tokio_stream::StreamExt::map_while(replies.into_inner(), Result::ok);
                    Some((calls, replies.boxed()))
                }
                Err(status) => {
                    debug!(peer = to, code = ?status.code(), "no stream to a holder");
                    None
                }
            }
        }
        .boxed()
    }
}
