//! The gated activation of Llama-form MLPs: `silu(gate) · up`.

use crate::{
    parallel::for_rows,
    real::Real,
    simd::simd,
    tensor::{matrix, read, with_type},
};
use candle_core::{Result, Tensor, bail};

/// Returns `silu(gate)·up`, `silu(x) = x/(1+e^−x)`. Shapes: all (T, I).
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (t, c) = dims(gate, up)?;
    with_type!(gate, T => {
        let (rg, ru) = (read(gate), read(up));
        let (g_, u_) = (rg.slice::<T>()?, ru.slice::<T>()?);
        let mut out = vec![T::ZERO; t * c];
        for_rows(&mut out, c, |i, y| {
            let (g, u) = (&g_[i * c..][..c], &u_[i * c..][..c]);
            row(y, g, u);
        });
        matrix(out, t, c, gate)
    })
}

/// Returns the gradients of `gate` and `up` for the gradient `dy` of the result. Shapes: all (T, I).
/// Formula: `dgate = dy·up·s·(1 + gate·(1 − s))`, `dup = dy·gate·s` with `s = sigmoid(gate)`.
pub fn swiglu_backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let (t, c) = dims(gate, up)?;
    dims(dy, gate)?;
    with_type!(gate, T => {
        let (rd, rg, ru) = (read(dy), read(gate), read(up));
        let (d_, g_, u_) = (rd.slice::<T>()?, rg.slice::<T>()?, ru.slice::<T>()?);
        let mut dgate = vec![T::ZERO; t * c];
        let part = |i: usize| (&d_[i * c..][..c], &g_[i * c..][..c], &u_[i * c..][..c]);
        for_rows(&mut dgate, c, |i, y| {
            let (d, g, u) = part(i);
            gate_row(y, d, g, u);
        });
        let mut dup = vec![T::ZERO; t * c];
        for_rows(&mut dup, c, |i, y| {
            let (d, g, _) = part(i);
            row(y, g, d);
        });
        Ok((matrix(dgate, t, c, gate)?, matrix(dup, t, c, gate)?))
    })
}

simd! {
    /// `y = silu(gate)·x`: the forward with `x = up`, the gradient of `up` with `x = dy`.
    fn row<T: Real>(y: &mut [T], gate: &[T], x: &[T]) {
        for ((y, g), x) in y.iter_mut().zip(gate).zip(x) {
            *y = *g * sigmoid(*g) * *x;
        }
    }
}

simd! {
    fn gate_row<T: Real>(y: &mut [T], dy: &[T], gate: &[T], up: &[T]) {
        for (((y, d), g), u) in y.iter_mut().zip(dy).zip(gate).zip(up) {
            let s = sigmoid(*g);
            *y = *d * *u * s * (T::ONE + *g * (T::ONE - s));
        }
    }
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

fn dims(a: &Tensor, b: &Tensor) -> Result<(usize, usize)> {
    let (t, c) = a.dims2()?;
    if b.dims2()? != (t, c) || a.dtype() != b.dtype() {
        bail!("swiglu: shapes {:?} and {:?}", a.shape(), b.shape());
    }
    Ok((t, c))
}
