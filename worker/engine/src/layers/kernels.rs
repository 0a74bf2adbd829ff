//! All arithmetic over many values but products with weights: weighted sums and elementwise functions.
//!
//! **Architecture Invariant.** The bits of an output row depend on its input row and the weights
//! alone: not on how many rows come with it, on threads, or on what the processor can do. The order of
//! a sum is fixed, what is fused is always fused, and no function of the system's mathematics library
//! is used.

use std::hint::black_box;
use std::sync::LazyLock;

use pulp::{Arch, Simd, WithSimd};

/// Lanes of a sum: enough to fill the registers of the processors we know.
const LANES: usize = 32;

/// What the processor can do: the same code, compiled for wider registers where there are some.
pub(super) static ARCH: LazyLock<Arch> = LazyLock::new(Arch::new);

/// Sums [`LANES`] lanes by halves: 32, 16, 8, 4, 2, 1. The sum is never -0.
#[inline(always)]
fn fold<S: Simd>(simd: S, lanes: &[S::f32s]) -> f32 {
    let mut sums = [simd.splat_f32s(0.0); LANES];
    let mut half = LANES / S::F32_LANES;
    sums[..half].copy_from_slice(&lanes[..half]);
    while half > 1 {
        half /= 2;
        for at in 0..half {
            sums[at] = simd.add_f32s(sums[at], sums[at + half]);
        }
    }
    let (mut sum, mut half) = (sums[0], S::F32_LANES / 2);
    while half > 0 {
        sum = simd.add_f32s(sum, simd.rotate_left_f32s(sum, half));
        half /= 2;
    }
    let mut first = [0.0; LANES];
    S::as_mut_simd_f32s(&mut first).0[0] = sum;
    // else the compiler gathers lanes one by one, to fold several sums at once
    black_box(first[0]) + 0.0
}

/// The sum of squares of a row, each fused with its addition, over [`LANES`] lanes.
pub(crate) fn square_sum(row: &[f32]) -> f32 {
    struct Squares<'a>(&'a [f32]);
    impl WithSimd for Squares<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            let mut lanes = [simd.splat_f32s(0.0); LANES];
            let lanes = &mut lanes[..LANES / S::F32_LANES];
            for values in self.0.chunks(LANES) {
                let mut padded = [0.0; LANES];
                padded[..values.len()].copy_from_slice(values);
                for (lane, value) in lanes.iter_mut().zip(S::as_simd_f32s(&padded).0) {
                    *lane = simd.mul_add_f32s(*value, *value, *lane);
                }
            }
            fold(simd, lanes)
        }
    }
    ARCH.dispatch(Squares(row))
}

/// Adds rows, each times its factor, to some sums, one row after the other.
///
/// # Shapes
/// `factors`: of a row one for each sum, `apart` from those of the next row. `rows`: `[rows, stride]`, of which the first
/// `width` values count. `sums`: `[sums, width]`.
pub(crate) fn add_scaled(factors: &[f32], apart: usize, rows: &[f32], stride: usize, sums: &mut [f32], width: usize) {
    ARCH.dispatch(AddScaled { factors, apart, rows, stride, sums, width });
}

struct AddScaled<'a> {
    factors: &'a [f32],
    apart: usize,
    rows: &'a [f32],
    stride: usize,
    sums: &'a mut [f32],
    width: usize,
}

impl WithSimd for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        /// Sums that share what is read of a row.
        const TOGETHER: usize = 4;
        for first in (0..self.sums.len() / self.width).step_by(TOGETHER) {
            match self.sums.len() / self.width - first {
                1 => self.some::<S, 1, 8>(simd, first),
                2 => self.some::<S, 2, 4>(simd, first),
                3 => self.some::<S, 3, 2>(simd, first),
                _ => self.some::<S, 4, 2>(simd, first),
            }
        }
    }
}

impl AddScaled<'_> {
    /// The sums from `first`, `R` registers of each at a time.
    #[inline(always)]
    fn some<S: Simd, const N: usize, const R: usize>(&mut self, simd: S, first: usize) {
        let registers = self.width / S::F32_LANES;
        let whole = registers / R * R;
        for at in (0..whole).step_by(R) {
            self.tile::<S, N, R>(simd, first, at);
        }
        for at in whole..registers {
            self.tile::<S, N, 1>(simd, first, at);
        }
        for at in registers * S::F32_LANES..self.width {
            for sum in first..first + N {
                let mut kept = self.sums[sum * self.width + at];
                for (factors, row) in self.factors.chunks(self.apart).zip(self.rows.chunks_exact(self.stride)) {
                    kept = factors[sum].mul_add(row[at], kept);
                }
                self.sums[sum * self.width + at] = kept;
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const N: usize, const R: usize>(&mut self, simd: S, first: usize, at: usize) {
        let span = at * S::F32_LANES..(at + R) * S::F32_LANES;
        let mut kept = [[simd.splat_f32s(0.0); R]; N];
        for (sum, kept) in kept.iter_mut().enumerate() {
            let start = (first + sum) * self.width;
            kept.copy_from_slice(S::as_simd_f32s(&self.sums[start + span.start..start + span.end]).0);
        }
        for (factors, values) in self.factors.chunks(self.apart).zip(self.rows.chunks_exact(self.stride)) {
            let mut wide = [simd.splat_f32s(0.0); R];
            wide.copy_from_slice(S::as_simd_f32s(&values[span.clone()]).0);
            for (sum, kept) in kept.iter_mut().enumerate() {
                let factor = simd.splat_f32s(factors[first + sum]);
                for (kept, value) in kept.iter_mut().zip(wide) {
                    *kept = simd.mul_add_f32s(factor, value, *kept);
                }
            }
        }
        for (sum, kept) in kept.iter().enumerate() {
            let start = (first + sum) * self.width;
            S::as_mut_simd_f32s(&mut self.sums[start + span.start..start + span.end]).0.copy_from_slice(kept);
        }
    }
}

/// Adds `other` to `sum`, value by value.
pub(crate) fn add(sum: &mut [f32], other: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(other) {
        *sum += value;
    }
}

/// `gate = silu(gate) * up`, value by value, where `silu(x) = x / (1 + exp(-x))`.
pub(crate) fn silu_times(gate: &mut [f32], up: &[f32]) {
    struct SiluTimes<'a>(&'a mut [f32], &'a [f32]);
    impl WithSimd for SiluTimes<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for (gate, up) in self.0.iter_mut().zip(self.1) {
                *gate = *gate / (1.0 + exp(-*gate)) * up;
            }
        }
    }
    ARCH.dispatch(SiluTimes(gate, up));
}

/// Replaces scores by `exp((score - most) * scale)`, `most` being the greatest of its query, and returns each query's sum of
/// them, in the order of the tokens: together a softmax whose division is left for later.
///
/// # Shapes
/// `scores`: `[tokens, queries]`. `seen`: for each query how many of the first tokens it sees, at least one. The scores of
/// the others count for nothing, and mean nothing afterwards. Returns `[queries]`.
/// # Assumptions
/// `scale` is positive.
pub(crate) fn softmax(scores: &mut [f32], seen: &[usize], scale: f32) -> Vec<f32> {
    let mut sums = vec![0.0; seen.len()];
    ARCH.dispatch(Softmax { scores, seen, scale, sums: &mut sums });
    sums
}

struct Softmax<'a> {
    scores: &'a mut [f32],
    seen: &'a [usize],
    scale: f32,
    sums: &'a mut [f32],
}

impl WithSimd for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) {
        let mut query = 0;
        while query < self.seen.len() {
            query += match self.seen.len() - query {
                16.. => self.some::<16>(query),
                8.. => self.some::<8>(query),
                4.. => self.some::<4>(query),
                _ => self.some::<1>(query),
            };
        }
    }
}

impl Softmax<'_> {
    /// `N` queries from `first`. Returns `N`.
    #[inline(always)]
    fn some<const N: usize>(&mut self, first: usize) -> usize {
        let (queries, seen) = (self.seen.len(), &self.seen[first..first + N]);
        let (all, any) = seen.iter().fold((usize::MAX, 0), |(all, any), &seen| (all.min(seen), any.max(seen)));
        let mut most = [f32::NEG_INFINITY; N];
        for (token, scores) in self.scores.chunks_exact(queries).take(any).enumerate() {
            let scores = &scores[first..first + N];
            for query in 0..N {
                if token < all || token < seen[query] {
                    most[query] = most[query].max(scores[query]);
                }
            }
        }
        let mut sums = [0.0; N];
        for (token, scores) in self.scores.chunks_exact_mut(queries).take(any).enumerate() {
            let scores = &mut scores[first..first + N];
            for query in 0..N {
                scores[query] = exp((scores[query] - most[query]) * self.scale);
                if token < all || token < seen[query] {
                    sums[query] += scores[query];
                }
            }
        }
        self.sums[first..first + N].copy_from_slice(&sums);
        N
    }
}

/// Rounds values to bf16, to the nearest, ties to even, as little-endian bytes: two a value.
pub(crate) fn round_to_bf16(values: &[f32], bytes: &mut [u8]) {
    struct Round<'a>(&'a [f32], &'a mut [u8]);
    impl WithSimd for Round<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for (value, bytes) in self.0.iter().zip(self.1.as_chunks_mut::<2>().0) {
                let bits = value.to_bits();
                let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
                let kept = if value.is_nan() { bits >> 16 | 0x40 } else { rounded };
                *bytes = (kept as u16).to_le_bytes();
            }
        }
    }
    ARCH.dispatch(Round(values, bytes));
}

/// The logistic function.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The exponential function, within two units in the last place; NaN stays NaN.
///
/// Of our own, because the system's differs from processor to processor in the last bit. By
/// halves of ln 2 around zero, then a polynomial.
///
/// # Source
/// Cephes mathematical library, `expf`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding and subtracting it rounds to a whole number, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = x - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let mut sum = 1.987_569_1e-4f32;
    for factor in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        sum = sum * rest + factor;
    }
    let power = (shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23;
    (sum * rest * rest + rest + 1.0) * f32::from_bits(power)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Values between -1 and 1 that look random.
    pub(in crate::layers) fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn scaled_rows_are_added_one_after_the_other() {
        for (rows, width, stride) in [(1, 1, 1), (3, 7, 9), (5, 64, 80), (16, 67, 67), (4, 200, 203)] {
            for count in 1..10 {
                let apart = count + rows % 3;
                let (factors, values, begun) =
                    (values(rows * apart, 1), values(rows * stride, 2), values(count * width, 3));
                let mut sums = begun.clone();
                add_scaled(&factors, apart, &values, stride, &mut sums, width);
                for (at, sum) in sums.iter().enumerate() {
                    let each = factors[at / width..].iter().step_by(apart).zip(values.chunks(stride));
                    let expected = each.fold(begun[at], |sum, (factor, row)| factor.mul_add(row[at % width], sum));
                    assert_eq!(*sum, expected, "{count} sums of {rows} x {width}");
                }
            }
        }
    }

    #[test]
    fn rounding_to_bf16_is_to_the_nearest() {
        let mut values: Vec<f32> = (0..=u32::MAX).step_by(4_099).map(f32::from_bits).collect();
        values.extend((0..512).map(|low| f32::from_bits(0x3f7f_ff00 + low)));
        values.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::from_bits(0x7f80_0001)]);
        let mut bytes = vec![0; values.len() * 2];
        round_to_bf16(&values, &mut bytes);
        for (value, bytes) in values.iter().zip(bytes.as_chunks::<2>().0) {
            assert_eq!(*bytes, half::bf16::from_f32(*value).to_le_bytes(), "{value}");
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for step in -86_000..88_000 {
            let x = step as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let off = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(off < 2.4e-7, "exp({x}) is off by {off}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e30) < 1e-37);
        assert!(exp(1e30).is_finite());
    }

    #[test]
    fn softmax_is_of_the_tokens_that_a_query_sees() {
        for queries in [1, 3, 4, 7, 8, 15, 16, 29, 64] {
            let tokens = 50;
            let seen: Vec<usize> = (0..queries).map(|query| 1 + (query * 7 + 3) % tokens).collect();
            let all = values(tokens * queries, queries as u32);
            let mut scores = all.clone();
            let sums = softmax(&mut scores, &seen, 3.0);
            for (query, &seen) in seen.iter().enumerate() {
                let of =
                    |scores: &[f32]| scores[query..].iter().step_by(queries).copied().take(seen).collect::<Vec<_>>();
                let most = of(&all).into_iter().fold(f32::NEG_INFINITY, f32::max);
                let expected: Vec<f32> = of(&all).iter().map(|score| exp((score - most) * 3.0)).collect();
                assert_eq!(of(&scores), expected, "query {query} of {queries}");
                assert_eq!(
                    sums[query],
                    expected.iter().fold(0.0, |sum, value| sum + value),
                    "query {query} of {queries}"
                );
            }
        }
    }

    #[test]
    fn softmax_keeps_what_is_not_a_number_and_only_where_it_is_seen() {
        let mut scores = [1.0, 1.0, 2.0, f32::NAN, 3.0, 3.0, f32::NAN, f32::NAN];
        let sums = softmax(&mut scores, &[3, 3], 1.0);
        assert!((sums[0] - (1.0 + (-1.0f32).exp() + (-2.0f32).exp())).abs() < 1e-6, "{sums:?}");
        assert!(sums[1].is_nan());
    }
}
