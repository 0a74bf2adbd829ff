//! The peer of the router's benchmark: the least that a proxy for OpenAI requests does, on plain hyper.
//!
//! `ref_hyper LISTEN UPSTREAM..` collects the body, peeks at `model` and `stream` where they lie, picks one of two
//! upstreams by outstanding requests, and sends the bytes on, untouched, over a pooled HTTP/1.1 connection. One thread.
//! It has no limits, no queue, no retry and no telemetry: it is a mark to measure against, not a router.

use std::{
    borrow::Cow,
    hint::black_box,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
};

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, Response, Uri, header, uri::Authority};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use serde::Deserialize;
use tokio::net::TcpListener;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let listen = arguments.next().context("usage: ref_hyper LISTEN UPSTREAM..")?;
    let upstreams = arguments.map(|address| Upstream::new(&address)).collect::<anyhow::Result<Vec<_>>>()?;
    anyhow::ensure!(!upstreams.is_empty(), "usage: ref_hyper LISTEN UPSTREAM..");
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(256).build(connector);
    let proxy = Arc::new(Proxy { upstreams, client });
    let listener = TcpListener::bind(&listen).await.with_context(|| format!("listening on {listen}"))?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let proxy = proxy.clone();
        let service = service_fn(move |request| forward(request, proxy.clone()));
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

struct Proxy {
    upstreams: Vec<Arc<Upstream>>,
    client: Client<HttpConnector, Full<Bytes>>,
}

struct Upstream {
    authority: Authority,
    outstanding: AtomicU32,
}

impl Upstream {
    fn new(address: &str) -> anyhow::Result<Arc<Self>> {
        let authority = address.parse().with_context(|| format!("reading the upstream {address}"))?;
        Ok(Arc::new(Self { authority, outstanding: AtomicU32::new(0) }))
    }
}

/// What routing needs of a body.
#[derive(Deserialize)]
struct Peek<'a> {
    #[serde(borrow)]
    model: Cow<'a, str>,
    #[serde(default)]
    stream: bool,
}

async fn forward(request: Request<Incoming>, proxy: Arc<Proxy>) -> anyhow::Result<Response<Guarded>> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let Peek { model, stream } = serde_json::from_slice(&body)?;
    black_box((model, stream)); // one model, so it decides nothing
    let guard = proxy.pick(fastrand::usize(..));
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let uri = Uri::builder().scheme("http").authority(guard.0.authority.clone()).path_and_query(path).build()?;
    let request = Request::builder().method(parts.method).uri(uri).header(header::CONTENT_TYPE, "application/json");
    let response = proxy.client.request(request.body(Full::new(body))?).await?;
    Ok(response.map(|body| Guarded { body, _guard: guard }))
}

impl Proxy {
    /// Power of two choices.
    fn pick(&self, draw: usize) -> Guard {
        let count = self.upstreams.len();
        let (first, second) = (&self.upstreams[draw % count], &self.upstreams[(draw / count) % count]);
        let outstanding = |upstream: &Upstream| upstream.outstanding.load(Ordering::Relaxed);
        let less = if outstanding(second) < outstanding(first) { second } else { first };
        less.outstanding.fetch_add(1, Ordering::Relaxed);
        Guard(less.clone())
    }
}

/// One outstanding request.
struct Guard(Arc<Upstream>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.outstanding.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A response's body; the request is outstanding until its end.
struct Guarded {
    body: Incoming,
    _guard: Guard,
}

impl Body for Guarded {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
