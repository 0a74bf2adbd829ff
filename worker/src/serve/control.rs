//! The worker's end of the control stream: snapshots in, state and load out.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::{Stream, StreamExt as _};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tracing::info;
use wire::proto::{Acknowledgement, Hello, Instruction, Report, Suspects, Version, hello::Role, instruction, report};

use super::{Options, state::State};
use crate::mesh::Mesh;

const LOAD_EVERY: Duration = Duration::from_secs(1);
/// How often it is told which experts get the rows.
const EXPERTS_EVERY: Duration = Duration::from_secs(10);
/// How soon a change of state is told that no snapshot brought.
const STATE_EVERY: Duration = Duration::from_millis(100);

/// Opens control streams to all operators of `options`.
pub fn stream(
    options: &Options,
    reports: mpsc::Receiver<Report>,
) -> impl Stream<Item = Instruction> + Send + Unpin + use<> {
    let hello = Hello {
        role: Role::Worker.into(),
        id: options.id.clone(),
        process: process(),
        model: options.model.clone(),
        revision: options.revision.clone(),
        replica: options.replica,
        ordinal: options.ordinal,
        address: options.advertise.clone(),
        content_hash: options.content_hash.clone(),
        ..Hello::default()
    };
    wire::fleet::watch(options.operators.clone(), move || hello.clone(), reports)
}

/// Acts on instructions and reports, until the streams end.
pub async fn follow(
    mut instructions: impl Stream<Item = Instruction> + Send + Unpin,
    state: Arc<State>,
    reports: mpsc::Sender<Report>,
) {
    let mut loads = tokio::time::interval(LOAD_EVERY);
    let mut experts = tokio::time::interval(EXPERTS_EVERY);
    let mut states = tokio::time::interval(STATE_EVERY);
    let (mut told, mut suspected) = (None, Suspects::default());
    // not acknowledged yet: a step may still run on an older one
    let mut fresh: Option<Arc<Mesh>> = None;
    loop {
        let report = tokio::select! {
            instruction = instructions.next() => match instruction {
                Some(instruction) => {
                    fresh = act(instruction, &state).or(fresh);
                    None
                }
                None => return,
            },
            Some(version) = everywhere_in_use(fresh.as_deref(), &state) => {
                fresh = None;
                let version = Some(version);
                Some(report::Report::Acknowledgement(Acknowledgement { model: state.model.clone(), version }))
            }
            _ = loads.tick() => state.load().map(report::Report::WorkerLoad),
            _ = experts.tick() => state.expert_load().map(report::Report::ExpertLoad),
            _ = states.tick() => None,
        };
        let now = state.report();
        let changed = (told.as_ref() != Some(&now)).then(|| {
            told = Some(now);
            report::Report::WorkerState(now)
        });
        let suspects = state.suspects();
        let doubted = (suspected != suspects).then(|| {
            suspected = suspects.clone();
            report::Report::Suspects(suspects)
        });
        for report in report.into_iter().chain(changed).chain(doubted) {
            if reports.send(Report { report: Some(report) }).await.is_err() {
                return;
            }
        }
    }
}

/// Waits until no step runs on an older mesh than this one, if there is one.
async fn everywhere_in_use(mesh: Option<&Mesh>, state: &State) -> Option<Version> {
    state.meshes.in_use_everywhere(mesh?).await;
    Some(mesh?.version)
}

/// Takes the mesh of an instruction, if it has one that counts.
fn act(instruction: Instruction, state: &State) -> Option<Arc<Mesh>> {
    // the others are for routers
    let Some(instruction::Instruction::Mesh(snapshot)) = instruction.instruction else {
        return None;
    };
    if snapshot.model != state.model {
        return None;
    }
    let mesh = state.meshes.take(snapshot)?;
    info!(epoch = mesh.version.epoch, sequence = mesh.version.sequence, "new mesh");
    Some(mesh)
}

/// A name for this start of this process, which no other one has.
pub fn process() -> String {
    let nanos = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    let mut hash = Sha256::new();
    hash.update(nanos.to_le_bytes());
    hash.update(std::process::id().to_le_bytes());
    hash.update(std::env::var("HOSTNAME").unwrap_or_default());
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
