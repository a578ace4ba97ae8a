//! Matrix products on tensors: plain, with several terms, onto a start. Called for every linear layer, LoRA factor and the head.

use crate::{
    gemm::{Right, Start, Target, Term, product},
    real::{Operand, Real},
    stored::Stored,
    tensor::{apart, matrix, read, same_type, with_type, write},
    weight::Weight,
};
use candle_core::{Result, Tensor, bail};

/// The second factor of a product.
#[derive(Clone, Copy)]
pub enum Factor<'a> {
    /// A (k, n) tensor of any strides.
    Plain(&'a Tensor),
    /// A (n, k) tensor of any strides, transposed.
    Transposed(&'a Tensor),
    /// A frozen weight (k, n).
    Weight(&'a Weight),
    /// A frozen weight (n, k), transposed: a linear layer.
    Linear(&'a Weight),
}

/// `scale · a · b`. Shapes: a (m, k) of any strides, b (k, n).
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

/// What products are added to.
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

/// Returns `a · b`. Shapes: a (m, k), b (k, n), result (m, n); any strides, so `.t()` costs nothing.
/// Errors: shapes or element types that do not match.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (m, n) = (a.dims2()?.0, b.dims2()?.1);
    if m.checked_mul(n).is_none() {
        bail!("a product of {m} × {n} is too large");
    }
    let out = with_type!(a, T => matrix(vec![T::ZERO; m * n], m, n, a))?;
    multiply(&out, Onto::Zero, &[Product::new(a, Factor::Plain(b))])?;
    Ok(out)
}

/// Computes `out = onto + Σ products`. `out` (m, n) is contiguous and shares no memory with any operand; a start is contiguous.
/// Errors: shapes or element types that do not match.
pub fn multiply(out: &Tensor, onto: Onto, products: &[Product]) -> Result<()> {
    let (m, n) = out.dims2()?;
    let mut terms_depth = 0usize;
    for p in products {
        same_type(out, p.a)?;
        apart(out, p.a)?;
        if let Some(b) = p.b.tensor() {
            same_type(out, b)?;
            apart(out, b)?;
        }
        let (rows, k) = p.a.dims2()?;
        let (depth, columns) = p.b.dims()?;
        if (rows, columns) != (m, n) || k != depth {
            bail!("product of ({rows}, {k}) and ({depth}, {columns}) for ({m}, {n})");
        }
        // Repeated rows make any depth without memory for it; a sum that wraps around would make too small a buffer.
        terms_depth = match terms_depth.checked_add(k) {
            Some(sum) => sum,
            None => bail!("product of ({rows}, {k}) and ({depth}, {columns}) is too deep"),
        };
    }
    let from = match onto {
        Onto::Zero | Onto::Itself => None,
        Onto::Row(row) => Some(row.unsqueeze(0)?),
        Onto::Matrix(matrix) => Some(matrix.clone()),
    };
    if let Some(from) = &from {
        same_type(out, from)?;
        apart(out, from)?;
        let rows = if matches!(onto, Onto::Row(_)) { 1 } else { m };
        if from.dims2()? != (rows, n) || !from.is_contiguous() {
            bail!("cannot start from {:?} for ({m}, {n})", from.shape());
        }
    }
    with_type!(out, T => {
        let left: Vec<_> = products.iter().map(|p| read(p.a)).collect();
        let right: Vec<_> = products.iter().map(|p| p.b.tensor().map(read)).collect();
        let base = from.as_ref().map(read);
        let start: Start<T> = match (&onto, &base) {
            (_, Some(reader)) => {
                let at = reader.slice::<T>()?.as_ptr();
                let row = if matches!(onto, Onto::Row(_)) { 0 } else { n as isize };
                Start::Matrix(Operand { at, row, column: 1 })
            }
            (Onto::Itself, _) => Start::Target,
            _ => Start::Zero,
        };
        let mut terms: Vec<Term<T>> = Vec::with_capacity(products.len());
        for ((p, a), b) in products.iter().zip(&left).zip(&right) {
            let b = match (&p.b, b) {
                (Factor::Plain(_), Some(reader)) => Right::Matrix(reader.operand()?.0),
                (Factor::Weight(Weight::Stored(w)), _) => in_place(w).map_or(Right::Rows(w), Right::Matrix),
                (Factor::Linear(Weight::Stored(w)), _) => {
                    in_place(w).map_or(Right::Columns(w), |m| Right::Matrix(m.transposed()))
                }
                (Factor::Weight(_), Some(reader)) => Right::Matrix(reader.operand()?.0),
                (_, Some(reader)) => Right::Matrix(reader.operand()?.0.transposed()),
                (_, None) => bail!("a factor without memory"),
            };
            let (a, _, k) = a.operand()?;
            terms.push(Term { a, b, k, scale: T::of(p.scale) });
        }
        let turned = if matches!(onto, Onto::Zero | Onto::Itself) { turn(&terms, m, n) } else { None };
        write::<T>(out, |c| {
            if let Some(terms) = &turned {
                let target = Target { at: c.as_mut_ptr(), row: 1, column: n };
                // SAFETY: as below, with both sides transposed.
                unsafe { product(target, n, m, start, terms, true) };
                return Ok(());
            }
            let target = Target { at: c.as_mut_ptr(), row: n, column: 1 };
            // SAFETY: the readers hold all operands, whose bounds and sizes were checked; `apart` proved that the target is elsewhere.
            unsafe { product(target, m, n, start, &terms, true) };
            Ok(())
        })
    })
}

/// A stored weight that needs no widening.
fn in_place<T: Real>(weight: &Stored) -> Option<Operand<T>> {
    let at = T::in_place(weight)?.as_ptr();
    Some(Operand { at, row: weight.columns() as isize, column: 1 })
}

/// Columns up to which a product with a transposed first factor is computed transposed.
const NARROW: usize = 64;

/// Returns the terms of the transposed product where that packs the long factor by rows: gradients of narrow LoRA factors.
/// Every element is the same chain of multiply-adds either way.
fn turn<'a, T: Real>(terms: &[Term<'a, T>], m: usize, n: usize) -> Option<Vec<Term<'a, T>>> {
    if n > NARROW || m <= n {
        return None;
    }
    let turned = |t: &Term<'a, T>| match t.b {
        Right::Matrix(b) if t.a.row == 1 => {
            Some(Term { a: b.transposed(), b: Right::Matrix(t.a.transposed()), ..*t })
        }
        _ => None,
    };
    terms.iter().map(turned).collect()
}

impl<'a> Factor<'a> {
    fn tensor(self) -> Option<&'a Tensor> {
        match self {
            Self::Plain(t) | Self::Transposed(t) => Some(t),
            Self::Weight(Weight::Dense(t)) | Self::Linear(Weight::Dense(t)) => Some(t),
            _ => None,
        }
    }

    /// Returns (k, n).
    fn dims(self) -> Result<(usize, usize)> {
        let turned = |(n, k): (usize, usize)| (k, n);
        match self {
            Self::Plain(t) => t.dims2(),
            Self::Transposed(t) => t.dims2().map(turned),
            Self::Weight(w) => w.dims(),
            Self::Linear(w) => w.dims().map(turned),
        }
    }
}
