//! One holder as its caller sees it: the stream to it, how fast it answers, and whether it is asked at all.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _};
use tokio::{sync::oneshot, task::AbortHandle};
use wire::proto::{Peer, RunCall};

use super::{
    link::{Answer, Claimed, Link, OPEN_WAIT, ways},
    network::Network,
    pace::Pace,
    signs::Signs,
    split,
    standing::{Board, Standing},
};

/// How long a doubted holder may take to answer a call of nothing before it counts as silent.
const PROBE_WAIT: Duration = Duration::from_millis(500);
/// Pause between probes of a holder that does not answer.
const PROBE_PAUSE: Duration = Duration::from_millis(100);

/// A peer that may be asked for rows.
pub(super) struct Holder {
    pub(super) peer: Peer,
    link: Link,
    standing: Arc<Standing>,
    pace: Pace,
    signs: Signs,
    on_their_way: Arc<AtomicUsize>,
    network: Arc<dyn Network>,
    /// A call of nothing.
    nothing: RunCall,
    probe: Option<AbortHandle>,
}

/// Rows on their way to a holder, counted until it is dropped.
pub(super) struct OnTheirWay {
    rows: usize,
    all: Arc<AtomicUsize>,
}

impl Drop for OnTheirWay {
    fn drop(&mut self) {
        self.all.fetch_sub(self.rows, Ordering::Relaxed);
    }
}

impl Holder {
    /// Opens a stream to `peer`. `nothing`: a call without rows, for probes. Must run inside tokio.
    pub(super) fn open(peer: &Peer, nothing: RunCall, network: Arc<dyn Network>, board: &Board) -> Self {
        let standing = Standing::new(&peer.id, board);
        let link = Link::open(ways(&peer.address, &peer.dns_name), network.clone(), standing.clone());
        let (pace, signs, on_their_way) = (Pace::default(), Signs::new(), Arc::default());
        Self { peer: peer.clone(), link, standing, pace, signs, on_their_way, network, nothing, probe: None }
    }

    /// Whether a snapshot means this very process.
    pub(super) fn is(&self, peer: &Peer) -> bool {
        (&self.peer.id, &self.peer.address, &self.peer.dns_name) == (&peer.id, &peer.address, &peer.dns_name)
    }

    /// Takes in what a snapshot says of it.
    pub(super) fn hear_of(&mut self, peer: &Peer) {
        self.peer.leaving = peer.leaving;
        self.standing.expect(peer.loaded);
        if peer.loaded {
            self.link.hurry();
        }
    }

    /// Whether it is asked for rows now.
    pub(super) fn is_asked(&self) -> bool {
        self.standing.is_asked()
    }

    /// Whether there is no hope of an answer for now.
    pub(super) fn is_silent(&self) -> bool {
        self.standing.is_silent()
    }

    /// What rows are expected to take.
    pub(super) fn expected(&self) -> split::Holder {
        self.pace.expected(self.on_their_way.load(Ordering::Relaxed))
    }

    /// How long it may take for so many rows more.
    pub(super) fn deadline(&self, rows: usize) -> Duration {
        self.pace.deadline(self.on_their_way.load(Ordering::Relaxed) + rows)
    }

    /// Sends a call without waiting; `None` if the stream is down or full.
    pub(super) fn send(&self, call: RunCall) -> Option<(oneshot::Receiver<Answer>, OnTheirWay)> {
        let rows = call.pair_experts.len();
        let reply = self.link.send(call)?;
        self.on_their_way.fetch_add(rows, Ordering::Relaxed);
        Some((reply, OnTheirWay { rows, all: self.on_their_way.clone() }))
    }

    /// Whether it has rows of ours.
    pub(super) fn is_busy(&self) -> bool {
        self.on_their_way.load(Ordering::Relaxed) > 0
    }

    /// To read its replies on this thread; `None` if somebody else does.
    pub(super) fn claim(&self) -> Option<Claimed> {
        self.link.claim()
    }

    /// It answered so many rows after this time.
    pub(super) fn answered(&mut self, rows: usize, took: Duration) {
        self.pace.answered(rows, took);
        self.signs.heard();
        self.trust();
    }

    /// Whether it gives no sign of life while it is waited for.
    pub(super) fn is_missed(&mut self) -> bool {
        let (network, peer) = (&self.network, &self.peer);
        self.signs.are_missing(|| network.open(&peer.address).map(|open| open.is_some()).boxed())
    }

    /// It takes longer than this for so many rows.
    pub(super) fn is_late(&mut self, rows: usize, waited: Duration) {
        self.pace.late(rows, waited);
    }

    /// It is not asked until it answers a probe.
    pub(super) fn doubt(&mut self) {
        if !self.standing.is_doubted() {
            self.standing.doubt();
            let (ways, nothing) = (ways(&self.peer.address, &self.peer.dns_name), self.nothing.clone());
            let probe = probe(ways, nothing, self.network.clone(), self.standing.clone());
            self.probe = Some(tokio::spawn(probe).abort_handle());
        }
    }

    fn trust(&mut self) {
        if self.standing.is_doubted() {
            self.probe.take().inspect(AbortHandle::abort);
            self.standing.is_heard();
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.probe.take().inspect(AbortHandle::abort);
    }
}

/// Asks for nothing on a stream of its own until that is answered.
async fn probe(ways: Vec<String>, nothing: RunCall, network: Arc<dyn Network>, standing: Arc<Standing>) {
    for way in ways.iter().cycle() {
        let mut asked = std::pin::pin!(ask(way, &nothing, &*network));
        let mut heard = tokio::time::timeout(PROBE_WAIT, &mut asked).await;
        if heard.is_err() {
            standing.is_not_heard();
            heard = tokio::time::timeout(OPEN_WAIT, asked).await; // it may only be slow
        }
        if heard.is_ok_and(|answered| answered) {
            break;
        }
        standing.is_not_heard();
        tokio::time::sleep(PROBE_PAUSE).await;
    }
    standing.is_heard();
}

/// Whether a peer answers a call of nothing with nothing.
async fn ask(way: &str, nothing: &RunCall, network: &dyn Network) -> bool {
    let Some((calls, mut replies)) = network.open(way).await else {
        return false;
    };
    if !calls.send(nothing.clone()) {
        return false;
    }
    replies.next().await.is_some_and(|reply| reply.refusal.is_none())
}
