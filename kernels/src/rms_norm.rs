//! Root-mean-square normalization, forward and backward. The weight is frozen, so it gets no gradient.

use crate::{
    parallel::for_rows,
    real::Real,
    tensor::{matrix, read, with_type},
};
use candle_core::{Result, Tensor, bail};

/// Returns `x / rms(x) · w` row by row, `rms(x) = sqrt(mean(x²) + eps)`. Shapes: x (T, C), w (C), result (T, C).
/// Source: arXiv 1910.07467; sums in the element type, as Llama does.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let (t, c) = dims(x, w)?;
    with_type!(x, T => {
        let (rx, rw) = (read(x), read(w));
        let (x_, w_) = (rx.slice::<T>()?, rw.slice::<T>()?);
        let mut out = vec![T::ZERO; t * c];
        for_rows(&mut out, c, |i, y| {
            let x = &x_[i * c..][..c];
            let r = inverse_rms(x, eps);
            for j in 0..c {
                y[j] = x[j] * r * w_[j];
            }
        });
        matrix(out, t, c, x)
    })
}

/// Returns the gradient of `x` for the gradient `dy` of the result. Shapes: all (T, C), w (C).
/// Formula, with `r = 1/rms(x)` and `g = dy·w`: `dx = r·(g − x·r²·mean(g·x))`.
pub fn rms_norm_backward(dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let (t, c) = dims(x, w)?;
    if dy.dims2()? != (t, c) {
        bail!("rms_norm_backward: gradient {:?} for an input {:?}", dy.shape(), x.shape());
    }
    with_type!(x, T => {
        let (rd, rx, rw) = (read(dy), read(x), read(w));
        let (d_, x_, w_) = (rd.slice::<T>()?, rx.slice::<T>()?, rw.slice::<T>()?);
        let mut out = vec![T::ZERO; t * c];
        for_rows(&mut out, c, |i, dx| {
            let (x, dy) = (&x_[i * c..][..c], &d_[i * c..][..c]);
            let r = inverse_rms(x, eps);
            let mut dot = T::ZERO;
            for j in 0..c {
                dot += dy[j] * w_[j] * x[j];
            }
            let k = dot * r * r / T::of(c as f64);
            for j in 0..c {
                dx[j] = r * (dy[j] * w_[j] - x[j] * k);
            }
        });
        matrix(out, t, c, x)
    })
}

fn dims(x: &Tensor, w: &Tensor) -> Result<(usize, usize)> {
    let (t, c) = x.dims2()?;
    if w.dims1()? != c || w.dtype() != x.dtype() {
        bail!("rms_norm: weight {:?} for an input {:?}", w.shape(), x.shape());
    }
    Ok((t, c))
}

fn inverse_rms<T: Real>(x: &[T], eps: f64) -> T {
    let mut sum = T::ZERO;
    for &v in x {
        sum += v * v;
    }
    T::ONE / (sum / T::of(x.len() as f64) + T::of(eps)).sqrt()
}
