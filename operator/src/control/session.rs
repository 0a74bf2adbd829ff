//! One open control stream: reports in, instructions out.

use std::{net::IpAddr, time::Duration};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;
use wire::proto::{self, Instruction, Report};

use super::{
    Fleet,
    state::{Rejection, StreamId, Told},
};

/// Instructions that wait for a slow reader, at most.
const WAITING: usize = 4;
/// A reader that takes nothing for this long is dropped.
const SLOW: Duration = Duration::from_secs(10);
/// The first report must come within this.
const HELLO: Duration = Duration::from_secs(10);
/// A process that nobody expects is held this long: its pod may not be known yet.
const STRANGER: Duration = Duration::from_secs(60);

pub(super) struct Service(Fleet);

impl Service {
    pub(super) fn new(fleet: Fleet) -> Self {
        Self(fleet)
    }
}

#[tonic::async_trait]
impl proto::fleet_server::Fleet for Service {
    type WatchStream = ReceiverStream<Result<Instruction, Status>>;

    async fn watch(&self, request: Request<Streaming<Report>>) -> Result<Response<Self::WatchStream>, Status> {
        let ip = request.remote_addr().map(|address| address.ip().to_canonical());
        let (instructions, receiver) = mpsc::channel(WAITING);
        tokio::spawn(Session::open(self.0.clone(), ip).run(request.into_inner(), instructions));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Closes its stream in the state when it is dropped.
struct Session {
    fleet: Fleet,
    id: StreamId,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.fleet.update(|state, _| state.close(self.id));
    }
}

/// Why a session ended.
enum End {
    /// All that the peer said is taken in and it will say no more, it is gone, or the process has another stream.
    Quiet,
    Status(Status),
}

impl Session {
    fn open(fleet: Fleet, ip: Option<IpAddr>) -> Self {
        let id = fleet.update(|state, _| state.open(ip));
        Self { fleet, id }
    }

    async fn run(self, reports: Streaming<Report>, instructions: mpsc::Sender<Result<Instruction, Status>>) {
        let mut closing = self.fleet.0.closing.subscribe();
        let end = tokio::select! {
            end = self.listen(reports) => end,
            end = self.speak(&instructions) => end,
            end = self.doubt() => end,
            _ = closing.wait_for(|closing| *closing) => End::Status(Status::unavailable("this operator ends")),
        };
        if let End::Status(status) = end {
            debug!(%status, "ended a control stream");
            drop(instructions.try_send(Err(status)));
        }
    }

    async fn listen(&self, mut reports: Streaming<Report>) -> End {
        let mut first = true;
        loop {
            let next = if first {
                match tokio::time::timeout(HELLO, reports.message()).await {
                    Ok(next) => next,
                    Err(_) => return End::Status(Status::deadline_exceeded("no hello came")),
                }
            } else {
                reports.message().await
            };
            first = false;
            let Ok(Some(report)) = next else {
                // one that says all it knows and leaves is often done before its pod's address is known here
                self.known().await;
                return End::Quiet;
            };
            if let Err(rejection) = self.fleet.update(|state, now| state.report(self.id, report, now)) {
                return End::Status(rejection.into());
            }
        }
    }

    async fn speak(&self, instructions: &mpsc::Sender<Result<Instruction, Status>>) -> End {
        let mut changes = self.fleet.0.changes.subscribe();
        let mut told = Told::default();
        loop {
            let Some(unsaid) = self.fleet.state().unsaid(self.id, &mut told) else {
                return End::Quiet;
            };
            if unsaid.is_empty() && changes.changed().await.is_err() {
                return End::Quiet;
            }
            for instruction in unsaid {
                match tokio::time::timeout(SLOW, instructions.send(Ok(instruction))).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return End::Quiet,
                    Err(_) => {
                        return End::Status(Status::resource_exhausted("took no instruction in time"));
                    }
                }
            }
        }
    }

    /// Waits until the process is one that is expected: what it said counts from then on.
    async fn known(&self) {
        let mut changes = self.fleet.0.changes.subscribe();
        while !self.fleet.state().is_known(self.id) && changes.changed().await.is_ok() {}
    }

    /// Ends the stream of a process that nobody came to expect.
    async fn doubt(&self) -> End {
        tokio::time::sleep(STRANGER).await;
        if self.fleet.state().is_known(self.id) {
            std::future::pending::<()>().await;
        }
        End::Status(Status::permission_denied("no process with this id is expected from this address"))
    }
}

impl From<Rejection> for Status {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::NoHello | Rejection::SecondHello | Rejection::Empty => {
                Status::invalid_argument(rejection.to_string())
            }
            Rejection::Crowded => Status::resource_exhausted(rejection.to_string()),
        }
    }
}
