//! `modelfleet experts`: which worker holds which experts, and how many rows each expert gets. Values, and how they are
//! put together; `read` asks the cluster, `local` puts its own together, `draw` makes text of either.

mod draw;
mod read;

use std::collections::{BTreeMap, BTreeSet};

use kube::ResourceExt;
use planner::placement::{Placement, skew_percent};
use serde::{Deserialize, Serialize};

pub use self::{
    draw::{Canvas, draw, table},
    read::{Error, read},
};
use crate::{
    moving::Besides,
    observe::node_of,
    replica::{Replica, Worker},
    table::ranges,
};

/// The experts of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelExperts {
    /// NAMESPACE/NAME.
    pub model: String,
    /// The column STATUS; empty before the operator has spoken.
    pub status: String,
    /// By revision and number.
    pub replicas: Vec<ReplicaExperts>,
}

/// Those of one replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaExperts {
    /// What it runs.
    pub revision: String,
    /// Its number within the revision.
    pub replica: u32,
    /// Workers that it should have.
    pub shards: u32,
    /// It is on its way out.
    pub draining: bool,
    /// Experts change their holders.
    pub moving: Option<Moving>,
    /// The placement is recorded and can be read.
    pub placed: bool,
    /// The least, over all experts, of live holders; absent without routed experts.
    pub min_copies: Option<u32>,
    /// By how many percent the fullest worker has more than the mean, if rows are split as well as can be; absent if no
    /// rows are known.
    pub skew_percent: Option<u32>,
    /// By ordinal.
    pub workers: Vec<WorkerExperts>,
    /// Layers with routed experts, in the model's order.
    pub layers: Vec<LayerExperts>,
}

/// How far a move of experts is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Moving {
    /// The next holders load.
    Loading,
    /// The last holders keep theirs until nobody asks them.
    Dropping,
}

/// One worker of a replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerExperts {
    /// Its place in the replica.
    pub ordinal: u32,
    /// Its pod, if there is one; in local mode its process.
    pub pod: Option<String>,
    /// Where that runs, once it is bound.
    pub node: Option<String>,
    /// Its experts can be asked.
    pub live: bool,
    /// Why the rows of its requests are not known.
    pub unknown: Option<String>,
    /// Experts that it is to hold, by layer.
    pub experts: BTreeMap<u32, Vec<u32>>,
}

/// The experts of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerExperts {
    /// Index of the transformer layer.
    pub layer: u32,
    /// By number.
    pub experts: Vec<Expert>,
}

/// One expert of a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Expert {
    /// Its number.
    pub expert: u32,
    /// Rows that the requests of the replica's workers gave to it since those started; absent if no worker told.
    pub rows: Option<u64>,
    /// Holders that are live.
    pub copies: u32,
    /// Ordinals of all holders.
    pub holders: Vec<u32>,
}

/// What a worker told: rows by layer and expert, or why it told none.
pub type Told = Result<BTreeMap<u32, Vec<u64>>, String>;

/// A model that nobody declared.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no ModelDeployment {name} in namespace {namespace}; there are: {}", listed(.there))]
pub struct NoSuchModel {
    /// The name that was asked for.
    pub name: String,
    /// Where.
    pub namespace: String,
    /// Those in that namespace.
    pub there: Vec<String>,
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// A layer that has no routed experts.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("layer {layer} of {model} has no routed experts; layers that have: {there}")]
pub struct NoSuchLayer {
    model: String,
    layer: u32,
    there: String,
}

impl ModelExperts {
    /// Keeps one layer.
    ///
    /// # Errors
    /// If no replica has experts in it, but some has replicas.
    pub fn only(mut self, layer: u32) -> Result<Self, NoSuchLayer> {
        let layers = self.replicas.iter().flat_map(|replica| &replica.layers);
        let there: BTreeSet<u32> = layers.map(|layer| layer.layer).collect();
        if !self.replicas.is_empty() && !there.contains(&layer) {
            let there = ranges(&there.into_iter().collect::<Vec<_>>());
            return Err(NoSuchLayer { model: self.model, layer, there });
        }
        for replica in &mut self.replicas {
            replica.layers.retain(|one| one.layer == layer);
            replica.workers.iter_mut().for_each(|worker| worker.experts.retain(|one, _| *one == layer));
        }
        Ok(self)
    }
}

impl ReplicaExperts {
    /// Puts together what is recorded of a replica and what its workers told, by ordinal.
    pub fn of(replica: &Replica, told: BTreeMap<u32, Told>) -> Self {
        let ordinals: BTreeSet<u32> =
            (0..replica.shards()).chain(replica.workers.iter().map(|worker| worker.ordinal)).collect();
        let worker = |ordinal: u32| {
            let pod = replica.worker(ordinal).map(|worker| &worker.pod);
            WorkerExperts {
                ordinal,
                pod: pod.map(|pod| pod.name_any()),
                node: pod.and_then(|pod| node_of(pod)).map(str::to_owned),
                live: replica.worker(ordinal).is_some_and(Worker::holds),
                ..WorkerExperts::default()
            }
        };
        let placement = replica.plan.as_ref().map(|plan| &plan.placement);
        Self {
            revision: replica.revision.to_string(),
            replica: replica.index,
            shards: replica.shards(),
            draining: replica.draining_since.is_some(),
            moving: replica.also.as_ref().map(|also| match also {
                Besides::Next(_) => Moving::Loading,
                Besides::Last(_) => Moving::Dropping,
            }),
            workers: ordinals.into_iter().map(worker).collect(),
            ..Self::default()
        }
        .with(placement, told)
    }

    /// Says of the workers what they hold and what they told, and of the experts who of them has a copy.
    pub(crate) fn with(mut self, placement: Option<&Placement>, mut told: BTreeMap<u32, Told>) -> Self {
        let none = Placement::default();
        self.placed = placement.is_some();
        let placement = placement.unwrap_or(&none);
        let live: BTreeSet<u32> =
            self.workers.iter().filter(|worker| worker.live).map(|worker| worker.ordinal).collect();
        let live = |ordinal: u32| live.contains(&ordinal);
        let rows = sums(placement, told.values().flatten());
        self.min_copies = placement.min_copies(live);
        self.skew_percent = rows.as_ref().and_then(|rows| skew_percent(placement, rows));
        self.layers = layers(placement, rows.as_deref(), live);
        for worker in &mut self.workers {
            worker.experts = placement.held_by(worker.ordinal);
            worker.unknown = told.remove(&worker.ordinal).unwrap_or_else(|| Err("it has no pod".to_owned())).err();
        }
        self
    }

    /// Workers whose rows are in the sums.
    pub fn told(&self) -> usize {
        self.workers.iter().filter(|worker| worker.unknown.is_none()).count()
    }
}

impl LayerExperts {
    /// Rows of all experts; `None`: no worker told.
    pub fn rows(&self) -> Option<u64> {
        self.experts.iter().map(|expert| expert.rows).try_fold(0_u64, |sum, rows| Some(sum.saturating_add(rows?)))
    }
}

/// Rows over all workers, by layer and expert of the placement; `None`: nobody told.
fn sums<'a>(
    placement: &Placement,
    told: impl Iterator<Item = &'a BTreeMap<u32, Vec<u64>>> + Clone,
) -> Option<Vec<Vec<u64>>> {
    told.clone().next()?;
    let of_layer = |layer: &planner::placement::LayerPlacement| {
        let mut sums = vec![0_u64; layer.experts.len()];
        for rows in told.clone().filter_map(|rows| rows.get(&layer.layer)) {
            sums.iter_mut().zip(rows).for_each(|(sum, rows)| *sum = sum.saturating_add(*rows));
        }
        sums
    };
    Some(placement.layers.iter().map(of_layer).collect())
}

fn layers(placement: &Placement, rows: Option<&[Vec<u64>]>, live: impl Fn(u32) -> bool) -> Vec<LayerExperts> {
    let expert = |of: usize, expert: usize, holders: &Vec<u32>| Expert {
        expert: u32::try_from(expert).unwrap_or(u32::MAX),
        rows: rows.map(|rows| rows[of][expert]),
        copies: u32::try_from(holders.iter().filter(|holder| live(**holder)).count()).unwrap_or(u32::MAX),
        holders: holders.clone(),
    };
    let layers = placement.layers.iter().enumerate();
    let layer = |(of, layer): (usize, &planner::placement::LayerPlacement)| LayerExperts {
        layer: layer.layer,
        experts: layer.experts.iter().enumerate().map(|(number, holders)| expert(of, number, holders)).collect(),
    };
    layers.map(layer).collect()
}

#[cfg(test)]
mod tests;
