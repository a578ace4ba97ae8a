//! Root-mean-square normalization, forward and backward. The gradient of a trained weight is in `column_sums`.

use crate::{
    lanes::lane_sum,
    parallel::for_rows,
    real::Real,
    simd::simd,
    tensor::{apart, read, with_type, write},
};
use candle_core::{Result, Tensor, bail};

/// Writes `x / rms(x) · w` row by row to `out`, `rms(x) = sqrt(mean(x²) + eps)`. Shapes: x and out (T, C), w (C).
/// Source: arXiv 1910.07467; sums in the element type, as Llama does.
pub fn rms_norm(out: &Tensor, x: &Tensor, w: &Tensor, eps: f64) -> Result<()> {
    let c = dims("rms_norm", out, x, w)?;
    with_type!(x, T => {
        let (rx, rw) = (read(x), read(w));
        let (x_, w_) = (rx.slice::<T>()?, rw.slice::<T>()?);
        write::<T>(out, |out| {
            for_rows(out, c, |i, y| normalize(y, &x_[i * c..][..c], w_, T::of(eps)));
            Ok(())
        })
    })
}

/// Adds to `dx` the gradient of `x` for the gradient `dy` of the result. Shapes: all (T, C), w (C).
/// Formula, with `r = 1/rms(x)` and `g = dy·w`: `dx += r·(g − x·r²·mean(g·x))`.
pub fn rms_norm_backward(dx: &Tensor, dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64) -> Result<()> {
    let c = dims("rms_norm", dx, x, w)?;
    dims("rms_norm", dy, x, w)?;
    apart(dx, dy)?;
    with_type!(x, T => {
        let (rd, rx, rw) = (read(dy), read(x), read(w));
        let (d_, x_, w_) = (rd.slice::<T>()?, rx.slice::<T>()?, rw.slice::<T>()?);
        write::<T>(dx, |dx| {
            for_rows(dx, c, |i, dx| add_gradient(dx, &d_[i * c..][..c], &x_[i * c..][..c], w_, T::of(eps)));
            Ok(())
        })
    })
}

simd! {
    fn normalize<T: Real>(y: &mut [T], x: &[T], w: &[T], eps: T) {
        let r = inverse_rms(x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = *x * r * *w;
        }
    }
}

simd! {
    fn add_gradient<T: Real>(dx: &mut [T], dy: &[T], x: &[T], w: &[T], eps: T) {
        let r = inverse_rms(x, eps);
        let dot = lane_sum(x.len(), |j| dy[j] * w[j] * x[j]);
        let k = dot * r * r / T::of(x.len() as f64);
        for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
            *dx += r * (*dy * *w - *x * k);
        }
    }
}

/// Returns C of a norm's operands. `w` is the weight, or the bias.
pub(crate) fn dims(what: &str, out: &Tensor, x: &Tensor, w: &Tensor) -> Result<usize> {
    let (t, c) = x.dims2()?;
    if w.dims1()? != c || w.dtype() != x.dtype() || out.dims2()? != (t, c) || out.dtype() != x.dtype() {
        bail!("{what}: weight {:?} and output {:?} for an input {:?}", w.shape(), out.shape(), x.shape());
    }
    apart(out, x)?;
    apart(out, w)?;
    Ok(c)
}

/// Returns 1/rms(x).
#[inline(always)]
pub(crate) fn inverse_rms<T: Real>(x: &[T], eps: T) -> T {
    let sum = lane_sum(x.len(), |j| x[j] * x[j]);
    T::ONE / (sum / T::of(x.len() as f64) + eps).sqrt()
}
