//! The control plane of modelfleet: from `ModelDeployment`s to objects of a cluster, or to child processes on loopback.
//!
//! `observe -> validate -> plan -> render -> apply -> report`. What decides is pure, and mostly in the crate `planner`;
//! what touches the world is `async`.

pub mod apply;
pub mod backoff;
pub mod control;
pub mod error;
pub mod launch;
pub mod lease;
