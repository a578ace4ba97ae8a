//! One linear layer with its LoRA factors: forward, and the pieces of the way back.

use crate::dora::Lengths;
use candle_core::Result;
use kto_kernels::{
    DropoutKey,
    device::{
        Factor, FrozenWeight, Onto, Product, Tensor, add, add_bias, add_column_dots, dropout, matmul,
        multiply, scale_columns, scale_in_place,
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
    /// Factor of B·A: alpha / rank, or alpha / √rank with rslora.
    pub scale: f64,
    /// DoRA: the lengths that the rows of W + scale·B·A get (out).
    pub magnitude: Option<T>,
}

/// A linear layer as one pass uses it: `y = x·Wᵀ + bias + scale·drop(x)·Aᵀ·Bᵀ`; with DoRA, which has no dropout,
/// `y = (x·Wᵀ + scale·x·Aᵀ·Bᵀ) ⊙ gain + bias`.
pub(crate) struct Projection<'a> {
    pub linear: &'a Linear,
    pub factors: Option<&'a Factors<Tensor>>,
    /// DoRA's gains.
    pub lengths: Option<&'a Lengths>,
    pub dropout: Option<(DropoutKey, &'a [u64])>,
}

impl Projection<'_> {
    /// Writes the layer's output, plus `residual`, to `y`, and `drop(x)·Aᵀ` to `inner`.
    /// Shapes: x (T, in), y and residual (T, out), inner (T, R).
    pub fn forward(&self, y: &Tensor, residual: Option<&Tensor>, x: &Tensor, inner: &Tensor) -> Result<()> {
        if self.factors.is_some() {
            self.inner(inner, x)?;
        }
        let products = self.products(x, inner);
        if let Some(lengths) = self.lengths {
            multiply(y, Onto::Zero, &products)?;
            scale_columns(y, &lengths.gain)?;
            self.linear.bias.as_ref().map_or(Ok(()), |bias| add_bias(y, bias))?;
            return residual.map_or(Ok(()), |residual| add(y, residual));
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

    /// Returns what the output is the sum of, before DoRA's gains.
    fn products<'t>(&'t self, x: &'t Tensor, inner: &'t Tensor) -> Vec<Product<'t>> {
        let base = Product::new(x, Factor::Linear(&self.linear.weight));
        let own = self.factors.map(|f| Product::scaled(inner, Factor::Transposed(&f.b), f.scale));
        std::iter::once(base).chain(own).collect()
    }

    /// Returns the gradient of the output before DoRA's gains for the gradient `dy` of the output: in `room`, or without DoRA `dy`
    /// itself. Shapes: dy and room (T, out).
    pub fn before_gains(&self, dy: &Tensor, room: &Tensor) -> Result<Tensor> {
        let Some(lengths) = self.lengths else { return Ok(dy.clone()) };
        room.set_rows(0, dy)?;
        scale_columns(room, &lengths.gain)?;
        Ok(room.clone())
    }

    /// Does the same in place: `dy` is used up.
    pub fn use_gains(&self, dy: &Tensor) -> Result<()> {
        self.lengths.map_or(Ok(()), |lengths| scale_columns(dy, &lengths.gain))
    }

    /// Adds to the gradient of DoRA's magnitudes; the lengths of rows that they are divided by count as constants, as in PEFT. `room` is
    /// work space. Shapes: dy and room (T, out), x (T, in), inner (T, R).
    pub fn magnitude_gradient(
        &self,
        gradient: Option<&Factors<Tensor>>,
        (dy, x, inner): (&Tensor, &Tensor, &Tensor),
        room: &Tensor,
    ) -> Result<()> {
        let magnitude = gradient.and_then(|g| g.magnitude.as_ref());
        let (Some(magnitude), Some(lengths)) = (magnitude, self.lengths) else { return Ok(()) };
        multiply(room, Onto::Zero, &self.products(x, inner))?;
        add_column_dots(magnitude, dy, room, &lengths.inverse)
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

    /// Writes `dy·B` (`dy` before gains), the gradient of `inner` but for the scale. Shapes: dy (T, out), dinner (T, R).
    pub fn inner_gradient(&self, dinner: &Tensor, dy: &Tensor) -> Result<()> {
        match self.factors {
            Some(f) => multiply(dinner, Onto::Zero, &[Product::new(dy, Factor::Plain(&f.b))]),
            None => Ok(()),
        }
    }

    /// Adds to the gradients of A and B. Shapes: dy before gains (T, out), x (T, in), inner and dinner (T, R).
    pub fn factor_gradients(
        &self,
        gradient: Option<&Factors<Tensor>>,
        dy: &Tensor,
        x: &Tensor,
        inner: &Tensor,
        dinner: &Tensor,
    ) -> Result<()> {
        let (Some(g), Some(f)) = (gradient, self.factors) else { return Ok(()) };
        let dropped = self.dropped(x)?;
        multiply(&g.b, Onto::Itself, &[Product::scaled(&dy.t()?, Factor::Plain(inner), f.scale)])?;
        multiply(&g.a, Onto::Itself, &[Product::scaled(&dinner.t()?, Factor::Plain(&dropped), f.scale)])
    }

    fn dropped(&self, x: &Tensor) -> Result<Tensor> {
        match self.dropout {
            Some((key, rows)) => dropout(x, key, rows),
            None => Ok(x.clone()),
        }
    }
}

/// Writes (or adds to) the gradient of an input that several layers share.
/// Each share is (layer, gradient of its output before gains (T, out), gradient of its inner values (T, R)). Shape: dx (T, in).
pub(crate) fn input_gradient(dx: &Tensor, shares: &[(&Projection, &Tensor, &Tensor)]) -> Result<()> {
    let mut products = Vec::with_capacity(2 * shares.len());
    for (layer, dy, dinner) in shares {
        products.push(Product::new(dy, Factor::Weight(&layer.linear.weight)));
        if let (Some(f), None) = (layer.factors, layer.dropout) {
            products.push(Product::scaled(dinner, Factor::Plain(&f.a), f.scale));
        }
    }
    multiply(dx, Onto::Zero, &products)?;
    for (layer, _, dinner) in shares {
        if let (Some(f), Some((key, rows))) = (layer.factors, layer.dropout) {
            let share = matmul(dinner, &f.a)?;
            scale_in_place(&share, f.scale)?;
            add(dx, &dropout(&share, key, rows)?)?;
        }
    }
    Ok(())
}
