//! The gated feed-forward part: a dense layer's, a shared expert's, or a routed expert's.

use super::kernels;
use super::matrix::Matrix;
use crate::error::Error;
use crate::load::Weights;

/// `down(silu(gate(x)) * up(x))`.
///
/// # Source
/// transformers `DeepseekV3MLP`.
#[derive(Debug)]
pub(crate) struct Mlp {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Mlp {
    pub(crate) fn load(weights: &Weights<'_, '_>, hidden: usize, inner: usize) -> Result<Self, Error> {
        Ok(Mlp {
            gate: weights.matrix("gate_proj.weight", inner, hidden)?,
            up: weights.matrix("up_proj.weight", inner, hidden)?,
            down: weights.matrix("down_proj.weight", hidden, inner)?,
        })
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> u64 {
        [&self.gate, &self.up, &self.down].map(Matrix::bytes).iter().sum()
    }

    /// Multiplications for one row: as many as there are weights.
    pub(crate) fn multiplications(&self) -> usize {
        [&self.gate, &self.up, &self.down].map(Matrix::multiplications).iter().sum()
    }

    /// `x`: `[rows, hidden]`. Returns the same shape.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let (mut inner, up) = (self.gate.apply(x), self.up.apply(x));
        kernels::silu_times(&mut inner, &up);
        self.down.apply(&inner)
    }
}
