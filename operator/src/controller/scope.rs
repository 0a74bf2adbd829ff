//! What the operator watches, and what wakes the objects in it: watches, the control stream, a change of leader.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Client, ResourceExt,
    runtime::{
        events::{Recorder, Reporter},
        reflector::{ObjectRef, Store},
    },
};
use planner::autoscale::History;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
};

use super::{CONFIRM, Context, Settings, control, lock};
use crate::{
    apply::Writer,
    backoff::Backoff,
    control::Fleet,
    lease::Leadership,
    observe::{self, Guarded, Look, Stores, Wake},
};

/// What the tasks beside the controllers need of all scopes.
#[derive(Clone)]
pub(super) struct Scopes {
    /// Namespace (`None`: all) and the way to wake an object in it.
    wakes: Vec<(Option<String>, Wake)>,
    deployments: Arc<Mutex<Vec<Store<Guarded>>>>,
    histories: Arc<Mutex<HashMap<String, History>>>,
    roster: Arc<Notify>,
}

impl Scopes {
    pub(super) fn start(
        client: &Client,
        settings: &Settings,
        fleet: &Fleet,
        leadership: &Leadership,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let mut scopes = Self {
            wakes: Vec::new(),
            deployments: Arc::default(),
            histories: Arc::default(),
            roster: Arc::new(Notify::new()),
        };
        let reporter = Reporter { controller: "modelfleet".to_owned(), instance: Some(settings.identity.clone()) };
        let recorder = Recorder::new(client.clone(), reporter);
        let writer = Writer::new(client.clone(), leadership.clone());
        let namespaces: Vec<Option<String>> = match settings.namespaces.as_slice() {
            [] => vec![None],
            some => some.iter().cloned().map(Some).collect(),
        };
        let look = Look::new(client.clone());
        let mut all = Vec::new();
        for namespace in namespaces {
            let (wake, woken) = mpsc::channel(1024);
            let stores = Stores::watch(client, namespace.as_deref(), &wake, tasks);
            scopes.wakes.push((namespace.clone(), wake));
            all.push(stores.clone());
            let context = Context {
                fleet: fleet.clone(),
                writer: writer.clone(),
                leadership: leadership.clone(),
                install: settings.install.clone(),
                recorder: recorder.clone(),
                stores,
                look: look.clone(),
                deployments: scopes.deployments.clone(),
                backoff: Backoff::default(),
                histories: scopes.histories.clone(),
                moved: Mutex::default(),
                leaving: Mutex::default(),
                roster: scopes.roster.clone(),
            };
            tasks.spawn(control(client.clone(), namespace, woken, Arc::new(context), scopes.clone()));
        }
        let roster = Roster::watch(client, settings, fleet, all, &scopes, tasks);
        tasks.spawn(roster.keep());
        scopes
    }

    async fn wake(&self, namespace: &str, name: &str) {
        let here = |scope: &&(Option<String>, Wake)| scope.0.as_deref().is_none_or(|scope| scope == namespace);
        if let Some((_, wake)) = self.wakes.iter().find(here) {
            // Fails only when the controller is gone.
            let _ = wake.send(ObjectRef::new(name).within(namespace)).await;
        }
    }

    pub(super) async fn wake_all(&self) {
        for object in self.all() {
            self.wake(&object.namespace().unwrap_or_default(), &object.name_any()).await;
        }
    }

    fn all(&self) -> Vec<Arc<Guarded>> {
        lock(&self.deployments).iter().flat_map(Store::state).collect()
    }
}

/// Speaks to the fleet while this process leads, and looks at every object when it begins to.
pub(super) async fn follow_leadership(mut leadership: Leadership, fleet: Fleet, scopes: Scopes) {
    let mut epoch = None;
    loop {
        epoch = leadership.changed_from(epoch).await;
        match epoch {
            Some(epoch) => {
                // what was wanted when another led is not what is wanted now
                lock(&scopes.histories).clear();
                fleet.lead(epoch);
                scopes.roster.notify_one();
                scopes.wake_all().await;
            }
            None => fleet.follow(),
        }
    }
}

/// Wakes the models of which the control stream heard something.
pub(super) async fn wake_by_fleet(fleet: Fleet, scopes: Scopes) {
    let mut changed = std::pin::pin!(fleet.changed());
    while let Some(model) = changed.next().await {
        if let Some((namespace, name)) = model.split_once('/') {
            scopes.wake(namespace, name).await;
        }
    }
}

/// Whose hello counts, and which models there are.
struct Roster {
    fleet: Fleet,
    workers: Vec<Stores>,
    routers: Store<Pod>,
    router_events: mpsc::Receiver<ObjectRef<Guarded>>,
    scopes: Scopes,
}

impl Roster {
    fn watch(
        client: &Client,
        settings: &Settings,
        fleet: &Fleet,
        workers: Vec<Stores>,
        scopes: &Scopes,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (wake, router_events) = mpsc::channel(64);
        let namespace = Some(settings.namespace.as_str());
        let routers = observe::watch_pods(client, namespace, &settings.router_selector, &wake, tasks);
        Self { fleet: fleet.clone(), workers, routers, router_events, scopes: scopes.clone() }
    }

    /// Tells the fleet whenever an object is looked at or a router changed, and each second besides: a pod may be known
    /// before anything of its model is looked at.
    async fn keep(mut self) {
        loop {
            tokio::select! {
                () = self.scopes.roster.notified() => {}
                _ = self.router_events.recv() => {}
                () = tokio::time::sleep(CONFIRM) => {}
            }
            let workers = self.workers.iter().flat_map(Stores::identities);
            let routers =
                self.routers.state().into_iter().filter_map(|pod| observe::identity(&pod)).collect::<Vec<_>>();
            self.fleet.expect(workers.chain(routers));
            let ready = lock(&self.scopes.deployments).len() == self.scopes.wakes.len();
            if ready {
                self.fleet.synced(self.scopes.all().iter().map(|object| path(object)));
            }
        }
    }
}

fn path(object: &Guarded) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}
