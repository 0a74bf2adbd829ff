//! A chat that is answered at once: one piece, or 100 if `stream` is true, each sent on its own.
//!
//! Two plain HTTP servers for the peers, and two workers with an operator that tells of them for our router. Both kinds
//! send the same JSON.

use std::{convert::Infallible, pin::Pin, time::Duration};

use anyhow::Context as _;
use futures::{Stream, StreamExt as _, stream};
use http_body_util::{BodyExt as _, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response,
    body::{Bytes, Frame, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use operator::control::{Availability, Fleet, Identity, ModelFacts, ReplicaFacts, WorkerFacts};
use tokio::{net::TcpListener, task::yield_now};
use tonic::{Status, service::Routes};
use wire::proto::{
    Chunk, GenerateCall, GenerateReply, Head,
    chunk::Kind,
    generate_reply::Reply,
    worker_server::{Worker, WorkerServer},
};

/// Pieces of a streamed answer.
const PIECES: usize = 100;
/// The `MODELFLEET_ID` of the router.
const ROUTER: &str = "router";

const PIECE: &str = r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"bench","choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}"#;
const LAST: &str = r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"bench","choices":[{"index":0,"delta":{"content":" word"},"finish_reason":"stop"}]}"#;
const USAGE: &str = r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"bench","choices":[],"usage":{"prompt_tokens":40,"completion_tokens":100,"total_tokens":140}}"#;
const WHOLE: &str = r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1700000000,"model":"bench","choices":[{"index":0,"message":{"role":"assistant","content":" word"},"finish_reason":"stop"}],"usage":{"prompt_tokens":40,"completion_tokens":1,"total_tokens":41}}"#;

/// Serves plain HTTP at `port` and the next one, workers at the two after them, and their operator at the fifth.
pub(crate) async fn serve(port: u16) -> anyhow::Result<()> {
    for port in [port, port + 1] {
        tokio::spawn(serve_http(bind(port).await?));
    }
    let workers = [port + 2, port + 3];
    for port in workers {
        let routes = Routes::new(WorkerServer::new(Answering));
        tokio::spawn(wire::serve(bind(port).await?, routes, std::future::pending()));
    }
    let fleet = Fleet::new();
    fleet.lead(1);
    fleet.expect([Identity { id: ROUTER.to_owned(), ip: None }]);
    fleet.publish("bench/bench", facts(workers));
    fleet.synced(["bench/bench".to_owned()]);
    fleet.serve(bind(port + 4).await?, std::future::pending()).await?;
    Ok(())
}

async fn bind(port: u16) -> anyhow::Result<TcpListener> {
    TcpListener::bind(("127.0.0.1", port)).await.with_context(|| format!("listening on port {port}"))
}

fn facts(workers: [u16; 2]) -> ModelFacts {
    let worker = |(ordinal, port): (u32, u16)| WorkerFacts {
        id: format!("worker-{ordinal}"),
        address: format!("127.0.0.1:{port}"),
        dns_name: String::new(),
        ordinal,
        ready: true,
        leaves: false,
    };
    ModelFacts {
        served_names: vec!["bench".to_owned()],
        created: 1_700_000_000,
        availability: Availability::Serving,
        max_pending: 1000,
        max_wait: Duration::from_secs(60),
        max_context_tokens: 0,
        migration_attempts: 0,
        expert_wait: None,
        replicas: vec![ReplicaFacts {
            replica: 0,
            revision: "1".to_owned(),
            content_hash: "hash".to_owned(),
            placement: planner::Placement { shards: 2, layers: Vec::new() },
            also_hold: None,
            draining: false,
            workers: (0..).zip(workers).map(worker).collect(),
        }],
    }
}

fn is_streamed(body: &[u8]) -> bool {
    let wanted = br#""stream":true"#;
    body.windows(wanted.len()).any(|window| window == wanted)
}

/// The pieces of an answer. The writer gets its turn after each, as after a token.
fn pieces(streamed: bool) -> impl Stream<Item = &'static str> + Send {
    let count = if streamed { PIECES } else { 1 };
    stream::iter(1..=count).then(move |number| async move {
        if number > 1 {
            yield_now().await;
        }
        if number == count { LAST } else { PIECE }
    })
}

async fn serve_http(listener: TcpListener) -> std::io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer));
        tokio::spawn(connection);
    }
}

async fn answer(request: Request<Incoming>) -> anyhow::Result<Response<BoxBody<Bytes, Infallible>>> {
    let body = request.into_body().collect().await?.to_bytes();
    let response = Response::builder();
    Ok(if is_streamed(&body) {
        let events = pieces(true).map(|piece| format!("data: {piece}\n\n"));
        let events = events.chain(stream::iter([format!("data: {USAGE}\n\n"), "data: [DONE]\n\n".to_owned()]));
        let frames = StreamBody::new(events.map(|event| Ok(Frame::data(Bytes::from(event)))));
        response.header(header::CONTENT_TYPE, "text/event-stream").body(BoxBody::new(frames))?
    } else {
        let whole = http_body_util::Full::new(Bytes::from_static(WHOLE.as_bytes()));
        response.header(header::CONTENT_TYPE, "application/json").body(whole.boxed())?
    })
}

struct Answering;

#[tonic::async_trait]
impl Worker for Answering {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateReply, Status>> + Send>>;

    async fn generate(
        &self,
        request: tonic::Request<GenerateCall>,
    ) -> Result<tonic::Response<Self::GenerateStream>, Status> {
        let streamed = is_streamed(&request.into_inner().body);
        let head = Head { status: 200, content_type: "application/json".to_owned(), body: Bytes::new() };
        let head = stream::iter([Reply::Head(head)]);
        let deltas = pieces(streamed).map(|piece| Reply::Chunk(chunk(Kind::Delta, piece)));
        let usage = stream::iter([Reply::Chunk(chunk(Kind::Usage, USAGE))]);
        let replies = head.chain(deltas).chain(usage);
        Ok(tonic::Response::new(Box::pin(replies.map(|reply| Ok(GenerateReply { reply: Some(reply) })))))
    }
}

fn chunk(kind: Kind, json: &'static str) -> Chunk {
    Chunk {
        kind: kind.into(),
        json: Bytes::from_static(json.as_bytes()),
        choice: 0,
        token_ids: vec![7],
        ends_choice: false,
    }
}
