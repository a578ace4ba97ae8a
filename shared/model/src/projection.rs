//! One linear layer with its LoRA factors: forward, and the pieces of the way back.

use candle_core::Result;
use kto_kernels::{
    DropoutKey,
    device::{
        Factor, FrozenWeight, Onto, Product, Tensor, add, add_bias, dropout, matmul, multiply, scale_in_place,
    },
};

/// A frozen linear layer.
#[derive(Clone, Debug)]
pub struct Linear {
    /// (out, in)
    pub weight: FrozenWeight,
    /// (out)
    pub bias: Option<Tensor>,
}

/// The trained factors of one linear layer: of the host as they are trained, or where a sweep computes.
#[derive(Clone, Debug)]
pub struct Factors<T = candle_core::Tensor> {
    /// A (R, in)
    pub a: T,
    /// B (out, R)
    pub b: T,
}

/// A linear layer as one pass uses it: `y = x·Wᵀ + bias + scale·drop(x)·Aᵀ·Bᵀ`.
pub(crate) struct Projection<'a> {
    pub linear: &'a Linear,
    pub factors: Option<&'a Factors<Tensor>>,
    pub scale: f64,
    pub dropout: Option<(DropoutKey, &'a [u64])>,
}

impl Projection<'_> {
    /// Writes the layer's output, plus `residual`, to `y`, and `drop(x)·Aᵀ` to `inner`.
    /// Shapes: x (T, in), y and residual (T, out), inner (T, R).
    pub fn forward(&self, y: &Tensor, residual: Option<&Tensor>, x: &Tensor, inner: &Tensor) -> Result<()> {
        let mut products = vec![Product::new(x, Factor::Linear(&self.linear.weight))];
        if let Some(f) = self.factors {
            self.inner(inner, x)?;
            products.push(Product::scaled(inner, Factor::Transposed(&f.b), self.scale));
        }
        match (residual, &self.linear.bias) {
            (None, None) => multiply(y, Onto::Zero, &products),
            (None, Some(bias)) => multiply(y, Onto::Row(bias), &products),
            (Some(residual), bias) => {
                multiply(y, Onto::Matrix(residual), &products)?;
                bias.as_ref().map_or(Ok(()), |bias| add_bias(y, bias))
            }
        }
    }

    /// Writes `drop(x)·Aᵀ`. Shapes: x (T, in), inner (T, R).
    pub fn inner(&self, inner: &Tensor, x: &Tensor) -> Result<()> {
        match self.factors {
            Some(f) => {
                multiply(inner, Onto::Zero, &[Product::new(&self.dropped(x)?, Factor::Transposed(&f.a))])
            }
            None => Ok(()),
        }
    }

    /// Writes `dy·B`, the gradient of `inner` but for the scale. Shapes: dy (T, out), dinner (T, R).
    pub fn inner_gradient(&self, dinner: &Tensor, dy: &Tensor) -> Result<()> {
        match self.factors {
            Some(f) => multiply(dinner, Onto::Zero, &[Product::new(dy, Factor::Plain(&f.b))]),
            None => Ok(()),
        }
    }

    /// Adds to the gradients of the factors. Shapes: dy (T, out), x (T, in), inner and dinner (T, R).
    pub fn factor_gradients(
        &self,
        gradient: Option<&Factors<Tensor>>,
        dy: &Tensor,
        x: &Tensor,
        inner: &Tensor,
        dinner: &Tensor,
    ) -> Result<()> {
        let (Some(g), Some(_)) = (gradient, self.factors) else { return Ok(()) };
        let dropped = self.dropped(x)?;
        multiply(&g.b, Onto::Itself, &[Product::scaled(&dy.t()?, Factor::Plain(inner), self.scale)])?;
        multiply(&g.a, Onto::Itself, &[Product::scaled(&dinner.t()?, Factor::Plain(&dropped), self.scale)])
    }

    fn dropped(&self, x: &Tensor) -> Result<Tensor> {
        match self.dropout {
            Some((key, rows)) => dropout(x, key, rows),
            None => Ok(x.clone()),
        }
    }
}

/// Writes (or adds to) the gradient of an input that several layers share.
/// Each share is (layer, gradient of its output (T, out), gradient of its inner values (T, R)). Shape: dx (T, in).
pub(crate) fn input_gradient(dx: &Tensor, shares: &[(&Projection, &Tensor, &Tensor)]) -> Result<()> {
    let mut products = Vec::with_capacity(2 * shares.len());
    for (layer, dy, dinner) in shares {
        products.push(Product::new(dy, Factor::Weight(&layer.linear.weight)));
        if let (Some(f), None) = (layer.factors, layer.dropout) {
            products.push(Product::scaled(dinner, Factor::Plain(&f.a), layer.scale));
        }
    }
    multiply(dx, Onto::Zero, &products)?;
    for (layer, _, dinner) in shares {
        if let (Some(f), Some((key, rows))) = (layer.factors, layer.dropout) {
            let share = matmul(dinner, &f.a)?;
            scale_in_place(&share, layer.scale)?;
            add(dx, &dropout(&share, key, rows)?)?;
        }
    }
    Ok(())
}
