//! The front door of modelfleet: OpenAI over HTTP and a typed gRPC, to all models and their workers.
//!
//! A request's way: [`edge`] (connections, time) → [`http`] or [`grpc`] (routes) → [`admit`] (limits, what routing
//! needs) → [`mod@line`] (queue, grant) → [`pick`] → [`dispatch`] (call, retry) → [`running`] (one worker's answer) →
//! [`pieces`] (the answer as it comes, from whichever worker, as [`resume`] has it) → server-sent events, one body of
//! [`aggregate`], or typed responses. [`control`] brings the snapshots of [`snapshot`]; [`vigil`] knows who is there.
//!
//! Architecture Invariant: `admit`, `aggregate`, `budget`, `line`, `load`, `patience`, `pick`, `pulse`, `queue`, `resume`
//! and `snapshot` know no `async`, no runtime and no socket; time and chance are their arguments. The router needs no
//! cluster rights, and serves on without an operator.

pub mod admit;
pub mod aggregate;
mod ahead;
pub mod ask;
pub mod budget;
pub mod channels;
mod codec;
pub mod control;
pub mod dispatch;
pub mod edge;
pub mod grpc;
pub mod http;
pub mod line;
pub mod load;
pub mod metrics;
pub mod patience;
pub mod pick;
pub mod pieces;
pub mod pulse;
pub mod queue;
pub mod refusal;
pub mod resume;
pub mod router;
pub mod running;
pub mod serve;
pub mod snapshot;
pub mod vigil;

pub use patience::Patience;
pub use router::Router;
pub use serve::{Ending, Listeners, serve};
