//! What ours is measured beside: the same bytes there and back, and nothing done with them.

use std::{
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Endpoint, Server, server::TcpIncoming},
};
use wire::proto::{
    RunCall, RunReply,
    experts_client::ExpertsClient,
    experts_server::{Experts, ExpertsServer},
};

/// A length, then as many bytes, over one TCP connection with two blocking ends.
pub(crate) struct Framed {
    stream: TcpStream,
    back: Vec<u8>,
}

impl Framed {
    /// The other end sends back what `work` makes of a frame.
    pub(crate) fn start(mut work: impl FnMut(Vec<u8>) -> Vec<u8> + Send + 'static) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        stream.set_nodelay(true)?;
        let (mut other, _) = listener.accept()?;
        other.set_nodelay(true)?;
        thread::spawn(move || {
            let mut frame = Vec::new();
            // ends with the connection
            while receive(&mut other, &mut frame).is_ok() {
                frame = work(frame);
                if send(&mut other, &frame).is_err() {
                    break;
                }
            }
        });
        Ok(Self { stream, back: Vec::new() })
    }

    pub(crate) fn ask(&mut self, rows: &[u8]) -> anyhow::Result<()> {
        send(&mut self.stream, rows)?;
        receive(&mut self.stream, &mut self.back)?;
        ensure!(self.back.len() == rows.len(), "the echo is cut");
        Ok(())
    }
}

fn send(stream: &mut TcpStream, frame: &[u8]) -> io::Result<()> {
    let length = (frame.len() as u64).to_le_bytes();
    let written = stream.write_vectored(&[io::IoSlice::new(&length), io::IoSlice::new(frame)])?;
    match written.checked_sub(length.len()) {
        Some(written) => stream.write_all(&frame[written..]),
        None => Err(io::ErrorKind::WriteZero.into()),
    }
}

fn receive(stream: &mut TcpStream, frame: &mut Vec<u8>) -> io::Result<()> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    frame.resize(usize::try_from(u64::from_le_bytes(length)).map_err(io::Error::other)?, 0);
    stream.read_exact(frame)
}

/// A bidirectional stream of tonic with its own settings.
pub(crate) struct Plain {
    calls: mpsc::Sender<RunCall>,
    replies: Streaming<RunReply>,
}

struct Echo;

#[tonic::async_trait]
impl Experts for Echo {
    type RunStream = ReceiverStream<Result<RunReply, Status>>;

    async fn run(&self, request: Request<Streaming<RunCall>>) -> Result<Response<Self::RunStream>, Status> {
        let mut calls = request.into_inner();
        let (replies, outgoing) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Some(Ok(call)) = calls.next().await {
                let reply = RunReply { sequence: call.sequence, layer: call.layer, rows: call.rows, refusal: None };
                if replies.send(Ok(reply)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

impl Plain {
    pub(crate) async fn start(far: &Runtime) -> anyhow::Result<Self> {
        let (sender, address) = tokio::sync::oneshot::channel();
        far.spawn(async move {
            let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into())?.with_nodelay(Some(true));
            // nobody asks for the address only if the benchmark has failed
            let _ = sender.send(incoming.local_addr()?);
            let echo = ExpertsServer::new(Echo).max_decoding_message_size(wire::MAX_MESSAGE_BYTES);
            Server::builder().add_service(echo).serve_with_incoming(incoming).await?;
            anyhow::Ok(())
        });
        let endpoint = Endpoint::from_shared(format!("http://{}", address.await?))?.tcp_nodelay(true);
        let client = ExpertsClient::new(endpoint.connect().await?);
        let (calls, outgoing) = mpsc::channel(1);
        let mut client = client.max_decoding_message_size(wire::MAX_MESSAGE_BYTES);
        let replies = client.run(ReceiverStream::new(outgoing)).await?.into_inner();
        Ok(Self { calls, replies })
    }

    pub(crate) async fn ask(&mut self, rows: &Bytes) -> anyhow::Result<()> {
        self.calls.send(RunCall { rows: rows.clone(), ..RunCall::default() }).await?;
        let reply = self.replies.message().await?.context("the stream ended")?;
        ensure!(reply.rows.len() == rows.len(), "the echo is cut");
        Ok(())
    }
}
