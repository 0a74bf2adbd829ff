//! The CustomResourceDefinition as the API server gets it.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

use crate::ModelDeployment;

/// The CustomResourceDefinition, with the rules of [`crate::rules`] in its schema.
pub fn definition() -> CustomResourceDefinition {
    ModelDeployment::crd()
}

/// The CustomResourceDefinition as a YAML document, as `crds/modeldeployments.yaml` and `modelfleet crd` print it.
pub fn yaml() -> String {
    serde_yaml::to_string(&definition()).expect("a definition made of JSON values is YAML too")
}
