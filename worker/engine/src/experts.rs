//! The routed experts that this worker holds, for its own sequences and for everybody else's.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::ExpertsError;
use crate::exchange::{ExpertBatch, WireDtype};

/// Which routed experts a worker keeps in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held(Option<BTreeMap<usize, BTreeSet<usize>>>);

impl Held {
    /// All of them.
    pub fn all() -> Self {
        Held(None)
    }

    /// Those listed, by layer. A layer that is not listed has none here.
    pub fn from_layers(layers: BTreeMap<usize, BTreeSet<usize>>) -> Self {
        Held(Some(layers))
    }
}

/// Routed experts in memory. Shared between the step loop and the threads that serve peers.
#[derive(Debug)]
pub struct Experts {
    hidden: usize,
}

impl Experts {
    /// Computes what each pair's expert makes of its row: `[pairs, hidden]`, little endian.
    ///
    /// # Errors
    /// [`ExpertsError`] if the batch does not fit or names an expert that is not here.
    pub fn run(&self, _batch: &ExpertBatch<'_>) -> Result<Vec<u8>, ExpertsError> {
        Ok(Vec::new())
    }

    /// How rows travel.
    pub fn dtype(&self) -> WireDtype {
        WireDtype::Bf16
    }

    /// Values of a row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Whether this expert is in memory.
    pub fn holds(&self, _layer: usize, _expert: usize) -> bool {
        false
    }

    /// Bytes of the experts in memory.
    pub fn bytes(&self) -> u64 {
        0
    }
}
