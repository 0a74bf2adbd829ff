//! What is read when it is needed, because a watch of it would show us much that is not ours: the claim of a source, and
//! nodes.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crds::ModelDeployment;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use kube::{Api, Client, ResourceExt};
use tokio::time::Instant;

use crate::{apply::CALL, error::Error, render::claim};

/// A node is read anew after this long.
const NODE_AGE: Duration = Duration::from_secs(5);
/// A node that nobody asked for so long is forgotten.
const NODE_KEPT: Duration = Duration::from_secs(3600);

/// A PersistentVolumeClaim, as far as it matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Its name.
    pub name: String,
    /// Such as `ReadWriteOnce`.
    pub modes: Vec<String>,
}

/// A node, as far as it matters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its kubelet reports.
    pub ready: bool,
}

/// Nodes by name, and when each was read; `None`: it is gone.
type Nodes = HashMap<String, (Instant, Option<NodeView>)>;
/// Claims by namespace and name; `None`: there was none.
type Claims = HashMap<(String, String), Option<Claim>>;

/// Reads single objects. While the API server does not answer, what it said last holds: routers and workers are told
/// what changes without it.
#[derive(Clone)]
pub struct Look {
    client: Client,
    nodes: Arc<Mutex<Nodes>>,
    claims: Arc<Mutex<Claims>>,
}

impl Look {
    /// Reads through `client`.
    pub fn new(client: Client) -> Self {
        Self { client, nodes: Arc::default(), claims: Arc::default() }
    }

    /// The claim that the source of `md` names; `None` if it names none, or one that is not there yet.
    ///
    /// # Errors
    /// If the API server refuses or does not answer, and never did.
    pub async fn claim(&self, md: &ModelDeployment) -> Result<Option<Claim>, Error> {
        let Some(name) = claim(&md.spec.model.source) else {
            return Ok(None);
        };
        let namespace = md.namespace().unwrap_or_default();
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &namespace);
        let modes = |claim: PersistentVolumeClaim| claim.spec.and_then(|spec| spec.access_modes).unwrap_or_default();
        let found = read("PersistentVolumeClaim", name, api.get_opt(name)).await;
        let found = found.map(|found| found.map(|claim| Claim { name: name.to_owned(), modes: modes(claim) }));
        let key = (namespace, name.to_owned());
        let found = found.or_else(|error| lock(&self.claims).get(&key).cloned().ok_or(error))?;
        lock(&self.claims).insert(key, found.clone());
        Ok(found)
    }

    /// The nodes of these pods, by name; one that is gone is not among them.
    ///
    /// # Errors
    /// If the API server refuses or does not answer, and never told of one of them.
    pub async fn nodes(&self, pods: &[&Pod]) -> Result<BTreeMap<String, NodeView>, Error> {
        let mut nodes = BTreeMap::new();
        for name in pods.iter().filter_map(|pod| node_of(pod)) {
            if !nodes.contains_key(name)
                && let Some(node) = self.node(name).await?
            {
                nodes.insert(name.to_owned(), node);
            }
        }
        Ok(nodes)
    }

    async fn node(&self, name: &str) -> Result<Option<NodeView>, Error> {
        let known = lock(&self.nodes).get(name).cloned();
        if let Some((_, node)) = known.clone().filter(|(at, _)| at.elapsed() < NODE_AGE) {
            return Ok(node);
        }
        let api: Api<Node> = Api::all(self.client.clone());
        let node = match read("Node", name, api.get_opt(name)).await {
            Ok(node) => node.map(view),
            Err(error) => return known.map(|(_, node)| node).ok_or(error),
        };
        let mut nodes = lock(&self.nodes);
        nodes.retain(|_, (at, _)| at.elapsed() < NODE_KEPT);
        nodes.insert(name.to_owned(), (Instant::now(), node.clone()));
        Ok(node)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The node that a pod is bound to.
pub(crate) fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

fn view(node: Node) -> NodeView {
    let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
    let ready = conditions.iter().any(|one| one.type_ == "Ready" && one.status == "True");
    NodeView { labels: node.metadata.labels.unwrap_or_default(), ready }
}

async fn read<T>(
    kind: &str,
    name: &str,
    call: impl Future<Output = Result<Option<T>, kube::Error>>,
) -> Result<Option<T>, Error> {
    let late = |_| Error::Timeout { kind: kind.to_owned(), name: name.to_owned(), after: CALL };
    let found = tokio::time::timeout(CALL, call).await.map_err(late)?;
    found.map_err(|source| Error::Read { kind: kind.to_owned(), name: name.to_owned(), source: Box::new(source) })
}
