//! What the fleet said, and what it was told: bookkeeping without IO; the time is an argument.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    time::Duration,
};

use tokio::time::Instant;
use wire::proto::{self, Instruction, instruction, report};

use super::{
    FleetView, Identity, LEASE, ModelFacts, Role, Version, WorkerPhase,
    model::Model,
    process::{Heard, Process},
    snapshot::{Word, Words},
};

/// Streams whose hello does not count (yet), at most.
const MAX_STRANGERS: usize = 1024;
/// Instructions that are made for a stream at a time, at most.
const BATCH: usize = 32;
/// Two that both lead raise their epochs at most this often, until one of them has lost its lease.
const RAISE_PAUSE: Duration = Duration::from_secs(3);

pub(super) type StreamId = u64;

/// A process in one role: a worker's pod fetches first, with the same id.
type Key = (Role, String);

/// Why a stream must end.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum Rejection {
    #[error("the first report must be a hello with a role and an id")]
    NoHello,
    #[error("a stream has one hello")]
    SecondHello,
    #[error("too many processes that nobody expects are connected")]
    Crowded,
    #[error("a report without content")]
    Empty,
}

#[derive(Default)]
pub(super) struct State {
    lead: Option<Lead>,
    /// The highest epoch that a process has heard, or in which this one led.
    heard_epoch: u64,
    expected: HashMap<String, Option<IpAddr>>,
    streams: HashMap<StreamId, Stream>,
    last_stream: StreamId,
    processes: BTreeMap<Key, Process>,
    live_routers: BTreeSet<String>,
    effects: Effects,
}

struct Lead {
    epoch: u64,
    raised: Option<Instant>,
    models: BTreeMap<String, Model>,
    /// All models that exist; `None` until the reconciler knows.
    all: Option<BTreeSet<String>>,
}

struct Stream {
    ip: Option<IpAddr>,
    who: Who,
}

enum Who {
    /// Said nothing yet.
    Silent,
    /// Said hello; not expected.
    Stranger(Box<Process>),
    /// Expected.
    Known(Key),
}

/// What a change asks of the shell around.
#[derive(Default)]
pub(super) struct Effects {
    /// Some stream may have something to be sent.
    pub(super) speak: bool,
    /// Models that the reconciler must look at.
    pub(super) heard: BTreeSet<String>,
}

/// What a stream was sent.
#[derive(Default)]
pub(super) struct Told {
    models: HashMap<String, Version>,
    mesh: Option<Version>,
    synced: Option<u64>,
}

impl State {
    pub(super) fn take_effects(&mut self) -> Effects {
        std::mem::take(&mut self.effects)
    }

    pub(super) fn epoch(&self) -> Option<u64> {
        self.lead.as_ref().map(|lead| lead.epoch)
    }

    pub(super) fn lead(&mut self, epoch: u64) {
        if self.lead.is_none() {
            let epoch = epoch.max(self.heard_epoch.saturating_add(1));
            self.heard_epoch = epoch;
            self.lead = Some(Lead { epoch, raised: None, models: BTreeMap::new(), all: None });
        }
    }

    pub(super) fn follow(&mut self) {
        self.lead = None;
    }

    pub(super) fn publish(&mut self, name: &str, facts: ModelFacts) {
        let Some(lead) = &mut self.lead else { return };
        if let Some(all) = &mut lead.all {
            all.insert(name.to_owned());
        }
        match lead.models.get_mut(name) {
            Some(model) => model.facts = facts,
            None => {
                lead.models.insert(name.to_owned(), Model::new(facts));
                self.effects.speak = true; // routers may have waited for this one, to be synced
            }
        }
        self.refresh(name);
    }

    pub(super) fn remove(&mut self, name: &str) {
        let Some(lead) = &mut self.lead else { return };
        if let Some(all) = &mut lead.all {
            all.remove(name);
        }
        lead.models.remove(name);
        self.effects.speak = true;
        for process in self.processes.values_mut() {
            process.forget_model(name);
        }
    }

    pub(super) fn synced(&mut self, models: BTreeSet<String>) {
        let Some(lead) = &mut self.lead else { return };
        lead.all = Some(models);
        self.effects.speak = true;
    }

    pub(super) fn expect(&mut self, identities: impl IntoIterator<Item = Identity>, now: Instant) {
        self.expected = identities.into_iter().map(|identity| (identity.id, identity.ip)).collect();
        let expected = &self.expected;
        let gone = self.processes.extract_if(.., |(_, id), _| !expected.contains_key(id));
        let gone: Vec<Process> = gone.map(|(_, process)| process).collect();
        for process in gone {
            process.stream.inspect(|stream| drop(self.streams.remove(stream)));
            self.touch(&process);
        }
        let strangers = self.streams.iter().filter(|(_, stream)| matches!(stream.who, Who::Stranger(_)));
        let mut strangers: Vec<StreamId> = strangers.map(|(id, _)| *id).collect();
        strangers.sort_unstable();
        for stream in strangers {
            self.admit(stream, now);
        }
        self.look_at_leases(now);
        self.effects.speak = true; // streams of those that are gone must end
    }

    pub(super) fn open(&mut self, ip: Option<IpAddr>) -> StreamId {
        self.last_stream += 1;
        self.streams.insert(self.last_stream, Stream { ip, who: Who::Silent });
        self.last_stream
    }

    pub(super) fn close(&mut self, stream: StreamId) {
        let Some(Stream { who: Who::Known(key), .. }) = self.streams.remove(&stream) else {
            return;
        };
        let Some(process) = self.processes.get_mut(&key) else {
            return;
        };
        if process.stream == Some(stream) {
            process.stream = None;
            let model = process.hello.model.clone();
            self.effects.heard.insert(model);
        }
    }

    /// Whether the stream's hello counts.
    pub(super) fn is_known(&self, stream: StreamId) -> bool {
        matches!(self.streams.get(&stream), Some(Stream { who: Who::Known(_), .. }))
    }

    /// Takes a report in.
    ///
    /// # Errors
    /// A [`Rejection`] if the stream breaks the protocol; it must end then.
    pub(super) fn report(&mut self, id: StreamId, report: proto::Report, now: Instant) -> Result<(), Rejection> {
        let report = report.report.ok_or(Rejection::Empty)?;
        let strangers = self.streams.values().filter(|stream| !matches!(stream.who, Who::Known(_))).count();
        let Some(stream) = self.streams.get_mut(&id) else {
            return Ok(());
        };
        match (&mut stream.who, report) {
            (Who::Silent, report::Report::Hello(hello)) => {
                if hello.id.is_empty() || hello.role() == Role::Unspecified {
                    return Err(Rejection::NoHello);
                }
                if strangers > MAX_STRANGERS {
                    return Err(Rejection::Crowded);
                }
                stream.who = Who::Stranger(Box::new(Process::new(hello, id, now)));
                self.admit(id, now);
            }
            (Who::Silent, _) => return Err(Rejection::NoHello),
            (_, report::Report::Hello(_)) => return Err(Rejection::SecondHello),
            (Who::Stranger(process), report) => drop(process.hear(report, now)),
            (Who::Known(key), report) => {
                let key = key.clone();
                self.hear(&key, id, report, now);
            }
        }
        Ok(())
    }

    /// Looks at what ends with time: leases of routers, and the pause before the next raise of the epoch.
    pub(super) fn tick(&mut self, now: Instant) {
        self.look_at_leases(now);
        self.rise_above(now);
    }

    pub(super) fn seen(&self, name: &str, now: Instant) -> FleetView {
        let model = self.lead.as_ref().and_then(|lead| lead.models.get(name));
        super::view::of(name, model, &self.processes, &self.live_routers, now)
    }

    /// Rows that each worker's requests gave to experts since it started, by its id; without those that told none yet.
    pub(super) fn rows(&self, name: &str) -> BTreeMap<String, BTreeMap<u32, Vec<u64>>> {
        let workers = self.processes.iter().filter(|((role, _), _)| *role == Role::Worker);
        let told = workers.filter(|(_, worker)| worker.hello.model == name && !worker.experts.said.is_empty());
        told.map(|((_, id), worker)| (id.clone(), worker.experts.said.clone())).collect()
    }

    /// The next instructions for a stream, at most [`BATCH`], marked as told; `None` if the stream must end.
    pub(super) fn unsaid(&self, stream: StreamId, told: &mut Told) -> Option<Vec<Instruction>> {
        let Who::Known(key) = &self.streams.get(&stream)?.who else {
            return Some(Vec::new());
        };
        let process = self.processes.get(key)?;
        if process.stream != Some(stream) {
            return None; // the same process has opened another
        }
        let Some(lead) = &self.lead else {
            return Some(Vec::new());
        };
        Some(match key.0 {
            Role::Router => lead.for_router(&key.1, told),
            Role::Worker => lead.for_worker(&process.hello.model, &key.1, told),
            Role::Fetch | Role::Describe | Role::Unspecified => Vec::new(),
        })
    }
}

impl State {
    /// Lets a stranger in if it is expected from where it is.
    fn admit(&mut self, id: StreamId, now: Instant) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let Who::Stranger(process) = &stream.who else {
            return;
        };
        let key: Key = (process.hello.role(), process.hello.id.clone());
        match self.expected.get(&key.1) {
            Some(None) => {}
            Some(expected) if *expected == stream.ip => {}
            _ => return,
        }
        let Who::Stranger(mut process) = std::mem::replace(&mut stream.who, Who::Known(key.clone())) else {
            return;
        };
        let before = self.processes.remove(&key);
        self.hear_epoch(&process, before.as_ref());
        if let Some(before) = before {
            process.take_over(before);
        }
        self.touch(&process);
        self.processes.insert(key, *process);
        self.effects.speak = true;
        self.look_at_leases(now);
        self.rise_above(now);
    }

    /// Takes in which epoch a process has heard, on its first stream or a later one.
    fn hear_epoch(&mut self, process: &Process, before: Option<&Process>) {
        let heard = process.hello.epoch.max(process.highest_acknowledged());
        // The Lease counts holders, so two leaders after each other can come to one epoch. A process that has ours before
        // it heard us has it from the other, and would take what we say for old.
        let is_new = before.is_none_or(|before| before.hello.process != process.hello.process);
        let is_anothers = is_new && self.lead.as_ref().is_some_and(|lead| lead.epoch == heard);
        self.heard_epoch = self.heard_epoch.max(heard.saturating_add(u64::from(is_anothers)));
    }

    fn hear(&mut self, key: &Key, stream: StreamId, report: report::Report, now: Instant) {
        let Some(process) = self.processes.get_mut(key).filter(|process| process.stream == Some(stream)) else {
            return;
        };
        let heard = process.hear(report, now);
        let model = process.hello.model.clone();
        match heard {
            Heard::Nothing => {}
            Heard::Matters => {
                self.effects.heard.insert(model);
            }
            Heard::Snapshot => {
                self.refresh(&model);
                self.effects.heard.insert(model);
            }
            Heard::Acknowledged { model, epoch } => {
                self.heard_epoch = self.heard_epoch.max(epoch);
                self.effects.heard.insert(model);
                self.rise_above(now);
            }
            Heard::Waiting(models) => self.touch_published(models),
        }
        if key.0 == Role::Router && !self.live_routers.contains(&key.1) {
            self.look_at_leases(now);
        }
    }

    /// The reconciler must look at what this process belongs to.
    fn touch(&mut self, process: &Process) {
        if process.hello.role() == Role::Router {
            self.touch_all();
        } else {
            self.effects.heard.insert(process.hello.model.clone());
            self.refresh(&process.hello.model);
        }
    }

    fn touch_published(&mut self, models: Vec<String>) {
        let Some(lead) = &self.lead else { return };
        self.effects.heard.extend(models.into_iter().filter(|model| lead.models.contains_key(model)));
    }

    fn touch_all(&mut self) {
        let names = self.lead.iter().flat_map(|lead| lead.models.keys().cloned());
        self.effects.heard.extend(names);
    }

    fn look_at_leases(&mut self, now: Instant) {
        let routers = self.processes.iter().filter(|((role, _), _)| *role == Role::Router);
        let live = routers.filter(|(_, router)| now.duration_since(router.last) <= LEASE);
        let live: BTreeSet<String> = live.map(|((_, id), _)| id.clone()).collect();
        if live != self.live_routers {
            self.live_routers = live;
            self.touch_all();
            self.refresh_all();
        }
    }

    /// Goes above an epoch that some process has heard from another leader.
    fn rise_above(&mut self, now: Instant) {
        let heard = self.heard_epoch;
        let Some(lead) = &mut self.lead else { return };
        if heard <= lead.epoch || lead.raised.is_some_and(|raised| now.duration_since(raised) < RAISE_PAUSE) {
            return;
        }
        lead.epoch = heard.saturating_add(1);
        lead.raised = Some(now);
        self.heard_epoch = lead.epoch;
        lead.models.values_mut().for_each(Model::forget_versions);
        self.effects.speak = true;
        self.refresh_all();
    }

    fn refresh_all(&mut self) {
        let names: Vec<String> = self.lead.iter().flat_map(|lead| lead.models.keys().cloned()).collect();
        for name in names {
            self.refresh(&name);
        }
    }

    fn refresh(&mut self, name: &str) {
        let Some(lead) = &mut self.lead else { return };
        let Some(model) = lead.models.get_mut(name) else {
            return;
        };
        let words = words(&self.processes, &model.facts);
        self.effects.speak |= model.refresh(name, lead.epoch, &words, &self.live_routers);
    }
}

/// What the model's workers said.
fn words(processes: &BTreeMap<Key, Process>, facts: &ModelFacts) -> Words {
    let workers = facts.replicas.iter().flat_map(|replica| &replica.workers);
    let spoken = workers.filter_map(|worker| {
        let process = processes.get(&(Role::Worker, worker.id.clone()))?;
        let word = Word {
            phase: process.phase(),
            address: process.hello.address.clone(),
            content_hash: process.hello.content_hash.clone(),
            idle: process.phase() == WorkerPhase::Draining && process.is_idle(),
        };
        Some((worker.id.clone(), word))
    });
    spoken.collect()
}

impl Lead {
    fn for_router(&self, id: &str, told: &mut Told) -> Vec<Instruction> {
        let mut instructions = Vec::new();
        for model in self.gone(told) {
            told.models.remove(&model);
            instructions.push(instruction::Instruction::Removed(proto::ModelRemoved { model }));
        }
        for (name, model) in &self.models {
            if instructions.len() >= BATCH {
                break;
            }
            let Some((version, snapshot)) = model.for_router(id) else {
                continue;
            };
            if told.models.get(name) != Some(&version) {
                told.models.insert(name.clone(), version);
                instructions.push(instruction::Instruction::Model(snapshot));
            }
        }
        let complete = self.all.as_ref().is_some_and(|all| all.iter().all(|name| self.models.contains_key(name)));
        if instructions.len() < BATCH && complete && told.synced != Some(self.epoch) {
            told.synced = Some(self.epoch);
            instructions.push(instruction::Instruction::Synced(proto::Synced {}));
        }
        instructions.into_iter().map(instruct).collect()
    }

    /// Models that a stream was told and that exist no more. One that is only not published yet is not among them.
    fn gone(&self, told: &Told) -> Vec<String> {
        let Some(all) = &self.all else {
            return Vec::new();
        };
        let exists = |name: &String| self.models.contains_key(name) || all.contains(name);
        told.models.keys().filter(|name| !exists(name)).cloned().collect()
    }

    fn for_worker(&self, model: &str, id: &str, told: &mut Told) -> Vec<Instruction> {
        let mesh = self.models.get(model).and_then(|model| model.for_worker(id));
        let news = mesh.filter(|(version, _)| told.mesh != Some(*version));
        let instruction = news.map(|(version, mesh)| {
            told.mesh = Some(version);
            instruct(instruction::Instruction::Mesh(mesh))
        });
        instruction.into_iter().collect()
    }
}

fn instruct(instruction: instruction::Instruction) -> Instruction {
    Instruction { instruction: Some(instruction) }
}
