//! The routed experts that this worker holds, for its own sequences and for everybody else's.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, ExpertsError};
use crate::exchange::{ExpertBatch, WireDtype};
use crate::layers::mlp::Mlp;
use crate::models::ByLayer;

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

    /// Whether an expert of a layer is among them.
    pub(crate) fn holds(&self, layer: usize, expert: usize) -> bool {
        let Some(layers) = &self.0 else { return true };
        layers.get(&layer).is_some_and(|experts| experts.contains(&expert))
    }

    /// Refuses layers and experts that a model does not have.
    pub(crate) fn check(&self, moe_layers: &[usize], experts: usize) -> Result<(), Error> {
        for (layer, held) in self.0.iter().flatten() {
            let reason = if !moe_layers.contains(layer) {
                format!("layer {layer} has no routed experts")
            } else if let Some(expert) = held.iter().find(|&&expert| expert >= experts) {
                format!("layer {layer} has {experts} experts, so there is no expert {expert}")
            } else {
                continue;
            };
            return Err(Error::Held { reason });
        }
        Ok(())
    }
}

/// Routed experts in memory. Shared between the step loop and the threads that serve peers.
#[derive(Debug)]
pub struct Experts {
    hidden: usize,
    dtype: WireDtype,
    bytes: u64,
    layers: ByLayer,
}

impl Experts {
    /// `bytes`: what they take.
    pub(crate) fn new(hidden: usize, dtype: WireDtype, bytes: u64, layers: ByLayer) -> Self {
        Experts { hidden, dtype, bytes, layers }
    }

    /// Computes what each pair's expert makes of its row: `[pairs, hidden]`, little endian, in the
    /// wire dtype. Pairs of one expert that follow each other are computed together.
    ///
    /// # Errors
    /// [`ExpertsError`] if the batch does not fit or names an expert that is not here; then nothing
    /// is computed.
    pub fn run(&self, batch: &ExpertBatch<'_>) -> Result<Vec<u8>, ExpertsError> {
        self.check(batch)?;
        let row_bytes = self.hidden * self.dtype.size();
        let mut answers = Vec::with_capacity(batch.pair_rows.len() * row_bytes);
        let mut start = 0;
        for pairs in batch.pair_experts.chunk_by(|a, b| a == b) {
            let mut rows = vec![0.0; pairs.len() * self.hidden];
            let wanted = &batch.pair_rows[start..start + pairs.len()];
            for (to, &row) in rows.chunks_exact_mut(self.hidden).zip(wanted) {
                let row = row as usize;
                self.dtype.decode(&batch.rows[row * row_bytes..(row + 1) * row_bytes], to);
            }
            let expert = self.find(batch.layer, pairs[0] as usize)?;
            answers.extend(self.dtype.encode(&expert.forward(&rows)));
            start += pairs.len();
        }
        Ok(answers)
    }

    fn check(&self, batch: &ExpertBatch<'_>) -> Result<(), ExpertsError> {
        let (bytes, row) = (batch.rows.len(), self.hidden * self.dtype.size());
        if !bytes.is_multiple_of(row) {
            return Err(ExpertsError::Rows { bytes, row });
        }
        let (rows, experts) = (batch.pair_rows.len(), batch.pair_experts.len());
        if rows != experts {
            let reason = format!("{rows} rows are named for {experts} experts");
            return Err(ExpertsError::Pairs { reason });
        }
        if let Some(named) = batch.pair_rows.iter().find(|&&named| named as usize >= bytes / row) {
            let reason = format!("row {named} is named; {} were sent", bytes / row);
            return Err(ExpertsError::Pairs { reason });
        }
        let mut experts = batch.pair_experts.iter();
        experts.try_for_each(|&expert| self.find(batch.layer, expert as usize).map(|_| ()))
    }

    fn find(&self, layer: usize, expert: usize) -> Result<&Mlp, ExpertsError> {
        let held = self.layers.get(layer).and_then(|experts| experts.get(expert));
        held.and_then(Option::as_ref).ok_or(ExpertsError::NotHeld { layer, expert })
    }

    /// How rows travel.
    pub fn dtype(&self) -> WireDtype {
        self.dtype
    }

    /// Values of a row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Whether this expert is in memory.
    pub fn holds(&self, layer: usize, expert: usize) -> bool {
        self.find(layer, expert).is_ok()
    }

    /// Bytes of the experts in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
