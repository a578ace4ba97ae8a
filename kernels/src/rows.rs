//! Rows of a matrix picked, scaled and added back: embeddings, head positions, the last block's needed rows.

use crate::{
    parallel::for_rows,
    real::Real,
    tensor::{apart, read, same_type, with_type, write},
};
use candle_core::{Result, Tensor, bail};

/// Returns the rows `index` of `x`. Shapes: x (T, C), result (index.len(), C).
pub fn gather_rows(x: &Tensor, index: &[u32]) -> Result<Tensor> {
    let out = zeros_like(x, index.len())?;
    gather_rows_into(&out, x, index)?;
    Ok(out)
}

/// Writes the rows `index` of `x` to `out`. Shapes: x (T, C), out (index.len(), C).
pub fn gather_rows_into(out: &Tensor, x: &Tensor, index: &[u32]) -> Result<()> {
    let (t, c) = x.dims2()?;
    check(index, t)?;
    same_type(out, x)?;
    apart(out, x)?;
    if out.dims2()? != (index.len(), c) {
        bail!("gather_rows: {} rows of {c} into {:?}", index.len(), out.shape());
    }
    with_type!(x, T => {
        let rx = read(x);
        let x_ = rx.slice::<T>()?;
        write::<T>(out, |out| {
            for_rows(out, c, |i, y| y.copy_from_slice(&x_[index[i] as usize * c..][..c]));
            Ok(())
        })
    })
}

/// Adds the rows of `x` to the rows `index` of `out`, in order (an index may repeat). Shapes: x (index.len(), C), out (T, C).
pub fn scatter_add_rows(out: &Tensor, x: &Tensor, index: &[u32]) -> Result<()> {
    let (n, c) = x.dims2()?;
    check(index, out.dims2()?.0)?;
    same_type(out, x)?;
    apart(out, x)?;
    if n != index.len() || out.dims2()?.1 != c {
        bail!("scatter_add_rows: {:?} for {} indices into {:?}", x.shape(), index.len(), out.shape());
    }
    with_type!(x, T => {
        let rx = read(x);
        let x_ = rx.slice::<T>()?;
        write::<T>(out, |out| {
            for (i, &at) in index.iter().enumerate() {
                let y = &mut out[at as usize * c..][..c];
                y.iter_mut().zip(&x_[i * c..][..c]).for_each(|(y, x)| *y += *x);
            }
            Ok(())
        })
    })
}

/// Sets every element of a contiguous tensor to zero.
pub fn clear(x: &Tensor) -> Result<()> {
    let c = x.dims().last().copied().unwrap_or(1);
    with_type!(x, T => write::<T>(x, |data| {
        for_rows(data, c, |_, row| row.fill(T::ZERO));
        Ok(())
    }))
}

fn zeros_like(x: &Tensor, rows: usize) -> Result<Tensor> {
    Tensor::zeros((rows, x.dims2()?.1), x.dtype(), x.device())
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
