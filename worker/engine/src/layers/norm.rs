//! Root mean square normalisation.

use super::kernels;

/// Scales each row to a root mean square of 1, then each column by its weight.
///
/// # Source
/// transformers `DeepseekV3RMSNorm`.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    weight: Vec<f32>,
    epsilon: f32,
}

impl RmsNorm {
    pub(crate) fn new(weight: Vec<f32>, epsilon: f32) -> Self {
        RmsNorm { weight, epsilon }
    }

    /// `x`: `[rows, width]`. Returns the same shape.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let mut y = x.to_vec();
        y.chunks_exact_mut(self.weight.len()).for_each(|row| self.normalise(row));
        y
    }

    /// Normalises one row in place.
    pub(crate) fn normalise(&self, row: &mut [f32]) {
        let mean = kernels::square_sum(row) / row.len() as f32;
        let scale = 1.0 / (mean + self.epsilon).sqrt();
        for (value, weight) in row.iter_mut().zip(&self.weight) {
            *value = weight * (*value * scale);
        }
    }
}
