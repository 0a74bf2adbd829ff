//! Clients' HTTP connections: what one may take of us in time and memory before, between and after requests.

mod activity;

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::Watcher,
};
use tokio::net::{TcpListener, TcpStream};
use tracing::debug;
use wire::connections::{Streams, watched};

use crate::{
    http::{Body, respond},
    router::Router,
};
use activity::{Activity, Busy, Watched};

/// The largest head of a request.
const HEADER_BYTES: usize = 16 << 10;
/// How long a connection may say nothing at first, or take for a head that it has begun.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may idle between requests: longer than clients (90 s in Go and reqwest) and load balancers (600 s at
/// Google) keep theirs, since a request that is on its way when we close is lost.
const IDLE_TIMEOUT: Duration = Duration::from_secs(620);
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
const STREAMS_PER_CONNECTION: u32 = 1024;
const READ_BUFFER: usize = 64 << 10;
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Serves HTTP/1.1 and HTTP/2 on `listener` until `shutdown`, then gives running requests `grace` to end.
pub async fn serve(listener: TcpListener, router: Router, shutdown: impl Future<Output = ()>, grace: Duration) {
    let protocols = Arc::new(Protocols::new(router.patience().reader));
    wire::connections::accept(listener, shutdown, grace, move |stream, watcher| {
        connection(stream, watcher, protocols.clone(), router.clone())
    })
    .await;
}

struct Protocols {
    http1: http1::Builder,
    http2: http2::Builder<Streams>,
}

impl Protocols {
    fn new(reader: Duration) -> Self {
        let mut http1 = http1::Builder::new();
        http1
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE_TIMEOUT)
            .max_header_size(HEADER_BYTES)
            .max_buf_size(READ_BUFFER);
        let mut http2 = http2::Builder::new(Streams::new(reader));
        http2
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .max_header_list_size(HEADER_BYTES as u32)
            .max_concurrent_streams(STREAMS_PER_CONNECTION);
        Self { http1, http2 }
    }
}

async fn connection(stream: TcpStream, watcher: Watcher, protocols: Arc<Protocols>, router: Router) {
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let reader = router.patience().reader;
    let ended = match tokio::time::timeout(HEADER_TIMEOUT, speaks_http2(&stream)).await {
        Ok(Ok(true)) => {
            let answer = move |request: Request<Incoming>| {
                let router = router.clone();
                async { Ok::<_, Infallible>(respond(router, request).await.map(watched)) }
            };
            let activity = Activity::of_http2(reader);
            let io = TokioIo::new(Watched::new(stream, activity.clone()));
            let connection = watcher.watch(protocols.http2.serve_connection(io, service_fn(answer)));
            tokio::select! {
                ended = connection => ended,
                () = activity.is_overdue() => return,
            }
        }
        Ok(Ok(false)) => {
            let activity = Activity::of_http1(HEADER_TIMEOUT, reader);
            let io = TokioIo::new(Watched::new(stream, activity.clone()));
            let service = {
                let activity = activity.clone();
                service_fn(move |request| answer_and_tell(router.clone(), request, activity.clone()))
            };
            let connection = watcher.watch(protocols.http1.serve_connection(io, service));
            tokio::select! {
                ended = connection => ended,
                () = activity.is_overdue() => return,
            }
        }
        Ok(Err(_)) | Err(_) => return, // it said nothing
    };
    if let Err(error) = ended {
        debug!(%error, "a client's connection ended");
    }
}

async fn answer_and_tell(
    router: Router,
    request: Request<Incoming>,
    activity: Arc<Activity>,
) -> Result<Response<Told>, Infallible> {
    let busy = activity.begin();
    let response = respond(router, request).await;
    Ok(response.map(|body| Told { body, _busy: busy }))
}

/// A body that keeps its connection busy until its last byte.
struct Told {
    body: Body,
    _busy: Busy,
}

impl http_body::Body for Told {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Whether the first bytes are HTTP/2's; they stay to be read.
async fn speaks_http2(stream: &TcpStream) -> std::io::Result<bool> {
    let mut first = [0; PREFACE.len()];
    loop {
        let seen = stream.peek(&mut first).await?;
        if seen == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if first[..seen] != PREFACE[..seen] {
            return Ok(false);
        }
        if seen == PREFACE.len() {
            return Ok(true);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
