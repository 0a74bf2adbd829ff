//! One long-lived stream to one holder: calls out, replies back in any order, made anew whenever it ends.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::AbortHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tracing::debug;
use wire::proto::{RunCall, RunReply, experts_client::ExpertsClient};

/// Calls on their way to a holder; a step sends one a layer, so more means that the holder does not read.
const CALLS: usize = 256;
/// Pauses between attempts to connect grow from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// How long a stream may take to open.
const OPEN_WAIT: Duration = Duration::from_secs(5);

/// A call and where its reply goes; a receiver that is gone gives the call up.
struct Sent {
    call: RunCall,
    reply: oneshot::Sender<RunReply>,
}

/// The stream to one holder. Dropping it closes the stream.
pub(super) struct Link {
    /// Where the holder is.
    pub(super) address: String,
    calls: mpsc::Sender<Sent>,
    up: Arc<AtomicBool>,
    hurry: Arc<Notify>,
    task: AbortHandle,
}

impl Link {
    /// Opens a stream to `address`, or to `name` (with the same port) where the address fails. `changes` counts the
    /// times a stream opens or ends. Must run inside tokio.
    pub(super) fn open(address: String, name: &str, changes: watch::Sender<u64>) -> Self {
        let (calls, sent) = mpsc::channel(CALLS);
        let (up, hurry) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
        let ways = ways(&address, name);
        let run = Run { sent, up: up.clone(), hurry: hurry.clone(), changes };
        let task = tokio::spawn(run.forever(ways)).abort_handle();
        Self { address, calls, up, hurry, task }
    }

    /// Whether calls have a chance of being answered.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Connects at once if it waits to do so: the holder is said to be there again.
    pub(super) fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// Sends a call without waiting; `None` if the stream is down or full.
    pub(super) fn send(&self, call: RunCall) -> Option<oneshot::Receiver<RunReply>> {
        let (reply, receiver) = oneshot::channel();
        (self.is_up() && self.calls.try_send(Sent { call, reply }).is_ok()).then_some(receiver)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The address, then the name with the address's port.
fn ways(address: &str, name: &str) -> Vec<String> {
    let port = address.rsplit_once(':').map_or("", |(_, port)| port);
    let mut ways = vec![address.to_owned()];
    match name {
        "" => {}
        name if name.contains(':') => ways.push(name.to_owned()),
        name => ways.push(format!("{name}:{port}")),
    }
    ways
}

struct Run {
    sent: mpsc::Receiver<Sent>,
    up: Arc<AtomicBool>,
    hurry: Arc<Notify>,
    changes: watch::Sender<u64>,
}

impl Run {
    async fn forever(mut self, ways: Vec<String>) {
        let mut pause = PAUSES.0;
        for way in ways.iter().cycle() {
            let mut client = ExpertsClient::new(wire::connect(way))
                .max_decoding_message_size(wire::MAX_MESSAGE_BYTES)
                .max_encoding_message_size(wire::MAX_MESSAGE_BYTES);
            let (out, calls) = mpsc::channel(CALLS);
            match tokio::time::timeout(OPEN_WAIT, client.run(ReceiverStream::new(calls))).await {
                Ok(Ok(replies)) => {
                    pause = PAUSES.0;
                    self.set_up(true);
                    self.carry(&out, replies.into_inner()).await;
                    self.set_up(false);
                }
                Ok(Err(status)) => {
                    debug!(peer = way, code = ?status.code(), "no stream to a holder")
                }
                Err(_) => debug!(peer = way, "a holder does not answer"),
            }
            // calls that came in the moment the stream ended go unanswered
            while self.sent.try_recv().is_ok() {}
            let jitter = pause.mul_f64(f64::from(std::process::id() % 100) / 200.0);
            tokio::select! {
                () = tokio::time::sleep(pause + jitter) => {}
                () = self.hurry.notified() => {}
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Matches replies to calls until the stream ends. What comes late or twice finds no call and is dropped.
    async fn carry(&mut self, out: &mpsc::Sender<RunCall>, mut replies: Streaming<RunReply>) {
        let mut open: HashMap<u64, oneshot::Sender<RunReply>> = HashMap::new();
        loop {
            tokio::select! {
                Some(Sent { call, reply }) = self.sent.recv() => {
                    if open.len() >= CALLS {
                        open.retain(|_, reply| !reply.is_closed());
                    }
                    let sequence = call.sequence;
                    if out.try_send(call).is_ok() {
                        open.insert(sequence, reply);
                    }
                }
                reply = replies.message() => match reply {
                    Ok(Some(reply)) => {
                        if let Some(waiting) = open.remove(&reply.sequence) {
                            let _ = waiting.send(reply); // given up meanwhile
                        }
                    }
                    Ok(None) | Err(_) => return,
                },
                else => return,
            }
        }
    }

    fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::Release);
        self.changes.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_the_second_way_with_the_same_port() {
        assert_eq!(ways("10.0.0.7:9000", ""), ["10.0.0.7:9000"]);
        assert_eq!(ways("[fd00::7]:9000", "m-0.workers"), ["[fd00::7]:9000", "m-0.workers:9000"]);
        assert_eq!(ways("10.0.0.7:9000", "m-0.workers:9001"), ["10.0.0.7:9000", "m-0.workers:9001"]);
    }
}
