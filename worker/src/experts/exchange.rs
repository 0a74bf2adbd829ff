//! The engine's way to experts that are not here.
//!
//! A batch is parted by holder (`split`), each holder gets one message with each row once, all are asked at once.
//! Rows whose holder refuses, breaks off or misses its deadline go to another copy at once; those that nobody answers
//! come back as missing. While a batch is waited for, the others that are on their way are looked after too.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use engine::{Exchange, ExpertBatch, Replies};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tonic::metadata::MetadataMap;
use tracing::{Span, field, info, info_span, warn};
use wire::proto::{RunReply, refusal::Reason};

pub use super::flight::Own;
use super::{
    flight::{Flight, Flights, Gathered, Landed, Part, Past, Place, Stage},
    holder::Holder,
    network::{self, Network},
    overlap::{Overlap, Way},
    pace::LEAST,
    split::{self, Group},
    standing::Board,
};
use crate::{
    mesh::{Mesh, Meshes},
    metrics::{CallResult, Metrics},
};

/// How often it is looked whether a holder that is late, and has no copy, can be asked again.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A holder computes a call that waited there up to so many times longer than its caller hopes.
const STILL_USEFUL: u32 = 4;
/// How long a holder is not asked again for an expert that it refused.
const LACKS_FOR: Duration = Duration::from_secs(1);
/// How long nobody must answer for an expert before this worker wants to hold it itself.
const OWN_AFTER: Duration = Duration::from_millis(500);
/// Misses further apart than this are not the same one.
const SAME_MISS: Duration = Duration::from_secs(2);

/// An expert without a holder, and how long sequences that need it are to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// Index of the transformer layer.
    pub layer: u32,
    /// The expert.
    pub expert: u32,
    /// From the first step that lacked it.
    pub max_wait: Duration,
}

/// Sends rows to holders and gathers what comes back.
pub struct MeshExchange {
    own: Own,
    meshes: Meshes,
    newest: watch::Receiver<Arc<Mesh>>,
    /// What the running step goes by.
    mesh: Arc<Mesh>,
    holders: BTreeMap<Place, Holder>,
    /// Experts that a holder refused, and until when it is not asked for them.
    lacks: HashMap<(Place, u32, u32), Instant>,
    /// Experts that nobody answered for: since when, and when last.
    absent: HashMap<(u32, u32), (Instant, Instant)>,
    /// Takes experts that this worker should hold itself.
    wanted: Option<mpsc::Sender<(u32, u32)>>,
    network: Arc<dyn Network>,
    board: Board,
    changed: watch::Receiver<u64>,
    /// Numbers calls and batches.
    sequence: u64,
    /// Calls that are on their way.
    flights: Flights,
    /// What came back of each batch that is on its way.
    gathered: BTreeMap<u64, Gathered>,
    span: Span,
    overlap: Overlap,
    step: Step,
    missing: Option<Missing>,
    metrics: Arc<Metrics>,
}

/// The step that runs.
struct Step {
    begun: Instant,
    /// For experts elsewhere.
    waited: Duration,
    /// Its rows, and which way it goes, if it could go in halves.
    way: Option<(usize, Way)>,
}

impl Step {
    fn begin() -> Self {
        Self { begun: Instant::now(), waited: Duration::ZERO, way: None }
    }
}

/// A batch on its way.
pub struct Ticket(Arc<Part>);

impl MeshExchange {
    /// Follows the newest of `meshes`; tells `board` who fails, and `wanted` which experts nobody answers for. Must be
    /// used inside tokio.
    pub fn new(
        own: Own,
        meshes: Meshes,
        board: Board,
        wanted: Option<mpsc::Sender<(u32, u32)>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self::over(network::sockets(), own, meshes, board, wanted, metrics)
    }

    pub(super) fn over(
        network: Arc<dyn Network>,
        own: Own,
        meshes: Meshes,
        board: Board,
        wanted: Option<mpsc::Sender<(u32, u32)>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            own,
            newest: meshes.follow(),
            mesh: Arc::default(),
            meshes,
            holders: BTreeMap::new(),
            lacks: HashMap::new(),
            absent: HashMap::new(),
            wanted,
            network,
            changed: board.changes(),
            board,
            sequence: 0,
            flights: Flights::default(),
            gathered: BTreeMap::new(),
            span: Span::none(),
            overlap: Overlap::default(),
            step: Step::begin(),
            missing: None,
            metrics,
        }
    }

    /// Begins a step: follows the newest snapshot. Calls of the step become children of `span`, unless that is none.
    pub fn begin_step(&mut self, span: Span) {
        self.span = span;
        self.step = Step::begin();
        (self.flights, self.gathered) = Default::default(); // of a step that was given up
        self.missing = None;
        self.changed.mark_unchanged();
        self.newest.mark_unchanged();
        let mesh = self.meshes.begin_step();
        if !Arc::ptr_eq(&mesh, &self.mesh) {
            self.follow(&mesh);
        }
        self.mesh = mesh;
    }

    /// Ends a step; returns an expert that it lacked, if it lacked any.
    pub fn end_step(&mut self) -> Option<Missing> {
        self.meshes.end_step();
        if let Some((rows, way)) = self.step.way.filter(|_| self.missing.is_none()) {
            self.overlap.took(rows, way, self.step.begun.elapsed(), self.step.waited);
        }
        self.missing
    }

    /// Waits until a holder came or went, or a snapshot arrived, after the step began.
    pub async fn changed(&mut self) {
        tokio::select! {
            biased; // as in a link
            _ = self.changed.changed() => {}
            Ok(()) = self.newest.changed() => {}
        }
    }

    /// A stream to each other worker with our files whose experts we may ask for. One that restarted elsewhere gets a
    /// new one at once.
    fn follow(&mut self, mesh: &Mesh) {
        let own = Place { replica: self.own.replica, ordinal: self.own.ordinal };
        let asked = |place: &Place| {
            let other = mesh.others.iter().any(|(replica, _)| *replica == place.replica);
            *place != own && (place.replica == own.replica || other)
        };
        let place = |peer: &wire::proto::Peer| Place { replica: peer.replica, ordinal: peer.ordinal };
        let peers: BTreeMap<Place, _> = mesh.peers.iter().map(|peer| (place(peer), peer)).collect();
        self.holders.retain(|place, holder| asked(place) && peers.get(place).is_some_and(|peer| holder.is(peer)));
        for (place, peer) in peers.into_iter().filter(|(place, _)| asked(place)) {
            let open = || Holder::open(peer, self.own.nothing(), self.network.clone(), &self.board);
            self.holders.entry(place).or_insert_with(open).hear_of(peer);
        }
        self.lacks.clear();
    }

    /// Those that may be asked for an expert now: of our replica, else of the first other one that has any; those that
    /// stay before those that leave.
    fn candidates(&self, layer: u32, expert: u32, tried: &[Place]) -> Vec<Place> {
        let now = Instant::now();
        let lacks = |place| self.lacks.get(&(place, layer, expert)).is_some_and(|&until| now < until);
        let asked = |place: &Place| {
            !tried.contains(place) && self.holders.get(place).is_some_and(Holder::is_asked) && !lacks(*place)
        };
        let of = |replica: u32, ordinals: &[u32]| -> Vec<Place> {
            let asked = ordinals.iter().map(|&ordinal| Place { replica, ordinal }).filter(asked);
            let (leaving, staying): (Vec<_>, Vec<_>) = asked.partition(|place| self.holders[place].peer.leaving);
            if staying.is_empty() { leaving } else { staying }
        };
        let own = of(self.own.replica, self.mesh.placement.holders(layer, expert));
        let others = self.mesh.others.iter().filter(|(replica, _)| *replica != self.own.replica);
        std::iter::once(own)
            .chain(others.map(|(replica, placement)| of(*replica, placement.holders(layer, expert))))
            .find(|found| !found.is_empty())
            .unwrap_or_default()
    }

    /// Who gets which pairs of a part, as indices in it. Pairs that nobody can be asked for are left out.
    fn assign(&self, part: &Part, tried: &[Place]) -> BTreeMap<Place, Vec<usize>> {
        let (mut groups, mut starts) = (Vec::new(), Vec::new());
        let mut places: Vec<Place> = Vec::new();
        let mut start = 0;
        for pairs in part.pair_experts.chunk_by(|a, b| a == b) {
            let candidates = self.candidates(part.layer, pairs[0], tried);
            let holders = candidates.into_iter().map(|place| {
                places.iter().position(|&known| known == place).unwrap_or_else(|| {
                    places.push(place);
                    places.len() - 1
                })
            });
            let group = Group { rows: u32::try_from(pairs.len()).unwrap_or(u32::MAX), holders: holders.collect() };
            if !group.holders.is_empty() {
                groups.push(group);
                starts.push(start);
            }
            start += pairs.len();
        }
        let expected: Vec<split::Holder> = places.iter().map(|place| self.holders[place].expected()).collect();
        let mut by_holder: BTreeMap<Place, Vec<usize>> = BTreeMap::new();
        for ((group, start), rows) in groups.iter().zip(starts).zip(split::split(&groups, &expected)) {
            let mut next = start;
            for (&holder, rows) in group.holders.iter().zip(rows).filter(|(_, rows)| *rows > 0) {
                let end = next + rows as usize;
                by_holder.entry(places[holder]).or_default().extend(next..end);
                next = end;
            }
        }
        by_holder
    }

    /// Sends the pairs of a part to those who can be asked for them. Pairs in no flight have nobody.
    fn fly(&mut self, part: Arc<Part>, past: Past) -> Vec<Flight> {
        let (mut flights, mut open) = (Vec::new(), vec![(part, past)]);
        while let Some((part, past)) = open.pop() {
            for (to, indices) in self.assign(&part, &past.tried) {
                let some = part.only(&indices, self.own.row_bytes());
                match self.send(to, &some, &past) {
                    Some(flight) => flights.push(flight),
                    None => open.push((some, past.after(to))),
                }
            }
        }
        flights
    }

    fn send(&mut self, to: Place, part: &Arc<Part>, past: &Past) -> Option<Flight> {
        let holder = self.holders.get(&to)?;
        self.sequence += 1;
        let allowed = holder.deadline(part.pairs.len()) * past.patience();
        let mut call = part.call(&self.own, self.sequence, allowed * STILL_USEFUL);
        let span = call_span(&self.span, part.layer, &holder.peer.address, part.pairs.len());
        call.traceparent = traceparent(&span);
        let bytes = call.rows.len();
        let (reply, on_their_way) = holder.send(call)?;
        self.metrics.rows_sent(bytes / self.own.row_bytes(), bytes);
        let sent = Instant::now();
        Some(Flight {
            to,
            part: part.clone(),
            past: past.clone(),
            sent,
            deadline: (sent + allowed).min(part.until),
            look: (sent + allowed.min(LEAST)).min(part.until),
            stage: Stage::Awaited,
            reply,
            span,
            _on_their_way: on_their_way,
        })
    }

    /// Whether there is hope for rows of a batch that have not come back.
    fn is_open(&self, batch: u64) -> bool {
        self.flights.are_hoped_of(batch) && self.gathered.get(&batch).is_some_and(|gathered| !gathered.is_complete())
    }

    /// Takes in what came of a flight; what follows from it goes on.
    fn land(&mut self, flight: Flight, landed: Landed) {
        let batch = flight.part.batch;
        if let Some(mut gathered) = self.gathered.remove(&batch) {
            let next = self.judge(flight, landed, &mut gathered);
            match gathered.is_complete() {
                true => self.flights.give_up(batch), // whoever is late with rows that came otherwise is not doubted
                false => self.flights.add(next),
            }
            self.gathered.insert(batch, gathered);
        }
    }

    /// What follows from a flight's end, or its lateness: the flights that go on.
    fn judge(&mut self, flight: Flight, landed: Landed, gathered: &mut Gathered) -> Vec<Flight> {
        let result = match &landed {
            Landed::Answered(answer) => result(&answer.reply, flight.part.pairs.len() * self.own.row_bytes()),
            Landed::Lost => CallResult::Lost,
            Landed::Quiet if flight.stage != Stage::Awaited => return self.look_again(flight, gathered),
            Landed::Quiet if self.has_time(&flight) => return vec![flight.looked_after(LOOK_EVERY)],
            Landed::Quiet => CallResult::Late,
        };
        flight.span.record("result", result.name());
        self.metrics.calls(result, 1);
        if let (Landed::Answered(answer), CallResult::Answered) = (landed, result) {
            if let Some(holder) = self.holders.get_mut(&flight.to) {
                holder.answered(flight.part.pairs.len(), answer.at.saturating_duration_since(flight.sent));
            }
            self.metrics.bytes_received(answer.reply.rows.len());
            gathered.take(&flight.part, answer.reply.rows);
            return Vec::new();
        }
        if !flight.is_hoped_of() {
            return Vec::new(); // its rows are on their way again
        }
        if result == CallResult::NotHeld {
            let until = Instant::now() + LACKS_FOR;
            let refused =
                flight.part.pair_experts.iter().map(|&expert| ((flight.to, flight.part.layer, expert), until));
            self.lacks.extend(refused);
        }
        if result == CallResult::Late {
            return self.is_late(flight, gathered);
        }
        self.again(&flight, flight.past.after(flight.to), result, gathered)
    }

    /// Whether a flight is not late yet, and its holder is there.
    fn has_time(&mut self, flight: &Flight) -> bool {
        let holder = self.holders.get_mut(&flight.to);
        Instant::now() < flight.deadline && holder.is_some_and(|holder| !holder.is_missed())
    }

    /// The deadline is over for the first time, or the holder gives no sign of life: it is doubted, and its rows go to other
    /// copies. Its answer is still listened to; where there is no other copy, it is waited for.
    fn is_late(&mut self, mut flight: Flight, gathered: &Gathered) -> Vec<Flight> {
        let now = Instant::now();
        if let Some(holder) = self.holders.get_mut(&flight.to).filter(|_| flight.had_time()) {
            if now >= flight.deadline {
                let waited = now.saturating_duration_since(flight.sent) / flight.past.patience();
                holder.is_late(flight.part.pairs.len(), waited);
            }
            holder.doubt();
        }
        if now >= flight.part.until {
            return Vec::new();
        }
        let mut flights = self.again(&flight, flight.past.after(flight.to), CallResult::Late, gathered);
        let elsewhere: usize = flights.iter().map(|flight| flight.part.pairs.len()).sum();
        (flight.stage, flight.look) = match elsewhere < gathered.lacking(&flight.part).len() {
            true => (Stage::Overdue, now + LOOK_EVERY),
            false => (Stage::Listened, flight.part.until),
        };
        flights.push(flight);
        flights
    }

    /// A flight without a copy is overdue. Whoever can be asked now is asked, with twice the time: the same holder, once
    /// it answered its probe, or another that came back. If there is no hope of an answer, it is only listened to. A
    /// holder that was missed and is there has the time that it had.
    fn look_again(&mut self, mut flight: Flight, gathered: &Gathered) -> Vec<Flight> {
        let now = Instant::now();
        if now >= flight.part.until {
            return Vec::new();
        }
        if flight.is_hoped_of() && now < flight.deadline && self.holders.get(&flight.to).is_some_and(Holder::is_asked) {
            flight.stage = Stage::Awaited;
            return vec![flight.looked_after(LOOK_EVERY)];
        }
        let past = Past { tried: Vec::new(), misses: flight.past.misses + 1 };
        let mut flights = self.again(&flight, past, CallResult::Late, gathered);
        let is_silent = self.holders.get(&flight.to).is_none_or(Holder::is_silent);
        if flights.is_empty() && !is_silent && !gathered.lacking(&flight.part).is_empty() {
            flights.push(flight.looked_after(LOOK_EVERY));
        } else {
            (flight.stage, flight.look) = (Stage::Listened, flight.part.until);
            flights.push(flight);
        }
        flights
    }

    /// Sends again what is lacking of a flight.
    fn again(&mut self, flight: &Flight, past: Past, why: CallResult, gathered: &Gathered) -> Vec<Flight> {
        let lacking = flight.part.only(&gathered.lacking(&flight.part), self.own.row_bytes());
        let flights = self.fly(lacking, past);
        for next in &flights {
            self.metrics.resent(why, next.part.pairs.len());
            if !flight.span.is_none() {
                let peer = self.holders.get(&next.to).map(|holder| holder.peer.address.as_str());
                info!(parent: &flight.span, why = why.name(), peer, pairs = next.part.pairs.len(), "sent again");
            }
        }
        flights
    }

    /// Remembers the experts of a batch that nobody answered for, and forgets those that somebody did.
    fn note(&mut self, batch: &Part, missing: &[u32]) {
        if missing.is_empty() && self.absent.is_empty() {
            return;
        }
        let now = Instant::now();
        let lost: std::collections::BTreeSet<u32> =
            missing.iter().map(|&pair| batch.pair_experts[pair as usize]).collect();
        self.absent.retain(|&(layer, expert), (_, last)| {
            let answered = layer == batch.layer && batch.pair_experts.contains(&expert) && !lost.contains(&expert);
            !answered && now.duration_since(*last) < SAME_MISS
        });
        for &expert in &lost {
            let (since, last) = self.absent.entry((batch.layer, expert)).or_insert((now, now));
            *last = now;
            if let Some(wanted) = self.wanted.as_ref().filter(|_| now.duration_since(*since) >= OWN_AFTER) {
                let _ = wanted.try_send((batch.layer, expert)); // full: the next step asks again
            }
        }
        if let Some(&expert) = lost.first() {
            let max_wait = self.mesh.max_wait();
            self.missing.get_or_insert(Missing { layer: batch.layer, expert, max_wait });
        }
    }
}

impl Exchange for MeshExchange {
    type Ticket = Ticket;

    fn send(&mut self, batch: &ExpertBatch<'_>) -> Ticket {
        self.sequence += 1;
        let whole = Arc::new(Part::whole(self.sequence, batch, Instant::now() + self.mesh.max_wait()));
        let flights = self.fly(whole.clone(), Past::default());
        self.flights.add(flights);
        self.gathered.insert(whole.batch, Gathered::none(whole.pairs.len(), self.own.row_bytes()));
        Ticket(whole)
    }

    fn overlaps(&mut self, rows: usize) -> bool {
        let way = self.overlap.way(rows);
        self.step.way = Some((rows, way));
        self.metrics.step(way == Way::Halves);
        way == Way::Halves
    }

    async fn join(&mut self, Ticket(whole): Ticket) -> Replies {
        let begun = Instant::now();
        let busy = self.holders.values().filter(|holder| holder.is_busy());
        self.flights.come_over(busy.map(Holder::claim).collect());
        while self.is_open(whole.batch) {
            let Some((flight, landed)) = self.flights.next().await else { break };
            self.land(flight, landed);
        }
        self.flights.give_up(whole.batch);
        self.flights.keep_links();
        let gathered = self.gathered.remove(&whole.batch);
        let gathered = gathered.unwrap_or_else(|| Gathered::none(whole.pairs.len(), self.own.row_bytes()));
        let missing = gathered.missing();
        self.metrics.calls(CallResult::Unreachable, usize::from(!missing.is_empty()));
        let waited = begun.elapsed();
        self.step.waited += waited;
        self.metrics.waited(waited);
        self.note(&whole, &missing);
        Replies { rows: gathered.into_rows(), missing }
    }
}

/// What a reply counts as. A refusal that no snapshot explains is a fault of ours, and is said once a message.
fn result(reply: &RunReply, bytes: usize) -> CallResult {
    let Some(refusal) = &reply.refusal else {
        if reply.rows.len() == bytes {
            return CallResult::Answered;
        }
        warn!(layer = reply.layer, got = reply.rows.len(), want = bytes, "a holder answered with other rows");
        return CallResult::Malformed;
    };
    match refusal.reason() {
        Reason::Busy => CallResult::Busy,
        Reason::Expired => CallResult::Expired,
        Reason::NotHeld => CallResult::NotHeld,
        reason @ (Reason::OtherContent | Reason::Malformed | Reason::Unspecified) => {
            warn!(layer = reply.layer, ?reason, "a holder refused rows");
            if reason == Reason::OtherContent { CallResult::OtherContent } else { CallResult::Malformed }
        }
    }
}

fn call_span(parent: &Span, layer: u32, peer: &str, pairs: usize) -> Span {
    if parent.is_none() {
        return Span::none();
    }
    info_span!(parent: parent, "experts.run", otel.kind = "client", layer, peer, pairs, result = field::Empty)
}

fn traceparent(span: &Span) -> String {
    if span.is_none() {
        return String::new();
    }
    let mut metadata = MetadataMap::new();
    span.in_scope(|| wire::telemetry::inject(&mut metadata));
    metadata.get("traceparent").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}
