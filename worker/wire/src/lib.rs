//! What modelfleet's processes agree on: protocols, connections, trace context, telemetry.
//!
//! Architecture Invariant: this crate decides nothing and knows no model, no Kubernetes and no planner. It is used by
//! all programs and uses none of our crates.

pub mod admin;
pub mod connections;
pub mod fleet;
pub mod frames;
pub mod genai;
pub mod openai;
pub mod telemetry;

pub use connections::{MAX_MESSAGE_BYTES, Services, connect, serve, serve_until};

/// The protocols, as generated from `proto/modelfleet/v1`.
#[allow(missing_docs, clippy::all, unreachable_pub, reason = "generated; the .proto files carry the documentation")]
pub mod proto {
    tonic::include_proto!("modelfleet.v1");
    /// The descriptors of what clients may call, for gRPC reflection.
    pub const INFERENCE_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/inference.bin"));
    /// All descriptors.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/modelfleet.bin"));
}
