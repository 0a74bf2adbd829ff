//! All arithmetic over many values: products with weights, weighted sums, and elementwise functions.
//!
//! **Architecture Invariant.** The bits of an output row depend on its input row and the weights
//! alone: not on how many rows come with it, on threads, or on what the processor can do. Sums run
//! over a fixed number of lanes, nothing is fused, and no function of the system's mathematics
//! library is used.

use std::array::from_fn;
use std::hint::black_box;
use std::num::NonZero;
use std::ops::Range;
use std::sync::{LazyLock, OnceLock};
use std::thread;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};

/// Lanes of a sum: enough to fill the registers of the processors we know.
const LANES: usize = 32;

/// Products of fewer multiplications than this are not worth starting threads for.
const THREADED_WORK: usize = 1 << 23;

/// What the processor can do: the same code, compiled for wider registers where there are some.
static ARCH: LazyLock<Arch> = LazyLock::new(Arch::new);

/// Weights in the type they are stored in, row after row.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weight<'a> {
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    F32(&'a [f32]),
}

impl Weight<'_> {
    fn len(&self) -> usize {
        match self {
            Weight::Bf16(values) => values.len(),
            Weight::F16(values) => values.len(),
            Weight::F32(values) => values.len(),
        }
    }
}

/// Multiplies rows with a weight matrix: `y = x * transpose(weight)`.
///
/// # Shapes
/// `x`: `[rows, inputs]`. `weight`: `[outputs, inputs]`. `y`: `[rows, outputs]`, overwritten.
///
/// # Guarantees
/// Every value is one sum over [`LANES`] lanes in f32, whatever the rows, the threads and the
/// processor.
pub(crate) fn product(x: &[f32], weight: Weight<'_>, inputs: usize, y: &mut [f32]) {
    let outputs = weight.len() / inputs;
    let threads = if x.len() * outputs < THREADED_WORK { 1 } else { processors() };
    product_on(threads, x, weight, inputs, y);
}

fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}

/// [`product`] with each of `threads` computing its share of the columns.
fn product_on(threads: usize, x: &[f32], weight: Weight<'_>, inputs: usize, y: &mut [f32]) {
    let (rows, outputs) = (x.len() / inputs, weight.len() / inputs);
    if threads < 2 {
        return columns(x, weight, inputs, 0..outputs, y);
    }
    let share = outputs.div_ceil(threads);
    let part = |start: usize| {
        let range = start..outputs.min(start + share);
        let mut part = vec![0.0; rows * range.len()];
        columns(x, weight, inputs, range.clone(), &mut part);
        (range, part)
    };
    let parts: Vec<(Range<usize>, Vec<f32>)> = thread::scope(|scope| {
        let started: Vec<_> = (0..outputs).step_by(share).map(|start| scope.spawn(move || part(start))).collect();
        started.into_iter().map(|thread| thread.join().expect("columns do not panic")).collect()
    });
    for (range, part) in parts {
        let width = range.len();
        for (row, values) in y.chunks_exact_mut(outputs).zip(part.chunks_exact(width)) {
            row[range.clone()].copy_from_slice(values);
        }
    }
}

fn columns(x: &[f32], weight: Weight<'_>, inputs: usize, range: Range<usize>, y: &mut [f32]) {
    ARCH.dispatch(Columns { x, weight, inputs, range, y });
}

struct Columns<'a> {
    x: &'a [f32],
    weight: Weight<'a>,
    inputs: usize,
    range: Range<usize>,
    y: &'a mut [f32],
}

impl WithSimd for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Columns { x, weight, inputs, range, y } = self;
        let width = range.len();
        let mut wide = match weight {
            Weight::F32(_) => Vec::new(),
            Weight::Bf16(_) | Weight::F16(_) => vec![0.0; inputs],
        };
        for (at, column) in range.enumerate() {
            let span = column * inputs..(column + 1) * inputs;
            let row: &[f32] = match weight {
                Weight::F32(values) => &values[span],
                Weight::Bf16(values) => {
                    widen(&values[span], &mut wide);
                    &wide
                }
                Weight::F16(values) => {
                    values[span].convert_to_f32_slice(&mut wide);
                    &wide
                }
            };
            for (x, y) in x.chunks_exact(inputs).zip(y.chunks_exact_mut(width)) {
                y[at] = dot(x, row);
            }
        }
    }
}

/// Half of an f32's bits are a bf16; the others are zero.
#[inline(always)]
fn widen(values: &[bf16], wide: &mut [f32]) {
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        lanes = step(lanes, a, b);
    }
    if !a_rest.is_empty() {
        lanes = step(lanes, &padded(a_rest), &padded(b_rest));
    }
    fold(lanes)
}

#[inline(always)]
fn step(lanes: [f32; LANES], a: &[f32; LANES], b: &[f32; LANES]) -> [f32; LANES] {
    from_fn(|lane| lanes[lane] + a[lane] * b[lane])
}

#[inline(always)]
fn padded(rest: &[f32]) -> [f32; LANES] {
    let mut padded = [0.0; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    padded
}

/// Sums lanes by halves: 32, 16, 8, 4, 2, 1.
#[inline(always)]
fn fold(lanes: [f32; LANES]) -> f32 {
    // else the compiler arranges the loop before this around these few sums, two lanes at a time
    let lanes = black_box(lanes);
    let lanes: [f32; 16] = from_fn(|lane| lanes[lane] + lanes[lane + 16]);
    let lanes: [f32; 8] = from_fn(|lane| lanes[lane] + lanes[lane + 8]);
    let lanes: [f32; 4] = from_fn(|lane| lanes[lane] + lanes[lane + 4]);
    (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
}

/// The sum of squares of a row.
pub(crate) fn square_sum(row: &[f32]) -> f32 {
    struct Squares<'a>(&'a [f32]);
    impl WithSimd for Squares<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> f32 {
            dot(self.0, self.0)
        }
    }
    ARCH.dispatch(Squares(row))
}

/// Adds rows, each times its factor, to `sum`, one row after the other.
///
/// # Shapes
/// `factors`: `[rows]`. `rows`: `[rows, stride]`, of which the first `sum.len()` values count.
pub(crate) fn add_scaled(factors: &[f32], rows: &[f32], stride: usize, sum: &mut [f32]) {
    struct AddScaled<'a> {
        factors: &'a [f32],
        rows: &'a [f32],
        stride: usize,
        sum: &'a mut [f32],
    }
    impl WithSimd for AddScaled<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for (factor, row) in self.factors.iter().zip(self.rows.chunks_exact(self.stride)) {
                for (sum, value) in self.sum.iter_mut().zip(row) {
                    *sum += factor * value;
                }
            }
        }
    }
    ARCH.dispatch(AddScaled { factors, rows, stride, sum });
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

/// Replaces scores by `exp(score * scale)`, normalised to sum 1.
pub(crate) fn softmax(row: &mut [f32], scale: f32) {
    struct Softmax<'a>(&'a mut [f32], f32);
    impl WithSimd for Softmax<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            let Softmax(row, scale) = self;
            let mut most = f32::NEG_INFINITY;
            for value in row.iter_mut() {
                *value *= scale;
                most = most.max(*value);
            }
            let mut lanes = [0.0f32; LANES];
            for (at, value) in row.iter_mut().enumerate() {
                *value = exp(*value - most);
                lanes[at % LANES] += *value;
            }
            let sum = fold(lanes);
            for value in row.iter_mut() {
                *value /= sum;
            }
        }
    }
    ARCH.dispatch(Softmax(row, scale));
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
mod tests {
    use super::*;

    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn a_row_does_not_depend_on_its_company_nor_on_threads() {
        for (inputs, outputs) in [(1, 3), (31, 7), (32, 16), (100, 33), (256, 5)] {
            let w = values(inputs * outputs, 1);
            let (b, h): (Vec<bf16>, Vec<f16>) = w.iter().map(|&v| (bf16::from_f32(v), f16::from_f32(v))).unzip();
            for weight in [Weight::F32(&w), Weight::Bf16(&b), Weight::F16(&h)] {
                let x = values(9 * inputs, 2);
                let mut together = vec![0.0; 9 * outputs];
                product_on(1, &x, weight, inputs, &mut together);
                for threads in [2, 3, 64] {
                    let mut parted = vec![0.0; 9 * outputs];
                    product_on(threads, &x, weight, inputs, &mut parted);
                    assert_eq!(bits(&together), bits(&parted), "{inputs} x {outputs}, {threads}");
                }
                for (row, expected) in x.chunks(inputs).zip(together.chunks(outputs)) {
                    let mut alone = vec![0.0; outputs];
                    product(row, weight, inputs, &mut alone);
                    assert_eq!(bits(&alone), bits(expected), "{inputs} x {outputs}");
                }
            }
        }
    }

    #[test]
    fn the_processor_does_not_change_the_bits() {
        let (a, b) = (values(1000, 3), values(1000, 4));
        let mut wide = [0.0];
        product(&a, Weight::F32(&b), 1000, &mut wide);
        assert_eq!(wide[0].to_bits(), dot(&a, &b).to_bits()); // here without the wider registers
    }

    #[test]
    fn products_are_near_the_exact_ones() {
        let (x, w) = (values(300, 5), values(600, 6));
        let mut y = [0.0; 2];
        product(&x, Weight::F32(&w), 300, &mut y);
        for (y, w) in y.iter().zip(w.chunks(300)) {
            let exact: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            assert!((f64::from(*y) - exact).abs() < 1e-5, "{y} against {exact}");
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
    fn softmax_sums_to_one_and_keeps_what_is_not_a_number() {
        let mut row = values(100, 7);
        softmax(&mut row, 3.0);
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        let mut row = [1.0, f32::NAN, 2.0];
        softmax(&mut row, 1.0);
        assert!(row.iter().all(|value| value.is_nan()));
    }
}
