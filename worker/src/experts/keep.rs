//! Keeps in memory what the newest snapshot says: loads what is new, then forgets what is not named any more.

use std::{sync::Arc, time::Duration};

use engine::{Error, Experts};
use tokio::sync::watch;
use tracing::{error, info};
use wire::proto::Version;

use crate::{
    mesh::{Mesh, Meshes},
    metrics::Metrics,
};

/// How soon experts that could not be read are tried again, if no other snapshot comes.
const READ_AGAIN: Duration = Duration::from_secs(5);

/// Follows the placement of one worker.
pub struct Keeper {
    ordinal: u32,
    meshes: Meshes,
    newest: watch::Receiver<Arc<Mesh>>,
    experts: Arc<Experts>,
    loaded: watch::Sender<Option<Version>>,
    metrics: Arc<Metrics>,
}

impl Keeper {
    /// For the worker with this ordinal. `loaded` is told the newest version whose experts are all here.
    pub fn new(
        ordinal: u32,
        meshes: Meshes,
        experts: Arc<Experts>,
        loaded: watch::Sender<Option<Version>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { ordinal, newest: meshes.follow(), meshes, experts, loaded, metrics }
    }

    /// Follows snapshots for ever.
    ///
    /// 1. Loads what the newest one names, beside the steps that run.
    /// 2. Says so, once all of it is here.
    /// 3. Forgets what it does not name, once no step of ours runs on an older one.
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
            self.loaded.send_replace(Some(mesh.version));
            tokio::select! {
                () = self.meshes.in_use_everywhere(&mesh) => self.forget(&mesh),
                Ok(()) = self.newest.changed() => self.newest.mark_changed(),
            }
            if self.newest.changed().await.is_err() {
                return;
            }
            self.newest.mark_changed();
        }
    }

    fn is_old(&self) -> bool {
        self.newest.has_changed().unwrap_or(false)
    }

    /// On a thread that may block; gives up for a newer snapshot.
    async fn load(&self, mesh: &Mesh) -> Result<(), Error> {
        let held = mesh.held(self.ordinal);
        self.experts.check_held(&held)?;
        let missing = self.experts.missing(&held);
        if missing.is_empty() {
            return Ok(());
        }
        let (experts, newest, count) = (self.experts.clone(), self.newest.clone(), missing.len());
        let is_old = move || newest.has_changed().unwrap_or(false);
        let loading = tokio::task::spawn_blocking(move || {
            missing.into_iter().take_while(|_| !is_old()).try_for_each(|(layer, expert)| experts.load(layer, expert))
        });
        let loaded = loading.await.unwrap_or_else(|ended| std::panic::resume_unwind(ended.into_panic()));
        self.metrics.experts(self.experts.weight());
        info!(experts = count, "loaded experts");
        loaded
    }

    fn forget(&self, mesh: &Mesh) {
        let beyond = self.experts.beyond(&mesh.held(self.ordinal));
        for &(layer, expert) in &beyond {
            self.experts.forget(layer, expert);
        }
        if !beyond.is_empty() {
            self.metrics.experts(self.experts.weight());
            info!(experts = beyond.len(), "forgot experts");
        }
    }
}

#[cfg(test)]
mod tests;
