//! Attention and products as an engine computes them that promises no equal bits: by candle, which picks its kernel by the
//! number of rows.
//!
//! The feature `plain` puts them in the place of ours, so that `tests/bench/bits` can say what equal bits cost.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::kernels;
use super::mla::MlaShape;

/// `x`: `[rows, inputs]`. `weight`: `[outputs, inputs]`. Returns `[rows, outputs]`.
pub(crate) fn product(x: &[f32], weight: &Tensor) -> Result<Vec<f32>> {
    multiply(x, &weight.t()?)
}

/// What [`super::mla::Mla`] mixes for rows of one sequence, `latents` being all that the last of them sees.
///
/// # Shapes
/// `query`: `[rows, heads, width]`. `latents`: `[length, width]`. Returns `[rows, heads, rank]`.
pub(crate) fn attend(
    shape: &MlaShape,
    scale: f32,
    query: &[f32],
    latents: &[f32],
    positions: Range<usize>,
) -> Result<Vec<f32>> {
    let length = positions.end;
    let latents = Tensor::from_slice(latents, (length, shape.width()), &Device::Cpu)?;
    let mut scores = multiply(query, &latents.t()?)?;
    for (scores, position) in scores.chunks_exact_mut(shape.heads * length).zip(positions) {
        for scores in scores.chunks_exact_mut(length) {
            let (seen, unseen) = scores.split_at_mut(position + 1);
            kernels::softmax(seen, scale);
            unseen.fill(0.0);
        }
    }
    multiply(&scores, &latents.narrow(1, 0, shape.rank)?)
}

/// `x`: `[rows, inputs]`. `right`: `[inputs, outputs]`.
fn multiply(x: &[f32], right: &Tensor) -> Result<Vec<f32>> {
    let inputs = right.dim(0)?;
    let x = Tensor::from_slice(x, (x.len() / inputs, inputs), &Device::Cpu)?.to_dtype(right.dtype())?;
    x.matmul(right)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
