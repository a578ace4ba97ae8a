//! The gated activation of Llama-form MLPs: `silu(gate) · up`.

use crate::{
    parallel::{Shared, for_rows},
    real::Real,
    simd::simd,
    tensor::{apart, read, with_type, write},
};
use candle_core::{Result, Tensor, bail};

/// Writes `silu(gate)·up` to `out`, `silu(x) = x/(1+e^−x)`. Shapes: all (T, I).
pub fn swiglu(out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    let (_, c) = dims(gate, up)?;
    dims(out, gate)?;
    apart(out, gate)?;
    apart(out, up)?;
    with_type!(gate, T => {
        let (rg, ru) = (read(gate), read(up));
        let (g_, u_) = (rg.slice::<T>()?, ru.slice::<T>()?);
        write::<T>(out, |out| {
            for_rows(out, c, |i, y| row(y, &g_[i * c..][..c], &u_[i * c..][..c]));
            Ok(())
        })
    })
}

/// For the gradient `y` of the result, turns all three in place: `gate` and `up` into their gradients, `y` into the result itself,
/// which the layer after it needs for its own gradients. Shapes: all (T, I).
/// Formula: `dgate = dy·up·s·(1 + gate·(1 − s))`, `dup = dy·gate·s` with `s = sigmoid(gate)`.
pub fn swiglu_backward(y: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    let (_, c) = dims(gate, up)?;
    dims(y, gate)?;
    apart(y, gate)?;
    apart(y, up)?;
    apart(gate, up)?;
    with_type!(gate, T => {
        write::<T>(gate, |gate| {
            let gate = Shared(gate.as_mut_ptr());
            write::<T>(up, |up| {
                let up = Shared(up.as_mut_ptr());
                write::<T>(y, |y| {
                    for_rows(y, c, |i, y| {
                        // SAFETY: the locks on both are held and the sizes were checked; every row is taken once.
                        let (gate, up) = unsafe {
                            (
                                std::slice::from_raw_parts_mut(gate.at(i * c), c),
                                std::slice::from_raw_parts_mut(up.at(i * c), c),
                            )
                        };
                        backward_row(y, gate, up);
                    });
                    Ok(())
                })
            })
        })
    })
}

simd! {
    fn row<T: Real>(y: &mut [T], gate: &[T], up: &[T]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = *g * sigmoid::<T, FUSED>(*g) * *u;
        }
    }
}

simd! {
    fn backward_row<T: Real>(y: &mut [T], gate: &mut [T], up: &mut [T]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            let (dy, gate, up) = (*y, *g, *u);
            let s = sigmoid::<T, FUSED>(gate);
            let silu = gate * s;
            *y = silu * up;
            *g = dy * up * s * (T::ONE + gate * (T::ONE - s));
            *u = dy * silu;
        }
    }
}

#[inline(always)]
fn sigmoid<T: Real, const FUSED: bool>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp::<FUSED>())
}

fn dims(a: &Tensor, b: &Tensor) -> Result<(usize, usize)> {
    let (t, c) = a.dims2()?;
    if b.dims2()? != (t, c) || a.dtype() != b.dtype() {
        bail!("swiglu: shapes {:?} and {:?}", a.shape(), b.shape());
    }
    Ok((t, c))
}
