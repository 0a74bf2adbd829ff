//! The whole reconcile, in process: the operator with its real control stream, against an API server and a cluster in
//! memory. What only a real API server knows (CEL, schemas, its own defaults) is tested in `tests/cluster`.

#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    missing_docs,
    reason = "a test: it may panic, and nothing of it is public"
)]

mod api;
mod cluster;
mod crash;
mod experts;
mod fault;
mod golden;
mod life;
mod node;
mod path;
mod process;
mod rebalance;
mod world;
