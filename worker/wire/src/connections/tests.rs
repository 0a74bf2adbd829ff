//! Over loopback.

use std::{pin::Pin, time::Instant};

use futures::{Stream, StreamExt as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::oneshot,
};
use tonic::{Code, Request, Response, Status, Streaming};

use super::*;
use crate::proto::{
    Instruction, ModelRemoved, Report, RunCall,
    fleet_client::FleetClient,
    fleet_server::{Fleet, FleetServer},
    instruction,
};

/// Answers each report with an instruction, and tells whether the peer's address was known.
struct Echo;

#[tonic::async_trait]
impl Fleet for Echo {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Instruction, Status>> + Send>>;

    async fn watch(&self, request: Request<Streaming<Report>>) -> Result<Response<Self::WatchStream>, Status> {
        let peer = request.remote_addr().ok_or_else(|| Status::internal("no peer address"))?;
        assert!(peer.ip().is_loopback());
        let answers = request.into_inner().map(|report| report.map(|_| Instruction::default()));
        Ok(Response::new(Box::pin(answers)))
    }
}

async fn served() -> (String, oneshot::Sender<()>, tokio::task::JoinHandle<io::Result<()>>) {
    served_with(Routes::new(FleetServer::new(Echo)).into()).await
}

async fn served_with(services: Services) -> (String, oneshot::Sender<()>, tokio::task::JoinHandle<io::Result<()>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (end, ended) = oneshot::channel::<()>();
    let grace = Duration::from_secs(20);
    let server = tokio::spawn(serve_until(listener, services, async { drop(ended.await) }, grace));
    (address, end, server)
}

#[tokio::test]
async fn a_call_arrives_with_its_peers_address_and_ends_before_the_server_does() {
    let (address, end, server) = served().await;
    let (reports, receiver) = tokio::sync::mpsc::channel(1);
    let receiver = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut answers = FleetClient::new(connect(&address)).watch(receiver).await.unwrap().into_inner();
    end.send(()).unwrap();
    // told to end, the server still finishes what runs
    reports.send(Report::default()).await.unwrap();
    assert_eq!(answers.message().await.unwrap(), Some(Instruction::default()));
    drop(reports);
    assert_eq!(answers.message().await.unwrap(), None);
    server.await.unwrap().unwrap();
}

#[tokio::test]
async fn metadata_that_is_too_large_is_refused_in_grpcs_words() {
    let (address, _end, _server) = served().await;
    for length in [HEADER_BYTES, 2 * HEADER_BYTES, HEADER_BYTES_READ - 1024] {
        let mut request = Request::new(tokio_stream::once(Report::default()));
        request.metadata_mut().insert("x-long", "y".repeat(length as usize).parse().unwrap());
        let status = FleetClient::new(connect(&address)).watch(request).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    }
}

#[tokio::test]
async fn nobody_there_and_no_address_are_both_unavailable() {
    for address in ["127.0.0.1:1", "no address", ""] {
        let answer = FleetClient::new(connect(address)).watch(tokio_stream::empty()).await;
        assert_eq!(answer.unwrap_err().code(), Code::Unavailable, "{address:?}");
    }
}

#[tokio::test]
async fn who_does_not_speak_http2_is_cut() {
    let (address, _end, _server) = served().await;
    let mut stream = TcpStream::connect(&address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest)).await;
    assert!(matches!(read, Ok(Ok(0) | Err(_))), "{rest:?}");
}

#[tokio::test]
async fn who_never_finishes_the_preface_is_cut() {
    let (address, _end, _server) = served_with(framed_echo()).await;
    for begun_with in [&PREFACE[..10], &framed::PREFACE[..10]] {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(begun_with).await.unwrap();
        let begun = Instant::now();
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut rest)).await;
        assert!(matches!(read, Ok(Ok(0) | Err(_))), "{rest:?}");
        assert!(begun.elapsed() >= PREFACE_TIMEOUT / 2, "only the deadline may end it");
    }
}

/// Routes, and frames that are echoed.
fn framed_echo() -> Services {
    let serve = |mut connection: framed::Connection| -> BoxFuture<'static, ()> {
        let outgoing = connection.outgoing(4);
        Box::pin(async move {
            let mut calls = std::pin::pin!(connection.messages::<RunCall>().unwrap().0);
            while let Some(Ok(call)) = calls.next().await {
                outgoing.reserve().await.unwrap().send(call);
            }
        })
    };
    Services::from(Routes::new(FleetServer::new(Echo))).with_frames(Arc::new(serve))
}

#[tokio::test]
async fn one_port_speaks_frames_and_http2_and_cuts_who_speaks_neither() {
    let (address, _end, _server) = served_with(framed_echo()).await;
    let mut connection = framed::connect(&address).await.unwrap().expect("it speaks frames");
    let outgoing = connection.outgoing(4);
    let mut answers = std::pin::pin!(connection.messages::<RunCall>().unwrap().0);
    let call = RunCall { sequence: 7, rows: vec![1; 100_000].into(), ..RunCall::default() };
    assert!(outgoing.reserve().await.unwrap().send(call.clone()));
    assert_eq!(answers.next().await.unwrap().unwrap(), call);
    let answer = FleetClient::new(connect(&address)).watch(tokio_stream::once(Report::default())).await;
    assert_eq!(answer.unwrap().into_inner().message().await.unwrap(), Some(Instruction::default()));
    let both = [&framed::PREFACE[..10], PREFACE].concat();
    for other in [&b"modelfleet-frames 2\n"[..], b"GET / HTTP/1.1\r\n\r\n", b"\0", &both] {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(other).await.unwrap();
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest)).await;
        assert!(matches!(read, Ok(Ok(0) | Err(_))), "{rest:?}");
    }
}

#[tokio::test]
async fn who_speaks_http2_alone_is_told_from_nobody() {
    let (address, _end, _server) = served().await;
    assert!(framed::connect(&address).await.unwrap().is_none());
    for address in ["127.0.0.1:1", "no address", ""] {
        assert!(framed::connect(address).await.is_err(), "{address:?}");
    }
}

#[tokio::test]
async fn a_framed_connection_ends_with_its_peer_or_with_the_server() {
    let (address, end, server) = served_with(framed_echo()).await;
    let open = || async { framed::connect(&address).await.unwrap().unwrap() };
    let (mut first, second) = (open().await, open().await);
    let outgoing = first.outgoing(1);
    let mut answers = std::pin::pin!(first.messages::<RunCall>().unwrap().0);
    end.send(()).unwrap();
    // told to end, the server still serves who is connected
    assert!(outgoing.reserve().await.unwrap().send(RunCall::default()));
    assert_eq!(answers.next().await.unwrap().unwrap(), RunCall::default());
    assert!(!server.is_finished());
    drop(second);
    server.abort();
    assert!(answers.next().await.is_none_or(|answer| answer.is_err()), "its end is noticed");
}

#[tokio::test]
async fn one_framed_connection_too_many_is_hung_up_on_and_can_ask_over_grpc() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = Arc::new(Serving::new(framed_echo(), READER_TIMEOUT, 2));
    let serve = move |stream, watcher| serving.clone().connection(stream, watcher);
    tokio::spawn(accept(listener, std::future::pending(), Duration::ZERO, serve));
    let open = || async { framed::connect(&address).await.unwrap() };
    let (first, second) = (open().await, open().await);
    assert!(first.is_some() && second.is_some());
    assert!(open().await.is_none(), "one too many");
    let answer = FleetClient::new(connect(&address)).watch(tokio_stream::once(Report::default())).await;
    assert_eq!(answer.unwrap().into_inner().message().await.unwrap(), Some(Instruction::default()));
    drop(first);
    let place = async {
        while open().await.is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), place).await.expect("there is a place again");
}

#[tokio::test]
async fn dropping_the_server_closes_its_connections() {
    let (address, _end, server) = served().await;
    let (_reports, receiver) = tokio::sync::mpsc::channel(1);
    let receiver = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut answers = FleetClient::new(connect(&address)).watch(receiver).await.unwrap().into_inner();
    server.abort();
    answers.message().await.unwrap_err();
}

/// Of which few fill a window.
fn large() -> Instruction {
    let removed = ModelRemoved { model: "m".repeat(1 << 20) };
    Instruction { instruction: Some(instruction::Instruction::Removed(removed)) }
}

/// Answers with more than any window holds, and tells when nobody wants the rest.
struct Flood(Arc<tokio::sync::Notify>);

#[tonic::async_trait]
impl Fleet for Flood {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Instruction, Status>> + Send>>;

    async fn watch(&self, _: Request<Streaming<Report>>) -> Result<Response<Self::WatchStream>, Status> {
        struct Told(Arc<tokio::sync::Notify>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.notify_one();
            }
        }
        let told = Told(self.0.clone());
        let flood = futures::stream::repeat_with(move || {
            let _ = &told;
            Ok(large())
        });
        Ok(Response::new(Box::pin(flood)))
    }
}

#[tokio::test]
async fn who_grants_no_window_is_cut_and_other_streams_of_the_connection_are_not() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let unwanted = Arc::new(tokio::sync::Notify::new());
    let routes = Routes::new(FleetServer::new(Flood(unwanted.clone())));
    let serving = Arc::new(Serving::new(routes.into(), Duration::from_secs(1), 0));
    let serve = move |stream, watcher| serving.clone().connection(stream, watcher);
    tokio::spawn(accept(listener, std::future::pending(), Duration::ZERO, serve));
    let mut client = FleetClient::new(connect(&address));
    let unread = client.watch(tokio_stream::empty()).await.unwrap();
    let mut read = client.watch(tokio_stream::empty()).await.unwrap().into_inner();
    let reads = async {
        loop {
            assert_eq!(read.message().await.unwrap(), Some(large()));
            tokio::task::yield_now().await;
        }
    };
    let cut = tokio::time::timeout(Duration::from_secs(20), unwanted.notified());
    tokio::select! {
        cut = cut => cut.expect("it is cut"),
        () = reads => {}
    }
    assert!(read.message().await.unwrap().is_some(), "the other one goes on");
    drop(unread);
}
