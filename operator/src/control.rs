//! The control stream: snapshots down, load and state up.
//!
//! Serves `modelfleet.v1.Fleet/Watch` to routers, workers, fetchers and describers. Knows nothing of Kubernetes: the
//! reconciler (or local mode) publishes what there is, and reads what the fleet said.
//!
//! Architecture Invariant: nothing is sent unless this process leads; a follower holds the streams and listens, so that
//! it can lead at once. Everything kept is bounded by the processes that are expected, the models that are published
//! and the streams that are open.

mod facts;
mod model;
mod process;
mod session;
mod snapshot;
mod state;
mod version;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures::{Stream, stream};
use tokio::{
    net::TcpListener,
    sync::{Notify, watch},
    time::{Instant, MissedTickBehavior},
};
use wire::proto::fleet_server::FleetServer;

pub use self::{
    facts::{Availability, Identity, ModelFacts, ReplicaFacts, WorkerFacts},
    version::Version,
    view::{
        DescriptionView, ExpertLoadView, FailureView, FetcherView, FleetView, LoadView, ProgressPhase, ProgressView,
        Role, RouterView, WorkerLoadView, WorkerPhase, WorkerView,
    },
};
use state::State;

/// A router counts as live, and a load as fresh, this long after its last report.
pub const LEASE: Duration = Duration::from_secs(3);

/// How often leases are looked at.
const TICK: Duration = Duration::from_millis(500);

/// The fleet's side of the control stream. Cheap to clone; all clones are one.
///
/// # Guarantees
/// - A snapshot is sent again only if it changed, and then with a higher [`Version`].
/// - A process that says no more (its half of the stream is closed) finds its stream ended without an error once what it
///   said counts. What it said counts too if it left before that, within a minute.
/// - A process that was expected, spoke and lost its stream keeps what it said until it is no longer expected, or
///   another process says hello with its id: a lost stream is no lost worker.
/// - A reader that does not take what it is sent is dropped; it connects again and gets everything.
#[derive(Clone)]
pub struct Fleet(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Counts changes of what is to be sent.
    changes: watch::Sender<u64>,
    closing: watch::Sender<bool>,
    /// Models about which something was heard, and who waits to read them.
    heard: Mutex<BTreeSet<String>>,
    wake: Notify,
}

impl Default for Fleet {
    fn default() -> Self {
        Self::new()
    }
}

impl Fleet {
    /// A fleet that follows, expects nobody and has no model.
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            state: Mutex::default(),
            changes: watch::Sender::new(0),
            closing: watch::Sender::new(false),
            heard: Mutex::default(),
            wake: Notify::new(),
        }))
    }

    /// Serves the control stream until `shutdown`, then ends all streams.
    ///
    /// # Errors
    /// If `wire` cannot serve the listener.
    pub async fn serve(&self, listener: TcpListener, shutdown: impl Future<Output = ()> + Send) -> io::Result<()> {
        let service = FleetServer::new(session::Service::new(self.clone()));
        let closed = async {
            shutdown.await;
            self.0.closing.send_replace(true);
        };
        tokio::select! {
            served = wire::serve(listener, tonic::service::Routes::new(service), closed) => served,
            () = self.tick() => Ok(()),
        }
    }

    /// Begins to speak, in `epoch` or a higher one: above each epoch that a process has heard, and above those in which
    /// this process led before. Does nothing if it leads already.
    ///
    /// Models must be published anew: what was published under an earlier lead is forgotten.
    pub fn lead(&self, epoch: u64) {
        self.update(|state, _| state.lead(epoch));
    }

    /// Falls silent. Models are forgotten; what processes said is kept.
    pub fn follow(&self) {
        self.update(|state, _| state.follow());
    }

    /// The epoch in which this process leads; `None` if it follows.
    pub fn epoch(&self) -> Option<u64> {
        self.state().epoch()
    }

    /// Says what there is of a model; sent to whom it concerns if it changes what they know. Ignored while following.
    pub fn publish(&self, model: &str, facts: ModelFacts) {
        self.update(|state, _| state.publish(model, facts));
    }

    /// A model is gone. Ignored while following.
    pub fn remove(&self, model: &str) {
        self.update(|state, _| state.remove(model));
    }

    /// These are all models that exist. Once each of them is published, routers are told that they have heard of all,
    /// and forget others that they knew.
    pub fn synced(&self, models: impl IntoIterator<Item = String>) {
        self.update(|state, _| state.synced(models.into_iter().collect()));
    }

    /// These, and no others, are the processes whose hello counts.
    ///
    /// A process that said hello before it was expected counts from now on; one that is no longer expected is
    /// forgotten.
    pub fn expect(&self, identities: impl IntoIterator<Item = Identity>) {
        self.update(|state, now| state.expect(identities, now));
    }

    /// What was said about a model, NAMESPACE/NAME.
    pub fn seen(&self, model: &str) -> FleetView {
        self.state().seen(model, Instant::now())
    }

    /// Rows that the requests of a model's workers gave to experts since those started: by the worker's id, layer and
    /// expert, as each told last. A worker that told none yet is not there.
    pub fn rows(&self, model: &str) -> BTreeMap<String, BTreeMap<u32, Vec<u64>>> {
        self.state().rows(model)
    }

    /// Models about which something was heard that a reconciler must look at: a process came or went, a worker changed
    /// its phase, a snapshot was acknowledged, a download moved on by a tenth, the rows of its experts doubled, a request
    /// waits for a model without workers. Repetitions are merged. For one reader: two would each get a part.
    pub fn changed(&self) -> impl Stream<Item = String> + Send + use<> {
        stream::unfold(self.clone(), |fleet| async move {
            loop {
                let next = lock(&fleet.0.heard).pop_first();
                if let Some(model) = next {
                    return Some((model, fleet));
                }
                fleet.0.wake.notified().await; // at once, if something was heard since
            }
        })
    }
}

impl Fleet {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }

    /// Acts on the state, then wakes whom it concerns.
    fn update<R>(&self, act: impl FnOnce(&mut State, Instant) -> R) -> R {
        let (result, effects) = {
            let mut state = self.state();
            let result = act(&mut state, Instant::now());
            (result, state.take_effects())
        };
        if effects.speak {
            self.0.changes.send_modify(|count| *count += 1);
        }
        if !effects.heard.is_empty() {
            lock(&self.0.heard).extend(effects.heard);
            self.0.wake.notify_one();
        }
        result
    }

    async fn tick(&self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.update(|state, now| state.tick(now));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
