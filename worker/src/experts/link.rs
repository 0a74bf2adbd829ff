//! One long-lived stream to one holder: calls out, replies back in any order, made anew whenever it ends.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt as _;
use tokio::{
    sync::{Notify, oneshot},
    task::AbortHandle,
    time::Instant,
};
use tracing::debug;
use wire::{
    connections::framed::{self, Claim},
    frames,
    proto::{RunCall, RunReply},
};

use super::{
    lock,
    network::{CALLS, Calls, Network, Open},
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

/// The stream to one holder. Dropping it closes the stream.
pub(super) struct Link {
    stream: Arc<Mutex<Stream>>,
    hurry: Arc<Notify>,
    task: AbortHandle,
}

/// The stream, while there is one.
#[derive(Default)]
struct Stream {
    calls: Option<Calls>,
    /// Where replies go, by sequence; a receiver that is gone gave its call up.
    open: HashMap<u64, oneshot::Sender<Answer>>,
}

/// Hands a reply to who waits for it. What comes late or twice finds nobody and is dropped.
fn deliver(stream: &Mutex<Stream>, reply: RunReply) {
    let waiting = lock(stream).open.remove(&reply.sequence);
    if let Some(waiting) = waiting {
        let _ = waiting.send(Answer { reply, at: Instant::now() }); // given up meanwhile
    }
}

impl Link {
    /// Keeps a stream to the first of `ways` that works. Must run inside tokio.
    pub(super) fn open(ways: Vec<String>, network: Arc<dyn Network>, standing: Arc<Standing>) -> Self {
        let (stream, hurry) = (Arc::<Mutex<Stream>>::default(), Arc::new(Notify::new()));
        let run = Run { stream: stream.clone(), network, standing, hurry: hurry.clone() };
        let task = tokio::spawn(run.forever(ways)).abort_handle();
        Self { stream, hurry, task }
    }

    /// Connects at once if it waits to do so: the holder is said to be there again.
    pub(super) fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// Sends a call without waiting; `None` if the stream is down or full.
    pub(super) fn send(&self, call: RunCall) -> Option<oneshot::Receiver<Answer>> {
        let (reply, receiver) = oneshot::channel();
        let sequence = call.sequence;
        let calls = {
            let mut stream = lock(&self.stream);
            if stream.open.len() >= CALLS {
                stream.open.retain(|_, reply| !reply.is_closed());
            }
            let calls = stream.calls.clone()?;
            stream.open.insert(sequence, reply);
            calls
        };
        // without the lock: replies to other calls need it meanwhile
        if calls.send(call) {
            return Some(receiver);
        }
        lock(&self.stream).open.remove(&sequence);
        None
    }

    /// To read its replies on this thread, those that were read behind an earlier one at once; `None` if somebody else does,
    /// or it has ended.
    pub(super) fn claim(&self) -> Option<Claimed> {
        let reader = match &lock(&self.stream).calls {
            Some(Calls::Socket(_, reader)) => reader.clone(),
            Some(Calls::Queue(_)) | None => return None,
        };
        let mut claimed = Claimed { stream: self.stream.clone(), claim: reader.claim()? };
        (claimed.claim.is_empty() || claimed.take()).then_some(claimed)
    }
}

/// A link whose replies are read by nobody else.
pub(super) struct Claimed {
    stream: Arc<Mutex<Stream>>,
    claim: Claim,
}

impl Claimed {
    /// Waits until something has come over one of these links, hands over what is there, and says whether another wait
    /// makes sense: not after `until`, nor when a link has ended.
    pub(super) fn read(links: &mut [Self], until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(come) = framed::wait(links.iter().map(|link| &link.claim), left) else { return false };
        let mut more_may_come = true;
        for (link, has_come) in links.iter_mut().zip(come) {
            more_may_come &= !has_come || link.take(); // also of those behind one that has ended
        }
        more_may_come && !left.is_zero()
    }

    /// Lets go, to come back soon.
    pub(super) fn keep(self) {
        self.claim.keep();
    }

    /// Hands over what has come; whether more may come.
    fn take(&mut self) -> bool {
        loop {
            match self.claim.receive() {
                Ok(Some(reply)) => {
                    deliver(&self.stream, reply);
                    if self.claim.is_empty() {
                        return true; // it is not looked again before it is waited for
                    }
                }
                Err(frames::Error::Broke(error)) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Ok(None) | Err(_) => return false, // whoever keeps the link finds it too
            }
        }
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
    stream: Arc<Mutex<Stream>>,
    network: Arc<dyn Network>,
    standing: Arc<Standing>,
    hurry: Arc<Notify>,
}

impl Run {
    async fn forever(self, ways: Vec<String>) {
        let mut pause = PAUSES.0;
        for way in ways.iter().cycle() {
            match tokio::time::timeout(OPEN_WAIT, self.network.open(way)).await {
                Ok(Some(open)) => {
                    pause = PAUSES.0;
                    self.carry(open).await;
                }
                Ok(None) => {}
                Err(_) => debug!(peer = way, "a holder does not answer"),
            }
            self.standing.broke();
            tokio::select! {
                biased; // so that a simulation goes the same way each time
                () = tokio::time::sleep(pause) => {}
                () = self.hurry.notified() => {}
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Matches replies to calls until the stream ends.
    async fn carry(&self, (calls, mut replies): Open) {
        lock(&self.stream).calls = Some(calls);
        self.standing.opened();
        while let Some(reply) = replies.next().await {
            deliver(&self.stream, reply);
        }
        *lock(&self.stream) = Stream::default(); // calls without a reply are lost
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
