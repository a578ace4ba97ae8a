//! Gradients of what every row has in common: biases, and weights of norms. The engine's trained ones are few, so both are plain sums.
//!
//! Sums are made in f64 in the order of the rows, each by one thread, so they do not depend on the number of threads.

use crate::{
    layer_norm::moments,
    parallel::{Pieces, SMALL, each, for_rows},
    real::Real,
    rms_norm::inverse_rms,
    tensor::{apart, read, same_type, with_type, write},
};
use candle_core::{Result, Tensor, bail};

/// Columns whose sums one task makes.
const COLUMNS: usize = 64;

/// Adds to each element of `to` (C) the sum of a column of `x` (T, C): the gradient of a bias.
pub fn add_column_sums(to: &Tensor, x: &Tensor) -> Result<()> {
    let c = dims("add_column_sums", to, x)?;
    with_type!(to, T => {
        let rx = read(x);
        let x = rx.slice::<T>()?;
        write::<T>(to, |to| {
            sum_columns(to, x, c, |_, _, v: T| v.wide());
            Ok(())
        })
    })
}

/// Adds to `to` (C) the gradient of a norm's weight for the gradient `dy` of its result. Shapes: dy and x (T, C).
/// Formula: `Σ dy ⊙ n` over the rows, n the row by its root mean square, or, when `centred` (LayerNorm), by mean and deviation.
pub fn add_norm_gradient(to: &Tensor, dy: &Tensor, x: &Tensor, eps: f64, centred: bool) -> Result<()> {
    let c = dims("add_norm_gradient", to, dy)?;
    dims("add_norm_gradient", to, x)?;
    if dy.dims() != x.dims() {
        bail!("add_norm_gradient: shapes {:?} and {:?}", dy.shape(), x.shape());
    }
    with_type!(to, T => {
        let (rd, rx) = (read(dy), read(x));
        let (d_, x_) = (rd.slice::<T>()?, rx.slice::<T>()?);
        // (mean, 1 / deviation) of every row.
        let mut rows = vec![(T::ZERO, T::ONE); x_.len() / c.max(1)];
        for_rows(&mut rows, 1, |i, row| {
            let x = &x_[i * c..][..c];
            row[0] = if centred { moments(x, T::of(eps)) } else { (T::ZERO, inverse_rms(x, T::of(eps))) };
        });
        write::<T>(to, |to| {
            sum_columns(to, d_, c, |row, column, d: T| {
                let (mean, inverse) = rows[row];
                d.wide() * ((x_[row * c + column] - mean) * inverse).wide()
            });
            Ok(())
        })
    })
}

/// Adds to each of `c` columns the sum over the rows of what `term(row, column, element)` makes of it.
fn sum_columns<T: Real>(to: &mut [T], x: &[T], c: usize, term: impl Fn(usize, usize, T) -> f64 + Sync) {
    let pieces = Pieces::new(to, COLUMNS);
    each(c.div_ceil(COLUMNS), x.len() >= SMALL, |i| {
        // SAFETY: every piece is asked for once.
        let to = unsafe { pieces.take(i) };
        let (start, mut sums) = (i * COLUMNS, [0.0f64; COLUMNS]);
        for (row, x) in x.chunks_exact(c).enumerate() {
            let x = &x[start..][..to.len()];
            x.iter().zip(&mut sums).enumerate().for_each(|(j, (x, sum))| *sum += term(row, start + j, *x));
        }
        to.iter_mut().zip(&sums).for_each(|(v, sum)| *v += T::of(*sum));
    });
}

fn dims(what: &str, to: &Tensor, x: &Tensor) -> Result<usize> {
    let (_, c) = x.dims2()?;
    same_type(to, x)?;
    apart(to, x)?;
    if to.dims1()? != c {
        bail!("{what}: {:?} for {:?}", to.shape(), x.shape());
    }
    Ok(c)
}
