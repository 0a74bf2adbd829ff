//! IO in: what there is of one ModelDeployment, from stores that watches keep, and from the control stream.
//!
//! A reconcile reads no object from the API server; it may see yesterday. What follows from it is the same each time,
//! and `apply` waits for its own writes.

mod look;

use std::{collections::BTreeMap, fmt::Debug, net::IpAddr, sync::Arc, time::Duration};

use crds::ModelDeployment;
use futures::{Stream, StreamExt};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::StatefulSet,
        batch::v1::Job,
        core::v1::{ConfigMap, Event, Pod, PodSpec, Service, ServiceAccount},
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
use planner::Millis;
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, task::JoinSet};
use tracing::warn;

pub(crate) use self::look::node_of;
pub use self::look::{Claim, Look, NodeView};
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
    /// Pods that were not made, by StatefulSets and Jobs of ours.
    pub refused_pods: Vec<Arc<Event>>,
    /// The claim that the source names, if there is one.
    pub claim: Option<Claim>,
    /// How long ago the experts of a replica, by revision and index, began to move under this leader.
    pub moved: BTreeMap<(String, u32), Millis>,
    /// How long each pod is known under this leader to be on its way out, by UID.
    pub leaving: BTreeMap<String, Duration>,
    /// The nodes that matter, by name.
    pub nodes: BTreeMap<String, NodeView>,
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
    refused_pods: Store<Event>,
}

impl Stores {
    /// Begins to watch what is ours in `namespace` (`None`: everywhere). Each change wakes its ModelDeployment.
    pub fn watch(client: &Client, namespace: Option<&str>, wake: &Wake, tasks: &mut JoinSet<()>) -> Self {
        let ours = || watching().labels(MODEL);
        let stateful_sets = watch(client, namespace, ours(), trim, parent, wake, tasks);
        let jobs = watch(client, namespace, ours(), trim, parent, wake, tasks);
        let failed = watching().fields("reason=FailedCreate");
        let of_event = {
            let (sets, jobs) = (stateful_sets.clone(), jobs.clone());
            move |event: &Event| involved(event, &sets).or_else(|| involved(event, &jobs))
        };
        Self {
            service_accounts: watch(client, namespace, ours(), trim, parent, wake, tasks),
            services: watch(client, namespace, ours(), trim, parent, wake, tasks),
            config_maps: watch(client, namespace, ours(), trim, parent, wake, tasks),
            budgets: watch(client, namespace, ours(), trim, parent, wake, tasks),
            pods: watch(client, namespace, ours(), trim_pod, parent, wake, tasks),
            refused_pods: watch(client, namespace, failed, trim, of_event, wake, tasks),
            stateful_sets,
            jobs,
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
            self.refused_pods.wait_until_ready(),
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
    watch(client, namespace, watching().labels(selector), trim_pod, parent, wake, tasks)
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
        refused_pods: Vec::new(),
        claim: None,
        moved: BTreeMap::new(),
        leaving: BTreeMap::new(),
        nodes: BTreeMap::new(),
    };
    let sets = observed.owned.stateful_sets.iter().filter_map(|set| set.uid());
    let makers: Vec<String> = sets.chain(observed.owned.jobs.iter().filter_map(|job| job.uid())).collect();
    observed.refused_pods = stores
        .refused_pods
        .state_filter(|event| event.involved_object.uid.as_ref().is_some_and(|uid| makers.contains(uid)));
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

/// Follows the ModelDeployments of `namespace` (`None`: all).
pub fn watch_deployments(
    client: &Client,
    namespace: Option<&str>,
) -> (Store<Guarded>, impl Stream<Item = Result<Guarded, watcher::Error>> + Send + use<>) {
    let (reader, writer) = store();
    let api: Api<Guarded> = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let events = watcher(api, watching()).modify(trim).default_backoff().reflect(writer).touched_objects();
    (reader, events)
}

fn watch<K>(
    client: &Client,
    namespace: Option<&str>,
    config: watcher::Config,
    trim: fn(&mut K),
    parent: impl Fn(&K) -> Option<ObjectRef<Guarded>> + Send + 'static,
    wake: &Wake,
    tasks: &mut JoinSet<()>,
) -> Store<K>
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
    let events = watcher(api, config).modify(trim).default_backoff().reflect(writer).touched_objects();
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

/// Drops what nobody here reads: who wrote which field weighs more than the object itself.
fn trim(object: &mut impl ResourceExt) {
    object.managed_fields_mut().clear();
    object.annotations_mut().remove("kubectl.kubernetes.io/last-applied-configuration");
}

/// Of a pod, what it is for, where it is and how it is; what it was made from is in its StatefulSet.
fn trim_pod(pod: &mut Pod) {
    trim(pod);
    let node_name = pod.spec.take().and_then(|spec| spec.node_name);
    pod.spec = node_name.map(|name| PodSpec { node_name: Some(name), ..PodSpec::default() });
    if let Some(status) = &mut pod.status {
        (status.pod_ips, status.host_ips, status.qos_class) = (None, None, None);
        let lists = [&mut status.container_statuses, &mut status.init_container_statuses];
        for container in lists.into_iter().flatten().flatten() {
            (container.resources, container.allocated_resources, container.volume_mounts) = (None, None, None);
            (container.user, container.container_id) = (None, None);
        }
    }
}

/// The ModelDeployment whose StatefulSet or Job an event is about.
fn involved<K>(event: &Event, store: &Store<K>) -> Option<ObjectRef<Guarded>>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    let object = &event.involved_object;
    let name = ObjectRef::new(object.name.as_deref()?).within(object.namespace.as_deref()?);
    parent(store.get(&name)?.as_ref())
}

/// The ModelDeployment that an object belongs to: its controller, or for pods the name that their template carries.
fn parent(object: &impl ResourceExt) -> Option<ObjectRef<Guarded>> {
    let kind = ModelDeployment::kind(&());
    let mut owners = object.owner_references().iter();
    let owner = owners.find(|owner| owner.controller == Some(true) && owner.kind == kind).map(|owner| &owner.name);
    let name = owner.or_else(|| object.annotations().get(MODEL_NAME))?;
    Some(ObjectRef::new(name).within(&object.namespace()?))
}
