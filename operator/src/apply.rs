//! IO out: writes what should be, deletes what should not, and touches nothing that is as it should be.
//!
//! Every write is server-side apply of a whole object under one field manager and a fixed name, so a second leader, a
//! lost reply or a crash between two writes changes nothing of the result. A delete names the UID that it means.
//!
//! Architecture Invariant: nothing is written while another operator leads, and no call outlives [`CALL`].

mod standing;

use std::{
    collections::HashMap,
    fmt::Debug,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crds::{ModelDeployment, ModelDeploymentStatus};
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{Pod, PodCondition},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tokio::{sync::Semaphore, time::Instant};

use self::standing::{LAG, Standing, Written, seal, standing, version};
use crate::{
    error::Error,
    lease::Leadership,
    observe::Owned,
    render::{Desired, ROUTED},
};

/// The field manager of all that the operator writes.
pub const FIELD_MANAGER: &str = "modelfleet";
/// Time for one call. kube retries some answers by itself for as long as the server asks; this ends that.
pub const CALL: Duration = Duration::from_secs(8);

/// Time between two writes of one status.
const STATUS_PAUSE: Duration = Duration::from_secs(1);
const WRITES_IN_FLIGHT: usize = 20;

/// What an apply did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Objects written or deleted.
    pub writes: usize,
    /// Something written is not in the stores yet, or waits for a deletion: look again soon.
    pub unconfirmed: bool,
}

/// What became of a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusWrite {
    /// It is as it was.
    Same,
    /// The API server has it.
    Written,
    /// The last write was a moment ago: look again soon.
    Postponed,
}

/// The only way to the API server for writes.
#[derive(Clone)]
pub struct Writer(Arc<Inner>);

struct Inner {
    client: Client,
    leadership: Leadership,
    permits: Semaphore,
    written: Mutex<HashMap<Owner, HashMap<Key, Written>>>,
    statuses: Mutex<HashMap<Owner, StatusOf>>,
    /// Of the last moments, by the UID of the pod.
    gates: Mutex<HashMap<Option<String>, Gate>>,
}

/// A readiness gate as the API server had it after our write.
struct Gate {
    status: String,
    reason: Option<String>,
    version: Option<u64>,
    at: Instant,
}

impl Gate {
    /// The watch has not told of it yet.
    fn is_awaited(&self, pod: &Pod, condition: &PodCondition, now: Instant) -> bool {
        let same = self.status == condition.status && self.reason == condition.reason;
        let lags = matches!((version(pod), self.version), (Some(seen), Some(written)) if seen < written);
        same && lags && now.duration_since(self.at) < LAG
    }
}

/// The UID of the object that has it, the status written last, and when.
type StatusOf = (Option<String>, ModelDeploymentStatus, Instant);

/// Namespace and name of a ModelDeployment.
type Owner = (String, String);
/// Kind and name of an object of it.
type Key = (String, String);

impl Writer {
    /// Writes through `client` while `leadership` says that this process leads.
    pub fn new(client: Client, leadership: Leadership) -> Self {
        Self(Arc::new(Inner {
            client,
            leadership,
            permits: Semaphore::new(WRITES_IN_FLIGHT),
            written: Mutex::default(),
            statuses: Mutex::default(),
            gates: Mutex::default(),
        }))
    }

    /// Makes the objects of `md` what `desired` says: applies in order, and prunes what is no longer listed. Replicas go
    /// before others come, so that there are never more than the rollout allows.
    ///
    /// # Errors
    /// The first write that failed; what was written before it stays, and the next pass goes on from there.
    pub async fn apply(&self, md: &ModelDeployment, desired: &Desired, seen: &Owned) -> Result<Applied, Error> {
        let mut applied = Applied::default();
        applied.add(self.apply_all(md, &desired.service_accounts, &seen.service_accounts).await?);
        applied.add(self.apply_all(md, &desired.services, &seen.services).await?);
        // config first, or pods start without it
        applied.add(self.apply_all(md, &desired.config_maps, &seen.config_maps).await?);
        applied.add(self.prune(md, &desired.stateful_sets, &left(&seen.stateful_sets, desired)).await?);
        applied.add(self.apply_all(md, &desired.stateful_sets, &seen.stateful_sets).await?);
        applied.add(self.apply_all(md, &desired.jobs, &seen.jobs).await?);
        applied.add(self.apply_all(md, &desired.budgets, &seen.budgets).await?);

        applied.add(self.prune(md, &desired.jobs, &seen.jobs).await?);
        applied.add(self.prune(md, &desired.budgets, &seen.budgets).await?);
        applied.add(self.prune(md, &desired.config_maps, &left(&seen.config_maps, desired)).await?);
        applied.add(self.prune(md, &desired.services, &seen.services).await?);
        applied.add(self.prune(md, &desired.service_accounts, &seen.service_accounts).await?);
        Ok(applied)
    }

    /// The status that `md` has: the one written last, until the watch shows it.
    pub fn status_of(&self, md: &ModelDeployment) -> Option<ModelDeploymentStatus> {
        let statuses = lock(&self.0.statuses);
        let last = statuses.get(&owner(md)).filter(|(uid, ..)| *uid == md.metadata.uid);
        let last = last.filter(|(_, _, at)| md.status.is_none() || at.elapsed() < LAG);
        last.map(|(_, status, _)| status.clone()).or_else(|| md.status.clone())
    }

    /// Writes the status of `md` if it differs from the one it has, at most once a second.
    ///
    /// # Errors
    /// If the API server refuses or does not answer.
    pub async fn write_status(
        &self,
        md: &ModelDeployment,
        status: &ModelDeploymentStatus,
    ) -> Result<StatusWrite, Error> {
        if md.status.as_ref() == Some(status) {
            return Ok(StatusWrite::Same);
        }
        let owner = owner(md);
        let last = lock(&self.0.statuses).get(&owner).map(|(_, _, at)| at.elapsed());
        if last.is_some_and(|since| since < STATUS_PAUSE) {
            return Ok(StatusWrite::Postponed);
        }
        let kind = ModelDeployment::kind(&()).into_owned();
        let name = md.name_any();
        let api: Api<ModelDeployment> = Api::namespaced(self.0.client.clone(), &owner.0);
        let patch = json!({
            "apiVersion": ModelDeployment::api_version(&()),
            "kind": kind,
            "metadata": {"name": name, "uid": md.metadata.uid},
            "status": status,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(&patch);
        let call = async {
            let written = api.patch_status(&name, &params, &patch).await;
            written.map_err(|source| Error::Apply { kind: kind.clone(), name: name.clone(), source: source.into() })
        };
        self.write(&kind, &name, call).await?;
        lock(&self.0.statuses).insert(owner, (md.metadata.uid.clone(), status.clone(), Instant::now()));
        Ok(StatusWrite::Written)
    }

    /// Sets the readiness gate of a worker, unless it is so already.
    ///
    /// # Errors
    /// If the API server refuses or does not answer. A pod that is gone is no error.
    pub async fn write_gate(&self, pod: &Pod, condition: &PodCondition) -> Result<bool, Error> {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        let present = conditions.and_then(|all| all.iter().find(|one| one.type_ == ROUTED));
        if present.is_some_and(|one| one.status == condition.status && one.reason == condition.reason) {
            return Ok(false);
        }
        if lock(&self.0.gates).get(&pod.uid()).is_some_and(|gate| gate.is_awaited(pod, condition, Instant::now())) {
            return Ok(false);
        }
        let (kind, name) = ("Pod".to_owned(), pod.name_any());
        let api: Api<Pod> = Api::namespaced(self.0.client.clone(), &pod.namespace().unwrap_or_default());
        let patch = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "uid": pod.metadata.uid},
            "status": {"conditions": [condition]},
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(&patch);
        let call = async {
            match api.patch_status(&name, &params, &patch).await {
                Ok(pod) => Ok(Some(pod)),
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(None),
                Err(source) => Err(Error::Apply { kind: kind.clone(), name: name.clone(), source: source.into() }),
            }
        };
        let Some(after) = self.write(&kind, &name, call).await? else {
            return Ok(false);
        };
        let (status, reason) = (condition.status.clone(), condition.reason.clone());
        let mut gates = lock(&self.0.gates);
        gates.retain(|_, gate| gate.at.elapsed() < LAG);
        gates.insert(pod.uid(), Gate { status, reason, version: version(&after), at: Instant::now() });
        Ok(true)
    }

    /// Forgets what was written for a ModelDeployment that is gone; says whether anything was.
    pub fn forget(&self, namespace: &str, name: &str) -> bool {
        let owner = (namespace.to_owned(), name.to_owned());
        let objects = lock(&self.0.written).remove(&owner).is_some();
        lock(&self.0.statuses).remove(&owner).is_some() || objects
    }

    async fn apply_all<K: Ours>(&self, md: &ModelDeployment, desired: &[K], seen: &[Arc<K>]) -> Result<Applied, Error> {
        let mut applied = Applied::default();
        for object in desired {
            let name = object.name_any();
            let present = seen.iter().find(|one| one.name_any() == name);
            applied.add(self.apply_one(md, object, present.map(Arc::as_ref)).await?);
        }
        Ok(applied)
    }

    async fn apply_one<K: Ours>(&self, md: &ModelDeployment, object: &K, seen: Option<&K>) -> Result<Applied, Error> {
        let sealed = seal(object)?;
        let (kind, name) = (K::kind(&()).into_owned(), object.name_any());
        let written = self.written(md, &kind, &name);
        match standing(&sealed, seen, written.as_ref(), Instant::now())? {
            Standing::Settled => return Ok(Applied::default()),
            Standing::Awaited => {
                return Ok(Applied { writes: 0, unconfirmed: true });
            }
            Standing::Differs => {}
        }
        if let Some(seen) = seen.filter(|_| K::kind(&()) == "Job") {
            // A Job's template cannot change. The new one follows when the old one is gone.
            self.delete(md, seen).await?;
            return Ok(Applied { writes: 1, unconfirmed: true });
        }
        let api: Api<K> = Api::namespaced(self.0.client.clone(), &md.namespace().unwrap_or_default());
        if seen.is_none() {
            self.refuse_foreign(md, &api, &kind, &name).await?;
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(&sealed.object);
        let call = async {
            let applied = api.patch(&name, &params, &patch).await;
            applied.map_err(|source| Error::Apply { kind: kind.clone(), name: name.clone(), source: source.into() })
        };
        let after = self.write(&kind, &name, call).await?;
        self.remember(md, (kind, name), Written::of(sealed.hash, &after));
        Ok(Applied { writes: 1, unconfirmed: true })
    }

    /// Objects that we do not own stay byte-equal, even if they have the name that ours needs.
    async fn refuse_foreign<K: Ours>(
        &self,
        md: &ModelDeployment,
        api: &Api<K>,
        kind: &str,
        name: &str,
    ) -> Result<(), Error> {
        let call = async {
            let found = api.get_metadata_opt(name).await;
            found.map_err(|source| Error::Read { kind: kind.to_owned(), name: name.to_owned(), source: source.into() })
        };
        let found = deadline(kind, name, call).await?;
        match found {
            Some(object) if !owned_by(&object, md) => {
                Err(Error::Foreign { kind: kind.to_owned(), name: name.to_owned() })
            }
            _ => Ok(()),
        }
    }

    async fn prune<K: Ours>(&self, md: &ModelDeployment, desired: &[K], seen: &[Arc<K>]) -> Result<Applied, Error> {
        let mut applied = Applied::default();
        for object in seen {
            let listed = desired.iter().any(|one| one.name_any() == object.name_any());
            if !listed && object.meta().deletion_timestamp.is_none() {
                self.delete(md, object.as_ref()).await?;
                applied.add(Applied { writes: 1, unconfirmed: true });
            }
        }
        Ok(applied)
    }

    /// Deletes a pod of ours whose node is gone, without waiting for its kubelet.
    ///
    /// # Errors
    /// If the API server refuses or does not answer. A pod that is gone is no error.
    pub async fn bury(&self, md: &ModelDeployment, pod: &Pod) -> Result<(), Error> {
        self.delete_within(md, pod, Some(0)).await
    }

    async fn delete<K: Ours>(&self, md: &ModelDeployment, object: &K) -> Result<(), Error> {
        self.delete_within(md, object, None).await
    }

    async fn delete_within<K: Ours>(&self, md: &ModelDeployment, object: &K, grace: Option<u32>) -> Result<(), Error> {
        let (kind, name) = (K::kind(&()).into_owned(), object.name_any());
        let api: Api<K> = Api::namespaced(self.0.client.clone(), &md.namespace().unwrap_or_default());
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            grace_period_seconds: grace,
            preconditions: Some(Preconditions { uid: object.uid(), resource_version: None }),
            ..DeleteParams::default()
        };
        let call = async {
            match api.delete(&name, &params).await {
                Ok(_) => Ok(()),
                // Gone, or another object by now: either way this one is no more.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
                Err(source) => Err(Error::Delete { kind: kind.clone(), name: name.clone(), source: source.into() }),
            }
        };
        self.write(&kind, &name, call).await?;
        if let Some(objects) = lock(&self.0.written).get_mut(&owner(md)) {
            objects.remove(&(kind, name));
        }
        Ok(())
    }

    /// Runs one write: only while leading, not too many at once, not for ever.
    async fn write<T>(&self, kind: &str, name: &str, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let _permit = self.0.permits.acquire().await.expect("the semaphore is never closed");
        if self.0.leadership.term().is_none() {
            return Err(Error::NotLeading { kind: kind.to_owned(), name: name.to_owned() });
        }
        deadline(kind, name, call).await
    }

    fn written(&self, md: &ModelDeployment, kind: &str, name: &str) -> Option<Written> {
        let written = lock(&self.0.written);
        written.get(&owner(md)).and_then(|objects| objects.get(&(kind.to_owned(), name.to_owned()))).cloned()
    }

    fn remember(&self, md: &ModelDeployment, key: Key, written: Written) {
        lock(&self.0.written).entry(owner(md)).or_default().insert(key, written);
    }
}

/// What is seen of a kind, without what is left alone.
fn left<K: Ours>(seen: &[Arc<K>], desired: &Desired) -> Vec<Arc<K>> {
    seen.iter().filter(|object| !desired.left_alone.contains(&object.name_any())).cloned().collect()
}

/// A namespaced kind that we write.
pub trait Ours:
    Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned
{
}

impl<K> Ours for K where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned
{
}

/// Tells whether `md` controls an object.
pub fn owned_by(object: &impl ResourceExt, md: &ModelDeployment) -> bool {
    let mut owners = object.owner_references().iter();
    md.metadata.uid.as_deref().is_some_and(|uid| owners.any(|owner| owner.controller == Some(true) && owner.uid == uid))
}

impl Applied {
    fn add(&mut self, other: Self) {
        self.writes += other.writes;
        self.unconfirmed |= other.unconfirmed;
    }
}

async fn deadline<T>(kind: &str, name: &str, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let late = |_| Error::Timeout { kind: kind.to_owned(), name: name.to_owned(), after: CALL };
    tokio::time::timeout(CALL, call).await.map_err(late)?
}

fn owner(md: &ModelDeployment) -> Owner {
    (md.namespace().unwrap_or_default(), md.name_any())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(version: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "a", "uid": "1", "resourceVersion": version}})).unwrap()
    }

    #[test]
    fn a_pod_watch_that_lags_behind_a_gate_causes_no_second_write() {
        let open = PodCondition { type_: ROUTED.to_owned(), status: "True".to_owned(), ..PodCondition::default() };
        let shut = PodCondition { status: "False".to_owned(), ..open.clone() };
        let now = Instant::now();
        let gate = Gate { status: "True".to_owned(), reason: None, version: Some(9), at: now };
        assert!(gate.is_awaited(&pod("5"), &open, now));
        assert!(!gate.is_awaited(&pod("5"), &shut, now), "another one is another write");
        assert!(!gate.is_awaited(&pod("9"), &open, now), "the watch has told, and somebody undid it");
        assert!(!gate.is_awaited(&pod("5"), &open, now + LAG), "by then somebody undid it");
    }

    #[tokio::test]
    async fn a_gate_that_was_written_is_not_written_again_before_the_watch_tells() {
        let server = tower::service_fn(async |_: http::Request<kube::client::Body>| {
            let written = serde_json::to_vec(&pod("9")).unwrap();
            Ok::<_, std::convert::Infallible>(http::Response::new(kube::client::Body::from(written)))
        });
        let (claim, leadership) = crate::lease::leadership();
        claim.lead(1, Instant::now() + Duration::from_secs(60));
        let writer = Writer::new(Client::new(server, "default"), leadership);
        let open = PodCondition { type_: ROUTED.to_owned(), status: "True".to_owned(), ..PodCondition::default() };
        assert!(writer.write_gate(&pod("5"), &open).await.unwrap());
        assert!(!writer.write_gate(&pod("5"), &open).await.unwrap());
        assert!(writer.write_gate(&pod("9"), &open).await.unwrap(), "somebody undid it");
    }
}
