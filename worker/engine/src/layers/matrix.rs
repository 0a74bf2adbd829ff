//! A weight matrix in memory, in the type of its file.

use candle_core::{CpuStorage, DType, Storage, Tensor};

use super::plain;
use super::product::{Weight, product};

/// A matrix of bf16, f16 or f32 on the CPU. Copies share their memory.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    values: Tensor,
    outputs: usize,
    inputs: usize,
}

impl Matrix {
    /// Takes a tensor `[outputs, inputs]`; `None` if its type is not one of the three.
    pub(crate) fn new(values: Tensor) -> Option<Self> {
        let known = matches!(values.dtype(), DType::BF16 | DType::F16 | DType::F32);
        let (outputs, inputs) = values.dims2().ok()?;
        (known && values.device().is_cpu()).then_some(Matrix { values, outputs, inputs })
    }

    /// Bytes of its values.
    pub(crate) fn bytes(&self) -> u64 {
        (self.values.elem_count() * self.values.dtype().size_in_bytes()) as u64
    }

    /// `x`: `[rows, inputs]`. Returns `[rows, outputs]`.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        if cfg!(feature = "plain") {
            return plain::product(x, &self.values).expect("x has as many inputs as the weights");
        }
        let mut y = vec![0.0; x.len() / self.inputs * self.outputs];
        self.with(0..self.outputs, |weight| product(x, weight, self.inputs, &mut y));
        y
    }

    /// Copies one row, widened to f32, to `to`: `[inputs]`.
    pub(crate) fn row(&self, index: usize, to: &mut [f32]) {
        self.with(index..index + 1, |weight| match weight {
            Weight::F32(row) => to.copy_from_slice(row),
            Weight::Bf16(row) => to.iter_mut().zip(row).for_each(|(to, v)| *to = v.to_f32()),
            Weight::F16(row) => to.iter_mut().zip(row).for_each(|(to, v)| *to = v.to_f32()),
        });
    }

    fn with(&self, rows: std::ops::Range<usize>, work: impl FnOnce(Weight<'_>)) {
        let (storage, layout) = self.values.storage_and_layout();
        let start = layout.start_offset();
        let span = start + rows.start * self.inputs..start + rows.end * self.inputs;
        match &*storage {
            Storage::Cpu(CpuStorage::BF16(values)) => work(Weight::Bf16(&values[span])),
            Storage::Cpu(CpuStorage::F16(values)) => work(Weight::F16(&values[span])),
            Storage::Cpu(CpuStorage::F32(values)) => work(Weight::F32(&values[span])),
            _ => unreachable!("Matrix::new takes only these"),
        }
    }
}
