//! The programs together, on loopback: what no crate can prove alone.

mod contract;
mod http;
mod local;
