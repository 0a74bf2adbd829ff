//! A model server: runs requests, and holds experts for its peers.
//!
//! A request goes `serve -> prepare (openai, chat, text) -> drive (engine, experts) -> choice -> chunks`.
//!
//! Architecture Invariant: only this crate knows text; the engine knows tokens, the router bytes. Nothing of a model
//! repository is ever run but its chat template, and that in a box.

pub mod chat;
pub mod choice;
pub mod drive;
pub mod experts;
pub mod fetch;
pub mod memory;
pub mod mesh;
pub mod metrics;
pub mod openai;
pub mod prepare;
pub mod resume;
pub mod serve;
pub mod text;
