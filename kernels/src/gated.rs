//! The gated activations of MLPs: `silu(gate) · up` of Llama's form, `gelu(gate) · up` of Gemma's.

use crate::{
    parallel::{Shared, for_rows},
    real::Real,
    simd::simd,
    tensor::{apart, read, with_type, write},
};
use candle_core::{Result, Tensor, bail};

/// Writes `silu(gate)·up` to `out`, `silu(x) = x/(1+e^−x)`. Shapes: all (T, I).
pub fn swiglu(out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    forward(out, gate, up, Kind::Silu)
}

/// Writes `gelu(gate)·up` to `out`, `gelu(x) = x/(1+e^−2z)` with `z = √(2/π)·(x + 0.044715·x³)`, which is the form by tanh.
/// Shapes: all (T, I).
pub fn geglu(out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    forward(out, gate, up, Kind::Gelu)
}

/// For the gradient `y` of the result, turns all three in place: `gate` and `up` into their gradients, `y` into the result itself,
/// which the layer after it needs for its own gradients. Shapes: all (T, I).
/// Formula: `dgate = dy·up·s·(1 + gate·(1 − s))`, `dup = dy·gate·s` with `s = sigmoid(gate)`.
pub fn swiglu_backward(y: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    backward(y, gate, up, Kind::Silu)
}

/// As [`swiglu_backward`] for [`geglu`].
/// Formula: `dgate = dy·up·s·(1 + gate·(1 − s)·2z′)`, `dup = dy·gate·s` with `s = sigmoid(2z)`.
pub fn geglu_backward(y: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    backward(y, gate, up, Kind::Gelu)
}

/// An activation `x·sigmoid(w(x))`.
#[derive(Clone, Copy)]
enum Kind {
    Silu,
    Gelu,
}

/// Returns w of GELU and its derivative.
#[inline(always)]
fn gelu_inner<T: Real>(x: T) -> (T, T) {
    // 2√(2/π), and that times 0.044715.
    let (a, b) = (T::of(1.595_769_121_605_730_8), T::of(0.071_354_816_272_600_25));
    let square = x * x;
    (x * (a + b * square), a + T::of(3.0) * b * square)
}

fn forward(out: &Tensor, gate: &Tensor, up: &Tensor, kind: Kind) -> Result<()> {
    let (_, c) = dims(gate, up)?;
    dims(out, gate)?;
    apart(out, gate)?;
    apart(out, up)?;
    with_type!(gate, T => {
        let (rg, ru) = (read(gate), read(up));
        let (g_, u_) = (rg.slice::<T>()?, ru.slice::<T>()?);
        write::<T>(out, |out| {
            for_rows(out, c, |i, y| row(y, &g_[i * c..][..c], &u_[i * c..][..c], kind));
            Ok(())
        })
    })
}

fn backward(y: &Tensor, gate: &Tensor, up: &Tensor, kind: Kind) -> Result<()> {
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
                        backward_row(y, gate, up, kind);
                    });
                    Ok(())
                })
            })
        })
    })
}

simd! {
    fn row<T: Real>(y: &mut [T], gate: &[T], up: &[T], kind: Kind) {
        let all = y.iter_mut().zip(gate).zip(up);
        // A loop each: the choice does not belong inside.
        match kind {
            Kind::Silu => all.for_each(|((y, g), u)| *y = *g * sigmoid::<T, FUSED>(*g) * *u),
            Kind::Gelu => all.for_each(|((y, g), u)| *y = *g * sigmoid::<T, FUSED>(gelu_inner(*g).0) * *u),
        }
    }
}

simd! {
    fn backward_row<T: Real>(y: &mut [T], gate: &mut [T], up: &mut [T], kind: Kind) {
        let all = y.iter_mut().zip(gate).zip(up);
        match kind {
            Kind::Silu => all.for_each(|((y, g), u)| {
                let s = sigmoid::<T, FUSED>(*g);
                turn(y, g, u, s, T::ONE + *g * (T::ONE - s));
            }),
            Kind::Gelu => all.for_each(|((y, g), u)| {
                let (inner, slope) = gelu_inner(*g);
                let s = sigmoid::<T, FUSED>(inner);
                turn(y, g, u, s, T::ONE + *g * (T::ONE - s) * slope);
            }),
        }
    }
}

/// Turns one element of each; `s` is the sigmoid, `rest` what the gate's slope is times it.
#[inline(always)]
fn turn<T: Real>(y: &mut T, gate: &mut T, up: &mut T, s: T, rest: T) {
    let (dy, g, u) = (*y, *gate, *up);
    let active = g * s;
    *y = active * u;
    *gate = dy * u * s * rest;
    *up = dy * active;
}

#[inline(always)]
fn sigmoid<T: Real, const FUSED: bool>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp::<FUSED>())
}

fn dims(a: &Tensor, b: &Tensor) -> Result<(usize, usize)> {
    let (t, c) = a.dims2()?;
    if b.dims2()? != (t, c) || a.dtype() != b.dtype() {
        bail!("gated activation: shapes {:?} and {:?}", a.shape(), b.shape());
    }
    Ok((t, c))
}
