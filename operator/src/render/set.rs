//! The StatefulSet of a replica, and what stands around the workers of a model.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetUpdateStrategy},
        core::v1::{PodTemplateSpec, Service, ServiceAccount, ServicePort, ServiceSpec},
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
    jiff::Timestamp,
};

use super::{
    name::{MODEL, Names, REPLICA, REVISION, Revision, WORKER},
    pod,
    record::Record,
};
use crate::{
    decide::Target,
    launch::{ADMIN_PORT, WORKER_PORT},
    validate::ValidModel,
};

/// Annotation of a StatefulSet: since when its replica drains.
pub const DRAINING_SINCE: &str = "modelfleet.io/draining-since";

/// The StatefulSet `NAME-REV-I`: pods are shards.
pub(super) fn replica(names: &Names, model: &ValidModel, record: &Record, target: &Target) -> StatefulSet {
    let name = names.replica(&record.revision, target.index);
    let mut metadata = names.metadata_of(name, WORKER, &record.revision);
    let labels = metadata.labels.get_or_insert_default();
    labels.insert(REPLICA.to_owned(), target.index.to_string());
    let selector = [MODEL, REVISION, REPLICA, "app.kubernetes.io/component"];
    let selector = selector.into_iter().filter_map(|key| labels.get(key).map(|value| (key.to_owned(), value.clone())));
    let selector = LabelSelector { match_labels: Some(selector.collect()), match_expressions: None };
    metadata.annotations = target.draining_since.map(drains);
    StatefulSet {
        metadata,
        spec: Some(StatefulSetSpec {
            pod_management_policy: Some("Parallel".to_owned()),
            replicas: Some(i32::try_from(target.pods).unwrap_or(i32::MAX)),
            template: template(names, model, record, target, &selector),
            selector,
            service_name: Some(names.workers()),
            // A template that an upgrade changes must restart nothing; a new revision is a new StatefulSet.
            update_strategy: Some(StatefulSetUpdateStrategy {
                type_: Some("OnDelete".to_owned()),
                rolling_update: None,
            }),
            ..StatefulSetSpec::default()
        }),
        status: None,
    }
}

/// A StatefulSet of a replica without a record, marked as draining since then, or not: all else is sent as it was read. Not
/// made again if it is gone.
pub(super) fn marked(set: &StatefulSet, draining_since: Option<Timestamp>) -> StatefulSet {
    let seen = &set.metadata;
    StatefulSet {
        metadata: ObjectMeta {
            name: seen.name.clone(),
            uid: seen.uid.clone(),
            namespace: seen.namespace.clone(),
            labels: seen.labels.clone(),
            owner_references: seen.owner_references.clone(),
            annotations: draining_since.map(drains),
            ..ObjectMeta::default()
        },
        spec: set.spec.clone(),
        status: None,
    }
}

/// The annotation that says so.
fn drains(since: Timestamp) -> BTreeMap<String, String> {
    [(DRAINING_SINCE.to_owned(), since.to_string())].into()
}

/// The recorded pods, made those of one replica.
fn template(
    names: &Names,
    model: &ValidModel,
    record: &Record,
    target: &Target,
    pods: &LabelSelector,
) -> PodTemplateSpec {
    let mut template = record.template.clone();
    let metadata = template.metadata.get_or_insert_default();
    metadata.labels.get_or_insert_default().insert(REPLICA.to_owned(), target.index.to_string());
    pod::place(&mut template, &names.replica(&record.revision, target.index), target);
    pod::spread(&mut template, model, pods);
    template
}

/// The headless Service `NAME-workers`: workers find each other before they are ready.
pub(super) fn service(names: &Names) -> Service {
    let port = |name: &str, number: u16| ServicePort {
        name: Some(name.to_owned()),
        port: i32::from(number),
        target_port: Some(IntOrString::Int(i32::from(number))),
        protocol: Some("TCP".to_owned()),
        ..ServicePort::default()
    };
    let selector = [(MODEL, names.stem()), ("app.kubernetes.io/component", WORKER)];
    Service {
        metadata: names.metadata(names.workers(), WORKER),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            publish_not_ready_addresses: Some(true),
            ports: Some(vec![port("grpc", WORKER_PORT), port("admin", ADMIN_PORT)]),
            selector: Some(selector.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// The ServiceAccount `NAME-workers`: no rights, and no token.
pub(super) fn service_account(names: &Names) -> ServiceAccount {
    ServiceAccount {
        metadata: names.metadata(names.workers(), WORKER),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

/// The disruption budget `NAME-REV`: as many workers of a revision at a time as copies can be spared, at least one, and
/// ones that are broken always.
pub(super) fn budget(names: &Names, revision: &Revision, redundancy: u32) -> PodDisruptionBudget {
    let selector = [
        (MODEL, names.stem().to_owned()),
        (REVISION, revision.to_string()),
        ("app.kubernetes.io/component", WORKER.to_owned()),
    ];
    PodDisruptionBudget {
        metadata: names.metadata_of(names.revision(revision), WORKER, revision),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(i32::try_from(redundancy.max(1)).unwrap_or(1))),
            min_available: None,
            selector: Some(LabelSelector {
                match_labels: Some(selector.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
                match_expressions: None,
            }),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
        }),
        status: None,
    }
}
