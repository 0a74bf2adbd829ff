//! Over loopback, against operators that a test scripts.

use std::pin::Pin;

use futures::StreamExt as _;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tonic::{Request, Response, Status, Streaming, service::Routes};

use super::*;
use crate::proto::{
    Acknowledgement, ModelSnapshot, Synced, Version, WorkerLoad, WorkerState,
    fleet_server::{Fleet, FleetServer},
    instruction, report,
};

const DEADLINE: Duration = Duration::from_secs(20);

type Inbound = Streaming<Report>;
type Outbound = mpsc::Sender<Result<Instruction, Status>>;

/// Hands each stream to the test, which answers as it likes.
struct Operator(mpsc::Sender<(Inbound, Outbound)>);

#[tonic::async_trait]
impl Fleet for Operator {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Instruction, Status>> + Send>>;

    async fn watch(&self, request: Request<Inbound>) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let _ = self.0.send((request.into_inner(), sender)).await;
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// An operator, the streams that come to it, and its end.
async fn operator() -> (String, mpsc::Receiver<(Inbound, Outbound)>, oneshot::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, streams) = mpsc::channel(4);
    let (end, ended) = oneshot::channel();
    let routes = Routes::new(FleetServer::new(Operator(sender)));
    tokio::spawn(crate::serve_until(listener, routes, async { drop(ended.await) }, Duration::ZERO));
    (address, streams, end)
}

fn hello() -> Hello {
    Hello { id: "me".into(), ..Default::default() }
}

fn report(report: report::Report) -> Report {
    Report { report: Some(report) }
}

fn model(name: &str, epoch: u64, sequence: u64) -> Instruction {
    let version = Some(Version { epoch, sequence });
    let snapshot = ModelSnapshot { model: name.into(), version, ..Default::default() };
    Instruction { instruction: Some(instruction::Instruction::Model(snapshot)) }
}

fn synced() -> Instruction {
    Instruction { instruction: Some(instruction::Instruction::Synced(Synced {})) }
}

async fn soon<T>(future: impl Future<Output = Option<T>>) -> T {
    timeout(DEADLINE, future).await.expect("nothing came in time").expect("it ended")
}

async fn heard(stream: &mut Inbound) -> report::Report {
    soon(async { stream.message().await.unwrap() }).await.report.unwrap()
}

#[tokio::test]
async fn a_new_stream_begins_with_hello_and_the_latest_of_each_state() {
    let (address, mut streams, _end) = operator().await;
    let (reports, receiver) = mpsc::channel(8);
    let mut instructions = watch(vec![address], hello, receiver);
    let (mut first, sender) = soon(streams.recv()).await;
    assert!(matches!(heard(&mut first).await, report::Report::Hello(hello) if hello.id == "me" && hello.epoch == 0));

    sender.send(Ok(model("a/m", 7, 1))).await.unwrap();
    assert_eq!(soon(instructions.next()).await, model("a/m", 7, 1));
    for phase in [1, 2] {
        let state = report::Report::WorkerState(WorkerState { phase, placement: None });
        reports.send(report(state)).await.unwrap();
    }
    reports.send(report(report::Report::WorkerLoad(WorkerLoad::default()))).await.unwrap();
    let acknowledgement = Acknowledgement { model: "a/m".into(), version: Some(Version { epoch: 7, sequence: 1 }) };
    reports.send(report(report::Report::Acknowledgement(acknowledgement.clone()))).await.unwrap();
    while !matches!(heard(&mut first).await, report::Report::Acknowledgement(_)) {}

    drop((first, sender)); // the operator restarts
    let (mut second, _sender) = soon(streams.recv()).await;
    assert!(matches!(heard(&mut second).await, report::Report::Hello(hello) if hello.epoch == 7));
    assert!(matches!(heard(&mut second).await, report::Report::WorkerState(state) if state.phase == 2));
    assert_eq!(heard(&mut second).await, report::Report::Acknowledgement(acknowledgement));
}

#[tokio::test]
async fn only_the_newest_leader_of_several_operators_is_heard() {
    let (old_address, mut old_streams, _a) = operator().await;
    let (new_address, mut new_streams, _b) = operator().await;
    let (_reports, receiver) = mpsc::channel(8);
    let mut instructions = watch(vec![old_address, new_address], hello, receiver);
    let (_keep_old, old) = soon(old_streams.recv()).await;
    let (_keep_new, new) = soon(new_streams.recv()).await;

    old.send(Ok(model("a/gone", 1, 1))).await.unwrap();
    assert_eq!(soon(instructions.next()).await, model("a/gone", 1, 1));
    new.send(Ok(model("a/m", 2, 1))).await.unwrap();
    assert_eq!(soon(instructions.next()).await, model("a/m", 2, 1));
    old.send(Ok(model("a/m", 1, 9))).await.unwrap();
    new.send(Ok(synced())).await.unwrap();
    let removed = soon(instructions.next()).await;
    assert!(
        matches!(removed.instruction, Some(instruction::Instruction::Removed(removed)) if removed.model == "a/gone")
    );
    assert_eq!(soon(instructions.next()).await, synced());
}

#[tokio::test]
async fn the_last_report_is_delivered_before_the_stream_ends() {
    let (address, mut streams, _end) = operator().await;
    let (reports, receiver) = mpsc::channel(8);
    let mut instructions = watch(vec![address], hello, receiver);
    reports.send(report(report::Report::Description(Default::default()))).await.unwrap();
    drop(reports);
    let (mut stream, sender) = soon(streams.recv()).await;
    assert!(matches!(heard(&mut stream).await, report::Report::Hello(_)));
    assert!(matches!(heard(&mut stream).await, report::Report::Description(_)));
    assert_eq!(timeout(DEADLINE, stream.message()).await.unwrap().unwrap(), None);
    drop(sender);
    assert_eq!(timeout(DEADLINE, instructions.next()).await.expect("it ends"), None);
}

#[tokio::test]
async fn an_operator_that_comes_late_is_found() {
    let spare = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = spare.local_addr().unwrap();
    drop(spare);
    let (_reports, receiver) = mpsc::channel(8);
    let mut instructions = watch(vec![address.to_string()], hello, receiver);
    assert!(timeout(Duration::from_millis(300), instructions.next()).await.is_err());

    let (sender, mut streams) = mpsc::channel(4);
    let listener = TcpListener::bind(address).await.unwrap();
    let routes = Routes::new(FleetServer::new(Operator(sender)));
    tokio::spawn(crate::serve(listener, routes, std::future::pending()));
    let (_stream, sender) = soon(streams.recv()).await;
    sender.send(Ok(synced())).await.unwrap();
    assert_eq!(soon(instructions.next()).await, synced());
}
