//! The router in one process with workers, clients and operators that tests script, over loopback.

#![allow(clippy::unwrap_used, reason = "tests")]

mod bad_input;
mod control;
mod fake;
mod generate;
mod grpc;
mod http;
mod operator;
mod program;
mod queue;
mod resume;
mod retry;
mod rig;
