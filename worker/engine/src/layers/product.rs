//! Products of rows with weight matrices: where nearly all time of a step goes.
//!
//! **Architecture Invariant.** Every value is one sum over [`LANES`] lanes in f32, each over every 32nd input in
//! ascending order, products and additions fused (IEEE 754 `fusedMultiplyAdd`), and the lanes folded by halves. Blocks
//! decide what is computed next to what, never the order within a sum, so they may follow the number of rows, the
//! threads and the processor; one that cannot fuse computes the same bits slowly. Inputs that are missing in the last
//! round of the lanes count as zeros or not at all, which may change the sign of a zero, so no sum is -0.

use std::array::from_fn;
use std::num::NonZero;
use std::ops::Range;
use std::sync::OnceLock;
use std::thread;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Scalar128b, Simd, WithSimd};

use super::kernels::{ARCH, LANES, dot, fold};

/// Products of fewer multiplications than this are not worth starting threads for.
const THREADED_WORK: usize = 1 << 25;
/// Reading a weight costs about as much as multiplying it with so many rows.
const READING: usize = 8;

/// Inputs that are computed with before the next ones are looked at: those of a strip of columns and of a tile of rows
/// fit the fastest cache together.
const DEPTH: usize = 512;
/// Columns whose weights are widened together.
const STRIP: usize = 8;
/// Rows whose sums are in registers at a time.
const TILE: usize = 4;
/// Columns and rows whose sums are under way at a time: their lanes fit the second cache beside their inputs.
const PANEL: usize = 64;
const BLOCK: usize = 64;

/// Products of at most so many inputs are summed for many columns at once, lane by lane.
const NARROW: usize = LANES;
/// Columns of a narrow product that are computed at once.
const NARROW_COLUMNS: usize = 64;

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

    /// Copies the values of a span, widened to f32.
    #[inline(always)]
    pub(crate) fn widen(&self, span: Range<usize>, wide: &mut [f32]) {
        match self {
            Weight::F32(values) => wide.copy_from_slice(&values[span]),
            Weight::F16(values) => values[span].convert_to_f32_slice(wide),
            // half of an f32's bits are a bf16; the others are zero
            Weight::Bf16(values) => {
                for (wide, value) in wide.iter_mut().zip(&values[span]) {
                    *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
                }
            }
        }
    }
}

/// Multiplies rows with a weight matrix: `y = x * transpose(weight)`.
///
/// # Shapes
/// `x`: `[rows, inputs]`. `weight`: `[outputs, inputs]`. `y`: `[rows, outputs]`, overwritten.
///
/// # Guarantees
/// The bits of a value depend on its row and its column of weights alone.
pub(crate) fn product(x: &[f32], weight: Weight<'_>, inputs: usize, y: &mut [f32]) {
    let outputs = weight.len() / inputs;
    let work = (x.len() + READING * inputs) * outputs;
    let threads = if work < THREADED_WORK { 1 } else { processors() };
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

/// The columns of a range, `y` having these only.
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
    fn with_simd<S: Simd>(self, simd: S) {
        match S::IS_SCALAR {
            true => self.sum(Scalar128b),
            false => self.sum(simd),
        }
    }
}

impl Columns<'_> {
    #[inline(always)]
    fn sum<S: Simd>(self, simd: S) {
        let rows = self.x.len() / self.inputs;
        if self.inputs <= NARROW.min(8 * rows) {
            self.narrow();
        } else if rows == 1 {
            self.one(simd);
        } else {
            self.wide(simd);
        }
    }

    /// One row: memory is what is waited for, so its order is kept.
    #[inline(always)]
    fn one<S: Simd>(self, simd: S) {
        let Columns { x, weight, inputs, range, y } = self;
        let mut wide = vec![0.0; if matches!(weight, Weight::F32(_)) { 0 } else { inputs }];
        for (column, y) in range.zip(y) {
            let span = column * inputs..(column + 1) * inputs;
            *y = match weight {
                Weight::F32(values) => dot(simd, x, &values[span]),
                Weight::Bf16(_) | Weight::F16(_) => {
                    weight.widen(span, &mut wide);
                    dot(simd, x, &wide)
                }
            };
        }
    }

    /// Sums by tiles of rows and columns.
    #[inline(always)]
    fn wide<S: Simd>(self, simd: S) {
        let Columns { x, weight, inputs, range, y } = self;
        let (rows, width) = (x.len() / inputs, range.len());
        let most = DEPTH.min(inputs.next_multiple_of(LANES));
        // values that lie as they are needed are not copied
        let lie_well = inputs == most;
        let mut x_block = vec![0.0; if lie_well { 0 } else { rows.min(BLOCK) * most }];
        let mut strip = vec![0.0; STRIP * most];
        let mut sums = vec![0.0; rows.min(BLOCK) * PANEL.min(width).next_multiple_of(STRIP) * LANES];
        for panel in steps(0..width, PANEL) {
            for block in steps(0..rows, BLOCK) {
                let of_strip = block.len() * STRIP * LANES;
                for inner in steps(0..inputs, most) {
                    let depth = inner.len().next_multiple_of(LANES);
                    for (row, to) in block.clone().zip(x_block.chunks_exact_mut(depth)) {
                        to[..inner.len()].copy_from_slice(&x[row * inputs..][inner.clone()]);
                        to[inner.len()..].fill(0.0);
                    }
                    let x = match lie_well {
                        true => &x[block.start * inputs..block.end * inputs],
                        false => &x_block[..block.len() * depth],
                    };
                    for (columns, sums) in steps(panel.clone(), STRIP).zip(sums.chunks_exact_mut(of_strip)) {
                        let first = (range.start + columns.start) * inputs;
                        let w = match weight {
                            Weight::F32(values) if lie_well && columns.len() == STRIP => {
                                &values[first..first + STRIP * inputs]
                            }
                            _ => {
                                for (column, to) in strip.chunks_exact_mut(depth).take(columns.len()).enumerate() {
                                    let start = first + column * inputs;
                                    weight.widen(start + inner.start..start + inner.end, &mut to[..inner.len()]);
                                    to[inner.len()..].fill(0.0);
                                }
                                &strip
                            }
                        };
                        let tiles = Tiles { simd, depth, w, columns: columns.len(), begin: inner.start == 0 };
                        tiles.run(x, sums);
                    }
                }
                for (columns, sums) in steps(panel.clone(), STRIP).zip(sums.chunks_exact(of_strip)) {
                    for (row, sums) in block.clone().step_by(TILE).zip(sums.chunks(TILE * STRIP * LANES)) {
                        let rows = sums.len() / (STRIP * LANES);
                        let beside = tile_columns(rows);
                        for r in 0..rows {
                            let y = &mut y[(row + r) * width..][columns.clone()];
                            for (at, y) in y.iter_mut().enumerate() {
                                let pair = at / beside * rows * beside + r * beside + at % beside;
                                *y = fold(simd, S::as_simd_f32s(&sums[pair * LANES..(pair + 1) * LANES]).0);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The parts of a range, each of `step` but the last.
#[inline(always)]
fn steps(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(step).map(move |start| start..range.end.min(start + step))
}

/// Columns of a tile of `rows`: with them about as many sums as the smaller register files hold.
#[inline(always)]
fn tile_columns(rows: usize) -> usize {
    match rows {
        1 => 8,
        2 => 4,
        _ => 2,
    }
}

/// Adds the products of rows with a strip of columns to their lanes, inputs `0..depth` of each.
struct Tiles<'a, S> {
    simd: S,
    /// A multiple of [`LANES`].
    depth: usize,
    /// `[STRIP, depth]`, of which the first `columns` count.
    w: &'a [f32],
    columns: usize,
    /// Whether these are the first inputs.
    begin: bool,
}

impl<S: Simd> Tiles<'_, S> {
    /// `x`: `[rows, depth]`. `sums`: `[rows, STRIP, LANES]`, tile by tile.
    #[inline(always)]
    fn run(&self, x: &[f32], sums: &mut [f32]) {
        for (x, sums) in x.chunks(TILE * self.depth).zip(sums.chunks_mut(TILE * STRIP * LANES)) {
            match x.len() / self.depth {
                1 => self.band::<1, 8>(x, sums),
                2 => self.band::<2, 4>(x, sums),
                3 => self.band::<3, 2>(x, sums),
                _ => self.band::<4, 2>(x, sums),
            }
        }
    }

    #[inline(always)]
    fn band<const R: usize, const C: usize>(&self, x: &[f32], sums: &mut [f32]) {
        let tiles = self.w.chunks_exact(C * self.depth).zip(sums.chunks_exact_mut(R * C * LANES));
        tiles.take(self.columns.div_ceil(C)).for_each(|(w, sums)| self.tile::<R, C>(x, w, sums));
    }

    /// A register of lanes after the other, each over the whole depth. `sums`: `[R, C, LANES]`.
    #[inline(always)]
    fn tile<const R: usize, const C: usize>(&self, x: &[f32], w: &[f32], sums: &mut [f32]) {
        let (simd, registers) = (self.simd, LANES / S::F32_LANES);
        let depth = self.depth / S::F32_LANES;
        let ((x, _), (w, _), (sums, _)) = (S::as_simd_f32s(x), S::as_simd_f32s(w), S::as_mut_simd_f32s(sums));
        let sums = &mut sums[..R * C * registers];
        let mut xs: [&[S::f32s]; R] = [&[]; R];
        let mut ws: [&[S::f32s]; C] = [&[]; C];
        for row in 0..R {
            xs[row] = &x[row * depth..(row + 1) * depth];
        }
        for column in 0..C {
            ws[column] = &w[column * depth..(column + 1) * depth];
        }
        for register in 0..registers {
            let mut lanes = [[simd.splat_f32s(0.0); C]; R];
            if !self.begin {
                for row in 0..R {
                    for column in 0..C {
                        lanes[row][column] = sums[(row * C + column) * registers + register];
                    }
                }
            }
            let mut at = register;
            while at < depth {
                let mut w = [simd.splat_f32s(0.0); C];
                for column in 0..C {
                    w[column] = ws[column][at];
                }
                for row in 0..R {
                    let x = xs[row][at];
                    for column in 0..C {
                        lanes[row][column] = simd.mul_add_f32s(x, w[column], lanes[row][column]);
                    }
                }
                at += registers;
            }
            for row in 0..R {
                for column in 0..C {
                    sums[(row * C + column) * registers + register] = lanes[row][column];
                }
            }
        }
    }
}

impl Columns<'_> {
    /// Sums many columns at once, input by input: for so few inputs that folding would take most of the time.
    #[inline(always)]
    fn narrow(self) {
        let Columns { x, weight, inputs, range, y } = self;
        let width = range.len();
        let mut weights = vec![0.0; range.len() * inputs];
        weight.widen(range.start * inputs..range.end * inputs, &mut weights);
        let mut turned = [[0.0; NARROW_COLUMNS]; NARROW];
        let mut lanes = [[0.0f32; NARROW_COLUMNS]; NARROW];
        for columns in steps(0..width, NARROW_COLUMNS) {
            for (at, weights) in weights[columns.start * inputs..columns.end * inputs].chunks_exact(inputs).enumerate()
            {
                turned.iter_mut().zip(weights).for_each(|(turned, weight)| turned[at] = *weight);
            }
            for (x, y) in x.chunks_exact(inputs).zip(y.chunks_exact_mut(width)) {
                for (lane, (x, w)) in lanes.iter_mut().zip(x.iter().zip(&turned)) {
                    *lane = from_fn(|at| x.mul_add(w[at], 0.0));
                }
                let mut half = NARROW / 2;
                while half > 0 {
                    let (low, high) = lanes.split_at_mut(half);
                    // the lanes beyond the inputs are 0, which changes no more than the sign of a 0
                    for (low, high) in low.iter_mut().zip(&high[..half.min(inputs.saturating_sub(half))]) {
                        *low = from_fn(|at| low[at] + high[at]);
                    }
                    half /= 2;
                }
                for (y, sum) in y[columns.clone()].iter_mut().zip(&lanes[0]) {
                    *y = sum + 0.0;
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
        let mut lanes = [0.0f32; LANES];
        for (at, (x, w)) in x.iter().zip(w).enumerate() {
            lanes[at % LANES] = x.mul_add(*w, lanes[at % LANES]);
        }
        let mut half = LANES;
        while half > 1 {
            half /= 2;
            (0..half).for_each(|at| lanes[at] += lanes[at + half]);
        }
        lanes[0] + 0.0
    }

    fn one_by_one(x: &[f32], w: &[f32], inputs: usize) -> Vec<f32> {
        x.chunks(inputs).flat_map(|x| w.chunks(inputs).map(move |w| one_sum(x, w))).collect()
    }

    fn widened(weight: Weight<'_>) -> Vec<f32> {
        let mut wide = vec![0.0; weight.len()];
        weight.widen(0..weight.len(), &mut wide);
        wide
    }

    /// Checks a product in all weight types against sums one by one.
    fn check(rows: usize, inputs: usize, outputs: usize, seed: u32) {
        let mut w = values(inputs * outputs, seed);
        w.iter_mut().step_by(7).for_each(|w| *w = -0.0);
        let (b, h): (Vec<bf16>, Vec<f16>) = w.iter().map(|&v| (bf16::from_f32(v), f16::from_f32(v))).unzip();
        let x = values(rows * inputs, seed.wrapping_add(1));
        for weight in [Weight::F32(&w), Weight::Bf16(&b), Weight::F16(&h)] {
            let expected = bits(&one_by_one(&x, &widened(weight), inputs));
            for threads in [1, 2, 3, 64] {
                let mut y = vec![f32::NAN; rows * outputs];
                product_on(threads, &x, weight, inputs, &mut y);
                assert!(bits(&y) == expected, "{rows} rows, {outputs} x {inputs}, {threads} threads");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn blocks_and_threads_change_no_bit(
            rows in select(vec![1usize, 2, 3, 4, 5, 7, 8, 31, 33, 67]),
            inputs in prop_oneof![1usize..70, select(vec![100usize, 255, 256, 511, 512, 513, 545, 1100])],
            outputs in prop_oneof![1usize..20, select(vec![31usize, 63, 64, 65, 71, 130])],
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
            let mut y = vec![0.0; rows * outputs];
            let mut check = |run: &dyn Fn(Columns<'_>)| {
                y.fill(f32::NAN);
                run(Columns { x: &x, weight: Weight::F32(&w), inputs, range: 0..outputs, y: &mut y });
                assert!(bits(&y) == expected, "{rows} rows, {outputs} x {inputs}");
            };
            check(&|columns| columns.with_simd(Scalar::new()));
            check(&|columns| columns.sum(Scalar::new()));
            check(&|columns| ARCH.dispatch(columns));
            #[cfg(target_arch = "x86_64")]
            if let Some(narrower) = pulp::x86::V3::try_new() {
                check(&|columns| Simd::vectorize(narrower, columns));
            }
        }
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
}
