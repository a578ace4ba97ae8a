//! Matrix products, where their tensors are.

use super::{FrozenWeight, Tensor, apart};
use crate::gpu::{
    Matrix,
    products::{self as on, Base, Frozen, Term},
};
use candle_core::{Result, bail};

/// The second factor of a product; as [`crate::Factor`].
#[derive(Clone, Copy)]
pub enum Factor<'a> {
    /// A (k, n) tensor.
    Plain(&'a Tensor),
    /// A (n, k) tensor, transposed.
    Transposed(&'a Tensor),
    /// A frozen weight (k, n).
    Weight(&'a FrozenWeight),
    /// A frozen weight (n, k), transposed: a linear layer.
    Linear(&'a FrozenWeight),
}

/// `scale · a · b`; as [`crate::Product`].
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// First factor.
    pub a: &'a Tensor,
    /// Second factor.
    pub b: Factor<'a>,
    /// Factor of the whole.
    pub scale: f64,
}

impl<'a> Product<'a> {
    /// Returns `a · b`.
    pub fn new(a: &'a Tensor, b: Factor<'a>) -> Self {
        Self { a, b, scale: 1.0 }
    }
    /// Returns `scale · a · b`.
    pub fn scaled(a: &'a Tensor, b: Factor<'a>, scale: f64) -> Self {
        Self { a, b, scale }
    }
}

/// What products are added to; as [`crate::Onto`].
#[derive(Clone, Copy)]
pub enum Onto<'a> {
    /// Nothing: the target is overwritten.
    Zero,
    /// The target.
    Itself,
    /// This row (n), a bias.
    Row(&'a Tensor),
    /// This (m, n) matrix, a residual.
    Matrix(&'a Tensor),
}

/// As [`crate::matmul`]; short-lived on a GPU.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match (a, b) {
        (Tensor::Host(a), Tensor::Host(b)) => Ok(Tensor::Host(crate::matmul(a, b)?)),
        (Tensor::Gpu(a), Tensor::Gpu(b)) => {
            let out = Matrix::short(a.gpu(), a.dims().0, b.dims().1, a.element())?;
            on::multiply(&out, Base::Zero, [Ok(Term { a, b: b.clone(), scale: 1.0 })])?;
            Ok(Tensor::Gpu(out))
        }
        _ => apart("matmul"),
    }
}

/// As [`crate::multiply`].
pub fn multiply(out: &Tensor, onto: Onto, products: &[Product]) -> Result<()> {
    match out {
        Tensor::Host(out) => on_host(out, onto, products),
        Tensor::Gpu(out) => on_gpu(out, onto, products),
    }
}

fn on_host(out: &candle_core::Tensor, onto: Onto, products: &[Product]) -> Result<()> {
    let onto = match onto {
        Onto::Zero => crate::Onto::Zero,
        Onto::Itself => crate::Onto::Itself,
        Onto::Row(row) => crate::Onto::Row(row.host()?),
        Onto::Matrix(matrix) => crate::Onto::Matrix(matrix.host()?),
    };
    let host = |w: &FrozenWeight| match w {
        FrozenWeight::Host(weight) => Ok(weight.clone()),
        FrozenWeight::Gpu(_) => apart("multiply"),
    };
    // Weights are handles; owned here so that factors can borrow them.
    let weights = products.iter().map(|p| match p.b {
        Factor::Weight(w) | Factor::Linear(w) => host(w).map(Some),
        Factor::Plain(_) | Factor::Transposed(_) => Ok(None),
    });
    let weights: Vec<_> = weights.collect::<Result<_>>()?;
    let factors = products.iter().zip(&weights).map(|(p, weight)| {
        let b = match (p.b, weight) {
            (Factor::Plain(b), _) => crate::Factor::Plain(b.host()?),
            (Factor::Transposed(b), _) => crate::Factor::Transposed(b.host()?),
            (Factor::Weight(_), Some(w)) => crate::Factor::Weight(w),
            (Factor::Linear(_), Some(w)) => crate::Factor::Linear(w),
            (_, None) => bail!("multiply: a factor without memory"),
        };
        Ok(crate::Product::scaled(p.a.host()?, b, p.scale))
    });
    crate::multiply(out, onto, &factors.collect::<Result<Vec<_>>>()?)
}

fn on_gpu(out: &Matrix, onto: Onto, products: &[Product]) -> Result<()> {
    let matrix = |t: &'_ Tensor| match t {
        Tensor::Gpu(m) => Ok(m.clone()),
        Tensor::Host(_) => apart("multiply"),
    };
    if let (
        [Product { a, b: Factor::Linear(FrozenWeight::Gpu(Frozen::Tiles(tiles))), scale: 1.0 }],
        Onto::Zero,
    ) = (products, onto)
    {
        return tiles.linear(out, &matrix(a)?);
    }
    let start = match onto {
        Onto::Row(t) | Onto::Matrix(t) => Some(matrix(t)?),
        Onto::Zero | Onto::Itself => None,
    };
    let base = match (onto, &start) {
        (Onto::Row(_), Some(row)) => Base::Row(row),
        (Onto::Matrix(_), Some(m)) => Base::Matrix(m),
        (Onto::Itself, _) => Base::Itself,
        _ => Base::Zero,
    };
    let whole = |w: &FrozenWeight| match w {
        FrozenWeight::Gpu(frozen) => frozen.whole(),
        FrozenWeight::Host(_) => apart("multiply"),
    };
    let left = products.iter().map(|p| matrix(p.a)).collect::<Result<Vec<_>>>()?;
    let terms = products.iter().zip(&left).map(|(p, a)| {
        let b = match p.b {
            Factor::Plain(b) => matrix(b)?,
            Factor::Transposed(b) => matrix(b)?.t(),
            Factor::Weight(w) => whole(w)?,
            Factor::Linear(w) => whole(w)?.t(),
        };
        Ok(Term { a, b, scale: p.scale })
    });
    on::multiply(out, base, terms)
}
