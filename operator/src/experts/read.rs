//! Asks the API server for placements, and through it each worker for its load: with the user's own rights, without a
//! write, and without the operator.

use std::{collections::BTreeMap, fmt::Debug, future::Future, sync::Arc, time::Duration};

use crds::ModelDeployment;
use futures::{StreamExt as _, stream};
use http::Request;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::StatefulSet,
        core::v1::{ConfigMap, Pod},
    },
};
use kube::{Api, Client, Resource, ResourceExt, api::ListParams};
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use wire::{admin::EXPERTS, proto};

use super::{ModelExperts, NoSuchModel, ReplicaExperts, Told};
use crate::{
    error,
    launch::ADMIN_PORT,
    observe::{Observed, Owned},
    render::{MODEL, MODEL_NAME, Names},
    replica::{Replica, Worker, replicas},
};

/// Workers that are asked at once.
const AT_ONCE: usize = 16;
/// Characters of a reason, at most.
const REASON: usize = 160;

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such model.
    #[error(transparent)]
    Unknown(NoSuchModel),
    /// The API server refuses or does not answer.
    #[error("{}", .0.chain())]
    Api(error::Error),
}

/// Reads the experts of the model `name`. No single call takes longer than `patience`.
///
/// A worker that cannot be asked is in the answer, with the reason.
///
/// # Errors
/// If there is no such model, or its objects cannot be read.
pub async fn read(client: &Client, namespace: &str, name: &str, patience: Duration) -> Result<ModelExperts, Error> {
    let cluster = Cluster { client, namespace, patience };
    let md = cluster.model(name).await?;
    let observed = cluster.observe(&md).await?;
    let mut shown = Vec::new();
    for replica in replicas(&Names::of(&md), &observed) {
        let told = cluster.ask_all(&replica).await;
        shown.push(ReplicaExperts::of(&replica, told));
    }
    let status = md.status.and_then(|status| status.summary).unwrap_or_default();
    Ok(ModelExperts { model: format!("{namespace}/{name}"), status, replicas: shown })
}

struct Cluster<'a> {
    client: &'a Client,
    namespace: &'a str,
    patience: Duration,
}

impl Cluster<'_> {
    async fn model(&self, name: &str) -> Result<ModelDeployment, Error> {
        let api: Api<ModelDeployment> = Api::namespaced(self.client.clone(), self.namespace);
        if let Some(found) = self.call::<ModelDeployment, _>(name, api.get_opt(name)).await? {
            return Ok(found);
        }
        let all: Vec<Arc<ModelDeployment>> = self.list(&ListParams::default()).await?;
        let there = all.iter().map(|md| md.name_any()).collect();
        Err(Error::Unknown(NoSuchModel { name: name.to_owned(), namespace: self.namespace.to_owned(), there }))
    }

    /// What there is of the model, as far as it says who holds what.
    async fn observe(&self, md: &ModelDeployment) -> Result<Observed, Error> {
        let ours = ListParams::default().labels(&format!("{MODEL}={}", Names::of(md).stem()));
        let mut pods: Vec<Arc<Pod>> = self.list(&ours).await?;
        pods.retain(|pod| pod.annotations().get(MODEL_NAME) == Some(&md.name_any()));
        let config_maps: Vec<Arc<ConfigMap>> = self.list(&ours).await?;
        let stateful_sets: Vec<Arc<StatefulSet>> = self.list(&ours).await?;
        Ok(Observed { owned: Owned { config_maps, stateful_sets, ..Owned::default() }, pods, ..Observed::default() })
    }

    async fn list<K>(&self, which: &ListParams) -> Result<Vec<Arc<K>>, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), self.namespace);
        let listed = self.call::<K, _>("list", api.list(which)).await?;
        Ok(listed.items.into_iter().map(Arc::new).collect())
    }

    async fn call<K, T>(&self, name: &str, call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Error>
    where
        K: Resource<DynamicType = ()>,
    {
        let (kind, name) = (K::kind(&()).into_owned(), name.to_owned());
        match timeout(self.patience, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(source)) => Err(Error::Api(error::Error::Read { kind, name, source: Box::new(source) })),
            Err(_) => Err(Error::Api(error::Error::Timeout { kind, name, after: self.patience })),
        }
    }

    /// What the workers of a replica tell, by ordinal.
    async fn ask_all(&self, replica: &Replica) -> BTreeMap<u32, Told> {
        let ask = |worker: &Worker| {
            let (ordinal, pod) = (worker.ordinal, worker.pod.clone());
            async move { (ordinal, self.ask(&pod).await) }
        };
        let asked: Vec<_> = replica.workers.iter().map(ask).collect();
        let mut told = BTreeMap::new();
        let mut answers = std::pin::pin!(stream::iter(asked).buffer_unordered(AT_ONCE));
        while let Some((ordinal, answer)) = answers.next().await {
            // of two pods with one ordinal, one is on its way out and may not answer
            if answer.is_ok() || !told.contains_key(&ordinal) {
                told.insert(ordinal, answer);
            }
        }
        told
    }

    async fn ask(&self, pod: &Pod) -> Told {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Running");
        if phase != "Running" {
            return Err(format!("its pod is {phase}"));
        }
        let path = format!("/api/v1/namespaces/{}/pods/{}:{ADMIN_PORT}/proxy{EXPERTS}", self.namespace, pod.name_any());
        let request = Request::get(path).body(Vec::new()).map_err(|error| error.to_string())?;
        let text = match timeout(self.patience, self.client.request_text(request)).await {
            Ok(Ok(text)) => text,
            Ok(Err(error)) => return Err(reason(&error)),
            Err(_) => return Err(format!("no answer within {} s", self.patience.as_secs_f32())),
        };
        let load: proto::ExpertLoad =
            serde_json::from_str(&text).map_err(|error| format!("its answer cannot be read: {error}"))?;
        Ok(load.layers.into_iter().map(|layer| (layer.layer, layer.rows)).collect())
    }
}

/// One line: the server's own words, where it has some.
fn reason(error: &kube::Error) -> String {
    let words = match error {
        kube::Error::Api(status) if status.message.trim().is_empty() => format!("it answers {}", status.code),
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    };
    let line = words.lines().next().unwrap_or_default().chars();
    line.filter(|letter| !letter.is_control()).take(REASON).collect()
}
