//! Products of rows with weight matrices: where nearly all time of a step goes.
//!
//! **Architecture Invariant.** Every value is a sum in f32 over parts of [`DEPTH`] inputs, added in ascending order; a part
//! is a sum over its inputs in ascending order that begins with 0, products and additions fused (IEEE 754
//! `fusedMultiplyAdd`). Registers hold values of different outputs, so nothing is folded. What is computed next to what
//! may follow the number of rows, the threads and the processor; one that cannot fuse computes the same bits slowly.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Scalar128b, Simd, WithSimd};

use super::kernels::ARCH;
use super::threads::{self, READING};

/// Outputs whose weights lie together: two registers of the widest processors we know.
const PANEL: usize = 32;
/// Inputs of a part of a sum: the weights of a panel for so many fit the fastest cache beside a tile of rows.
const DEPTH: usize = 128;
/// Rows whose sums are in registers at a time.
const TILE: usize = 6;
/// Rows that are computed with before the next inputs are looked at: their part fits the second cache.
const BLOCK: usize = 192;

/// Weights in the type they are stored in, panel after panel: for each [`PANEL`] outputs, or what remains of them, the
/// weights of the first input, then of the next.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weight<'a> {
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    F32(&'a [f32]),
}

/// Brings weights `[outputs, inputs]` into the order of [`Weight`].
pub(crate) fn to_panels<T: Copy + Default>(values: &[T], inputs: usize) -> Vec<T> {
    /// Inputs whose weights are moved before those of the next output.
    const MOVED: usize = 64;
    let mut panels = vec![T::default(); values.len()];
    for (from, to) in values.chunks(PANEL * inputs).zip(panels.chunks_mut(PANEL * inputs)) {
        let outputs = from.len() / inputs;
        for (first, to) in (0..inputs).step_by(MOVED).zip(to.chunks_mut(MOVED * outputs)) {
            for (output, from) in from.chunks_exact(inputs).enumerate() {
                let to = to[output..].iter_mut().step_by(outputs);
                to.zip(&from[first..]).for_each(|(to, value)| *to = *value);
            }
        }
    }
    panels
}

impl Weight<'_> {
    fn len(&self) -> usize {
        match self {
            Weight::Bf16(values) => values.len(),
            Weight::F16(values) => values.len(),
            Weight::F32(values) => values.len(),
        }
    }

    /// Copies the weights of one output, widened to f32, to `to`: `[inputs]`.
    pub(crate) fn output(&self, output: usize, to: &mut [f32]) {
        let (inputs, first) = (to.len(), output / PANEL * PANEL);
        let width = PANEL.min(self.len() / inputs - first);
        let places = (first * inputs + output % PANEL..).step_by(width);
        for (to, place) in to.iter_mut().zip(places) {
            *to = match self {
                Weight::Bf16(values) => values[place].to_f32(),
                Weight::F16(values) => values[place].to_f32(),
                Weight::F32(values) => values[place],
            };
        }
    }

    /// Replaces `wide` by a span of the weights, widened to f32, and a panel of zeros behind it.
    #[inline(always)]
    fn widen(&self, span: Range<usize>, wide: &mut Vec<f32>) {
        let length = span.len();
        wide.clear();
        match self {
            Weight::F32(values) => wide.extend_from_slice(&values[span]),
            // half of an f32's bits are a bf16; the others are zero
            Weight::Bf16(values) => {
                wide.extend(values[span].iter().map(|value| f32::from_bits(u32::from(value.to_bits()) << 16)));
            }
            Weight::F16(values) => {
                wide.resize(length, 0.0);
                values[span].convert_to_f32_slice(wide);
            }
        }
        wide.resize(length + PANEL, 0.0);
    }
}

/// Multiplies rows with a weight matrix: `y = x * transpose(weight)`.
///
/// # Shapes
/// `x`: `[rows, inputs]`. `weight`: of `[outputs, inputs]`. `y`: `[rows, outputs]`, overwritten.
///
/// # Guarantees
/// The bits of a value depend on its row and its output's weights alone.
pub(crate) fn product(x: &[f32], weight: Weight<'_>, inputs: usize, y: &mut [f32]) {
    let outputs = weight.len() / inputs;
    product_on(threads::worth(x.len() * outputs, weight.len()), x, weight, inputs, y);
}

/// [`product`] in `threads` parts: of the rows if there are many, else of the outputs.
fn product_on(threads: usize, x: &[f32], weight: Weight<'_>, inputs: usize, y: &mut [f32]) {
    let (rows, outputs) = (x.len() / inputs, weight.len() / inputs);
    if threads < 2 {
        return panels(x, weight, inputs, 0..outputs, y);
    }
    let rows_each = rows.div_ceil(threads).next_multiple_of(TILE);
    if rows_each >= 4 * READING {
        let parts = x.chunks(rows_each * inputs).zip(y.chunks_mut(rows_each * outputs)).collect();
        return threads::share(threads, parts, |(x, y)| panels(x, weight, inputs, 0..outputs, y));
    }
    let share = outputs.div_ceil(threads).next_multiple_of(PANEL);
    let part = |range: Range<usize>| (vec![0.0; rows * range.len()], range);
    let mut parts: Vec<(Vec<f32>, Range<usize>)> = steps(0..outputs, share).map(part).collect();
    threads::share(threads, parts.iter_mut().collect(), |(y, range)| panels(x, weight, inputs, range.clone(), y));
    for (part, range) in parts {
        for (y, part) in y.chunks_exact_mut(outputs).zip(part.chunks_exact(range.len())) {
            y[range.clone()].copy_from_slice(part);
        }
    }
}

fn panels(x: &[f32], weight: Weight<'_>, inputs: usize, range: Range<usize>, y: &mut [f32]) {
    ARCH.dispatch(Panels { x, weight, inputs, range, y });
}

/// The outputs of a range that begins with a panel, `y` having these only.
struct Panels<'a> {
    x: &'a [f32],
    weight: Weight<'a>,
    inputs: usize,
    range: Range<usize>,
    y: &'a mut [f32],
}

impl WithSimd for Panels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::IS_SCALAR {
            true => self.sum(Scalar128b),
            false => self.sum(simd),
        }
    }
}

impl Panels<'_> {
    #[inline(always)]
    fn sum<S: Simd>(mut self, simd: S) {
        let (panels, parts) = (self.range.len().div_ceil(PANEL), self.inputs.div_ceil(DEPTH));
        let mut strip = Vec::with_capacity((DEPTH.min(self.inputs) + 1) * PANEL);
        for rows in steps(0..self.x.len() / self.inputs, BLOCK) {
            for turn in 0..panels * parts {
                // a few rows stay in the fastest cache, so weights are read in their order; of many, a part stays in the second
                let (panel, part) = match rows.len() <= TILE {
                    true => (turn / parts, turn % parts),
                    false => (turn % panels, turn / panels),
                };
                let first = self.range.start + panel * PANEL;
                let panel = first..self.range.end.min(first + PANEL);
                let inner = part * DEPTH..self.inputs.min((part + 1) * DEPTH);
                self.part(simd, rows.clone(), panel, inner, &mut strip);
            }
        }
    }

    /// Adds to the sums of some rows and a panel those over some inputs. `strip`: for their weights.
    #[inline(always)]
    fn part<S: Simd>(
        &mut self,
        simd: S,
        rows: Range<usize>,
        panel: Range<usize>,
        inner: Range<usize>,
        strip: &mut Vec<f32>,
    ) {
        let (inputs, outputs, width) = (self.inputs, self.range.len(), panel.len());
        let span = panel.start * inputs + inner.start * width..panel.start * inputs + inner.end * width;
        let weights = match self.weight {
            Weight::F32(values) if width == PANEL => &values[span],
            _ => {
                self.weight.widen(span, strip);
                &*strip
            }
        };
        let part = Part { simd, weights, inputs, inner, width, outputs };
        let first = rows.start * outputs + panel.start - self.range.start;
        part.run(&self.x[rows.start * inputs..rows.end * inputs], &mut self.y[first..]);
    }
}

/// The parts of a range, each of `step` but the last.
#[inline(always)]
fn steps(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(step).map(move |start| start..range.end.min(start + step))
}

/// A part of the sums of a panel.
struct Part<'a, S> {
    simd: S,
    /// `[inner, width]`, and a panel of any values behind them where `width` is less.
    weights: &'a [f32],
    inputs: usize,
    /// The inputs of this part.
    inner: Range<usize>,
    /// Outputs of the panel.
    width: usize,
    /// From a row of `y` to the next.
    outputs: usize,
}

impl<S: Simd> Part<'_, S> {
    /// `x`: `[rows, inputs]`. `y`: from the first row's values of the panel.
    #[inline(always)]
    fn run(&self, x: &[f32], y: &mut [f32]) {
        let (rows, mut row) = (x.len() / self.inputs, 0);
        while row < rows {
            let (x, y) = (&x[row * self.inputs..], &mut y[row * self.outputs..]);
            row += match rows - row {
                1 => self.wide::<1>(x, y),
                2..4 => self.wide::<2>(x, y),
                4..TILE => self.narrow::<4>(x, y),
                _ => self.narrow::<TILE>(x, y),
            };
        }
    }

    /// Few rows: more registers of each, so that additions need not wait for each other. Returns `R`, as the others do.
    #[inline(always)]
    fn wide<const R: usize>(&self, x: &[f32], y: &mut [f32]) -> usize {
        if self.width < PANEL || PANEL / S::F32_LANES < 4 {
            return self.narrow::<R>(x, y);
        }
        for at in (0..PANEL / S::F32_LANES).step_by(4) {
            self.tile::<R, 4, true>(at, x, y);
        }
        R
    }

    #[inline(always)]
    fn narrow<const R: usize>(&self, x: &[f32], y: &mut [f32]) -> usize {
        match self.width.div_ceil(S::F32_LANES) {
            1 => self.tile::<R, 1, false>(0, x, y),
            registers if self.width < PANEL => {
                for at in (0..registers).step_by(2) {
                    self.tile::<R, 2, false>(at, x, y);
                }
            }
            registers => {
                for at in (0..registers).step_by(2) {
                    self.tile::<R, 2, true>(at, x, y);
                }
            }
        }
        R
    }

    /// `C` registers of outputs from the one at `at`, of `R` rows.
    #[inline(always)]
    fn tile<const R: usize, const C: usize, const FULL: bool>(&self, at: usize, x: &[f32], y: &mut [f32]) {
        self.add_to::<R, C>(at, y, self.sums::<R, C, FULL>(at, x));
    }

    /// `FULL`: whether the panel is. Else the registers hold values of the next input too, of which nothing is kept.
    #[inline(always)]
    fn sums<const R: usize, const C: usize, const FULL: bool>(&self, at: usize, x: &[f32]) -> [[S::f32s; C]; R] {
        let (simd, depth) = (self.simd, self.inner.len());
        let mut rows: [&[f32]; R] = [&[]; R];
        for row in 0..R {
            rows[row] = &x[row * self.inputs + self.inner.start..][..depth];
        }
        let panels = &self.weights.as_chunks::<PANEL>().0[..if FULL { depth } else { 0 }];
        let mut sums = [[simd.splat_f32s(0.0); C]; R];
        for input in 0..depth {
            let weights = if FULL { &panels[input] } else { &self.weights[input * self.width..][..PANEL] };
            let weights = &S::as_simd_f32s(weights).0[at..at + C];
            for row in 0..R {
                let x = simd.splat_f32s(rows[row][input]);
                for column in 0..C {
                    sums[row][column] = simd.mul_add_f32s(x, weights[column], sums[row][column]);
                }
            }
        }
        sums
    }

    /// `sums`: of the registers from the one at `at`. `y`: as above.
    #[inline(always)]
    fn add_to<const R: usize, const C: usize>(&self, at: usize, y: &mut [f32], sums: [[S::f32s; C]; R]) {
        let start = at * S::F32_LANES;
        let width = (C * S::F32_LANES).min(self.width - start);
        for (row, sums) in sums.iter().enumerate() {
            let y = &mut y[row * self.outputs + start..][..width];
            if width == C * S::F32_LANES {
                for (y, sum) in S::as_mut_simd_f32s(y).0.iter_mut().zip(sums) {
                    *y = if self.inner.start == 0 { *sum } else { self.simd.add_f32s(*y, *sum) };
                }
            } else {
                let mut values = [0.0; PANEL];
                S::as_mut_simd_f32s(&mut values).0[..C].copy_from_slice(sums);
                for (y, value) in y.iter_mut().zip(values) {
                    *y = if self.inner.start == 0 { value } else { *y + value };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;
    use pulp::Scalar;

    use super::super::kernels::tests::values;
    use super::*;

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// The sum that every value is, as the invariant tells it.
    fn one_sum(x: &[f32], w: &[f32]) -> f32 {
        let parts = x.chunks(DEPTH).zip(w.chunks(DEPTH));
        let part = |(x, w): (&[f32], &[f32])| x.iter().zip(w).fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum));
        parts.map(part).reduce(|sum, part| sum + part).unwrap()
    }

    fn one_by_one(x: &[f32], w: &[f32], inputs: usize) -> Vec<f32> {
        x.chunks(inputs).flat_map(|x| w.chunks(inputs).map(move |w| one_sum(x, w))).collect()
    }

    /// Checks a product in all weight types against sums one by one.
    fn check(rows: usize, inputs: usize, outputs: usize, seed: u32) {
        let mut w = values(inputs * outputs, seed);
        w.iter_mut().step_by(7).for_each(|w| *w = -0.0);
        let (b, h): (Vec<bf16>, Vec<f16>) = w.iter().map(|&v| (bf16::from_f32(v), f16::from_f32(v))).unzip();
        let widened_b: Vec<f32> = b.iter().map(|v| v.to_f32()).collect();
        let widened_h: Vec<f32> = h.iter().map(|v| v.to_f32()).collect();
        let mut x = values(rows * inputs, seed.wrapping_add(1));
        x.iter_mut().step_by(5).for_each(|x| *x *= f32::MIN_POSITIVE); // products that round to a zero
        let (w_panels, b, h) = (to_panels(&w, inputs), to_panels(&b, inputs), to_panels(&h, inputs));
        let all = [(Weight::F32(&w_panels), &w), (Weight::Bf16(&b), &widened_b), (Weight::F16(&h), &widened_h)];
        for (weight, wide) in all {
            let expected = bits(&one_by_one(&x, wide, inputs));
            for threads in [1, 2, 3, 64] {
                let mut y = vec![f32::NAN; rows * outputs];
                product_on(threads, &x, weight, inputs, &mut y);
                assert!(bits(&y) == expected, "{rows} rows, {outputs} x {inputs}, {threads} threads");
            }
            let mut row = vec![f32::NAN; inputs];
            for (output, wide) in wide.chunks(inputs).enumerate() {
                weight.output(output, &mut row);
                assert!(bits(&row) == bits(wide), "output {output} of {outputs} x {inputs}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn blocks_and_threads_change_no_bit(
            rows in prop_oneof![1usize..14, select(vec![31usize, 33, 67, 192, 193, 199, 400])],
            inputs in prop_oneof![1usize..70, select(vec![127usize, 128, 129, 255, 256, 257, 545, 1100])],
            outputs in prop_oneof![1usize..40, select(vec![63usize, 64, 65, 71, 130])],
            seed in any::<u32>(),
        ) {
            check(rows, inputs, outputs, seed);
        }
    }

    #[test]
    fn odd_sizes_change_no_bit() {
        for rows in [1, 2, 3, 5, 7, 31, 33] {
            for (inputs, outputs) in [(1, 1), (1, 300), (300, 1), (31, 7), (33, 9), (32, 65), (517, 11)] {
                check(rows, inputs, outputs, 1);
            }
        }
    }

    #[test]
    fn the_processor_changes_no_bit() {
        for (rows, inputs, outputs) in [(1, 1000, 3), (3, 40, 5), (6, 700, 9), (9, 20, 70)] {
            let (x, w) = (values(rows * inputs, 3), values(outputs * inputs, 4));
            let expected = bits(&one_by_one(&x, &w, inputs));
            let w = to_panels(&w, inputs);
            let mut y = vec![0.0; rows * outputs];
            let mut check = |run: &dyn Fn(Panels<'_>)| {
                y.fill(f32::NAN);
                run(Panels { x: &x, weight: Weight::F32(&w), inputs, range: 0..outputs, y: &mut y });
                assert!(bits(&y) == expected, "{rows} rows, {outputs} x {inputs}");
            };
            check(&|panels| panels.with_simd(Scalar::new()));
            check(&|panels| ARCH.dispatch(panels));
            #[cfg(target_arch = "x86_64")]
            if let Some(narrower) = pulp::x86::V3::try_new() {
                check(&|panels| Simd::vectorize(narrower, panels));
            }
        }
    }

    #[test]
    fn products_are_near_the_exact_ones() {
        let (x, w) = (values(300, 5), values(600, 6));
        let mut y = [0.0; 2];
        product(&x, Weight::F32(&to_panels(&w, 300)), 300, &mut y);
        for (y, w) in y.iter().zip(w.chunks(300)) {
            let exact: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            assert!((f64::from(*y) - exact).abs() < 1e-5, "{y} against {exact}");
        }
    }
}
