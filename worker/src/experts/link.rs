//! One long-lived stream to one holder: calls out, replies back in any order, made anew whenever it ends.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::StreamExt as _;
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::AbortHandle,
    time::Instant,
};
use tracing::debug;
use wire::proto::{RunCall, RunReply};

use super::{
    network::{CALLS, Network, Open},
    standing::Standing,
};

/// Pauses between attempts to connect grow from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// How long a stream may take to open.
pub(super) const OPEN_WAIT: Duration = Duration::from_secs(5);

/// A reply, and when it came.
pub(super) struct Answer {
    pub(super) reply: RunReply,
    pub(super) at: Instant,
}

/// A call and where its reply goes; a receiver that is gone gives the call up.
struct Sent {
    call: RunCall,
    reply: oneshot::Sender<Answer>,
}

/// The stream to one holder. Dropping it closes the stream.
pub(super) struct Link {
    calls: mpsc::Sender<Sent>,
    standing: Arc<Standing>,
    hurry: Arc<Notify>,
    task: AbortHandle,
}

impl Link {
    /// Keeps a stream to the first of `ways` that works. Must run inside tokio.
    pub(super) fn open(ways: Vec<String>, network: Arc<dyn Network>, standing: Arc<Standing>) -> Self {
        let (calls, sent) = mpsc::channel(CALLS);
        let hurry = Arc::new(Notify::new());
        let run = Run { sent, network, standing: standing.clone(), hurry: hurry.clone() };
        let task = tokio::spawn(run.forever(ways)).abort_handle();
        Self { calls, standing, hurry, task }
    }

    /// Connects at once if it waits to do so: the holder is said to be there again.
    pub(super) fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// Sends a call without waiting; `None` if the stream is down or full.
    pub(super) fn send(&self, call: RunCall) -> Option<oneshot::Receiver<Answer>> {
        let (reply, receiver) = oneshot::channel();
        (self.standing.is_open() && self.calls.try_send(Sent { call, reply }).is_ok()).then_some(receiver)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The address, then the name with the address's port.
pub(super) fn ways(address: &str, name: &str) -> Vec<String> {
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
    network: Arc<dyn Network>,
    standing: Arc<Standing>,
    hurry: Arc<Notify>,
}

impl Run {
    async fn forever(mut self, ways: Vec<String>) {
        let mut pause = PAUSES.0;
        for way in ways.iter().cycle() {
            match tokio::time::timeout(OPEN_WAIT, self.network.open(way)).await {
                Ok(Some(open)) => {
                    pause = PAUSES.0;
                    self.standing.opened();
                    self.carry(open).await;
                }
                Ok(None) => {}
                Err(_) => debug!(peer = way, "a holder does not answer"),
            }
            self.standing.broke();
            // calls that came in the moment the stream ended go unanswered
            while self.sent.try_recv().is_ok() {}
            tokio::select! {
                biased; // so that a simulation goes the same way each time, here and below
                () = tokio::time::sleep(pause) => {}
                () = self.hurry.notified() => {}
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Matches replies to calls until the stream ends. What comes late or twice finds no call and is dropped.
    async fn carry(&mut self, (out, mut replies): Open) {
        let mut open: HashMap<u64, oneshot::Sender<Answer>> = HashMap::new();
        loop {
            tokio::select! {
                biased;
                Some(Sent { call, reply }) = self.sent.recv() => {
                    if open.len() >= CALLS {
                        open.retain(|_, reply| !reply.is_closed());
                    }
                    let sequence = call.sequence;
                    if out.try_send(call).is_ok() {
                        open.insert(sequence, reply);
                    }
                }
                reply = replies.next() => {
                    let Some(reply) = reply else { return };
                    if let Some(waiting) = open.remove(&reply.sequence) {
                        let _ = waiting.send(Answer { reply, at: Instant::now() }); // given up meanwhile
                    }
                }
                else => return,
            }
        }
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
