//! A weight matrix in memory, in the type of its file.

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, WithDType};

use super::plain;
use super::product::{Weight, product, to_panels};

/// A matrix of bf16, f16 or f32 on the CPU. Copies share their memory.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    /// In the order of [`Weight`], in one dimension.
    values: Tensor,
    outputs: usize,
    inputs: usize,
}

impl Matrix {
    /// Takes a tensor `[outputs, inputs]` of one of the three types.
    ///
    /// # Errors
    /// candle's, if the tensor is another.
    pub(crate) fn new(values: &Tensor) -> Result<Self> {
        let (outputs, inputs) = values.dims2()?;
        let values = match values.dtype() {
            _ if cfg!(feature = "plain") => values.contiguous()?,
            DType::BF16 => turned::<half::bf16>(values)?,
            DType::F16 => turned::<half::f16>(values)?,
            _ => turned::<f32>(values)?,
        };
        Ok(Matrix { values, outputs, inputs })
    }

    /// One of this shape and type without values, for files that are only checked.
    ///
    /// # Errors
    /// As [`Matrix::new`].
    pub(crate) fn unread(values: &Tensor) -> Result<Self> {
        let (outputs, inputs) = values.dims2()?;
        Ok(Matrix { values: Tensor::zeros(0, values.dtype(), &Device::Cpu)?, outputs, inputs })
    }

    /// Bytes of its values.
    pub(crate) fn bytes(&self) -> u64 {
        (self.multiplications() * self.values.dtype().size_in_bytes()) as u64
    }

    /// `x`: `[rows, inputs]`. Returns `[rows, outputs]`.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        if cfg!(feature = "plain") {
            return plain::product(x, &self.values).expect("x has as many inputs as the weights");
        }
        let mut y = vec![0.0; x.len() / self.inputs * self.outputs];
        self.with(|weight| product(x, weight, self.inputs, &mut y));
        y
    }

    /// Multiplications that [`Matrix::apply`] does for one row: as many as there are weights.
    pub(crate) fn multiplications(&self) -> usize {
        self.outputs * self.inputs
    }

    /// Copies the weights of one output, widened to f32, to `to`: `[inputs]`.
    pub(crate) fn output(&self, output: usize, to: &mut [f32]) {
        if cfg!(feature = "plain") {
            return plain::row(&self.values, output, to).expect("the tensor has this row");
        }
        self.with(|weight| weight.output(output, to));
    }

    fn with(&self, work: impl FnOnce(Weight<'_>)) {
        match &*self.values.storage_and_layout().0 {
            Storage::Cpu(CpuStorage::BF16(values)) => work(Weight::Bf16(values)),
            Storage::Cpu(CpuStorage::F16(values)) => work(Weight::F16(values)),
            Storage::Cpu(CpuStorage::F32(values)) => work(Weight::F32(values)),
            _ => unreachable!("Matrix::new takes only these"),
        }
    }
}

fn turned<T: WithDType + Default>(values: &Tensor) -> Result<Tensor> {
    let (inputs, values) = (values.dim(1)?, values.contiguous()?);
    let (storage, layout) = values.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { candle_core::bail!("weights are on the CPU") };
    let span = layout.start_offset()..layout.start_offset() + values.elem_count();
    let panels = to_panels(&T::cpu_storage_as_slice(storage)?[span], inputs);
    Tensor::from_vec(panels, values.elem_count(), &Device::Cpu)
}
