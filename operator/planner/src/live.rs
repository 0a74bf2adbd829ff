//! How a placement changes while requests run: what is published next, for a rebalance, a wider and a narrower replica.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::placement::Placement;

/// What is published of a replica's experts. It is the only state of a change: it is kept, and whoever finds it goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Published {
    /// Who is asked for an expert.
    pub placement: Placement,
    /// What is held besides, so that a table that some still use, or will use next, finds its holders.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub also_hold: Option<Placement>,
}

impl Published {
    /// A placement that nothing is about to change.
    pub fn steady(placement: Placement) -> Self {
        Published { placement, also_hold: None }
    }

    /// How many pods the replica must have meanwhile: as many as the wider of both placements.
    pub fn pods(&self) -> u32 {
        self.also_hold.as_ref().map_or(0, |also| also.shards).max(self.placement.shards)
    }
}

/// What is known of the workers, by ordinal, and of the version that is published now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workers {
    /// They hold all that the published version asks of them.
    pub loaded: BTreeSet<u32>,
    /// They run no step on a table older than the published one.
    pub acknowledged: BTreeSet<u32>,
    /// No process of theirs runs: the pod is missing, pending or ended. A worker that is merely out of reach is not gone,
    /// because it may still ask its peers.
    pub gone: BTreeSet<u32>,
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Publish this, as a new version. Pods beyond [`Published::pods`] go after it is published, missing ones are made.
    Publish(Published, Why),
    /// Nothing can be done before the workers have.
    Wait(Why),
    /// The wanted placement is all that is published.
    Complete,
}

/// Why that is the step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The wanted experts are to be loaded, beside those that are asked for.
    Load,
    /// All have loaded: the new holders are asked, the old ones kept.
    Switch,
    /// All ask the new holders: the old ones may drop what is not theirs.
    Drop,
    /// These have not loaded yet.
    Loading(Vec<u32>),
    /// These have experts to load and do not run.
    Missing(Vec<u32>),
    /// These may still run a step on an older table.
    Acknowledging(Vec<u32>),
}

/// The next step from what is published to the `wanted` placement.
///
/// A change is three versions. A table is what a worker asks its peers by, one for a whole step.
/// 1. *Load*: `{placement: old, also_hold: wanted}`, until every holder of the wanted one has loaded it.
/// 2. *Switch*: `{placement: wanted, also_hold: old}`, until no worker runs a step on the old table.
/// 3. *Drop*: `{placement: wanted}`.
///
/// If another placement is wanted in the middle, `also_hold` is replaced once nobody can use its table any more, or
/// becomes the placement again if it is the wanted one.
///
/// # Guarantees
/// Every table that a step may run on is that of `placement` or of `also_hold`, so its holders hold what they are asked
/// for. No worker is asked for an expert before it has reported it as loaded. Pods that a narrower placement leaves
/// out are no longer needed by anyone when [`Published::pods`] falls. The answer depends on the arguments alone: asked
/// again, or by another leader, it is the same; without a change of `wanted` three versions end it.
/// # Assumptions
/// `seen` tells of the published version. The first version of a replica is published when no worker runs.
pub fn next_step(published: &Published, wanted: &Placement, seen: &Workers) -> Step {
    let Published { placement, also_hold } = published;
    match also_hold {
        None if placement == wanted => Step::Complete,
        None => Step::Publish(published.and_hold(wanted), Why::Load),
        Some(also) if also == wanted => match unloaded(published, seen) {
            Some(why) => Step::Wait(why),
            None => {
                let next = Published { placement: also.clone(), also_hold: Some(placement.clone()) };
                Step::Publish(next, Why::Switch)
            }
        },
        Some(_) => match unacknowledged(published, seen) {
            Some(why) => Step::Wait(why),
            None if placement == wanted => Step::Publish(Published::steady(placement.clone()), Why::Drop),
            None => Step::Publish(published.and_hold(wanted), Why::Load),
        },
    }
}

impl Published {
    fn and_hold(&self, wanted: &Placement) -> Published {
        Published { placement: self.placement.clone(), also_hold: Some(wanted.clone()) }
    }
}

/// Which holders of `also_hold` keep it from being asked.
fn unloaded(published: &Published, seen: &Workers) -> Option<Why> {
    let also = published.also_hold.as_ref()?;
    let holders = also.holders();
    let missing: Vec<u32> = holders.iter().copied().filter(|ordinal| seen.gone.contains(ordinal)).collect();
    if !missing.is_empty() {
        return Some(Why::Missing(missing));
    }
    let loading: Vec<u32> = holders.into_iter().filter(|ordinal| !seen.loaded.contains(ordinal)).collect();
    (!loading.is_empty()).then_some(Why::Loading(loading))
}

/// Which workers keep the holders of `also_hold` from dropping it.
fn unacknowledged(published: &Published, seen: &Workers) -> Option<Why> {
    let may_run = (0..published.pods()).filter(|ordinal| !seen.gone.contains(ordinal));
    let asking: Vec<u32> = may_run.filter(|ordinal| !seen.acknowledged.contains(ordinal)).collect();
    (!asking.is_empty()).then_some(Why::Acknowledging(asking))
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ordinals, verb) = match self {
            Why::Load => return f.write_str("the wanted experts load"),
            Why::Switch => return f.write_str("all have loaded"),
            Why::Drop => return f.write_str("all ask the same holders"),
            Why::Loading(ordinals) => (ordinals, "loading"),
            Why::Missing(ordinals) => (ordinals, "missing"),
            Why::Acknowledging(ordinals) => (ordinals, "on an older table"),
        };
        let noun = if ordinals.len() == 1 { "worker" } else { "workers" };
        let ordinals: Vec<String> = ordinals.iter().map(u32::to_string).collect();
        write!(f, "{noun} {} {verb}", ordinals.join(", "))
    }
}

impl fmt::Display for Published {
    /// The width, and the one that is held besides: `4`, `4 and 6`; for few experts the holders of each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text(&self.placement))?;
        self.also_hold.as_ref().map_or(Ok(()), |also| write!(f, ", hold {}", text(also)))
    }
}

/// The holders of each expert, where one layer of a few tells all; else the width.
fn text(placement: &Placement) -> String {
    const FEW: usize = 8;
    match placement.layers.as_slice() {
        [only] if only.experts.len() <= FEW => {
            let holders = |of: &Vec<u32>| of.iter().map(u32::to_string).collect::<Vec<String>>().join("+");
            only.experts.iter().map(holders).collect::<Vec<String>>().join(" ")
        }
        _ => format!("{} shards", placement.shards),
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Publish(next, why) => write!(f, "publish {next}, {} pods ({why})", next.pods()),
            Step::Wait(why) => write!(f, "wait ({why})"),
            Step::Complete => f.write_str("complete"),
        }
    }
}
