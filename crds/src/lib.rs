//! The API of modelfleet: the custom resource `ModelDeployment` (`mdep`) of `modelfleet.io/v1alpha1`.
//!
//! This crate answers for the fields, their schema, and the rules that the API server checks by itself (CEL). It
//! has no client and takes no decision. `validate` of the operator repeats every rule for objects that were stored
//! before the rule existed, with the words of [`rules`], so both say the same.
//!
//! The doc comments of the fields are the reference of the API: `kubectl explain mdep.spec` prints them.

mod definition;
mod model_deployment;
pub mod rules;
mod status;

pub use definition::{definition, yaml};
pub use model_deployment::*;
pub use status::*;

/// Group of the API, and prefix (with a slash) of every label, annotation and readiness gate that is ours.
pub const GROUP: &str = "modelfleet.io";
