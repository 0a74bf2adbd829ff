//! The replicas of a model as they are: each a StatefulSet with its plan, its pods, and what they said.
//!
//! Pure: everything comes from one [`Observed`].

use std::{sync::Arc, time::Duration};

use k8s_openapi::{
    api::{
        apps::v1::StatefulSet,
        core::v1::{ContainerStatus, Pod, PodCondition},
    },
    jiff::Timestamp,
};
use kube::ResourceExt;
use planner::Plan;

use crate::{
    control::{FailureView, FetcherView, FleetView, WorkerPhase, WorkerView},
    launch,
    moving::Besides,
    observe::{Observed, node_of},
    render::{DRAINING_SINCE, Names, POD_INDEX, REPLICA, REVISION, ROUTED, Revision, WORKER, read_also, read_plan},
};

/// How long nothing is heard of a process that hangs.
const UNHEARD: Duration = Duration::from_secs(10);
/// Within this time of a StatefulSet its first pods are made.
const TOGETHER: Duration = Duration::from_secs(10);

/// One replica of one revision.
#[derive(Debug, Clone)]
pub struct Replica {
    /// What it runs.
    pub revision: Revision,
    /// Its number within the revision.
    pub index: u32,
    /// Its StatefulSet; without one only pods are left, on their way out.
    pub set: Option<Arc<StatefulSet>>,
    /// What it is made of, unless that record is lost: by this its workers ask each other.
    pub plan: Option<Plan>,
    /// The plan whose experts its workers hold besides, while experts move.
    pub also: Option<Besides>,
    /// Since when it drains.
    pub draining_since: Option<Timestamp>,
    /// Its pods, by ordinal.
    pub workers: Vec<Worker>,
}

/// One pod of a replica, with what its processes said.
#[derive(Debug, Clone)]
pub struct Worker {
    /// Its place in the replica.
    pub ordinal: u32,
    /// The pod.
    pub pod: Arc<Pod>,
    /// What the worker said.
    pub view: Option<WorkerView>,
    /// What the fetcher said.
    pub fetcher: Option<FetcherView>,
    /// Why one of them cannot go on.
    pub failure: Option<FailureView>,
}

/// Finds the replicas, by revision and index.
pub fn replicas(names: &Names, seen: &Observed) -> Vec<Replica> {
    let mut replicas: Vec<Replica> =
        seen.owned.stateful_sets.iter().filter_map(|set| of_set(names, set, seen)).collect();
    for pod in seen.pods.iter().filter(|pod| is_worker(pod)) {
        let Some((revision, index)) = label(pod.as_ref()) else {
            continue;
        };
        let Some(worker) = worker(pod, &seen.fleet) else {
            continue;
        };
        let known = replicas.iter_mut().find(|replica| replica.revision == revision && replica.index == index);
        match known {
            Some(replica) => replica.workers.push(worker),
            None => replicas.push(left_over(revision, index, worker)),
        }
    }
    for replica in &mut replicas {
        replica.workers.sort_by_key(|worker| worker.ordinal);
    }
    replicas.sort_by(|a, b| (&a.revision, a.index).cmp(&(&b.revision, b.index)));
    replicas
}

impl Replica {
    /// Workers that it should have.
    pub fn shards(&self) -> u32 {
        self.plan.as_ref().map_or_else(|| self.pods(), |plan| plan.shards)
    }

    /// The model files that its workers must have. Its StatefulSet tells: what runs needs no record to go on.
    pub fn content_hash(&self) -> Option<&str> {
        let pod = self.set.as_ref()?.spec.as_ref()?.template.spec.as_ref()?;
        let worker = pod.containers.iter().find(|container| container.name == WORKER)?;
        launch::flag(worker.args.as_ref()?, "--content-hash")
    }

    /// Its StatefulSet exists and is not being deleted.
    pub fn stands(&self) -> bool {
        self.set.as_ref().is_some_and(|set| set.metadata.deletion_timestamp.is_none())
    }

    /// Pods of it stay, so there is a StatefulSet of which no watch told yet; or it is gone, and they are about to go.
    pub fn is_unseen(&self) -> bool {
        self.set.is_none() && self.workers.iter().any(|worker| !worker.terminating())
    }

    /// All its workers are ready, and every router knows them.
    pub fn ready(&self) -> bool {
        let ready = |ordinal: u32| self.worker(ordinal).is_some_and(Worker::ready);
        self.shards() > 0 && (0..self.shards()).all(ready)
    }

    /// Workers that are ready and that every router knows.
    pub fn ready_workers(&self) -> u32 {
        u32::try_from(self.workers.iter().filter(|worker| worker.ready()).count()).unwrap_or(u32::MAX)
    }

    /// Nothing runs on it any more, as far as its own workers say.
    pub fn empty(&self) -> bool {
        self.workers.iter().all(Worker::empty)
    }

    /// Requests that its workers have.
    pub fn running(&self) -> u64 {
        let loads = self.workers.iter().filter_map(|worker| worker.view.as_ref()?.load);
        loads.map(|load| load.waiting + load.running).sum()
    }

    /// The worker with this ordinal, rather one that stays.
    pub fn worker(&self, ordinal: u32) -> Option<&Worker> {
        let mut all = self.workers.iter().filter(|worker| worker.ordinal == ordinal);
        all.clone().find(|worker| !worker.terminating()).or_else(|| all.next())
    }

    /// Ordinals that worked before and do not now: gone, started again, or crashed.
    pub fn lost(&self) -> Vec<u32> {
        let some_ready = self.ready_workers() > 0;
        let first_made_until = self.first_made_until();
        let lost = |ordinal: &u32| match self.worker(*ordinal) {
            None => some_ready,
            Some(worker) if worker.ready() => false,
            Some(worker) if worker.terminating() => true,
            Some(worker) => worker.crashed() || first_made_until.is_some_and(|until| worker.made_after(until)),
        };
        (0..self.shards()).filter(lost).collect()
    }

    /// Until when its first pods were made. They are made together, so a later one replaces one that was lost: one made
    /// once another was ready, or long after the StatefulSet. All times are the API server's.
    fn first_made_until(&self) -> Option<Timestamp> {
        let made = self.set.as_ref()?.metadata.creation_timestamp.as_ref()?.0;
        let ready = self.workers.iter().filter_map(Worker::ready_since);
        ready.chain(made.checked_add(TOGETHER).ok()).min()
    }
}

impl Worker {
    /// A pod of which nobody has spoken.
    pub fn bare(pod: &Arc<Pod>) -> Self {
        Self { ordinal: 0, pod: pod.clone(), view: None, fetcher: None, failure: None }
    }

    /// It takes requests, and every router knows it.
    pub fn ready(&self) -> bool {
        !self.terminating() && self.condition("Ready").is_some_and(|one| one.status == "True")
    }

    /// Its experts can be asked.
    pub fn holds(&self) -> bool {
        // one that has not spoken to this operator yet is judged by its own probe
        !self.terminating() && self.view.as_ref().map_or_else(|| self.probed(), WorkerView::holds)
    }

    /// Its own readiness probe succeeds.
    pub fn probed(&self) -> bool {
        self.container().is_some_and(|status| status.ready)
    }

    /// It hangs on its way out: its node is not ready or gone, and nothing was heard of its process for a while.
    pub fn hangs(&self, seen: &Observed) -> bool {
        let node = node_of(&self.pod);
        let gone = node.is_some_and(|name| !seen.nodes.get(name).is_some_and(|node| node.ready));
        let grace = self.pod.metadata.deletion_grace_period_seconds.unwrap_or(0).max(0).unsigned_abs();
        let leaving = self.pod.uid().and_then(|uid| seen.leaving.get(&uid)).copied().unwrap_or_default();
        // one that never spoke to this operator has its time to end, since we saw that it is to
        let over = leaving >= UNHEARD.max(Duration::from_secs(grace));
        let silent = self.view.as_ref().map_or(over, |view| view.silent_for >= UNHEARD);
        self.terminating() && gone && silent
    }

    /// It is on its way out.
    pub fn terminating(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    /// One of the pod's conditions.
    pub fn condition(&self, kind: &str) -> Option<&PodCondition> {
        self.pod.status.as_ref()?.conditions.as_ref()?.iter().find(|one| one.type_ == kind)
    }

    /// The readiness gate is open.
    pub fn gated(&self) -> bool {
        self.condition(ROUTED).is_some_and(|one| one.status == "True")
    }

    /// Its model's files are there.
    pub fn fetched(&self) -> bool {
        let status = self.pod.status.as_ref().and_then(|status| status.init_container_statuses.as_ref());
        let mut states = status.into_iter().flatten().filter(|one| one.name == "fetch");
        let ended = |one: &ContainerStatus| {
            let ended = one.state.as_ref().and_then(|state| state.terminated.as_ref());
            ended.is_some_and(|ended| ended.exit_code == 0)
        };
        states.any(ended)
    }

    /// All container statuses, those of init containers first.
    pub fn containers(&self) -> impl Iterator<Item = &ContainerStatus> {
        let status = self.pod.status.as_ref();
        let init = status.and_then(|status| status.init_container_statuses.as_ref());
        let main = status.and_then(|status| status.container_statuses.as_ref());
        init.into_iter().flatten().chain(main.into_iter().flatten())
    }

    fn container(&self) -> Option<&ContainerStatus> {
        self.containers().find(|status| status.name == WORKER)
    }

    fn crashed(&self) -> bool {
        self.container().is_some_and(|status| status.restart_count > 0)
    }

    fn made_after(&self, time: Timestamp) -> bool {
        self.pod.metadata.creation_timestamp.as_ref().is_some_and(|made| made.0 > time)
    }

    fn ready_since(&self) -> Option<Timestamp> {
        let ready = self.condition("Ready").filter(|one| one.status == "True")?;
        ready.last_transition_time.as_ref().map(|time| time.0)
    }

    fn empty(&self) -> bool {
        match &self.view {
            Some(view) => matches!(view.phase, WorkerPhase::Drained | WorkerPhase::Loading),
            // never started: nothing was ever sent to it
            None => !self.probed() && !self.gated(),
        }
    }
}

fn of_set(names: &Names, set: &Arc<StatefulSet>, seen: &Observed) -> Option<Replica> {
    let (revision, index) = label(set.as_ref())?;
    let name = names.replica(&revision, index);
    let config = seen.owned.config_maps.iter().find(|config| config.name_any() == name);
    let draining = set.annotations().get(DRAINING_SINCE);
    Some(Replica {
        plan: config.and_then(|config| read_plan(config).ok()),
        also: config.and_then(|config| read_also(config).ok().flatten()),
        draining_since: draining.and_then(|since| since.parse().ok()),
        set: Some(set.clone()),
        workers: Vec::new(),
        revision,
        index,
    })
}

fn left_over(revision: Revision, index: u32, worker: Worker) -> Replica {
    let draining_since = worker.pod.metadata.deletion_timestamp.as_ref().map(|time| time.0);
    Replica { revision, index, set: None, plan: None, also: None, draining_since, workers: vec![worker] }
}

fn worker(pod: &Arc<Pod>, fleet: &FleetView) -> Option<Worker> {
    let id = pod.uid()?;
    Some(Worker {
        ordinal: pod.labels().get(POD_INDEX)?.parse().ok()?,
        view: fleet.workers.iter().find(|view| view.id == id).cloned(),
        fetcher: fleet.fetchers.iter().find(|view| view.id == id).cloned(),
        failure: fleet.failures.iter().find(|view| view.id == id).cloned(),
        pod: pod.clone(),
    })
}

fn label(object: &impl ResourceExt) -> Option<(Revision, u32)> {
    let labels = object.labels();
    let revision = Revision::parse(labels.get(REVISION)?)?;
    Some((revision, labels.get(REPLICA)?.parse().ok()?))
}

fn is_worker(pod: &Pod) -> bool {
    pod.labels().get("app.kubernetes.io/component").is_some_and(|component| component == WORKER)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_that_never_spoke_has_its_time_to_end_whatever_clock_the_api_server_has() {
        let pod = json!({
            "metadata": {"name": "a", "uid": "1", "deletionTimestamp": "2001-01-01T00:00:00Z",
                "deletionGracePeriodSeconds": 30},
            "spec": {"nodeName": "gone", "containers": []},
        });
        let worker = Worker::bare(&Arc::new(serde_json::from_value(pod).unwrap()));
        let hangs = |seconds: &[u64]| {
            let leaving = seconds.iter().map(|seconds| ("1".to_owned(), Duration::from_secs(*seconds))).collect();
            worker.hangs(&Observed { leaving, ..Observed::default() })
        };
        assert!(!hangs(&[]) && !hangs(&[0]) && !hangs(&[29]) && hangs(&[30]));
    }
}
