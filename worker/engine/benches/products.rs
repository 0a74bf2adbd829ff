//! What it costs that the bits of a row do not depend on its company: `cargo bench -p engine --bench products`.
//!
//! The engine's own product beside candle's, whose kernel depends on the number of rows, on the same weights and rows, each
//! with the threads that it chooses itself. `tests/bench/bits` compares whole answers. candle has no product with weights in
//! bf16: it widens them all in each call, and to widen them once takes twice the memory.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use half::bf16;

use layers::product::{Weight, product, to_panels};

#[expect(
    dead_code,
    unused_imports,
    reason = "of the engine's kernels, which it shows nobody, this needs the product only"
)]
#[path = "../src/layers"]
mod layers {
    mod kernels;
    pub(crate) mod product;
    mod threads;
}

/// Outputs and inputs of a weight matrix, and whose it is.
const SHAPES: [(usize, usize, &str); 2] =
    [(2048, 7168, "an expert of DeepSeek-V3"), (512, 256, "a dense layer of tiny-r1")];
const ROWS: [usize; 4] = [1, 8, 32, 128];
const ROUNDS: usize = 5;
/// How long each way computes in a round, at least.
const ENOUGH: Duration = Duration::from_millis(300);

fn main() -> candle_core::Result<()> {
    for (outputs, inputs, whose) in SHAPES {
        println!("{outputs} x {inputs}, {whose}");
        println!("{:>5} {:>26} {:>26} {:>26} {:>26}", "rows", "candle f32", "candle bf16", "ours f32", "ours bf16");
        let wide = values(outputs * inputs);
        let narrow: Vec<bf16> = wide.iter().map(|&value| bf16::from_f32(value)).collect();
        let (wide_panels, narrow_panels) = (to_panels(&wide, inputs), to_panels(&narrow, inputs));
        let tensor = Tensor::from_slice(&wide, (outputs, inputs), &Device::Cpu)?;
        let weights = [tensor.t()?, tensor.to_dtype(DType::BF16)?.t()?];
        for rows in ROWS {
            let x = values(rows * inputs);
            let xs = Tensor::from_slice(&x, (rows, inputs), &Device::Cpu)?;
            let xs = [xs.clone(), xs.to_dtype(DType::BF16)?];
            let mut y = vec![0.0; rows * outputs];
            let mut rounds: [Vec<Duration>; 4] = Default::default();
            for _ in 0..ROUNDS {
                for (times, (xs, weights)) in rounds.iter_mut().zip(xs.iter().zip(&weights)) {
                    times.push(mean(|| xs.matmul(weights).map(drop))?);
                }
                for (times, weight) in
                    rounds[2..].iter_mut().zip([Weight::F32(&wide_panels), Weight::Bf16(&narrow_panels)])
                {
                    times.push(mean(|| {
                        product(&x, weight, inputs, black_box(&mut y));
                        Ok(())
                    })?);
                }
            }
            let least = middle(&mut rounds[0]);
            let cells = rounds.iter_mut().map(|times| cell(times, least));
            println!("{rows:>5} {}", cells.collect::<Vec<_>>().join(" "));
        }
    }
    println!("us a product (lowest-highest of {ROUNDS} rounds), and as a multiple of candle's with f32");
    Ok(())
}

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|at| (at * 37 % 251) as f32 / 251.0 - 0.5).collect()
}

/// The mean time of a call, once it is warm.
fn mean(mut call: impl FnMut() -> candle_core::Result<()>) -> candle_core::Result<Duration> {
    call()?;
    let (mut calls, begun) = (0, Instant::now());
    while begun.elapsed() < ENOUGH {
        call()?;
        calls += 1;
    }
    Ok(begun.elapsed() / calls)
}

fn middle(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn cell(times: &mut [Duration], least: Duration) -> String {
    let (middle, micros) = (middle(times), |time: Duration| time.as_secs_f64() * 1e6);
    let (lowest, highest) = (micros(times[0]), micros(times[times.len() - 1]));
    let ratio = middle.as_secs_f64() / least.as_secs_f64();
    format!("{:>26}", format!("{:.0} ({lowest:.0}-{highest:.0}) {ratio:.2}x", micros(middle)))
}
