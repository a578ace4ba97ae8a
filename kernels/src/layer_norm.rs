//! Layer normalization with weight and bias, forward and backward. The gradients of trained ones are in `column_sums`.

use crate::{
    lanes::lane_sum,
    parallel::for_rows,
    real::Real,
    rms_norm::dims,
    simd::simd,
    tensor::{apart, read, with_type, write},
};
use candle_core::{Result, Tensor};

/// Writes `(x − mean(x)) / sd(x) · w + b` row by row to `out`, `sd(x) = sqrt(mean((x − mean(x))²) + eps)`.
/// Shapes: x and out (T, C), w and b (C). Source: arXiv 1607.06450; sums in the element type, as torch does.
pub fn layer_norm(out: &Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<()> {
    let c = dims("layer_norm", out, x, w)?;
    dims("layer_norm", out, x, b)?;
    with_type!(x, T => {
        let (rx, rw, rb) = (read(x), read(w), read(b));
        let (x_, w_, b_) = (rx.slice::<T>()?, rw.slice::<T>()?, rb.slice::<T>()?);
        write::<T>(out, |out| {
            for_rows(out, c, |i, y| normalize(y, &x_[i * c..][..c], w_, b_, T::of(eps)));
            Ok(())
        })
    })
}

/// Adds to `dx` the gradient of `x` for the gradient `dy` of the result. Shapes: all (T, C), w (C).
/// Formula, with `r = 1/sd(x)`, `n = r·(x − mean(x))` and `g = dy·w`: `dx += r·(g − mean(g) − n·mean(g·n))`.
pub fn layer_norm_backward(dx: &Tensor, dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64) -> Result<()> {
    let c = dims("layer_norm", dx, x, w)?;
    dims("layer_norm", dy, x, w)?;
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
    fn normalize<T: Real>(y: &mut [T], x: &[T], w: &[T], b: &[T], eps: T) {
        let (mean, r) = moments(x, eps);
        for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
            *y = (*x - mean) * r * *w + *b;
        }
    }
}

simd! {
    fn add_gradient<T: Real>(dx: &mut [T], dy: &[T], x: &[T], w: &[T], eps: T) {
        let ((mean, r), n) = (moments(x, eps), T::of(x.len() as f64));
        let sum = lane_sum(x.len(), |j| dy[j] * w[j]) / n;
        let slope = lane_sum(x.len(), |j| dy[j] * w[j] * (x[j] - mean)) * r * r / n;
        for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
            *dx += r * (*dy * *w - sum - (*x - mean) * slope);
        }
    }
}

/// Returns mean(x) and 1/sd(x). The mean is taken off before squaring: a row far from zero loses nothing.
#[inline(always)]
pub(crate) fn moments<T: Real>(x: &[T], eps: T) -> (T, T) {
    let n = T::of(x.len() as f64);
    let mean = lane_sum(x.len(), |j| x[j]) / n;
    let squares = lane_sum(x.len(), |j| (x[j] - mean) * (x[j] - mean));
    (mean, T::ONE / (squares / n + eps).sqrt())
}
