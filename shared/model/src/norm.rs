//! The norms of a decoder: by root mean square, or, where a norm has a bias, by mean and variance.

use candle_core::Result;
use kto_kernels::device::{Tensor, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};

/// A frozen norm.
#[derive(Clone, Debug)]
pub struct NormWeights<T> {
    /// As it is multiplied with (C).
    pub weight: T,
    /// Of a LayerNorm (C).
    pub bias: Option<T>,
}

impl<T> NormWeights<T> {
    /// Returns what `f` makes of its tensors.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> kto_cli::Result<U>) -> kto_cli::Result<NormWeights<U>> {
        Ok(NormWeights { weight: f(&self.weight)?, bias: self.bias.as_ref().map(f).transpose()? })
    }
}

impl NormWeights<Tensor> {
    /// Writes the normed rows of `x`. Shapes: out and x (T, C).
    pub(crate) fn forward(&self, out: &Tensor, x: &Tensor, eps: f64) -> Result<()> {
        match &self.bias {
            None => rms_norm(out, x, &self.weight, eps),
            Some(bias) => layer_norm(out, x, &self.weight, bias, eps),
        }
    }

    /// Adds to `dx` the gradient of `x` for the gradient `dy` of the result. Shapes: all (T, C).
    pub(crate) fn backward(&self, dx: &Tensor, dy: &Tensor, x: &Tensor, eps: f64) -> Result<()> {
        match &self.bias {
            None => rms_norm_backward(dx, dy, x, &self.weight, eps),
            Some(_) => layer_norm_backward(dx, dy, x, &self.weight, eps),
        }
    }
}
