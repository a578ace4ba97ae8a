//! The norms of a decoder: by root mean square, or, where a norm has a bias, by mean and variance.

use candle_core::{Result, Tensor as HostTensor};
use kto_kernels::{
    add_column_sums, add_norm_gradient,
    device::{Tensor, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward},
};

/// Where the gradients of a norm are added to, as far as it is trained.
#[derive(Clone, Debug, Default)]
pub struct NormGradient {
    /// Of its weight (C).
    pub weight: Option<HostTensor>,
    /// Of its bias (C).
    pub bias: Option<HostTensor>,
}

impl NormGradient {
    /// Returns whether anything of it is trained.
    pub fn is_some(&self) -> bool {
        self.weight.is_some() || self.bias.is_some()
    }
}

/// A norm.
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

    /// Adds to the gradients of a trained norm for the gradient `dy` of the result. Shapes: dy and x (T, C).
    pub(crate) fn add_gradient(&self, to: &NormGradient, dy: &Tensor, x: &Tensor, eps: f64) -> Result<()> {
        if let Some(weight) = &to.weight {
            add_norm_gradient(weight, dy.host()?, x.host()?, eps, self.bias.is_some())?;
        }
        to.bias.as_ref().map_or(Ok(()), |bias| add_column_sums(bias, dy.host()?))
    }
}
