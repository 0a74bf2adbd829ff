//! Whole objects from a decision: pure, and it cannot fail.
//!
//! One file a part: `name` (names and labels), `record` (what is remembered), `set` (a replica, and what stands
//! around the workers), `pod` (what runs in one).

mod name;
mod pod;
mod record;
mod set;

use std::collections::BTreeSet;

use k8s_openapi::api::{
    apps::v1::StatefulSet,
    batch::v1::{Job, JobSpec},
    core::v1::{ConfigMap, Service, ServiceAccount},
    policy::v1::PodDisruptionBudget,
};
use planner::{ModelDescription, Plan};

pub use self::{
    name::{DESCRIBE, MODEL, MODEL_NAME, Names, POD_INDEX, REPLICA, REVISION, Revision, WORKER},
    pod::{ROUTED, Workload, claim, template},
    record::{Record, read_accepted, read_also, read_plan},
    set::DRAINING_SINCE,
};
use crate::{
    decide::{Decision, Target},
    validate::ValidModel,
};

/// Tries of a describer; its pauses grow to minutes, and a source may appear any time.
const DESCRIBE_TRIES: i32 = 1_000_000;

/// What the install adds to every worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Install {
    /// The image of workers. It reaches the revisions that are made from now on.
    pub image: String,
    /// `IfNotPresent`, `Always` or `Never`.
    pub image_pull_policy: String,
    /// Secrets of the model's namespace.
    pub image_pull_secrets: Vec<String>,
    /// HOST:PORT of the control stream.
    pub operator: String,
    /// Host of the routers' Service.
    pub router: String,
    /// How the hub is reached.
    pub hub: HubAccess,
    /// `OTEL_*`, as they are to be set.
    pub telemetry: Vec<(String, String)>,
}

/// How the hub is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HubAccess {
    /// Instead of `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// Certificates to trust beside the usual ones, PEM.
    pub certificates: Option<String>,
    /// A proxy.
    pub proxy: Option<String>,
    /// Hosts that are reached without it.
    pub no_proxy: Option<String>,
}

/// The objects that should be. What is ours and not in it goes, but for what is left alone.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Desired {
    /// The identity of the workers.
    pub service_accounts: Vec<ServiceAccount>,
    /// The headless Service.
    pub services: Vec<Service>,
    /// Records, placements, the accepted spec, certificates.
    pub config_maps: Vec<ConfigMap>,
    /// One a replica.
    pub stateful_sets: Vec<StatefulSet>,
    /// The description under way.
    pub jobs: Vec<Job>,
    /// One a revision with replicas.
    pub budgets: Vec<PodDisruptionBudget>,
    /// Names of objects that are not deleted, listed or not.
    pub left_alone: Vec<String>,
}

/// The objects of a model in the cluster.
pub fn objects(names: &Names, model: &ValidModel, install: &Install, decision: &Decision) -> Desired {
    let mut desired = around(names, model, install);
    desired.left_alone.clone_from(&decision.left_alone);
    desired.config_maps.extend(decision.records.iter().map(|record| record.render(names)));
    for target in &decision.targets {
        let record = decision.records.iter().find(|record| record.revision == target.revision);
        if let Some(record) = record {
            desired.replica(names, model, record, target);
        }
    }
    let marked = decision.marked.iter().map(|(set, draining_since)| set::marked(set, *draining_since));
    desired.stateful_sets.extend(marked);
    let revisions: BTreeSet<&Revision> = decision.targets.iter().map(|target| &target.revision).collect();
    desired.budgets = revisions.into_iter().map(|revision| set::budget(names, revision, model.redundancy)).collect();
    if decision.describe {
        desired.jobs.push(describe(&Workload { names, model, install, revision: &decision.revision }));
    }
    desired
}

/// The objects of a model that is installed with this plan, as `modelfleet plan` shows them.
pub fn fresh(
    names: &Names,
    model: &ValidModel,
    install: &Install,
    description: &ModelDescription,
    plan: &Plan,
) -> Desired {
    let revision = Revision::of(model.revision_input.as_bytes());
    let template = template(&Workload { names, model, install, revision: &revision }, description, plan);
    let record = Record::new(revision, description.clone(), template);
    let mut desired = around(names, model, install);
    desired.config_maps.push(record.render(names));
    for index in 0..model.replicas {
        desired.replica(names, model, &record, &Target::new(record.revision.clone(), index, plan.clone()));
    }
    desired.budgets.push(set::budget(names, &record.revision, model.redundancy));
    desired
}

/// What a model has whatever it runs.
fn around(names: &Names, model: &ValidModel, install: &Install) -> Desired {
    let certificates = install.hub.certificates.as_deref();
    let mut config_maps = vec![record::accepted(names, &model.spec)];
    config_maps.extend(certificates.map(|pem| record::certificates(names, pem)));
    Desired {
        service_accounts: vec![set::service_account(names)],
        services: vec![set::service(names)],
        config_maps,
        ..Desired::default()
    }
}

impl Desired {
    fn replica(&mut self, names: &Names, model: &ValidModel, record: &Record, target: &Target) {
        let (plan, also) = (&target.plan, target.also.as_ref());
        self.config_maps.push(record::placement(names, &record.revision, target.index, plan, also));
        self.stateful_sets.push(set::replica(names, model, record, target));
    }
}

/// The Job `NAME-REV-describe`: reads what the model weighs, once a revision.
fn describe(workload: &Workload<'_>) -> Job {
    Job {
        metadata: workload.names.metadata_of(workload.names.describe(workload.revision), DESCRIBE, workload.revision),
        spec: Some(JobSpec {
            backoff_limit: Some(DESCRIBE_TRIES),
            ttl_seconds_after_finished: Some(300),
            template: pod::describe(workload),
            ..JobSpec::default()
        }),
        status: None,
    }
}
