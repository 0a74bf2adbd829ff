//! IO in: what there is of one ModelDeployment, from stores that watches keep, and from the control stream.
//!
//! A reconcile reads no object from the API server; it may see yesterday. What follows from it is the same each time,
//! and `apply` waits for its own writes.

use std::{fmt::Debug, net::IpAddr, sync::Arc};

use crds::ModelDeployment;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::StatefulSet,
        batch::v1::Job,
        core::v1::{ConfigMap, Pod, Service, ServiceAccount},
        policy::v1::PodDisruptionBudget,
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt,
        reflector::{ObjectRef, Store, store},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, task::JoinSet};
use tracing::warn;

use crate::{
    apply::owned_by,
    control::{Fleet, FleetView, Identity},
    render::{MODEL, MODEL_NAME},
};

/// A ModelDeployment, or why it cannot be read: one bad object must not end the watch of all.
pub type Guarded = DeserializeGuard<ModelDeployment>;

/// Where a wake-up for a ModelDeployment goes.
pub type Wake = mpsc::Sender<ObjectRef<Guarded>>;

/// A watch that went silent is noticed this many seconds, and five, after.
const WATCH_SECONDS: u32 = 20;

/// The settings of every watch.
pub fn watching() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_SECONDS)
}

/// Objects of one ModelDeployment, by kind.
#[derive(Debug, Clone, Default)]
pub struct Owned {
    /// The identity of the workers, without rights.
    pub service_accounts: Vec<Arc<ServiceAccount>>,
    /// The headless Service.
    pub services: Vec<Arc<Service>>,
    /// Records of revisions, placements, the accepted spec.
    pub config_maps: Vec<Arc<ConfigMap>>,
    /// One a replica.
    pub stateful_sets: Vec<Arc<StatefulSet>>,
    /// Descriptions under way.
    pub jobs: Vec<Arc<Job>>,
    /// One a revision.
    pub budgets: Vec<Arc<PodDisruptionBudget>>,
}

/// What there is of one ModelDeployment.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Its objects.
    pub owned: Owned,
    /// Its pods, those of objects that are gone too.
    pub pods: Vec<Arc<Pod>>,
    /// What its processes said.
    pub fleet: FleetView,
}

/// All that one scope (a namespace, or all of them) holds of us.
#[derive(Clone)]
pub struct Stores {
    service_accounts: Store<ServiceAccount>,
    services: Store<Service>,
    config_maps: Store<ConfigMap>,
    stateful_sets: Store<StatefulSet>,
    jobs: Store<Job>,
    budgets: Store<PodDisruptionBudget>,
    pods: Store<Pod>,
}

impl Stores {
    /// Begins to watch what is ours in `namespace` (`None`: everywhere). Each change wakes its ModelDeployment.
    pub fn watch(client: &Client, namespace: Option<&str>, wake: &Wake, tasks: &mut JoinSet<()>) -> Self {
        Self {
            service_accounts: watch(client, namespace, MODEL, wake, tasks),
            services: watch(client, namespace, MODEL, wake, tasks),
            config_maps: watch(client, namespace, MODEL, wake, tasks),
            stateful_sets: watch(client, namespace, MODEL, wake, tasks),
            jobs: watch(client, namespace, MODEL, wake, tasks),
            budgets: watch(client, namespace, MODEL, wake, tasks),
            pods: watch(client, namespace, MODEL, wake, tasks),
        }
    }

    /// Waits until each store has heard of all there is.
    pub async fn ready(&self) {
        // A writer lives as long as the process; without it nothing is reconciled anyway.
        let _ = tokio::join!(
            self.service_accounts.wait_until_ready(),
            self.services.wait_until_ready(),
            self.config_maps.wait_until_ready(),
            self.stateful_sets.wait_until_ready(),
            self.jobs.wait_until_ready(),
            self.budgets.wait_until_ready(),
            self.pods.wait_until_ready(),
        );
    }

    /// The processes of our pods: no other hello counts.
    pub fn identities(&self) -> Vec<Identity> {
        self.pods.state().iter().filter_map(|pod| identity(pod)).collect()
    }
}

/// Watches pods of one label selector, such as the routers.
pub fn watch_pods(
    client: &Client,
    namespace: Option<&str>,
    selector: &str,
    wake: &Wake,
    tasks: &mut JoinSet<()>,
) -> Store<Pod> {
    watch(client, namespace, selector, wake, tasks)
}

/// Reads what there is of `md`.
pub fn observe(md: &ModelDeployment, stores: &Stores, fleet: &Fleet) -> Observed {
    let (namespace, name) = (md.namespace().unwrap_or_default(), md.name_any());
    let mut observed = Observed {
        owned: Owned {
            service_accounts: owned(&stores.service_accounts, md),
            services: owned(&stores.services, md),
            config_maps: owned(&stores.config_maps, md),
            stateful_sets: owned(&stores.stateful_sets, md),
            jobs: owned(&stores.jobs, md),
            budgets: owned(&stores.budgets, md),
        },
        pods: stores.pods.state_filter(|pod| {
            pod.metadata.namespace.as_deref() == Some(&namespace) && pod.annotations().get(MODEL_NAME) == Some(&name)
        }),
        fleet: fleet.seen(&format!("{namespace}/{name}")),
    };
    observed.pods.sort_by_key(|pod| pod.name_any());
    observed
}

/// The id and address that a pod's processes say hello with, once it has an address.
pub fn identity(pod: &Pod) -> Option<Identity> {
    let ip: IpAddr = pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()?;
    Some(Identity { id: pod.uid()?, ip: Some(ip) })
}

fn owned<K>(store: &Store<K>, md: &ModelDeployment) -> Vec<Arc<K>>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    let mut objects = store.state_filter(|object| owned_by(object, md));
    objects.sort_by_key(|object| object.name_any());
    objects
}

fn watch<K>(client: &Client, namespace: Option<&str>, selector: &str, wake: &Wake, tasks: &mut JoinSet<()>) -> Store<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    let api: Api<K> = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let (reader, writer) = store();
    let slim = |mut object: K| {
        object.managed_fields_mut().clear();
        object
    };
    let events = watcher(api, watching().labels(selector))
        .map_ok(move |event| event.modify(|object| *object = slim(object.clone())))
        .default_backoff()
        .reflect(writer)
        .touched_objects();
    let wake = wake.clone();
    tasks.spawn(async move {
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            match event {
                Ok(object) => {
                    if let Some(parent) = parent(&object) {
                        // Fails only when the controller is gone.
                        let _ = wake.send(parent).await;
                    }
                }
                Err(error) => {
                    warn!(kind = %K::kind(&()), %error, "the watch broke and begins anew")
                }
            }
        }
    });
    reader
}

/// The ModelDeployment that an object belongs to: its controller, or for pods the name that their template carries.
fn parent(object: &impl ResourceExt) -> Option<ObjectRef<Guarded>> {
    let kind = ModelDeployment::kind(&());
    let mut owners = object.owner_references().iter();
    let owner = owners.find(|owner| owner.controller == Some(true) && owner.kind == kind).map(|owner| &owner.name);
    let name = owner.or_else(|| object.annotations().get(MODEL_NAME))?;
    Some(ObjectRef::new(name).within(&object.namespace()?))
}
