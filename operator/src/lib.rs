//! The control plane of modelfleet: from `ModelDeployment`s to objects of a cluster, or to child processes on loopback.
//!
//! `observe -> validate -> plan -> render -> apply -> report`. What decides is pure, and mostly in the crate `planner`;
//! what touches the world is `async`.

pub mod apply;
pub mod backoff;
pub mod control;
pub mod controller;
pub mod decide;
pub mod error;
pub mod experts;
pub mod facts;
pub mod launch;
pub mod lease;
pub mod local;
pub mod moving;
pub mod observe;
pub mod preview;
pub mod render;
pub mod replica;
pub mod report;
pub mod served;
mod table;
pub mod validate;
