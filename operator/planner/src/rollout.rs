//! Which replicas are made, drained, taken back and deleted: one answer for rollouts, scaling and both at once.

use std::fmt;

use crate::units::Millis;

/// A replica of a revision.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId {
    /// What it runs.
    pub revision: String,
    /// Its number within the revision.
    pub index: u32,
}

/// What is known of a replica that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Which one.
    pub id: ReplicaId,
    /// How it is.
    pub state: State,
    /// Requests that run on it, as far as known.
    pub running: u64,
}

/// How a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A worker is missing, loads, or is not routed yet.
    Starting,
    /// All workers are ready and every router knows them.
    Ready,
    /// It is going: routers send nothing new to it. It can be taken back.
    Draining {
        /// When that began.
        since: Millis,
        /// Whether every router knows and nothing runs on it any more.
        empty: bool,
    },
}

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The revision that all replicas should run.
    pub revision: String,
    /// How many.
    pub replicas: u32,
    /// Replicas above that number, while something changes.
    pub max_surge: u32,
    /// Replicas that may be missing, while something changes. Not 0 together with `max_surge`.
    pub max_unavailable: u32,
    /// How long a draining replica may finish its requests.
    pub drain_timeout: Millis,
}

/// What is to be done now. All of it may be done at once; then ask again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Drained, or out of time: their objects go.
    pub delete: Vec<ReplicaId>,
    /// Draining, and wanted again.
    pub take_back: Vec<ReplicaId>,
    /// To be made.
    pub create: Vec<ReplicaId>,
    /// To be marked as draining.
    pub drain: Vec<ReplicaId>,
    /// What it comes to.
    pub why: Why,
}

/// What a step comes to, or waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Why {
    /// Exactly the wanted replicas exist, and are ready.
    #[default]
    Complete,
    /// Replicas are made or taken back.
    Growing,
    /// Replicas begin to drain, or go.
    Shrinking,
    /// Replicas of the wanted revision are not ready yet.
    Loading {
        /// How many.
        replicas: u32,
    },
    /// Replicas finish their requests.
    Draining {
        /// How many.
        replicas: u32,
    },
}

/// Decides what is to be done now.
///
/// 1. *Delete* what is drained or out of time.
/// 2. *Grow* the wanted revision: first take back its draining replicas, then make new ones, while all replicas
///    together, draining ones too, stay within `replicas + max_surge`.
/// 3. *Shrink*: drain surplus replicas of the wanted revision, then others, while `replicas - max_unavailable` stay
///    ready. Ones that are not ready go before ones that are, then those with the least to do.
///
/// # Guarantees
/// Never more than `replicas + max_surge` are made. No step makes fewer ready than `replicas - max_unavailable`
/// demands. Nothing is deleted that did not drain. A replica of another revision that is not ready is not given up
/// for one that is not ready either, so a bad revision leaves the old one alone. Asked again without a change, the
/// answer is to wait.
/// # Assumptions
/// Ids are distinct; `max_surge + max_unavailable > 0`.
pub fn next_step(wanted: &Wanted, replicas: &[Replica], now: Millis) -> Step {
    let mut seen = Seen::new(wanted, replicas, now);
    let mut step = Step { delete: seen.delete_drained(), ..Step::default() };
    step.take_back = seen.take_back();
    step.create = seen.create();
    step.drain = seen.drain_surplus();
    step.drain.extend(seen.drain_others());
    step.why = seen.why(&step);
    step
}

/// The replicas, sorted by what can become of them, as the phases change them.
struct Seen<'a> {
    wanted: &'a Wanted,
    now: Millis,
    /// Of the wanted revision, not draining.
    new: Vec<&'a Replica>,
    /// Of other revisions, not draining.
    old: Vec<&'a Replica>,
    /// Draining, of any revision.
    draining: Vec<&'a Replica>,
    /// Replicas that this step makes.
    created: u32,
    indices: Vec<u32>,
}

impl<'a> Seen<'a> {
    fn new(wanted: &'a Wanted, replicas: &'a [Replica], now: Millis) -> Self {
        let is_draining = |r: &&Replica| matches!(r.state, State::Draining { .. });
        let is_new = |r: &&Replica| r.id.revision == wanted.revision;
        let (draining, active): (Vec<_>, Vec<_>) = replicas.iter().partition(is_draining);
        let (new, old) = active.into_iter().partition(is_new);
        let indices = replicas.iter().filter(is_new).map(|r| r.id.index).collect();
        Seen { wanted, now, new, old, draining, created: 0, indices }
    }

    fn delete_drained(&mut self) -> Vec<ReplicaId> {
        let (timeout, now) = (self.wanted.drain_timeout, self.now);
        let done = |r: &&Replica| match r.state {
            State::Draining { since, empty } => empty || now.since(since) >= timeout,
            State::Starting | State::Ready => false,
        };
        let (gone, draining) = std::mem::take(&mut self.draining).into_iter().partition(done);
        self.draining = draining;
        ids(gone)
    }

    fn take_back(&mut self) -> Vec<ReplicaId> {
        let missing = self.wanted.replicas.saturating_sub(count(&self.new)) as usize;
        let is_new = |r: &&Replica| r.id.revision == self.wanted.revision;
        let (mut back, mut rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.draining).into_iter().partition(is_new);
        back.sort_by_key(|r| r.id.index);
        rest.extend(back.split_off(missing.min(back.len())));
        self.draining = rest;
        self.new.extend(&back);
        ids(back)
    }

    fn create(&mut self) -> Vec<ReplicaId> {
        let all = count(&self.new) + count(&self.old) + count(&self.draining);
        let ceiling = self.wanted.replicas.saturating_add(self.wanted.max_surge);
        let missing = self.wanted.replicas.saturating_sub(count(&self.new));
        self.created = missing.min(ceiling.saturating_sub(all));
        let free = (0..).filter(|index| !self.indices.contains(index));
        let id = |index| ReplicaId { revision: self.wanted.revision.clone(), index };
        free.take(self.created as usize).map(id).collect()
    }

    fn drain_surplus(&mut self) -> Vec<ReplicaId> {
        let surplus = count(&self.new).saturating_sub(self.wanted.replicas) as usize;
        self.new.sort_by_key(|r| least_loss(r));
        let mut kept = self.new.split_off(surplus);
        // With other revisions about, a ready one may still carry what they do not.
        let floor = self.floor();
        let mut ready = count_ready(&self.new) + count_ready(&kept) + count_ready(&self.old);
        let mut going = Vec::new();
        for replica in std::mem::take(&mut self.new) {
            let is_ready = replica.state == State::Ready;
            if is_ready && ready <= floor {
                kept.push(replica);
                continue;
            }
            ready -= u32::from(is_ready);
            going.push(replica);
        }
        self.new = kept;
        ids(going)
    }

    fn drain_others(&mut self) -> Vec<ReplicaId> {
        self.old.sort_by_key(|r| least_loss(r));
        let floor = self.floor();
        let new_ready = count_ready(&self.new);
        let mut ready = new_ready + count_ready(&self.old);
        let (mut left, mut going) = (count(&self.old), Vec::new());
        for replica in &self.old {
            let spared = match replica.state {
                State::Ready => ready > floor,
                // Not ready, it may come back; it goes once enough is left that could serve without it.
                State::Starting | State::Draining { .. } => ready >= floor || new_ready + left > floor,
            };
            if !spared {
                continue;
            }
            ready -= u32::from(replica.state == State::Ready);
            left -= 1;
            going.push(*replica);
        }
        self.old.retain(|replica| !going.contains(replica));
        ids(going)
    }

    /// The ready replicas that must stay.
    fn floor(&self) -> u32 {
        self.wanted.replicas.saturating_sub(self.wanted.max_unavailable)
    }

    fn why(&self, step: &Step) -> Why {
        let loading = count(&self.new) - count_ready(&self.new);
        if !step.create.is_empty() || !step.take_back.is_empty() {
            Why::Growing
        } else if !step.drain.is_empty() || !step.delete.is_empty() {
            Why::Shrinking
        } else if loading > 0 {
            Why::Loading { replicas: loading }
        } else if !self.draining.is_empty() {
            Why::Draining { replicas: count(&self.draining) }
        } else {
            Why::Complete
        }
    }
}

/// What costs least goes first: not ready, then idle, then the highest index.
fn least_loss(replica: &Replica) -> (bool, u64, std::cmp::Reverse<u32>) {
    (replica.state == State::Ready, replica.running, std::cmp::Reverse(replica.id.index))
}

fn count(replicas: &[&Replica]) -> u32 {
    replicas.len() as u32
}

fn count_ready(replicas: &[&Replica]) -> u32 {
    replicas.iter().filter(|r| r.state == State::Ready).count() as u32
}

fn ids(replicas: Vec<&Replica>) -> Vec<ReplicaId> {
    replicas.into_iter().map(|r| r.id.clone()).collect()
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.revision, self.index)
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Complete => f.write_str("complete"),
            Why::Growing => f.write_str("growing"),
            Why::Shrinking => f.write_str("shrinking"),
            Why::Loading { replicas } => write!(f, "{replicas} loading"),
            Why::Draining { replicas } => write!(f, "{replicas} draining"),
        }
    }
}

impl fmt::Display for Step {
    /// `delete a-0, make b-1 (growing)`, or `wait (1 loading)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts =
            [("delete", &self.delete), ("take back", &self.take_back), ("make", &self.create), ("drain", &self.drain)];
        let text = |(verb, ids): &(&str, &Vec<ReplicaId>)| {
            let ids: Vec<String> = ids.iter().map(ReplicaId::to_string).collect();
            format!("{verb} {}", ids.join(" "))
        };
        let done: Vec<String> = parts.iter().filter(|(_, ids)| !ids.is_empty()).map(text).collect();
        let done = if done.is_empty() { "wait".to_owned() } else { done.join(", ") };
        write!(f, "{done} ({})", self.why)
    }
}
