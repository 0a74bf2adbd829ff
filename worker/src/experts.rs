//! The mesh of experts.
//!
//! [`exchange`] asks the holders of experts that are not here; `link` keeps one stream to each of them; [`service`]
//! answers peers that ask us, on the threads of [`pool`]; [`keep`] loads and forgets experts as snapshots say.
//!
//! Architecture Invariant: no answer is ever made up. A row without an answer is missing, and the sequence that needs
//! it waits, is tried again with equal bits, or fails with an error that says so.

pub mod exchange;
pub mod keep;
mod link;
pub mod pool;
pub mod service;

use wire::proto;

/// How a dtype is named in messages.
pub fn dtype(dtype: engine::WireDtype) -> proto::Dtype {
    match dtype {
        engine::WireDtype::Bf16 => proto::Dtype::Bf16,
        engine::WireDtype::F32 => proto::Dtype::F32,
    }
}

#[cfg(test)]
mod tests;
