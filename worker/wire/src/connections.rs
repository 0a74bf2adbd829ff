//! The one place where connections between our processes are opened and accepted.
//!
//! Both ends ping, bound what the other may send and disable Nagle's algorithm, so a peer that vanished is noticed in
//! under ten seconds, and one that floods or does not read is cut. A port tells by the first bytes whether a peer speaks
//! HTTP/2 or frames ([`framed`]). Mutual TLS belongs here, and nowhere else.

use std::{convert::Infallible, future::Future, io, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use hyper::server::conn::http2;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tonic::{
    Status,
    service::Routes,
    transport::{Channel, Endpoint, server::Connected},
};
use tower::ServiceExt as _;
use tracing::{debug, warn};

pub mod framed;
mod streams;

pub use streams::{Streams, Watched, watched};

/// The largest message that our services send or take, in bytes: set it as the decoding and the encoding limit of
/// each client and server.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// How long calls may go on after [`serve`] was told to end.
pub const GRACE: Duration = Duration::from_secs(5);

/// How long a reader may leave what there is to read.
const READER_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const PING_EVERY: Duration = Duration::from_secs(3);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 32 << 20;
const FRAME_BYTES: u32 = 1 << 20;
/// The largest head of a call.
const HEADER_BYTES: u32 = 16 << 10;
/// What is read of a head that is too large, so that the answer can be gRPC's own instead of HTTP's 431.
const HEADER_BYTES_READ: u32 = 4 * HEADER_BYTES;
const STREAMS_PER_CONNECTION: u32 = 16_384;
const RESETS_PENDING: usize = 64;
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Connections that speak frames; one beyond hangs up, and its peer asks over gRPC.
const FRAMED_CONNECTIONS: usize = 1024;

/// A channel to `HOST:PORT` that connects at its first call, and again whenever the connection was lost.
///
/// An address that cannot be one gives a channel whose calls all fail with `UNAVAILABLE`, like any other address at
/// which nobody answers.
pub fn connect(address: &str) -> Channel {
    match Endpoint::from_shared(format!("http://{address}")) {
        Ok(endpoint) => tuned(endpoint).connect_lazy(),
        Err(error) => {
            warn!(address, %error, "not an address");
            let refuse = tower::service_fn(|_| async {
                Err::<TokioIo<TcpStream>, _>(io::Error::new(io::ErrorKind::InvalidInput, "not an address"))
            });
            Endpoint::from_static("http://invalid").connect_with_connector_lazy(refuse)
        }
    }
}

fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .tcp_keepalive(Some(PING_EVERY))
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES)
        .http2_max_header_list_size(HEADER_BYTES)
}

/// What is served on one port.
pub struct Services {
    routes: Routes,
    frames: Option<Arc<ServeFrames>>,
}

/// Serves a connection that speaks [`frames`](crate::frames) until its peer ends it, or the future is dropped.
pub type ServeFrames = dyn Fn(framed::Connection) -> BoxFuture<'static, ()> + Send + Sync;

impl From<Routes> for Services {
    fn from(routes: Routes) -> Self {
        Self { routes, frames: None }
    }
}

impl Services {
    /// Serves frames too.
    pub fn with_frames(self, frames: Arc<ServeFrames>) -> Self {
        Self { frames: Some(frames), ..self }
    }
}

/// Serves gRPC routes, and frames where there are any, on `listener` until `shutdown`, then gives running calls [`GRACE`]
/// to end.
///
/// Dropping the future closes every connection at once.
///
/// # Errors
/// None after it has begun: an accept that fails, for want of file descriptors or otherwise, is tried again.
pub async fn serve(
    listener: TcpListener,
    services: impl Into<Services>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    serve_until(listener, services, shutdown, GRACE).await
}

/// As [`serve`], with `grace` for running calls to end.
///
/// # Errors
/// As [`serve`].
pub async fn serve_until(
    listener: TcpListener,
    services: impl Into<Services>,
    shutdown: impl Future<Output = ()>,
    grace: Duration,
) -> io::Result<()> {
    let serving = Arc::new(Serving::new(services.into(), READER_TIMEOUT, FRAMED_CONNECTIONS));
    accept(listener, shutdown, grace, move |stream, watcher| serving.clone().connection(stream, watcher)).await;
    Ok(())
}

/// Accepts until `shutdown`, runs `each` connection as a task of its own, then waits at most `grace` for those that
/// their watcher has told to end. What is still open after that, or when the future is dropped, is closed.
pub async fn accept<C>(
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
    grace: Duration,
    mut each: impl FnMut(TcpStream, Watcher) -> C,
) where
    C: Future<Output = ()> + Send + 'static,
{
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(each(stream, graceful.watcher()));
                }
                Err(error) => pause(&error).await,
            },
        }
    }
    drop(listener); // whoever connects from now on is refused, and tries another of us
    let ended = async {
        graceful.shutdown().await;
        while connections.join_next().await.is_some() {}
    };
    if tokio::time::timeout(grace, ended).await.is_err() {
        debug!(open = connections.len(), "closed connections that did not end in time");
    }
}

/// A connection that was gone before we took it is nothing; without file descriptors, at once again would only spin.
async fn pause(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        warn!(%error, "could not accept a connection; trying again");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn server(reader_timeout: Duration) -> http2::Builder<Streams> {
    let mut server = http2::Builder::new(Streams::new(reader_timeout));
    server
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(HEADER_BYTES_READ)
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .max_pending_accept_reset_streams(RESETS_PENDING);
    server
}

/// What the connections of one port share.
struct Serving {
    routes: Routes,
    http2: http2::Builder<Streams>,
    frames: Option<Arc<ServeFrames>>,
    framed: Semaphore,
    most_framed: usize,
    reader_timeout: Duration,
}

impl Serving {
    /// With at most `most_framed` connections that speak frames.
    fn new(services: Services, reader_timeout: Duration, most_framed: usize) -> Self {
        let Services { routes, frames } = services;
        let (routes, http2) = (routes.prepare(), server(reader_timeout));
        Self { routes, http2, frames, framed: Semaphore::new(most_framed), most_framed, reader_timeout }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, watcher: Watcher) {
        if stream.set_nodelay(true).is_err() {
            return;
        }
        match (spoken(&stream).await, &self.frames) {
            (Some(Spoken::Http2), _) => self.http2(stream, watcher).await,
            (Some(Spoken::Frames), Some(serve)) => self.frames(stream, &**serve).await,
            (Some(Spoken::Frames), None) | (None, _) => {}
        }
        // held until here: a server that is told to end waits for whoever it serves
    }

    async fn http2(&self, stream: TcpStream, watcher: Watcher) {
        let (peer, routes) = (stream.connect_info(), self.routes.clone());
        let service = tower::service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
            let routes = routes.clone();
            request.extensions_mut().insert(peer.clone());
            async move {
                if head_bytes(&request) > HEADER_BYTES as usize {
                    let message = format!("the metadata is larger than {HEADER_BYTES} bytes");
                    return Ok::<_, Infallible>(Status::resource_exhausted(message).into_http().map(watched));
                }
                Ok(routes.oneshot(request.map(tonic::body::Body::new)).await?.map(watched))
            }
        });
        let connection = self.http2.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
        if let Err(error) = watcher.watch(connection).await {
            debug!(%error, "connection ended");
        }
    }

    async fn frames(&self, stream: TcpStream, serve: &ServeFrames) {
        let Ok(_place) = self.framed.try_acquire() else {
            return warn!(open = self.most_framed, "hung up on a peer that speaks frames; too many do");
        };
        match framed::accept(stream, self.reader_timeout).await {
            Ok(connection) => serve(connection).await,
            Err(error) => debug!(%error, "a peer that speaks frames is gone"),
        }
    }
}

/// The size of a head as HTTP/2 counts it: 32 bytes a field beside its name and value.
fn head_bytes<T>(request: &http::Request<T>) -> usize {
    let fields = request.headers().iter().map(|(name, value)| 32 + name.as_str().len() + value.len());
    let path = request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    path + fields.sum::<usize>()
}

/// What a peer's first bytes begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spoken {
    Http2,
    Frames,
}

/// What a peer speaks, if its first bytes say so, and come in time: HTTP/2's own pings begin only after them.
async fn spoken(stream: &TcpStream) -> Option<Spoken> {
    const PREFACES: [(&[u8], Spoken); 2] = [(PREFACE, Spoken::Http2), (framed::PREFACE, Spoken::Frames)];
    let seen = async {
        let mut first = [0; PREFACE.len()];
        loop {
            let n = stream.peek(&mut first).await.ok().filter(|&n| n > 0)?;
            let seen = &first[..n];
            let (preface, spoken) = PREFACES.into_iter().find(|(preface, _)| {
                let n = seen.len().min(preface.len());
                seen[..n] == preface[..n]
            })?;
            if seen.len() >= preface.len() {
                return Some(spoken);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PREFACE_TIMEOUT, seen).await.ok().flatten()
}

#[cfg(test)]
mod tests;
