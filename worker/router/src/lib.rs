//! The front door of modelfleet: OpenAI over HTTP and a typed gRPC, to all models and their workers.
//!
//! A request's way: [`edge`] (connections, time) → [`http`] or [`grpc`] (routes) → [`admit`] (limits, what routing
//! needs) → [`mod@line`] (queue, grant) → [`pick`] → [`dispatch`] (call, retry) → [`pieces`] (the answer as it comes) →
//! server-sent events, one body of [`aggregate`], or typed responses. [`control`] brings the snapshots of [`snapshot`].
//!
//! Architecture Invariant: `admit`, `aggregate`, `line`, `load`, `pick`, `queue` and `snapshot` know no `async`, no
//! runtime and no socket; time and chance are their arguments. The router needs no cluster rights, and serves on
//! without an operator.

pub mod admit;
pub mod aggregate;
pub mod ask;
pub mod control;
pub mod dispatch;
pub mod edge;
pub mod grpc;
pub mod http;
pub mod line;
pub mod load;
pub mod metrics;
pub mod pick;
pub mod pieces;
pub mod queue;
pub mod refusal;
pub mod router;
pub mod serve;
pub mod snapshot;

pub use router::Router;
pub use serve::{Ending, Listeners, serve};
