//! Rotary position embedding, with or without YaRN.

use std::f64::consts::PI;

/// How far a model's positions were stretched beyond those it was first trained on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Yarn {
    pub(crate) factor: f64,
    pub(crate) original_context: f64,
    pub(crate) beta_fast: f64,
    pub(crate) beta_slow: f64,
    pub(crate) mscale: Option<f64>,
    pub(crate) mscale_all_dim: Option<f64>,
    pub(crate) attention_factor: Option<f64>,
    pub(crate) truncate: bool,
}

impl Yarn {
    /// What the softmax scale is multiplied by: mscale, squared.
    pub(crate) fn softmax_scale(&self) -> f64 {
        let mscale = self.mscale_all_dim.map_or(1.0, |all| mscale(self.factor, all));
        mscale * mscale
    }

    /// What cosine and sine are multiplied by.
    fn angle_scale(&self) -> f64 {
        self.attention_factor.unwrap_or_else(|| match (self.mscale, self.mscale_all_dim) {
            (Some(one), Some(all)) => mscale(self.factor, one) / mscale(self.factor, all),
            _ => mscale(self.factor, 1.0),
        })
    }

    /// The frequencies between which to blend, as places in the list of them.
    fn ramp(&self, theta: f64, width: usize) -> (f64, f64) {
        let place =
            |rotations: f64| width as f64 * (self.original_context / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (low, high) = (place(self.beta_fast), place(self.beta_slow));
        let (low, high) = if self.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        (low.max(0.0), high.min(width as f64 - 1.0))
    }
}

fn mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// Rotates pairs of values by angles that grow with the position.
///
/// # Source
/// transformers `modeling_rope_utils.py` (`_compute_yarn_parameters`) and
/// `modeling_deepseek_v3.py` (`apply_rotary_pos_emb`, `apply_rotary_pos_emb_interleave`).
#[derive(Debug)]
pub(crate) struct Rope {
    frequencies: Vec<f32>,
    scale: f32,
    interleave: bool,
}

/// Cosine and sine of one position, for each frequency.
pub(crate) type Angles = Vec<(f32, f32)>;

impl Rope {
    /// `width`: values that are rotated, an even number.
    pub(crate) fn new(width: usize, theta: f64, yarn: Option<&Yarn>, interleave: bool) -> Self {
        let plain = |at: usize| {
            let exponent = (2 * at) as f32 / width as f32;
            theta.powf(f64::from(exponent)) as f32
        };
        let frequencies = match yarn {
            None => (0..width / 2).map(|at| 1.0 / plain(at)).collect(),
            Some(yarn) => {
                let (low, high) = yarn.ramp(theta, width);
                let high = if low == high { high + 0.001 } else { high };
                let blend = |at: usize| {
                    let kept = 1.0 - (((at as f64 - low) / (high - low)) as f32).clamp(0.0, 1.0);
                    let stretched = 1.0 / (yarn.factor as f32 * plain(at));
                    stretched * (1.0 - kept) + 1.0 / plain(at) * kept
                };
                (0..width / 2).map(blend).collect()
            }
        };
        Rope { frequencies, scale: yarn.map_or(1.0, |yarn| yarn.angle_scale() as f32), interleave }
    }

    /// The angles of a position.
    pub(crate) fn angles(&self, position: usize) -> Angles {
        let angle = |frequency: &f32| {
            let angle = f64::from(position as f32 * frequency);
            (angle.cos() as f32 * self.scale, angle.sin() as f32 * self.scale)
        };
        self.frequencies.iter().map(angle).collect()
    }

    /// Rotates `row` into `to`, both `[width]`: first the pairs' first values, then their second.
    pub(crate) fn rotate(&self, angles: &Angles, row: &[f32], to: &mut [f32]) {
        let half = angles.len();
        for (at, (cos, sin)) in angles.iter().enumerate() {
            let (a, b) = if self.interleave { (row[2 * at], row[2 * at + 1]) } else { (row[at], row[at + half]) };
            to[at] = a * cos - b * sin;
            to[at + half] = b * cos + a * sin;
        }
    }
}
