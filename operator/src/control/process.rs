//! What one process said, newest first kept only.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;
use wire::proto::{self, report};

use super::{Role, Version, WorkerPhase, state::StreamId};

/// Models that a process may speak of, at most.
const MAX_MODELS: usize = 16_384;
/// Layers, experts of a layer and suspects of a process that are kept, at most.
const MAX_LAYERS: usize = 512;
const MAX_EXPERTS: usize = 4096;
const MAX_SUSPECTS: usize = 4096;
/// Characters of a failure that are kept, at most.
const MAX_FAILURE: usize = 4096;

pub(super) struct Process {
    pub(super) hello: proto::Hello,
    /// Its newest stream, while that is open.
    pub(super) stream: Option<StreamId>,
    /// When it last said anything.
    pub(super) last: Instant,
    pub(super) state: Option<proto::WorkerState>,
    pub(super) worker_load: Option<(Instant, proto::WorkerLoad)>,
    pub(super) router_load: Option<(Instant, BTreeMap<String, proto::ModelLoad>)>,
    pub(super) progress: Option<proto::Progress>,
    pub(super) description: Option<(Instant, Vec<u8>)>,
    pub(super) failure: Option<proto::Failure>,
    pub(super) acknowledged: BTreeMap<String, Version>,
    /// Ids of peers that this one does not ask now.
    pub(super) suspects: BTreeSet<String>,
    /// Rows by layer and expert.
    pub(super) experts: ExpertRows,
}

/// Rows that a worker's requests gave to experts: what it said last, and how many lately.
#[derive(Debug, Default)]
pub(super) struct ExpertRows {
    pub(super) said: BTreeMap<u32, Vec<u64>>,
    /// Each report counts a tenth less than the next one.
    pub(super) lately: BTreeMap<u32, Vec<u64>>,
    /// How many there were when the reconciler was told last.
    looked_at: u64,
}

impl ExpertRows {
    /// Takes in what was counted since the process started, and says whether the reconciler must look: soon after the
    /// first rows, and ever more rarely. What changes later is seen when it looks for another reason.
    fn hear(&mut self, load: proto::ExpertLoad) -> Heard {
        for proto::LayerLoad { layer, rows } in load.layers.into_iter().take(MAX_LAYERS) {
            let rows: Vec<u64> = rows.into_iter().take(MAX_EXPERTS).collect();
            let before = self.said.entry(layer).or_default();
            let lately = self.lately.entry(layer).or_default();
            lately.resize(rows.len(), 0);
            for (expert, (lately, rows)) in lately.iter_mut().zip(&rows).enumerate() {
                let new = rows.saturating_sub(before.get(expert).copied().unwrap_or(0));
                *lately = (*lately - *lately / 10).saturating_add(new);
            }
            *before = rows;
        }
        let all = self.said.values().flatten().fold(0_u64, |sum, rows| sum.saturating_add(*rows));
        if all < self.looked_at.saturating_mul(2).max(1) {
            return Heard::Nothing;
        }
        self.looked_at = all;
        Heard::Matters
    }
}

/// What a report means for others.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Nothing,
    /// The reconciler must look.
    Matters,
    /// The reconciler must look, and snapshots may change.
    Snapshot,
    /// A snapshot is acted on.
    Acknowledged {
        model: String,
        epoch: u64,
    },
    /// Requests began to wait for these models.
    Waiting(Vec<String>),
}

impl Process {
    pub(super) fn new(hello: proto::Hello, stream: StreamId, now: Instant) -> Self {
        Self {
            hello,
            stream: Some(stream),
            last: now,
            state: None,
            worker_load: None,
            router_load: None,
            progress: None,
            description: None,
            failure: None,
            acknowledged: BTreeMap::new(),
            suspects: BTreeSet::new(),
            experts: ExpertRows::default(),
        }
    }

    /// Continues what the same process said on an earlier stream, where it has not said anything newer. Of a reader that
    /// was started again, only why it could not go on: a failure that is tried again stands until it is overcome.
    pub(super) fn take_over(&mut self, before: Self) {
        if before.hello.process != self.hello.process {
            let overcome = self.progress.is_some() || self.description.is_some();
            if matches!(self.hello.role(), Role::Fetch | Role::Describe) && !overcome {
                self.failure = self.failure.take().or(before.failure);
            }
            return;
        }
        self.state = self.state.take().or(before.state);
        self.worker_load = self.worker_load.take().or(before.worker_load);
        self.router_load = self.router_load.take().or(before.router_load);
        self.progress = self.progress.take().or(before.progress);
        self.description = self.description.take().or(before.description);
        self.failure = self.failure.take().or(before.failure);
        if self.suspects.is_empty() {
            self.suspects = before.suspects;
        }
        if self.experts.said.is_empty() {
            self.experts = before.experts;
        }
        for (model, version) in before.acknowledged {
            self.acknowledged.entry(model).or_insert(version);
        }
    }

    pub(super) fn phase(&self) -> WorkerPhase {
        self.state.as_ref().map_or(WorkerPhase::Unspecified, proto::WorkerState::phase)
    }

    /// Said that it has no request of its own.
    pub(super) fn is_idle(&self) -> bool {
        self.worker_load.as_ref().is_some_and(|(_, load)| load.waiting + load.running == 0)
    }

    pub(super) fn highest_acknowledged(&self) -> u64 {
        self.acknowledged.values().map(|version| version.epoch).max().unwrap_or(0)
    }

    pub(super) fn forget_model(&mut self, model: &str) {
        self.acknowledged.remove(model);
        if let Some((_, load)) = &mut self.router_load {
            load.remove(model);
        }
    }

    /// Keeps a report; a hello is none.
    pub(super) fn hear(&mut self, report: report::Report, now: Instant) -> Heard {
        self.last = now;
        match report {
            report::Report::Hello(_) => Heard::Nothing,
            report::Report::Acknowledgement(acknowledgement) => self.hear_acknowledgement(acknowledgement),
            report::Report::RouterLoad(load) if self.hello.role() == Role::Router => self.hear_router_load(load, now),
            report::Report::RouterLoad(_) => Heard::Nothing,
            report::Report::ExpertLoad(load) => self.experts.hear(load),
            report::Report::Suspects(suspects) => {
                let suspects: BTreeSet<String> = suspects.ids.into_iter().take(MAX_SUSPECTS).collect();
                let matters = self.suspects != suspects;
                self.suspects = suspects;
                if matters { Heard::Matters } else { Heard::Nothing }
            }
            report::Report::WorkerLoad(load) => {
                let was_idle = self.is_idle();
                self.worker_load = Some((now, load));
                let matters = self.phase() == WorkerPhase::Draining && was_idle != self.is_idle();
                if matters { Heard::Snapshot } else { Heard::Nothing }
            }
            report::Report::WorkerState(state) => {
                if self.state.as_ref() == Some(&state) {
                    return Heard::Nothing;
                }
                self.state = Some(state);
                self.failure = None;
                Heard::Snapshot
            }
            report::Report::Description(description) => {
                self.description = Some((now, description.json.into()));
                self.failure = None;
                Heard::Matters
            }
            report::Report::Progress(progress) => {
                let shown = |progress: &proto::Progress| (progress.phase, tenths(progress));
                let matters = self.progress.as_ref().map(shown) != Some(shown(&progress));
                self.progress = Some(progress);
                let matters = self.failure.take().is_some() || matters;
                if matters { Heard::Matters } else { Heard::Nothing }
            }
            report::Report::Failure(mut failure) => {
                failure.reason = failure.reason.chars().take(64).collect();
                failure.message = failure.message.chars().take(MAX_FAILURE).collect();
                self.failure = Some(failure);
                Heard::Matters
            }
        }
    }

    fn hear_acknowledgement(&mut self, acknowledgement: proto::Acknowledgement) -> Heard {
        let version = Version::from(acknowledgement.version.unwrap_or_default());
        let model = acknowledgement.model;
        let known = self.acknowledged.get(&model).copied();
        if known.is_some_and(|known| known >= version) || (known.is_none() && self.acknowledged.len() >= MAX_MODELS) {
            return Heard::Nothing;
        }
        self.acknowledged.insert(model.clone(), version);
        Heard::Acknowledged { model, epoch: version.epoch }
    }

    fn hear_router_load(&mut self, load: proto::RouterLoad, now: Instant) -> Heard {
        let fresh: BTreeMap<String, proto::ModelLoad> =
            load.models.into_iter().take(MAX_MODELS).map(|load| (load.model.clone(), load)).collect();
        let queued_before = |model: &str| {
            self.router_load.as_ref().and_then(|(_, known)| known.get(model)).is_some_and(|load| load.queued > 0)
        };
        let begun = fresh.values().filter(|load| load.queued > 0 && !queued_before(&load.model));
        let begun: Vec<String> = begun.map(|load| load.model.clone()).collect();
        self.router_load = Some((now, fresh));
        if begun.is_empty() { Heard::Nothing } else { Heard::Waiting(begun) }
    }
}

fn tenths(progress: &proto::Progress) -> u128 {
    u128::from(progress.done_bytes) * 10 / u128::from(progress.total_bytes.max(1))
}
