//! The decisions of modelfleet: functions of values. Nothing here knows a clock, a random number, a socket, a log or
//! Kubernetes; time comes in as [`Millis`], and every answer carries its reason.
//!
//! | Question | Function |
//! |---|---|
//! | How many workers has a replica, which experts and how many cached tokens has each? | [`plan`] |
//! | Where does each expert go, given where it is? | [`placement::place`] |
//! | Is a better placement worth its move? | [`rebalance::decide`] |
//! | How does a placement change while requests run? | [`live::next_step`] |
//! | Which replicas are made, drained and deleted now? | [`rollout::next_step`] |
//! | How many replicas are wanted now? | [`autoscale::decide`] |
//!
//! How the operator calls them, on each pass of a `ModelDeployment`:
//! 1. [`plan`], once a revision, with the description that the describe job reported. [`Outcome::Planned`] is
//!    recorded with the revision; [`Outcome::NoRoom`] becomes `Planned=False` with its text.
//! 2. [`autoscale::decide`] where autoscaling is on, with the last decided number and the [`autoscale::History`] that
//!    the call before returned ([`autoscale::History::new`] after a change of leader). Else `spec.replicas` is wanted.
//! 3. [`rollout::next_step`] with every replica that exists, of all revisions. It is asked again after each change,
//!    and says what it waits for.
//!
//! 4. [`placement::place`] once the pods of a replica are bound, with their domains, the room of
//!    [`Plan::expert_room`] and the loads that were measured; it is wanted at once where what runs does not
//!    [`Placement::meets`] the problem. Else [`rebalance::decide`] says whether it is worth it.
//! 5. [`live::next_step`] on each pass, with what is published and what is wanted. Nothing else is to be kept.
//!
//! `README.md` states the problems as mathematics, with invariants and phases.

pub mod autoscale;
pub mod live;
mod memory;
mod model;
pub mod placement;
pub mod rebalance;
pub mod rollout;
mod units;

pub use memory::{ExpertRoom, Need, NoRoom, Outcome, Plan, Request, plan};
pub use model::{ModelDescription, ModelFile, MoeLayer};
pub use placement::Placement;
pub use units::{Bytes, Millis, Tokens};
