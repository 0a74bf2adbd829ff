//! The mesh of experts.
//!
//! [`exchange`] asks the `holder`s of experts that are not here: it parts a batch among them (`split`, by the `pace` of
//! each) and follows the parts on their way (`flight`). `link` keeps one stream to each over the `network`, [`standing`]
//! says who is asked at all, `signs` whether one that takes its time is there, `overlap` whether a step goes in two
//! halves. [`service`] answers peers that ask us, on the threads of [`pool`] or of the `peer`; [`keep`] loads and
//! forgets experts as snapshots say.
//!
//! Architecture Invariant: no answer is ever made up. A row without an answer is missing, and the sequence that needs
//! it waits, is tried again with equal bits, or fails with an error that says so.

pub mod exchange;
mod flight;
mod holder;
pub mod keep;
mod link;
mod network;
mod overlap;
mod pace;
mod peer;
pub mod pool;
pub mod room;
pub mod service;
mod signs;
mod split;
pub mod standing;

use std::sync::{Mutex, MutexGuard, PoisonError};

use wire::proto;

/// How a dtype is named in messages.
pub fn dtype(dtype: engine::WireDtype) -> proto::Dtype {
    match dtype {
        engine::WireDtype::Bf16 => proto::Dtype::Bf16,
        engine::WireDtype::F32 => proto::Dtype::F32,
    }
}

/// Locks, whoever panicked with the lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod faults;
#[cfg(test)]
mod moves;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod transports;
