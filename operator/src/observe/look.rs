//! What is read when it is needed, because a watch of it would show us much that is not ours: the claim of a source, and
//! nodes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crds::ModelDeployment;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use kube::{Api, Client, ResourceExt};
use tokio::time::Instant;

use crate::{apply::CALL, error::Error, render::claim};

/// What was read is read anew after this long.
const AGE: Duration = Duration::from_secs(5);
/// What nobody asked for so long is forgotten.
const KEPT: Duration = Duration::from_secs(3600);

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

/// Reads single objects, each at most every few seconds. While the API server does not answer, what it said last holds:
/// routers and workers are told what changes without it.
#[derive(Clone)]
pub struct Look {
    client: Client,
    nodes: Known<String, NodeView>,
    /// By namespace and name.
    claims: Known<(String, String), Claim>,
}

impl Look {
    /// Reads through `client`.
    pub fn new(client: Client) -> Self {
        Self { client, nodes: Known::default(), claims: Known::default() }
    }

    /// The claim that the source of `md` names; `None` if it names none, or one that is not there yet.
    ///
    /// # Errors
    /// If the API server refuses or does not answer, and never did.
    pub async fn claim(&self, md: &ModelDeployment) -> Result<Option<Claim>, Error> {
        let Some(name) = claim(&md.spec.model.source) else {
            return Ok(None);
        };
        let key = (md.namespace().unwrap_or_default(), name.to_owned());
        if let Some(claim) = self.claims.fresh(&key, Instant::now()) {
            return Ok(claim);
        }
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &key.0);
        let modes = |claim: PersistentVolumeClaim| claim.spec.and_then(|spec| spec.access_modes).unwrap_or_default();
        let found = read("PersistentVolumeClaim", name, api.get_opt(name)).await;
        let found = found.map(|found| found.map(|claim| Claim { name: name.to_owned(), modes: modes(claim) }));
        self.claims.keep(key, found, Instant::now())
    }

    /// The nodes of these pods, by name; one that is gone is not among them.
    ///
    /// # Errors
    /// If the API server refuses or does not answer, and never told of one of them.
    pub async fn nodes(&self, pods: &[&Pod]) -> Result<BTreeMap<String, NodeView>, Error> {
        let names: BTreeSet<&str> = pods.iter().filter_map(|pod| node_of(pod)).collect();
        let nodes = names.into_iter().map(|name| async move { Ok((name.to_owned(), self.node(name).await?)) });
        // at once: one that is not answered must not keep the others waiting
        let nodes = futures::future::try_join_all(nodes).await?;
        Ok(nodes.into_iter().filter_map(|(name, node)| Some((name, node?))).collect())
    }

    async fn node(&self, name: &str) -> Result<Option<NodeView>, Error> {
        if let Some(node) = self.nodes.fresh(&name.to_owned(), Instant::now()) {
            return Ok(node);
        }
        let api: Api<Node> = Api::all(self.client.clone());
        let found = read("Node", name, api.get_opt(name)).await;
        self.nodes.keep(name.to_owned(), found.map(|node| node.map(view)), Instant::now())
    }
}

/// What was read, and when; `None`: there was nothing. All clones are one.
struct Known<K, V>(Arc<Mutex<Entries<K, V>>>);

type Entries<K, V> = HashMap<K, (Instant, Option<V>)>;

impl<K, V> Clone for Known<K, V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K, V> Default for Known<K, V> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Eq + Hash, V: Clone> Known<K, V> {
    /// What is known of `key` and not too old at `now`.
    fn fresh(&self, key: &K, now: Instant) -> Option<Option<V>> {
        let entries = self.entries();
        let (_, value) = entries.get(key).filter(|(at, _)| now.duration_since(*at) < AGE)?;
        Some(value.clone())
    }

    /// Keeps what was found of `key` by `now`. If that failed, what was found last, for as long as if it was found anew.
    fn keep(&self, key: K, found: Result<Option<V>, Error>, now: Instant) -> Result<Option<V>, Error> {
        let mut entries = self.entries();
        let value = found.or_else(|error| entries.get(&key).map(|(_, value)| value.clone()).ok_or(error))?;
        entries.retain(|_, (at, _)| now.duration_since(*at) < KEPT);
        entries.insert(key, (now, value.clone()));
        Ok(value)
    }

    fn entries(&self) -> MutexGuard<'_, Entries<K, V>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_holds_for_a_while_and_until_it_can_be_read_again() {
        let (known, start) = (Known::default(), Instant::now());
        let refused = || Err(Error::Foreign { kind: "Node".to_owned(), name: "one".to_owned() });
        assert!(known.keep("one", refused(), start).is_err(), "nothing was ever known");
        assert_eq!(known.fresh(&"one", start), None);
        assert_eq!(known.keep("one", Ok(Some(1)), start).unwrap(), Some(1));
        let later = start + AGE;
        assert_eq!(
            known.fresh(&"one", later - Duration::from_millis(1)),
            Some(Some(1)),
            "it is not asked for each time"
        );
        assert_eq!(known.fresh(&"one", later), None);
        assert_eq!(known.keep("one", refused(), later).unwrap(), Some(1));
        assert_eq!(known.fresh(&"one", later), Some(Some(1)), "who does not answer is not asked each time either");
        assert_eq!(known.keep("two", Ok(None), later + KEPT).unwrap(), None);
        assert_eq!(known.entries().len(), 1, "what nobody asks for is forgotten");
    }
}
