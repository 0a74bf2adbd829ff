//! Keeps in memory what the newest snapshot says: loads what is new, then forgets what is not named any more. Holds for a
//! while what nobody else answers for.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use engine::{Error, Experts};
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};
use wire::proto::Version;

use super::standing::Board;
use crate::{
    mesh::{Mesh, Meshes},
    metrics::Metrics,
};

/// How soon experts that could not be read are tried again, if no other snapshot comes.
const READ_AGAIN: Duration = Duration::from_secs(5);
/// How often it is looked whether experts that others lost have their holders back.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What a keeper works with.
pub struct Keeping {
    /// Index of the replica.
    pub replica: u32,
    /// Index in the replica.
    pub ordinal: u32,
    /// Who holds what.
    pub meshes: Meshes,
    /// What is here.
    pub experts: Arc<Experts>,
    /// Told the newest version whose experts are all here.
    pub loaded: watch::Sender<Option<Version>>,
    /// Says who is not there.
    pub board: Board,
    /// Layer and number of experts that nobody answers for.
    pub wanted: mpsc::Receiver<(u32, u32)>,
    /// Bytes that are left for such experts.
    pub room: Box<dyn Fn() -> u64 + Send + Sync>,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

/// Follows the placement of one worker.
pub struct Keeper {
    with: Keeping,
    newest: watch::Receiver<Arc<Mesh>>,
    suspects: watch::Receiver<BTreeSet<String>>,
    /// Held because nobody else did.
    adopted: BTreeSet<(u32, u32)>,
    /// Not adopted for want of room, and said so.
    refused: BTreeSet<(u32, u32)>,
}

impl Keeper {
    /// Begins with the newest snapshot.
    pub fn new(with: Keeping) -> Self {
        let (newest, suspects) = (with.meshes.follow(), with.board.suspects());
        Self { newest, suspects, with, adopted: BTreeSet::new(), refused: BTreeSet::new() }
    }

    /// Follows snapshots for ever.
    ///
    /// 1. Loads what the newest one names, beside the steps that run.
    /// 2. Says so, once all of it is here.
    /// 3. Forgets what it does not name, once no step of ours runs on an older one.
    /// 4. Until the next one: adopts experts that nobody answers for where memory allows, until their holders are back.
    ///
    /// # Guarantees
    /// A newer snapshot ends each of these at once, so any order, repeat or skip of snapshots ends in the same place.
    pub async fn follow(mut self) {
        loop {
            let mesh = self.newest.borrow_and_update().clone();
            if let Err(error) = self.load(&mesh).await {
                error!(error = &error as &dyn std::error::Error, "could not load experts of the placement");
                tokio::select! {
                    () = tokio::time::sleep(READ_AGAIN) => {}
                    _ = self.newest.changed() => {}
                }
                continue;
            }
            if self.is_old() {
                continue;
            }
            self.with.loaded.send_replace(Some(mesh.version));
            self.with.board.bump();
            tokio::select! {
                () = self.with.meshes.in_use_everywhere(&mesh) => self.forget(&mesh),
                Ok(()) = self.newest.changed() => continue,
            }
            self.adopt_until_changed(&mesh).await;
        }
    }

    fn is_old(&self) -> bool {
        self.newest.has_changed().unwrap_or(false)
    }

    /// On a thread that may block; gives up for a newer snapshot.
    async fn load(&self, mesh: &Mesh) -> Result<(), Error> {
        let held = mesh.held(self.with.ordinal);
        self.with.experts.check_held(&held)?;
        let missing = self.with.experts.missing(&held);
        if missing.is_empty() {
            return Ok(());
        }
        let (experts, newest, count) = (self.with.experts.clone(), self.newest.clone(), missing.len());
        let is_old = move || newest.has_changed().unwrap_or(false);
        let loaded = blocking(move || {
            missing.into_iter().take_while(|_| !is_old()).try_for_each(|(layer, expert)| experts.load(layer, expert))
        });
        let loaded = loaded.await;
        self.with.metrics.experts(self.with.experts.weight());
        info!(experts = count, "loaded experts");
        loaded
    }

    /// Forgets what neither the mesh names nor others lost.
    fn forget(&mut self, mesh: &Mesh) {
        let held = mesh.held(self.with.ordinal);
        let beyond = self.with.experts.beyond(&held).into_iter();
        let lost = |&(layer, expert): &(usize, usize)| !self.adopted.contains(&(layer as u32, expert as u32));
        let forgotten: Vec<_> = beyond.filter(lost).collect();
        for &(layer, expert) in &forgotten {
            self.with.experts.forget(layer, expert);
        }
        if !forgotten.is_empty() {
            self.with.metrics.experts(self.with.experts.weight());
            info!(experts = forgotten.len(), "forgot experts");
        }
    }

    async fn adopt_until_changed(&mut self, mesh: &Mesh) {
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.reset();
        loop {
            tokio::select! {
                _ = self.newest.changed() => return self.newest.mark_changed(),
                Some((layer, expert)) = self.with.wanted.recv() => self.adopt(layer, expert).await,
                _ = look.tick(), if !self.adopted.is_empty() => self.give_back(mesh),
            }
        }
    }

    /// Loads an expert that nobody answers for, if there is room.
    async fn adopt(&mut self, layer: u32, expert: u32) {
        let (experts, at) = (self.with.experts.clone(), (layer as usize, expert as usize));
        if experts.holds(at.0, at.1) {
            return;
        }
        let (need, left) = (experts.weigh(at.0, at.1), (self.with.room)());
        if need.as_ref().is_ok_and(|&need| need > left) {
            if self.refused.insert((layer, expert)) {
                warn!(layer, expert, left, "nobody holds an expert, and there is no room for it here");
            }
            return;
        }
        match blocking(move || experts.load(at.0, at.1)).await {
            Ok(()) => {
                self.adopted.insert((layer, expert));
                self.refused.remove(&(layer, expert));
                self.with.metrics.adopted();
                self.with.metrics.experts(self.with.experts.weight());
                self.with.board.bump();
                warn!(layer, expert, "nobody holds an expert: loaded it here");
            }
            Err(error) => {
                error!(error = &error as &dyn std::error::Error, layer, expert, "could not load a lost expert");
            }
        }
    }

    /// Forgets adopted experts that have a holder again.
    fn give_back(&mut self, mesh: &Mesh) {
        let suspects = self.suspects.borrow().clone();
        let ours = mesh.peers.iter().filter(|peer| peer.replica == self.with.replica && peer.loaded);
        let there = ours.filter(|peer| !suspects.contains(&peer.id)).map(|peer| peer.ordinal);
        let there: BTreeSet<u32> = there.filter(|&ordinal| ordinal != self.with.ordinal).collect();
        let back = |&(layer, expert): &(u32, u32)| {
            mesh.placement.holders(layer, expert).iter().any(|ordinal| there.contains(ordinal))
        };
        self.adopted.retain(|lost| !back(lost));
        self.forget(mesh);
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|ended| std::panic::resume_unwind(ended.into_panic()))
}

#[cfg(test)]
mod tests;
