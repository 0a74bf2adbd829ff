//! An operator that does what a test tells it to.

use std::pin::Pin;

use futures::Stream;
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, service::Routes};
use wire::proto::{
    Instruction, Report,
    fleet_server::{Fleet, FleetServer},
    instruction, report,
};

use crate::rig::in_time;

pub(crate) type Inbound = Streaming<Report>;
pub(crate) type Outbound = mpsc::Sender<Result<Instruction, Status>>;

/// Hands each control stream to the test.
pub(crate) struct Operator {
    pub(crate) address: String,
    streams: mpsc::Receiver<(Inbound, Outbound)>,
    server: JoinHandle<std::io::Result<()>>,
}

struct Service(mpsc::Sender<(Inbound, Outbound)>);

#[tonic::async_trait]
impl Fleet for Service {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Instruction, Status>> + Send>>;

    async fn watch(&self, request: Request<Inbound>) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let _ = self.0.send((request.into_inner(), sender)).await;
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

impl Operator {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, streams) = mpsc::channel(4);
        let routes = Routes::new(FleetServer::new(Service(sender)));
        let server = tokio::spawn(wire::serve(listener, routes, std::future::pending()));
        Self { address, streams, server }
    }

    /// The next control stream that is opened.
    pub(crate) async fn stream(&mut self) -> (Inbound, Outbound) {
        in_time(self.streams.recv()).await.unwrap()
    }

    pub(crate) async fn kill(self) {
        self.server.abort();
        let _ = self.server.await;
    }
}

pub(crate) fn instruct(instruction: instruction::Instruction) -> Result<Instruction, Status> {
    Ok(Instruction { instruction: Some(instruction) })
}

pub(crate) async fn heard(inbound: &mut Inbound) -> report::Report {
    in_time(inbound.message()).await.unwrap().unwrap().report.unwrap()
}
