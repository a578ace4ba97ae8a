//! One linear layer with its LoRA factors: forward, and backward into the factors and the input.

use candle_core::{Result, Tensor};
use kto_kernels::{DropoutKey, add, add_bias, dropout, matmul, matmul_acc, scale_in_place};

/// A frozen linear layer.
#[derive(Clone, Debug)]
pub struct Linear {
    /// (out, in)
    pub weight: Tensor,
    /// (out)
    pub bias: Option<Tensor>,
}

/// The trained factors of one linear layer.
#[derive(Clone, Debug)]
pub struct Factors {
    /// A (R, in)
    pub a: Tensor,
    /// B (out, R)
    pub b: Tensor,
}

/// A linear layer as one pass uses it: `y = x·Wᵀ + bias + scale·drop(x)·Aᵀ·Bᵀ`.
pub(crate) struct Projection<'a> {
    pub linear: &'a Linear,
    pub factors: Option<&'a Factors>,
    pub scale: f64,
    pub dropout: Option<(DropoutKey, &'a [u64])>,
}

impl Projection<'_> {
    /// Shapes: x (T, in), result (T, out).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = matmul(x, &self.linear.weight.t()?)?;
        if let Some(bias) = &self.linear.bias {
            add_bias(&y, bias)?;
        }
        if let Some(f) = self.factors {
            let u = matmul(&self.dropped(x)?, &f.a.t()?)?;
            matmul_acc(&y, &u, &f.b.t()?, self.scale)?;
        }
        Ok(y)
    }

    /// Adds to the factors' gradients and, when `dx` is asked for, returns `dx` plus this layer's share.
    /// Shapes: dy (T, out), x (T, in); `gradient` as the factors.
    pub fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        gradient: Option<&Factors>,
        dx: Dx,
    ) -> Result<Option<Tensor>> {
        let mut dx = match dx {
            Dx::Skip => None,
            Dx::New => Some(matmul(dy, &self.linear.weight)?),
            Dx::AddTo(dx) => {
                matmul_acc(&dx, dy, &self.linear.weight, 1.0)?;
                Some(dx)
            }
        };
        if let Some(f) = self.factors {
            let du = matmul(dy, &f.b)?;
            if let Some(g) = gradient {
                let x = self.dropped(x)?;
                matmul_acc(&g.b, &dy.t()?, &matmul(&x, &f.a.t()?)?, self.scale)?;
                matmul_acc(&g.a, &du.t()?, &x, self.scale)?;
            }
            dx = match (dx, self.dropout) {
                (None, _) => None,
                (Some(dx), None) => {
                    matmul_acc(&dx, &du, &f.a, self.scale)?;
                    Some(dx)
                }
                (Some(dx), Some((key, rows))) => {
                    let share = matmul(&du, &f.a)?;
                    scale_in_place(&share, self.scale)?;
                    Some(add(&dx, &dropout(&share, key, rows)?)?)
                }
            };
        }
        Ok(dx)
    }

    fn dropped(&self, x: &Tensor) -> Result<Tensor> {
        match self.dropout {
            Some((key, rows)) => dropout(x, key, rows),
            None => Ok(x.clone()),
        }
    }
}

/// What to do about the gradient of a layer's input.
pub(crate) enum Dx {
    /// Nobody needs it.
    Skip,
    /// Return it.
    New,
    /// Add it to this one, in place.
    AddTo(Tensor),
}
