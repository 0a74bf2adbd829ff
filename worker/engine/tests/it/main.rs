//! The engine over real weights: against the reference, sharded, in company, with answers missing,
//! and with files that are not what they should be.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod files;
mod reference;
mod shards;
mod steps;
mod support;
