//! Sums, biases, scaling and the checks on gradients.

use crate::{
    parallel::{Pieces, SMALL, each, for_rows},
    real::Real,
    tensor::{apart, read, same_type, with_type, write},
};
use candle_core::{Result, Tensor, bail};

/// Adds `b` to `a` in place. Shapes: both (T, C).
pub fn add(a: &Tensor, b: &Tensor) -> Result<()> {
    let (t, c) = a.dims2()?;
    same_type(a, b)?;
    apart(a, b)?;
    if b.dims2()? != (t, c) {
        bail!("add: shapes {:?} and {:?}", a.shape(), b.shape());
    }
    with_type!(a, T => {
        let rb = read(b);
        let y = rb.slice::<T>()?;
        write::<T>(a, |data| {
            for_rows(data, c, |i, row| row.iter_mut().zip(&y[i * c..][..c]).for_each(|(v, y)| *v += *y));
            Ok(())
        })
    })
}

/// Adds `bias` (C) to every row of `x` (T, C) in place.
pub fn add_bias(x: &Tensor, bias: &Tensor) -> Result<()> {
    let (_, c) = x.dims2()?;
    same_type(x, bias)?;
    apart(x, bias)?;
    if bias.dims1()? != c {
        bail!("add_bias: bias {:?} for {:?}", bias.shape(), x.shape());
    }
    with_type!(x, T => {
        let rb = read(bias);
        let b = rb.slice::<T>()?;
        write::<T>(x, |data| {
            for_rows(data, c, |_, row| row.iter_mut().zip(b).for_each(|(v, b)| *v += *b));
            Ok(())
        })
    })
}

/// Multiplies every row of `x` (T, C) element by element with `factors` (C) in place.
pub fn scale_columns(x: &Tensor, factors: &Tensor) -> Result<()> {
    let (_, c) = x.dims2()?;
    same_type(x, factors)?;
    apart(x, factors)?;
    if factors.dims1()? != c {
        bail!("scale_columns: factors {:?} for {:?}", factors.shape(), x.shape());
    }
    with_type!(x, T => {
        let rf = read(factors);
        let f = rf.slice::<T>()?;
        write::<T>(x, |data| {
            for_rows(data, c, |_, row| row.iter_mut().zip(f).for_each(|(v, f)| *v *= *f));
            Ok(())
        })
    })
}

/// Columns whose sums one task makes.
const COLUMNS: usize = 64;

/// Adds to each element of `to` (C) the sum over the rows of `x ⊙ y` (T, C), times its factor (C). Sums are made in f64 in the order of
/// the rows, so they do not depend on the threads.
pub fn add_column_dots(to: &Tensor, x: &Tensor, y: &Tensor, factors: &Tensor) -> Result<()> {
    let (t, c) = x.dims2()?;
    for other in [x, y, factors] {
        same_type(to, other)?;
        apart(to, other)?;
    }
    if y.dims2()? != (t, c) || to.dims1()? != c || factors.dims1()? != c {
        let shapes = [to.shape(), x.shape(), y.shape(), factors.shape()];
        bail!("add_column_dots: shapes {shapes:?}");
    }
    with_type!(to, T => {
        let (rx, ry, rf) = (read(x), read(y), read(factors));
        let (x, y, f) = (rx.slice::<T>()?, ry.slice::<T>()?, rf.slice::<T>()?);
        write::<T>(to, |data| {
            let pieces = Pieces::new(data, COLUMNS);
            each(c.div_ceil(COLUMNS), t * c >= SMALL, |i| {
                // SAFETY: every piece is asked for once.
                let to = unsafe { pieces.take(i) };
                let (start, mut sums) = (i * COLUMNS, [0.0f64; COLUMNS]);
                for row in 0..t {
                    let at = row * c + start;
                    let both = x[at..][..to.len()].iter().zip(&y[at..][..to.len()]);
                    both.zip(&mut sums).for_each(|((x, y), sum)| *sum += x.wide() * y.wide());
                }
                to.iter_mut().zip(&f[start..]).zip(&sums).for_each(|((v, f), sum)| *v += T::of(f.wide() * sum));
            });
            Ok(())
        })
    })
}

/// Multiplies every element of a contiguous tensor by `factor` in place.
pub fn scale_in_place(x: &Tensor, factor: f64) -> Result<()> {
    with_type!(x, T => write::<T>(x, |data| {
        data.iter_mut().for_each(|v| *v *= T::of(factor));
        Ok(())
    }))
}

/// Writes `cap·tanh(x / cap)` in place.
pub fn soft_cap(x: &Tensor, cap: f64) -> Result<()> {
    let c = x.dims().last().copied().unwrap_or(1);
    with_type!(x, T => write::<T>(x, |data| {
        for_rows(data, c, |_, row| crate::attention::cap(row, T::of(cap)));
        Ok(())
    }))
}

/// Multiplies the gradient `d` of capped values by the slope of their cap: `1 − (y / cap)²`. Shapes: d and y (T, C).
pub fn soft_cap_backward(d: &Tensor, y: &Tensor, cap: f64) -> Result<()> {
    let (_, c) = d.dims2()?;
    same_type(d, y)?;
    apart(d, y)?;
    if d.dims2()? != y.dims2()? {
        bail!("soft_cap_backward: shapes {:?} and {:?}", d.shape(), y.shape());
    }
    with_type!(d, T => {
        let ry = read(y);
        let y_ = ry.slice::<T>()?;
        write::<T>(d, |data| {
            for_rows(data, c, |i, row| {
                for (d, y) in row.iter_mut().zip(&y_[i * c..][..c]) {
                    let t = *y / T::of(cap);
                    *d *= T::ONE - t * t;
                }
            });
            Ok(())
        })
    })
}

/// Returns the sum of squares in f64, always added in element order.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    with_type!(x, T => Ok(read(x).slice::<T>()?.iter().map(|v| v.wide() * v.wide()).sum()))
}

/// Returns the index of the first infinite or NaN element.
pub fn first_non_finite(x: &Tensor) -> Result<Option<usize>> {
    with_type!(x, T => Ok(read(x).slice::<T>()?.iter().position(|v| !v.finite())))
}
