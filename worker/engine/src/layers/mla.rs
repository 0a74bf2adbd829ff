//! Multi-head latent attention over a paged cache of latents.

use std::iter::repeat_n;
use std::ops::Range;

use super::kernels;
use super::matrix::Matrix;
use super::norm::RmsNorm;
use super::plain;
use super::product::{Weight, product, to_panels};
use super::rope::{Angles, Rope};
use super::threads;
use crate::error::Error;
use crate::kv::{Cache, PAGE_TOKENS, Slice};
use crate::load::Weights;

/// Sizes of the attention part, in values.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MlaShape {
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    /// Rank of the queries' bottleneck, if they have one.
    pub(crate) query_rank: Option<usize>,
    /// Rank of the latents.
    pub(crate) rank: usize,
    /// Of a head's query: without position.
    pub(crate) nope: usize,
    /// Of a head's query: rotated by position.
    pub(crate) rope: usize,
    /// Of a head's value.
    pub(crate) value: usize,
    /// Whether the projections from and to the hidden state have biases.
    pub(crate) bias: bool,
}

impl MlaShape {
    /// Values cached for a token: the latent and the rotary key, shared by all heads.
    pub(crate) fn width(&self) -> usize {
        self.rank + self.rope
    }
}

#[derive(Debug)]
enum Query {
    Whole(Matrix),
    Narrow { down: Linear, norm: RmsNorm, up: Matrix },
}

/// A product with a bias, where there is one.
#[derive(Debug)]
struct Linear {
    weight: Matrix,
    bias: Option<Vec<f32>>,
}

impl Linear {
    fn load(weights: &Weights<'_, '_>, outputs: usize, inputs: usize, bias: bool) -> Result<Self, Error> {
        let weight = weights.matrix("weight", outputs, inputs)?;
        let bias = bias.then(|| weights.vector("bias", outputs)).transpose()?;
        Ok(Linear { weight, bias })
    }

    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = self.weight.apply(x);
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(bias.len()).for_each(|row| kernels::add(row, bias));
        }
        y
    }
}

/// The attention of one layer, in the absorbed form: queries are brought into the latents' space
/// and the weighted latents out of it, so that keys and values are never expanded.
///
/// # Source
/// DeepSeek-V2 technical report, section 2.1; transformers `DeepseekV3Attention`, of which this is
/// the same sum in another order.
#[derive(Debug)]
pub(crate) struct Mla {
    shape: MlaShape,
    query: Query,
    latent: Linear,
    latent_norm: RmsNorm,
    /// For each head `[rank, nope]`: the keys' half of `kv_b_proj`, transposed.
    absorb: Vec<Matrix>,
    /// For each head `[value, rank]`: the values' half.
    expand: Vec<Matrix>,
    output: Linear,
    scale: f32,
}

/// Queries whose scores are computed together, each head of each row being one.
const QUERIES: usize = 64;

/// The norms inside attention have this epsilon whatever the model's is.
const EPSILON: f32 = 1e-6;

impl Mla {
    /// `scale`: the softmax scale. `weights`: at `self_attn`.
    pub(crate) fn load(weights: &Weights<'_, '_>, shape: &MlaShape, scale: f32) -> Result<Self, Error> {
        let MlaShape { hidden, heads, rank, nope, rope, value, bias, .. } = *shape;
        let queries = heads * (nope + rope);
        let query = match shape.query_rank {
            None => Query::Whole(weights.matrix("q_proj.weight", queries, hidden)?),
            Some(narrow) => Query::Narrow {
                down: Linear::load(&weights.at("q_a_proj"), narrow, hidden, bias)?,
                norm: RmsNorm::new(weights.vector("q_a_layernorm.weight", narrow)?, EPSILON),
                up: weights.matrix("q_b_proj.weight", queries, narrow)?,
            },
        };
        let (absorb, expand) = weights.key_value_heads("kv_b_proj.weight", heads, nope, value, rank)?;
        Ok(Mla {
            query,
            latent: Linear::load(&weights.at("kv_a_proj_with_mqa"), rank + rope, hidden, bias)?,
            latent_norm: RmsNorm::new(weights.vector("kv_a_layernorm.weight", rank)?, EPSILON),
            absorb,
            expand,
            output: Linear::load(&weights.at("o_proj"), hidden, heads * value, bias)?,
            scale,
            shape: shape.clone(),
        })
    }

    /// Attends from each row to its sequence up to itself, and writes the rows' latents to the cache.
    ///
    /// # Shapes
    /// `x`: `[rows, hidden]`, the rows of `slices` one after the other, with their `angles`.
    /// Returns the same shape.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        rope: &Rope,
        angles: &[Angles],
        slices: &[Slice<'_>],
        cache: &mut LayerCache<'_>,
    ) -> Vec<f32> {
        let latents = self.latents(x, rope, angles);
        let width = self.shape.width();
        let mut written = latents.chunks_exact(width);
        for (slice, position) in rows(slices) {
            if let Some(latent) = written.next() {
                cache.cache.write(cache.layer, slice.pages, position, latent);
            }
        }
        let queries = self.queries(x, rope, angles);
        let MlaShape { heads, rank, .. } = self.shape;
        let mut mixed = vec![0.0; angles.len() * heads * rank];
        let together = (QUERIES / heads).max(1);
        let (mut queries, mut rest, mut blocks) = (queries.as_slice(), mixed.as_mut_slice(), Vec::new());
        for slice in slices {
            let all = slice.positions();
            for start in all.clone().step_by(together) {
                let positions = start..all.end.min(start + together);
                let (query, others) = queries.split_at(positions.len() * heads * width);
                let (mixed, below) = std::mem::take(&mut rest).split_at_mut(positions.len() * heads * rank);
                blocks.push(Block { query, pages: slice.pages, positions, mixed });
                (queries, rest) = (others, below);
            }
        }
        let cache = &*cache;
        let work = blocks.iter().map(|block| block.query.len() * block.positions.end).sum();
        threads::share(threads::worth(work, 0), blocks, |block| self.attend(cache, block));
        self.output.apply(&self.values(&mixed))
    }

    /// Returns `[rows, width]`: the normalised latent and the rotated key.
    fn latents(&self, x: &[f32], rope: &Rope, angles: &[Angles]) -> Vec<f32> {
        let mut latents = self.latent.apply(x);
        let mut key = vec![0.0; self.shape.rope];
        for (row, angles) in latents.chunks_exact_mut(self.shape.width()).zip(angles) {
            let (latent, rotary) = row.split_at_mut(self.shape.rank);
            self.latent_norm.normalise(latent);
            key.copy_from_slice(rotary);
            rope.rotate(angles, &key, rotary);
        }
        latents
    }

    /// Returns `[rows, heads, width]`: each head's query in the space of the latents, and rotated.
    fn queries(&self, x: &[f32], rope: &Rope, angles: &[Angles]) -> Vec<f32> {
        let MlaShape { heads, rank, nope, rope: rotary, .. } = self.shape;
        let (width, head) = (rank + rotary, nope + rotary);
        let plain = match &self.query {
            Query::Whole(matrix) => matrix.apply(x),
            Query::Narrow { down, norm, up } => up.apply(&norm.forward(&down.apply(x))),
        };
        let mut queries = vec![0.0; angles.len() * heads * width];
        for (index, absorb) in self.absorb.iter().enumerate() {
            let own = |row: &[f32]| row[index * head..index * head + nope].to_vec();
            let gathered: Vec<f32> = plain.chunks_exact(heads * head).flat_map(own).collect();
            let absorbed = absorb.apply(&gathered);
            let rows = queries.chunks_exact_mut(heads * width).zip(plain.chunks_exact(heads * head));
            for (((to, from), latent), angles) in rows.zip(absorbed.chunks_exact(rank)).zip(angles) {
                let to = &mut to[index * width..(index + 1) * width];
                to[..rank].copy_from_slice(latent);
                rope.rotate(angles, &from[index * head + nope..(index + 1) * head], &mut to[rank..]);
            }
        }
        queries
    }

    /// Mixes for rows of one sequence the latents up to each.
    fn attend(&self, cache: &LayerCache<'_>, block: Block<'_>) {
        let MlaShape { heads, rank, .. } = self.shape;
        let Block { query, pages, positions, mixed } = block;
        let (width, length) = (self.shape.width(), positions.end);
        let seen: Vec<usize> = positions.flat_map(|position| repeat_n(position + 1, heads)).collect();
        let latents = || (0..length).step_by(PAGE_TOKENS).zip(cache.cache.read(cache.layer, pages, length));
        if cfg!(feature = "plain") {
            let latents: Vec<f32> = latents().flat_map(|(_, page)| page).copied().collect();
            let plain = plain::attend(&self.shape, self.scale, query, &latents, &seen);
            return mixed.copy_from_slice(&plain.expect("the latents are of this shape"));
        }
        // the other way about: what a page holds is multiplied with the queries as weights
        let (queries, query) = (seen.len(), to_panels(query, width));
        let mut scores = vec![0.0; length * queries];
        for (start, page) in latents() {
            let tokens = page.len() / width;
            product(page, Weight::F32(&query), width, &mut scores[start * queries..(start + tokens) * queries]);
        }
        let sums = kernels::softmax(&mut scores, &seen, self.scale);
        for (start, page) in latents() {
            for (row, mixed) in mixed.chunks_exact_mut(heads * rank).enumerate() {
                let tokens = seen[row * heads].saturating_sub(start).min(page.len() / width);
                let factors = &scores[start * queries + row * heads..];
                kernels::add_scaled(factors, queries, &page[..tokens * width], width, mixed, rank);
            }
        }
        for (mixed, sum) in mixed.chunks_exact_mut(rank).zip(sums) {
            mixed.iter_mut().for_each(|value| *value /= sum);
        }
    }

    /// `mixed`: `[rows, heads, rank]`. Returns `[rows, heads, value]`.
    fn values(&self, mixed: &[f32]) -> Vec<f32> {
        let MlaShape { heads, rank, value, .. } = self.shape;
        let rows = mixed.len() / (heads * rank);
        let mut values = vec![0.0; rows * heads * value];
        for (index, expand) in self.expand.iter().enumerate() {
            let own = |row: &[f32]| row[index * rank..(index + 1) * rank].to_vec();
            let gathered: Vec<f32> = mixed.chunks_exact(heads * rank).flat_map(own).collect();
            let expanded = expand.apply(&gathered);
            let rows = values.chunks_exact_mut(heads * value).zip(expanded.chunks_exact(value));
            rows.for_each(|(to, from)| to[index * value..(index + 1) * value].copy_from_slice(from));
        }
        values
    }
}

/// Rows of one sequence that follow each other.
struct Block<'a> {
    /// `[rows, heads, width]`
    query: &'a [f32],
    pages: &'a [u32],
    positions: Range<usize>,
    /// `[rows, heads, rank]`, zero.
    mixed: &'a mut [f32],
}

/// The part of the cache that one layer reads and writes.
#[derive(Debug)]
pub(crate) struct LayerCache<'a> {
    pub(crate) cache: &'a mut Cache,
    pub(crate) layer: usize,
}

/// Each row's slice and its position in the sequence.
fn rows<'a>(slices: &'a [Slice<'a>]) -> impl Iterator<Item = (&'a Slice<'a>, usize)> {
    slices.iter().flat_map(|slice| slice.positions().map(move |position| (slice, position)))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::super::kernels::tests::values;
    use super::*;

    const ROWS: usize = 50;

    fn matrix(outputs: usize, inputs: usize, dtype: DType) -> Matrix {
        let values = values(outputs * inputs, (outputs * 100 + inputs) as u32);
        let tensor = Tensor::from_vec(values, (outputs, inputs), &Device::Cpu).unwrap();
        Matrix::new(&tensor.to_dtype(dtype).unwrap()).unwrap()
    }

    fn attention(dtype: DType) -> Mla {
        let shape =
            MlaShape { hidden: 24, heads: 3, query_rank: None, rank: 37, nope: 8, rope: 6, value: 10, bias: false };
        let linear = |outputs, inputs| Linear { weight: matrix(outputs, inputs, dtype), bias: None };
        Mla {
            query: Query::Whole(matrix(3 * (8 + 6), 24, dtype)),
            latent: linear(37 + 6, 24),
            latent_norm: RmsNorm::new(values(37, 1), EPSILON),
            absorb: (0..3).map(|_| matrix(37, 8, dtype)).collect(),
            expand: (0..3).map(|_| matrix(10, 37, dtype)).collect(),
            output: linear(24, 3 * 10),
            scale: 0.3,
            shape,
        }
    }

    /// Bits of the outputs of a sequence that goes through in these parts, each behind rows of another sequence.
    fn outputs(mla: &Mla, parts: &[usize], others: usize) -> Vec<u32> {
        let (hidden, tokens, x) = (mla.shape.hidden, [0; ROWS], values(ROWS * mla.shape.hidden, 7));
        let (rope, mut cache) = (Rope::new(mla.shape.rope, 10_000.0, None, true), Cache::new(1, mla.shape.width()));
        let (mut outputs, mut start) = (Vec::new(), 0);
        for rows in parts {
            let end = start + rows;
            let company = Slice { sequence: 1, start: 0, tokens: &tokens[..others], pages: &[4] };
            let slice = Slice { sequence: 0, start, tokens: &tokens[start..end], pages: &[2, 0, 3, 1] };
            let together = [&x[..others * hidden], &x[start * hidden..end * hidden]].concat();
            let angles: Vec<Angles> = company.positions().chain(slice.positions()).map(|at| rope.angles(at)).collect();
            let mut cache = LayerCache { cache: &mut cache, layer: 0 };
            let y = mla.forward(&together, &rope, &angles, &[company, slice], &mut cache);
            outputs.extend(y[others * hidden..].iter().map(|value| value.to_bits()));
            start = end;
        }
        outputs
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_among_others() {
        for dtype in [DType::F32, DType::BF16] {
            let mla = attention(dtype);
            let alone = outputs(&mla, &[1; ROWS], 0);
            assert!(alone.iter().all(|bits| f32::from_bits(*bits).is_finite()));
            for (parts, others) in [(&[ROWS][..], 0), (&[7, 20, 23], 5), (&[1; ROWS], 9)] {
                assert!(outputs(&mla, parts, others) == alone, "{dtype:?} in {parts:?}, {others} of others");
            }
        }
    }
}
