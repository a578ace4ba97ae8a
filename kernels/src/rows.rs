//! Rows of a matrix picked, scaled and added back: embeddings, head positions, the last block's needed rows.

use crate::{
    parallel::for_rows,
    real::Real,
    tensor::{matrix, read, same_type, with_type, write},
};
use candle_core::{Result, Tensor, bail};

/// Returns the rows `index` of `x`. Shapes: x (T, C), result (index.len(), C).
pub fn gather_rows(x: &Tensor, index: &[u32]) -> Result<Tensor> {
    let (t, c) = x.dims2()?;
    check(index, t)?;
    with_type!(x, T => {
        let rx = read(x);
        let x_ = rx.slice::<T>()?;
        let mut out = vec![T::ZERO; index.len() * c];
        for_rows(&mut out, c, |i, y| y.copy_from_slice(&x_[index[i] as usize * c..][..c]));
        matrix(out, index.len(), c, x)
    })
}

/// Returns a (rows, C) matrix that is zero but for `x`'s rows added at `index`, in order (an index may repeat).
pub fn scatter_add_rows(x: &Tensor, index: &[u32], rows: usize) -> Result<Tensor> {
    let (n, c) = x.dims2()?;
    check(index, rows)?;
    if n != index.len() {
        bail!("scatter_add_rows: {n} rows for {} indices", index.len());
    }
    with_type!(x, T => {
        let rx = read(x);
        let x_ = rx.slice::<T>()?;
        let mut out = vec![T::ZERO; rows * c];
        for (i, &at) in index.iter().enumerate() {
            let y = &mut out[at as usize * c..][..c];
            for (y, x) in y.iter_mut().zip(&x_[i * c..][..c]) {
                *y += *x;
            }
        }
        matrix(out, rows, c, x)
    })
}

/// Multiplies row `i` of `x` (T, C) by `factors[i]` in place.
pub fn scale_rows(x: &Tensor, factors: &[f64]) -> Result<()> {
    let (t, c) = x.dims2()?;
    if factors.len() != t {
        bail!("scale_rows: {} factors for {t} rows", factors.len());
    }
    same_type(x, x)?;
    with_type!(x, T => write::<T>(x, |data| {
        for_rows(data, c, |i, row| {
            let f = T::of(factors[i]);
            row.iter_mut().for_each(|v| *v *= f);
        });
        Ok(())
    }))
}

fn check(index: &[u32], rows: usize) -> Result<()> {
    match index.iter().find(|i| **i as usize >= rows) {
        Some(i) => bail!("row {i} of a matrix with {rows} rows"),
        None => Ok(()),
    }
}
