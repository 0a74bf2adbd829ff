//! `modelfleet plan`: what a model would be made of, as text.

use std::{fmt::Write as _, path::PathBuf};

use kube::{Resource, ResourceExt};
use planner::Need;

use crate::{
    local::{self, Declared, Planned, Tools},
    render::{self, Desired, Install, Names, Revision},
    table::{aligned, experts},
    validate::Place,
};

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The files cannot be used.
    #[error(transparent)]
    Read(#[from] local::ReadError),
    /// A model cannot be planned.
    #[error(transparent)]
    Prepare(#[from] local::PrepareError),
}

/// Plans the models of all files, and says which workers each would have and which objects would be made in a cluster.
///
/// # Errors
/// The first model that cannot be read or planned.
pub async fn preview(files: &[PathBuf], tools: Tools<'_>) -> Result<String, Error> {
    let mut text = String::new();
    for declared in local::read(files)? {
        let accepted = local::accept(&declared, place(&declared))?;
        let planned = local::plan(accepted, tools).await?;
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&describe(&declared, &planned));
    }
    Ok(text)
}

/// Where the source can be read.
fn place(declared: &Declared) -> Place {
    if declared.deployment.spec.model.source.starts_with("hf://") { Place::Cluster } else { Place::Local }
}

fn describe(declared: &Declared, planned: &Planned) -> String {
    let (model, plan, weighs) = (&planned.accepted.model, &planned.plan, &planned.description);
    let names = Names::of(&declared.deployment);
    let revision = Revision::of(model.revision_input.as_bytes());
    let desired = render::fresh(&names, model, &Install::default(), weighs, plan);
    let mut text = format!(
        "{}: {}, {} parameters, {}, revision {revision}\n",
        planned.accepted.name, weighs.architecture, weighs.parameters, weighs.dtype
    );
    let shards = match weighs.is_dense() {
        true => "no routed experts".to_owned(),
        false => format!("{} experts a layer in {} layers", weighs.experts, weighs.moe_layers.len()),
    };
    // writing to a String cannot fail
    let _ = writeln!(
        text,
        "replicas {}, workers in each {}, {shards}, context {} tokens, cache {} tokens a worker\n",
        model.replicas, plan.shards, plan.max_context_tokens, plan.kv_cache_tokens
    );
    text.push_str(&aligned(&workers(&names, &revision, planned)));
    text.push('\n');
    text.push_str(&aligned(&objects(&desired)));
    text
}

/// One line a worker of the first replica: all replicas are alike.
fn workers(names: &Names, revision: &Revision, planned: &Planned) -> Vec<[String; 7]> {
    let header = ["WORKER", "EXPERTS", "DENSE", "EXPERT WEIGHTS", "CACHE", "REST", "MEMORY"].map(str::to_owned);
    let line = |(ordinal, need): (u32, &Need)| {
        let held = experts(&planned.plan.placement.held_by(ordinal));
        let rest = need.activations.plus(need.program);
        let name = format!("{}-{ordinal}", names.replica(revision, 0));
        let bytes = [need.dense, need.experts, need.kv_cache, rest, need.total()].map(|bytes| bytes.to_string());
        let [dense, weights, cache, rest, memory] = bytes;
        [name, held, dense, weights, cache, rest, memory]
    };
    std::iter::once(header).chain((0..).zip(&planned.plan.workers).map(line)).collect()
}

fn objects(desired: &Desired) -> Vec<[String; 2]> {
    let mut lines = vec![["KIND", "OBJECT"].map(str::to_owned)];
    list(&desired.service_accounts, &mut lines);
    list(&desired.services, &mut lines);
    list(&desired.config_maps, &mut lines);
    list(&desired.stateful_sets, &mut lines);
    list(&desired.jobs, &mut lines);
    list(&desired.budgets, &mut lines);
    lines
}

fn list<K: Resource<DynamicType = ()>>(objects: &[K], lines: &mut Vec<[String; 2]>) {
    lines.extend(objects.iter().map(|object| [K::kind(&()).into_owned(), object.name_any()]));
}
