//! How a stream of calls to a holder is opened: of frames, over gRPC, or in a simulation without sockets.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::BoxStream};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tracing::debug;
use wire::{
    connections::framed::{self, Reader},
    frames::Outgoing,
    proto::{RunCall, RunReply, experts_client::ExpertsClient},
};

use super::lock;

/// Calls on their way to a holder; a step sends one a layer, so more means that the holder does not read.
pub(super) const CALLS: usize = 256;
/// How long a peer that does not speak frames is asked over gRPC at once.
const GRPC_FOR: Duration = Duration::from_secs(60);

/// Where calls go in, and replies come out until the stream ends.
pub(super) type Open = (Calls, BoxStream<'static, RunReply>);

/// Where calls go in.
#[derive(Clone)]
pub(super) enum Calls {
    /// To a task that sends them.
    Queue(mpsc::Sender<RunCall>),
    /// Into the socket, by whoever has a call. The replies can be read by who waits for them.
    Socket(Arc<Outgoing>, Reader),
}

impl Calls {
    /// Sends a call without waiting; whether it is on its way.
    pub(super) fn send(&self, call: RunCall) -> bool {
        match self {
            Self::Queue(calls) => calls.try_send(call).is_ok(),
            Self::Socket(outgoing, _) => outgoing.try_reserve().is_some_and(|place| place.send(call)),
        }
    }
}

/// Opens streams.
pub(super) trait Network: Send + Sync {
    /// Opens one to `HOST:PORT`; `None` if nobody answers there.
    fn open(&self, to: &str) -> BoxFuture<'static, Option<Open>>;
}

/// The one to use outside tests.
pub(super) fn sockets() -> Arc<dyn Network> {
    Arc::new(Sockets::default())
}

/// Frames with those that speak them, gRPC with the others.
#[derive(Default)]
struct Sockets {
    /// Who does not speak frames, and until when that is taken for granted.
    grpc: Arc<Mutex<HashMap<String, Instant>>>,
}

impl Network for Sockets {
    fn open(&self, to: &str) -> BoxFuture<'static, Option<Open>> {
        let (to, known) = (to.to_owned(), self.grpc.clone());
        async move {
            if lock(&known).get(&to).is_none_or(|&until| until <= Instant::now()) {
                match framed::connect(&to).await {
                    Ok(Some(connection)) => {
                        return frames(connection).inspect_err(|error| debug!(peer = to, %error, "no stream")).ok();
                    }
                    Ok(None) => debug!(peer = to, "a holder does not speak frames"),
                    Err(error) => {
                        debug!(peer = to, %error, "no stream to a holder");
                        return None;
                    }
                }
            }
            let open = grpc(&to).await?;
            let now = Instant::now();
            let mut known = lock(&known);
            known.retain(|_, &mut until| now < until);
            known.entry(to).or_insert(now + GRPC_FOR);
            Some(open)
        }
        .boxed()
    }
}

fn frames(mut connection: framed::Connection) -> io::Result<Open> {
    let outgoing = connection.outgoing(CALLS);
    let (replies, reader) = connection.messages()?;
    let replies = tokio_stream::StreamExt::map_while(replies, |reply| {
        reply.inspect_err(|error| debug!(error = error as &dyn std::error::Error, "a stream to a holder ended")).ok()
    });
    let writer = outgoing.clone();
    Ok((Calls::Socket(outgoing, reader), replies.take_until(async move { writer.flush().await }).boxed()))
}

/// A stream over gRPC.
pub(super) async fn grpc(to: &str) -> Option<Open> {
    let mut client = ExpertsClient::new(wire::connect(to))
        .max_decoding_message_size(wire::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(wire::MAX_MESSAGE_BYTES);
    let (calls, outgoing) = mpsc::channel(CALLS);
    match client.run(ReceiverStream::new(outgoing)).await {
        Ok(replies) => {
            let replies = tokio_stream::StreamExt::map_while(replies.into_inner(), Result::ok);
            Some((Calls::Queue(calls), replies.boxed()))
        }
        Err(status) => {
            debug!(peer = to, code = ?status.code(), "no stream to a holder");
            None
        }
    }
}
