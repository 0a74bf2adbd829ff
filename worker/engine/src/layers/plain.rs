//! Attention and products as an engine computes them that promises no equal bits: by candle, which picks its kernel by the
//! number of rows.
//!
//! The feature `plain` puts them in the place of ours, so that `tests/bench/bits` can say what equal bits cost.

use candle_core::{DType, Device, Result, Tensor};

use super::kernels;
use super::mla::MlaShape;

/// Copies the weights of one output, widened to f32, to `to`: `[inputs]`.
pub(crate) fn row(weight: &Tensor, output: usize, to: &mut [f32]) -> Result<()> {
    to.copy_from_slice(&weight.get(output)?.to_dtype(DType::F32)?.to_vec1()?);
    Ok(())
}

/// What [`super::mla::Mla`] mixes for rows of one sequence, `latents` being all that the last of them sees.
///
/// # Shapes
/// `query`: `[rows, heads, width]`. `latents`: `[length, width]`. Returns `[rows, heads, rank]`.
pub(crate) fn attend(shape: &MlaShape, scale: f32, query: &[f32], latents: &[f32], seen: &[usize]) -> Result<Vec<f32>> {
    let (queries, length) = (seen.len(), latents.len() / shape.width());
    let latents = Tensor::from_slice(latents, (length, shape.width()), &Device::Cpu)?;
    let query = Tensor::from_slice(query, (queries, shape.width()), &Device::Cpu)?;
    let mut scores: Vec<f32> = latents.matmul(&query.t()?)?.flatten_all()?.to_vec1()?;
    let sums = kernels::softmax(&mut scores, seen, scale);
    for (token, scores) in scores.chunks_exact_mut(queries).enumerate() {
        let unseen = scores.iter_mut().zip(seen).filter(|(_, seen)| token >= **seen);
        unseen.for_each(|(score, _)| *score = 0.0);
    }
    let scores = Tensor::from_vec(scores, (length, queries), &Device::Cpu)?;
    let sums = Tensor::from_vec(sums, (queries, 1), &Device::Cpu)?;
    scores.t()?.matmul(&latents.narrow(1, 0, shape.rank)?)?.broadcast_div(&sums)?.flatten_all()?.to_vec1()
}

/// `x`: `[rows, inputs]`. `weight`: `[outputs, inputs]`. Returns `[rows, outputs]`.
pub(crate) fn product(x: &[f32], weight: &Tensor) -> Result<Vec<f32>> {
    let inputs = weight.dim(1)?;
    let x = Tensor::from_slice(x, (x.len() / inputs, inputs), &Device::Cpu)?.to_dtype(weight.dtype())?;
    x.matmul(&weight.t()?)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
