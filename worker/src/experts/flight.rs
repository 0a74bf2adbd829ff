//! Rows on their way: some pairs of a batch, the call that carries them, and what came of it.

use std::{collections::HashMap, future::poll_fn, pin::pin, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use engine::{ExpertBatch, WireDtype};
use futures::FutureExt as _;
use tokio::{
    sync::oneshot::{self, error::TryRecvError},
    time::Instant,
};
use tracing::Span;
use wire::proto::RunCall;

use super::{
    dtype,
    holder::OnTheirWay,
    link::{Answer, Claimed},
    pace::LEAST,
};

/// Who this worker is, and what it runs.
#[derive(Debug, Clone)]
pub struct Own {
    /// Index of the replica.
    pub replica: u32,
    /// Index in the replica.
    pub ordinal: u32,
    /// Of the model files.
    pub content_hash: String,
    /// Values of a row.
    pub hidden: usize,
    /// How rows travel.
    pub dtype: WireDtype,
}

impl Own {
    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        self.hidden * self.dtype.size()
    }

    /// A call without rows, which any holder of our files answers with none.
    pub(super) fn nothing(&self) -> RunCall {
        RunCall { content_hash: self.content_hash.clone(), dtype: dtype(self.dtype).into(), ..RunCall::default() }
    }
}

/// A worker of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    pub(super) replica: u32,
    pub(super) ordinal: u32,
}

/// Some pairs of a batch, with the rows that they need.
#[derive(Debug)]
pub(super) struct Part {
    /// Of which batch.
    pub(super) batch: u64,
    pub(super) layer: u32,
    /// When it is given up.
    pub(super) until: Instant,
    rows: Bytes,
    /// The pairs' places in the batch, and for each its row and its expert.
    pub(super) pairs: Vec<u32>,
    pair_rows: Vec<u32>,
    pub(super) pair_experts: Vec<u32>,
}

impl Part {
    /// All of a batch, which has this number and is given up then.
    pub(super) fn whole(number: u64, batch: &ExpertBatch<'_>, until: Instant) -> Self {
        Self {
            batch: number,
            until,
            layer: u32::try_from(batch.layer).unwrap_or(u32::MAX),
            rows: batch.rows.clone(),
            pairs: (0..).take(batch.pair_experts.len()).collect(),
            pair_rows: batch.pair_rows.to_vec(),
            pair_experts: batch.pair_experts.to_vec(),
        }
    }

    /// Those of its pairs at these indices, ascending, with each row that they need once.
    pub(super) fn only(self: &Arc<Self>, indices: &[usize], row_bytes: usize) -> Arc<Self> {
        if indices.len() == self.pairs.len() {
            return self.clone();
        }
        let mut rows = Vec::new();
        let mut places: HashMap<u32, u32> = HashMap::new();
        let mut place = |from: u32| {
            *places.entry(from).or_insert_with(|| {
                rows.extend_from_slice(&self.rows[from as usize * row_bytes..][..row_bytes]);
                u32::try_from(rows.len() / row_bytes - 1).unwrap_or(u32::MAX)
            })
        };
        let pair_rows = indices.iter().map(|&at| place(self.pair_rows[at])).collect();
        Arc::new(Self {
            batch: self.batch,
            layer: self.layer,
            until: self.until,
            pairs: indices.iter().map(|&at| self.pairs[at]).collect(),
            pair_rows,
            pair_experts: indices.iter().map(|&at| self.pair_experts[at]).collect(),
            rows: rows.into(),
        })
    }

    /// The call that carries it.
    pub(super) fn call(&self, own: &Own, sequence: u64, remaining: Duration) -> RunCall {
        RunCall {
            sequence,
            layer: self.layer,
            remaining_ms: u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX).max(1),
            rows: self.rows.clone(),
            pair_rows: self.pair_rows.clone(),
            pair_experts: self.pair_experts.clone(),
            ..own.nothing()
        }
    }
}

/// Which way a part went before.
#[derive(Debug, Clone, Default)]
pub(super) struct Past {
    /// Holders that are not asked again.
    pub(super) tried: Vec<Place>,
    /// How often it had to be asked for again with more time.
    pub(super) misses: u32,
}

/// A deadline grows by at most two to this.
const MOST_MISSES: u32 = 4;

impl Past {
    /// How many times the usual deadline is given: twice as much each time.
    pub(super) fn patience(&self) -> u32 {
        1 << self.misses.min(MOST_MISSES)
    }

    /// What it becomes when one more holder is not asked again.
    pub(super) fn after(&self, holder: Place) -> Self {
        let mut past = self.clone();
        past.tried.push(holder);
        past
    }
}

/// What is hoped of a flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// An answer until the deadline.
    Awaited,
    /// An answer at last: there is no other copy to ask.
    Overdue,
    /// Nothing, as its rows are on their way again; but an answer is still welcome.
    Listened,
}

/// A part on its way to a holder.
pub(super) struct Flight {
    pub(super) to: Place,
    pub(super) part: Arc<Part>,
    pub(super) past: Past,
    pub(super) sent: Instant,
    /// When it is late.
    pub(super) deadline: Instant,
    /// When it is looked after, if nothing came of it until then.
    pub(super) look: Instant,
    pub(super) stage: Stage,
    pub(super) reply: oneshot::Receiver<Answer>,
    pub(super) span: Span,
    pub(super) _on_their_way: OnTheirWay,
}

/// What came of a flight.
pub(super) enum Landed {
    Answered(Answer),
    /// The stream ended.
    Lost,
    /// Nothing, until it is to be looked after.
    Quiet,
}

impl Flight {
    /// Whether its holder had time to answer before its batch was given up.
    pub(super) fn had_time(&self) -> bool {
        self.sent + LEAST <= self.part.until
    }

    /// Whether its end decides anything.
    pub(super) fn is_hoped_of(&self) -> bool {
        self.stage != Stage::Listened
    }

    /// It goes on, and is looked after again after a pause, and when it is late.
    pub(super) fn looked_after(self, pause: Duration) -> Self {
        let next = Instant::now() + pause;
        let look = if self.stage == Stage::Awaited { next.min(self.deadline) } else { next };
        Self { look, ..self }
    }

    /// What came of it already.
    fn landed(&mut self) -> Option<Landed> {
        match self.reply.try_recv() {
            Ok(answer) => Some(Landed::Answered(answer)),
            Err(TryRecvError::Closed) => Some(Landed::Lost),
            Err(TryRecvError::Empty) => None,
        }
    }
}

/// The flights that have not landed, of all batches on their way.
#[derive(Default)]
pub(super) struct Flights {
    all: Vec<Flight>,
    /// Those over which all replies come. Until a flight is looked after, or more are on their way, this thread waits for
    /// the replies itself: being woken by who reads them takes longer.
    links: Option<Vec<Claimed>>,
}

impl Flights {
    /// Replies come over `links`, if this thread may read all of these.
    pub(super) fn come_over(&mut self, links: Option<Vec<Claimed>>) {
        self.links = links;
    }

    /// The next to land, or to be looked after; `None` if there are no more.
    pub(super) async fn next(&mut self) -> Option<(Flight, Landed)> {
        let (at, landed) = loop {
            let landed = (0..).zip(&mut self.all).find_map(|(at, flight)| Some((at, flight.landed()?)));
            if let Some(landed) = landed {
                break landed;
            }
            let look = self.all.iter().map(|flight| flight.look).min()?;
            let Some(links) = &mut self.links else { break self.told(look).await };
            if !Claimed::read(links, look) {
                self.links = None;
            }
        };
        Some((self.all.swap_remove(at), landed))
    }

    /// Waits until another thread hands over a reply, or a flight is to be looked after at this time: which.
    async fn told(&mut self, look: Instant) -> (usize, Landed) {
        let mut time = pin!(tokio::time::sleep_until(look));
        poll_fn(|context| {
            for (at, flight) in (0..).zip(&mut self.all) {
                match flight.reply.poll_unpin(context) {
                    Poll::Ready(answer) => return Poll::Ready((at, answer.map_or(Landed::Lost, Landed::Answered))),
                    Poll::Pending => {}
                }
            }
            let due = || self.all.iter().position(|flight| flight.look <= look).unwrap_or_default();
            time.as_mut().poll(context).map(|()| (due(), Landed::Quiet))
        })
        .await
    }

    /// Others go on, or begin.
    pub(super) fn add(&mut self, flights: Vec<Flight>) {
        if !flights.is_empty() {
            self.links = None; // there may be more of them
            self.all.extend(flights);
        }
    }

    /// Whether something is hoped of any of a batch; the others are only listened to.
    pub(super) fn are_hoped_of(&self, batch: u64) -> bool {
        self.all.iter().any(|flight| flight.part.batch == batch && flight.is_hoped_of())
    }

    /// No more is waited for of a batch.
    pub(super) fn give_up(&mut self, batch: u64) {
        self.all.retain(|flight| flight.part.batch != batch);
    }

    /// Nothing is waited for now, but soon.
    pub(super) fn keep_links(&mut self) {
        self.links.take().into_iter().flatten().for_each(Claimed::keep);
    }
}

/// The rows of a batch that came back so far.
pub(super) struct Gathered {
    row_bytes: usize,
    /// Of all pairs at once, where they were read.
    whole: Option<Bytes>,
    /// Else those of each part; empty until some came.
    rows: Vec<u8>,
    done: Vec<bool>,
    left: usize,
}

impl Gathered {
    /// None of a batch of so many pairs.
    pub(super) fn none(pairs: usize, row_bytes: usize) -> Self {
        Self { row_bytes, whole: None, rows: Vec::new(), done: vec![false; pairs], left: pairs }
    }

    /// Takes in the answer to a part. A row that came before has the same bits.
    pub(super) fn take(&mut self, part: &Part, rows: Bytes) {
        let all = self.done.len();
        if self.left == all && part.pairs.len() == all {
            self.done.fill(true);
            self.left = 0;
            self.whole = Some(rows);
            return;
        }
        self.rows.resize(all * self.row_bytes, 0);
        for (&pair, bytes) in part.pairs.iter().zip(rows.chunks_exact(self.row_bytes)) {
            let pair = pair as usize;
            if !std::mem::replace(&mut self.done[pair], true) {
                self.rows[pair * self.row_bytes..][..self.row_bytes].copy_from_slice(bytes);
                self.left -= 1;
            }
        }
    }

    /// The pairs of a part that did not come back, as indices in it.
    pub(super) fn lacking(&self, part: &Part) -> Vec<usize> {
        (0..part.pairs.len()).filter(|&at| !self.done[part.pairs[at] as usize]).collect()
    }

    /// The rows of the batch; those that are missing are zeros.
    pub(super) fn into_rows(mut self) -> Bytes {
        self.whole.unwrap_or_else(|| {
            self.rows.resize(self.done.len() * self.row_bytes, 0);
            self.rows.into()
        })
    }

    /// Whether all came back.
    pub(super) fn is_complete(&self) -> bool {
        self.left == 0
    }

    /// The pairs of the batch that did not come back.
    pub(super) fn missing(&self) -> Vec<u32> {
        (0..).zip(&self.done).filter(|(_, done)| !**done).map(|(pair, _)| pair).collect()
    }
}
