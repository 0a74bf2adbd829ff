//! The names and labels of everything that belongs to one ModelDeployment.

use std::collections::BTreeMap;

use crds::ModelDeployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};
use sha2::{Digest, Sha256};

/// Label of all our objects and pods: the stem of the model's name, fit for a label.
pub const MODEL: &str = "modelfleet.io/model";
/// Annotation of pods: the name of their ModelDeployment, whole.
pub const MODEL_NAME: &str = "modelfleet.io/model-name";
/// Label of objects and pods of one revision.
pub const REVISION: &str = "modelfleet.io/revision";
/// Label of objects and pods of one replica.
pub const REPLICA: &str = "modelfleet.io/replica";
/// Label that Kubernetes gives the pods of a StatefulSet: their ordinal.
pub const POD_INDEX: &str = "apps.kubernetes.io/pod-index";
/// Component of worker pods and of what is made for them.
pub const WORKER: &str = "worker";
/// Component of the Job that reads what a model weighs.
pub const DESCRIBE: &str = "describe";

/// Characters of a stem: `STEM-REVISION-INDEX` stays within 52 with indices up to 99999.
const STEM: usize = 36;

/// The first part of every name: the model's own where it is short and without dots, else cut and hashed.
#[derive(Debug, Clone, PartialEq)]
pub struct Names {
    stem: String,
    namespace: String,
    model: String,
    path: String,
    owner: OwnerReference,
}

/// 8 hex characters of what a worker runs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(String);

impl Revision {
    /// The revision of what is described by `input`, canonical text.
    pub fn of(input: &[u8]) -> Self {
        Self(hex(input, 4))
    }

    /// Reads a label.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        (hex && text.len() == 8).then(|| Self(text.to_owned()))
    }

    /// The characters.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Revision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Names {
    /// The names of what `md` owns.
    pub fn of(md: &ModelDeployment) -> Self {
        let model = md.name_any();
        let owner = OwnerReference {
            api_version: ModelDeployment::api_version(&()).into_owned(),
            kind: ModelDeployment::kind(&()).into_owned(),
            name: model.clone(),
            uid: md.uid().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: None,
        };
        let namespace = md.namespace().unwrap_or_default();
        Self { stem: stem(&model), path: format!("{namespace}/{model}"), namespace, model, owner }
    }

    /// `NAMESPACE/NAME`, as requests and processes name the model.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The ModelDeployment's own name.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The value of the label [`MODEL`].
    pub fn stem(&self) -> &str {
        &self.stem
    }

    /// `NAME-REV-I`: a replica's StatefulSet and its placement; at most 52 characters.
    pub fn replica(&self, revision: &Revision, index: u32) -> String {
        format!("{}-{revision}-{index}", self.stem)
    }

    /// `NAME-REV`: the record of a revision, and its disruption budget.
    pub fn revision(&self, revision: &Revision) -> String {
        format!("{}-{revision}", self.stem)
    }

    /// `NAME-REV-describe`: the Job that reads what the model weighs.
    pub fn describe(&self, revision: &Revision) -> String {
        format!("{}-{revision}-describe", self.stem)
    }

    /// `NAME-accepted`: the spec that was accepted last.
    pub fn accepted(&self) -> String {
        format!("{}-accepted", self.stem)
    }

    /// `NAME-hub`: the certificates that the hub is trusted by.
    pub fn hub(&self) -> String {
        format!("{}-hub", self.stem)
    }

    /// `NAME-workers`: the headless Service, and the ServiceAccount. A Service must not begin with a digit.
    pub fn workers(&self) -> String {
        let digit = self.stem.starts_with(|first: char| first.is_ascii_digit());
        format!("{}{}-workers", if digit { "m-" } else { "" }, self.stem)
    }

    /// The DNS name of a worker.
    pub fn worker_host(&self, pod: &str) -> String {
        format!("{pod}.{}.{}.svc", self.workers(), self.namespace)
    }

    /// Matches one pod a replica, so that an HPA counts replicas and not shards.
    pub fn scale_selector(&self) -> String {
        format!("{MODEL}={},app.kubernetes.io/component={WORKER},{POD_INDEX}=0", self.stem)
    }

    /// The labels of one component.
    pub fn labels(&self, component: &str) -> BTreeMap<String, String> {
        let labels = [
            ("app.kubernetes.io/name", "modelfleet"),
            ("app.kubernetes.io/instance", &self.stem),
            ("app.kubernetes.io/component", component),
            ("app.kubernetes.io/managed-by", "modelfleet"),
            (MODEL, &self.stem),
        ];
        labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// The metadata of an object that `md` owns.
    pub fn metadata(&self, name: String, component: &str) -> ObjectMeta {
        ObjectMeta {
            name: Some(name),
            namespace: Some(self.namespace.clone()),
            labels: Some(self.labels(component)),
            owner_references: Some(vec![self.owner.clone()]),
            ..ObjectMeta::default()
        }
    }

    /// The metadata of an object that belongs to one revision.
    pub fn metadata_of(&self, name: String, component: &str, revision: &Revision) -> ObjectMeta {
        let mut metadata = self.metadata(name, component);
        metadata.labels.get_or_insert_default().insert(REVISION.to_owned(), revision.to_string());
        metadata
    }
}

/// The first `bytes` bytes of the SHA-256 of `input`, in hex.
fn hex(input: &[u8], bytes: usize) -> String {
    Sha256::digest(input)[..bytes].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn stem(name: &str) -> String {
    if name.len() <= STEM && !name.contains('.') {
        return name.to_owned();
    }
    let hash = hex(name.as_bytes(), 4);
    let plain: String = name.chars().map(|c| if c == '.' { '-' } else { c }).take(STEM - hash.len() - 1).collect();
    format!("{}-{hash}", plain.trim_end_matches('-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(name: &str) -> Names {
        let mut md = ModelDeployment::default();
        md.metadata.name = Some(name.to_owned());
        md.metadata.namespace = Some("here".to_owned());
        Names::of(&md)
    }

    fn revision() -> Revision {
        Revision::of(b"anything")
    }

    #[test]
    fn a_short_name_stays_itself() {
        let names = names("qwen3-moe");
        assert_eq!(names.replica(&revision(), 0), format!("qwen3-moe-{}-0", revision()));
        assert_eq!(names.workers(), "qwen3-moe-workers");
    }

    #[test]
    fn a_service_does_not_begin_with_a_digit() {
        assert_eq!(names("7b").workers(), "m-7b-workers");
    }

    #[test]
    fn names_that_are_equal_when_cut_stay_apart() {
        let long = "a".repeat(250);
        let (one, other) = (names(&format!("{long}x")), names(&format!("{long}y")));
        assert_ne!(one.replica(&revision(), 0), other.replica(&revision(), 0));
        assert_ne!(names("a.b").stem(), names("a-b").stem());
    }

    proptest! {
        #[test]
        fn every_legal_name_gives_legal_names(name in "[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?", index in 0_u32..99_999) {
            let names = names(&name);
            let set = names.replica(&revision(), index);
            prop_assert!(set.len() <= 52, "{set}");
            prop_assert!(names.describe(&revision()).len() <= 63);
            prop_assert!(names.workers().len() <= 63);
            for label in [set, names.stem().to_owned(), names.workers()] {
                let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
                prop_assert!(label.chars().all(legal) && !label.starts_with('-') && !label.ends_with('-'), "{label}");
            }
        }
    }
}
