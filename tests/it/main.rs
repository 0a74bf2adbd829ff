//! The programs together, on loopback: what no crate can prove alone.

#![allow(clippy::unwrap_used, reason = "tests")]

mod clients;
mod contract;
mod experts;
mod http;
mod hub;
mod load;
mod local;
mod soak;
mod trace;
