//! What the operator must remember, kept in the cluster: what a revision is, where a replica's experts are, and the
//! spec that was accepted last. Written here, and read back here.

use std::{collections::BTreeMap, sync::Arc};

use crds::ModelDeploymentSpec;
use k8s_openapi::api::core::v1::{ConfigMap, PodTemplateSpec};
use kube::ResourceExt;
use planner::{ModelDescription, Plan};
use serde::de::DeserializeOwned;

use super::name::{Names, REPLICA, Revision, WORKER};
use crate::{error::Error, launch, moving::Besides};

const DESCRIPTION: &str = "description.json";
const TEMPLATE: &str = "template.json";
const PLAN: &str = "plan.json";
const NEXT: &str = "next.json";
const LAST: &str = "last.json";
const SPEC: &str = "spec.json";
/// The file that a worker reads when no operator tells it its placement.
pub(super) const PLACEMENT: &str = "placement.json";
/// The file with the hub's certificates.
pub(super) const CERTIFICATES: &str = "ca.crt";

/// What a revision is: written once, so that an upgrade of the operator changes no worker that runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Which one.
    pub revision: Revision,
    /// What the model weighs, and its files.
    pub description: ModelDescription,
    /// The pods of its workers, for any replica.
    pub template: PodTemplateSpec,
    /// As stored: what is rendered again is what is there.
    data: BTreeMap<String, String>,
}

impl Record {
    /// Records a new revision.
    pub fn new(revision: Revision, description: ModelDescription, template: PodTemplateSpec) -> Self {
        let data = [(DESCRIPTION, json(&description)), (TEMPLATE, json(&template))];
        let data = data.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Self { revision, description, template, data }
    }

    /// Reads the record of a revision back.
    ///
    /// # Errors
    /// If the ConfigMap is not what [`Record::render`] makes.
    pub fn read(revision: &Revision, config: &ConfigMap) -> Result<Self, Error> {
        Ok(Self {
            revision: revision.clone(),
            description: field(config, DESCRIPTION)?,
            template: field(config, TEMPLATE)?,
            data: config.data.clone().unwrap_or_default(),
        })
    }

    /// Finds and reads the record of a revision.
    ///
    /// # Errors
    /// As [`Record::read`].
    pub fn find(names: &Names, revision: &Revision, configs: &[Arc<ConfigMap>]) -> Result<Option<Self>, Error> {
        let name = names.revision(revision);
        let found = configs.iter().find(|config| config.name_any() == name);
        found.map(|config| Self::read(revision, config)).transpose()
    }

    /// The user wrote what a worker asks of its node, so it is not the plan that decides.
    pub fn asks_for_memory(&self) -> bool {
        let mut containers = self.template.spec.iter().flat_map(|spec| &spec.containers);
        let worker = containers.find(|container| container.name == WORKER);
        let requests = worker.and_then(|worker| worker.resources.as_ref()?.requests.as_ref());
        requests.is_some_and(|requests| requests.contains_key("memory"))
    }

    /// The ConfigMap `NAME-REV`.
    pub fn render(&self, names: &Names) -> ConfigMap {
        ConfigMap {
            metadata: names.metadata_of(names.revision(&self.revision), WORKER, &self.revision),
            immutable: Some(true),
            data: Some(self.data.clone()),
            binary_data: None,
        }
    }
}

/// The ConfigMap `NAME-REV-I`: the plan of one replica, the one that it comes from or goes to while experts move, and
/// the placement file of its workers.
pub(super) fn placement(
    names: &Names,
    revision: &Revision,
    index: u32,
    plan: &Plan,
    also: Option<&Besides>,
) -> ConfigMap {
    let mut metadata = names.metadata_of(names.replica(revision, index), WORKER, revision);
    metadata.labels.get_or_insert_default().insert(REPLICA.to_owned(), index.to_string());
    let file = launch::placement_json(&plan.placement);
    let mut data = BTreeMap::from([(PLAN.to_owned(), json(plan)), (PLACEMENT.to_owned(), file)]);
    data.extend(also.map(|also| match also {
        Besides::Next(plan) => (NEXT.to_owned(), json(plan)),
        Besides::Last(plan) => (LAST.to_owned(), json(plan)),
    }));
    ConfigMap { metadata, data: Some(data), ..ConfigMap::default() }
}

/// Reads back the plan whose experts a replica holds besides.
///
/// # Errors
/// If the ConfigMap is not what `placement` makes.
pub fn read_also(config: &ConfigMap) -> Result<Option<Besides>, Error> {
    let there = |key: &str| config.data.as_ref().is_some_and(|data| data.contains_key(key));
    if there(NEXT) {
        return field(config, NEXT).map(|plan| Some(Besides::Next(plan)));
    }
    if there(LAST) { field(config, LAST).map(|plan| Some(Besides::Last(plan))) } else { Ok(None) }
}

/// Reads the plan of a replica back.
///
/// # Errors
/// If the ConfigMap is not what `placement` makes.
pub fn read_plan(config: &ConfigMap) -> Result<Plan, Error> {
    field(config, PLAN)
}

/// The ConfigMap `NAME-accepted`: the spec that runs while a later one is refused.
pub(super) fn accepted(names: &Names, spec: &ModelDeploymentSpec) -> ConfigMap {
    let data = [(SPEC.to_owned(), json(spec))];
    ConfigMap { metadata: names.metadata(names.accepted(), WORKER), data: Some(data.into()), ..ConfigMap::default() }
}

/// Reads the spec back that was accepted last; `None`: none was.
///
/// # Errors
/// If the ConfigMap is not what `accepted` makes.
pub fn read_accepted(names: &Names, configs: &[Arc<ConfigMap>]) -> Result<Option<ModelDeploymentSpec>, Error> {
    let name = names.accepted();
    configs.iter().find(|config| config.name_any() == name).map(|config| field(config, SPEC)).transpose()
}

/// The ConfigMap `NAME-hub`: the certificates that the hub is trusted by, for fetch and describe.
pub(super) fn certificates(names: &Names, pem: &str) -> ConfigMap {
    ConfigMap {
        metadata: names.metadata(names.hub(), WORKER),
        data: Some([(CERTIFICATES.to_owned(), pem.to_owned())].into()),
        ..ConfigMap::default()
    }
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("values of ours have text keys and no failing serialiser")
}

fn field<T: DeserializeOwned>(config: &ConfigMap, key: &str) -> Result<T, Error> {
    let object = || format!("ConfigMap {}", config.name_any());
    let text = config.data.as_ref().and_then(|data| data.get(key));
    let text = text.ok_or_else(|| Error::Record { object: object(), why: format!("{key} is missing") })?;
    serde_json::from_str(text).map_err(|error| Error::Record { object: object(), why: format!("{key}: {error}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_as_it_was_and_renders_the_same_bytes() {
        let names = Names::of(&crds::ModelDeployment::default());
        let record = Record::new(Revision::of(b"a"), ModelDescription::default(), PodTemplateSpec::default());
        let config = record.render(&names);
        let again = Record::read(&record.revision, &config).unwrap();
        assert_eq!(again, record);
        assert_eq!(again.render(&names), config);
    }

    #[test]
    fn a_record_with_a_field_missing_says_which() {
        let error = Record::read(&Revision::of(b"a"), &ConfigMap::default()).unwrap_err();
        assert!(error.to_string().contains("description.json is missing"), "{error}");
    }
}
