//! The element-wise and row-wise operations on a device: shapes checked, then one launch each. What they compute stands with the
//! CPU operations of the same names.

use super::{
    Dropout, Elements, Gains, Gated, Grid, LayerNorm, Logprob, RmsNorm, Rope, Rows,
    matrix::Matrix,
    memory::{Gpu, Memory},
};
use crate::{Dense, DropoutKey, LogprobStats};
use candle_core::{Result, bail};
use std::sync::Arc;

/// Fails unless all matrices have this shape and type and none is transposed.
fn same(what: &str, dims: (usize, usize), element: Dense, all: &[&Matrix]) -> Result<()> {
    for m in all {
        if m.dims() != dims || m.element() != element || m.is_transposed() {
            bail!("{what}: {:?} of {:?} where {dims:?} of {element:?} belongs", m.dims(), m.element());
        }
    }
    Ok(())
}

pub(super) fn width(columns: usize) -> Result<u32> {
    u32::try_from(columns).map_err(candle_core::Error::wrap)
}

/// Uploads numbers for the next launch.
fn numbers<const N: usize>(gpu: &Arc<Gpu>, numbers: impl Iterator<Item = [u8; N]>) -> Result<Memory> {
    let bytes: Vec<u8> = numbers.flatten().collect();
    let memory = gpu.borrow(bytes.len())?;
    if !bytes.is_empty() {
        gpu.machine().upload(memory.address(), &bytes)?;
    }
    Ok(memory)
}

pub(super) fn indices(gpu: &Arc<Gpu>, index: &[u32]) -> Result<Memory> {
    numbers(gpu, index.iter().map(|i| i.to_le_bytes()))
}

pub(super) fn check_index(what: &str, index: &[u32], rows: usize) -> Result<()> {
    match index.iter().find(|i| **i as usize >= rows) {
        Some(i) => bail!("{what}: row {i} of {rows}"),
        None => Ok(()),
    }
}

/// As [`crate::rms_norm`]. Shape: w (1, C).
pub fn rms_norm(out: &Matrix, x: &Matrix, w: &Matrix, eps: f64) -> Result<()> {
    let (rows, columns) = x.dims();
    same("rms_norm", (rows, columns), x.element(), &[x, out])?;
    same("rms_norm", (1, columns), x.element(), &[w])?;
    if rows == 0 {
        return Ok(());
    }
    let p = RmsNorm { rows: rows as u64, columns: width(columns)?, eps: eps as f32 };
    let at = [out.address(), x.address(), w.address()];
    x.gpu().launch("rms_norm", x.element(), Grid::rows(rows, columns), &at, &p)
}

/// As [`crate::rms_norm_backward`]. Shape: w (1, C).
pub fn rms_norm_backward(dx: &Matrix, dy: &Matrix, x: &Matrix, w: &Matrix, eps: f64) -> Result<()> {
    let (rows, columns) = x.dims();
    same("rms_norm_backward", (rows, columns), x.element(), &[x, dx, dy])?;
    same("rms_norm_backward", (1, columns), x.element(), &[w])?;
    if rows == 0 {
        return Ok(());
    }
    let p = RmsNorm { rows: rows as u64, columns: width(columns)?, eps: eps as f32 };
    let at = [dx.address(), dy.address(), x.address(), w.address()];
    x.gpu().launch("rms_norm_backward", x.element(), Grid::rows(rows, columns), &at, &p)
}

/// As [`crate::layer_norm`]. Shapes: w and b (1, C).
pub fn layer_norm(out: &Matrix, x: &Matrix, w: &Matrix, b: &Matrix, eps: f64) -> Result<()> {
    let (rows, columns) = x.dims();
    same("layer_norm", (rows, columns), x.element(), &[x, out])?;
    same("layer_norm", (1, columns), x.element(), &[w, b])?;
    if rows == 0 {
        return Ok(());
    }
    let p = LayerNorm { rows: rows as u64, columns: width(columns)?, eps: eps as f32 };
    let at = [out.address(), x.address(), w.address(), b.address()];
    x.gpu().launch("layer_norm", x.element(), Grid::rows(rows, columns), &at, &p)
}

/// As [`crate::layer_norm_backward`]. Shape: w (1, C).
pub fn layer_norm_backward(dx: &Matrix, dy: &Matrix, x: &Matrix, w: &Matrix, eps: f64) -> Result<()> {
    let (rows, columns) = x.dims();
    same("layer_norm_backward", (rows, columns), x.element(), &[x, dx, dy])?;
    same("layer_norm_backward", (1, columns), x.element(), &[w])?;
    if rows == 0 {
        return Ok(());
    }
    let p = LayerNorm { rows: rows as u64, columns: width(columns)?, eps: eps as f32 };
    let at = [dx.address(), dy.address(), x.address(), w.address()];
    x.gpu().launch("layer_norm_backward", x.element(), Grid::rows(rows, columns), &at, &p)
}

/// As [`crate::rope`]. Shapes: cosines and sines (positions, D/2) in f32.
pub fn rope(
    x: &Matrix,
    (cosines, sines): (&Matrix, &Matrix),
    head: usize,
    positions: &[u32],
    inverse: bool,
) -> Result<()> {
    let ((rows, columns), (known, half)) = (x.dims(), cosines.dims());
    same("rope", (known, half), Dense::F32, &[cosines, sines])?;
    same("rope", (positions.len(), columns), x.element(), &[x])?;
    check_index("rope", positions, known)?;
    if half == 0 || 2 * half > head || columns % head != 0 {
        bail!("rope: rows of {columns} for heads of {head}");
    }
    if rows == 0 {
        return Ok(());
    }
    let positions = indices(x.gpu(), positions)?;
    let p = Rope {
        rows: rows as u64,
        heads: width(columns / head)?,
        half_dim: width(half)?,
        sign: if inverse { -1.0 } else { 1.0 },
        head_dim: width(head)?,
    };
    let at = [x.address(), positions.address(), cosines.address(), sines.address()];
    x.gpu().launch("rope", x.element(), Grid::rows(rows, columns / 2), &at, &p)
}

/// As [`crate::swiglu`] and [`crate::geglu`]; `name` is the operation's.
pub fn gated(name: &str, out: &Matrix, gate: &Matrix, up: &Matrix) -> Result<()> {
    same(name, gate.dims(), gate.element(), &[gate, up, out])?;
    let p = Gated { elements: gate.elements() as u64 };
    flat(name, gate, &[out.address(), gate.address(), up.address()], &p)
}

/// Launches an element-wise kernel over the elements of `like`.
fn flat(name: &str, like: &Matrix, at: &[u64], p: &impl super::Params) -> Result<()> {
    match like.elements() {
        0 => Ok(()),
        n => like.gpu().launch(name, like.element(), Grid::elements(n), at, p),
    }
}

fn elements(like: &Matrix, factor: f64) -> Elements {
    Elements { elements: like.elements() as u64, factor: factor as f32, unused: 0 }
}

/// As [`crate::add`].
pub fn add(a: &Matrix, b: &Matrix) -> Result<()> {
    same("add", a.dims(), a.element(), &[a, b])?;
    flat("add", a, &[a.address(), b.address()], &elements(a, 1.0))
}

/// As [`crate::scale_in_place`].
pub fn scale_in_place(x: &Matrix, factor: f64) -> Result<()> {
    flat("scale", x, &[x.address()], &elements(x, factor))
}

/// As [`crate::soft_cap`].
pub fn soft_cap(x: &Matrix, cap: f64) -> Result<()> {
    flat("soft_cap", x, &[x.address()], &elements(x, cap))
}

/// As [`crate::soft_cap_backward`]; y is f32.
pub fn soft_cap_backward(d: &Matrix, y: &Matrix, cap: f64) -> Result<()> {
    same("soft_cap_backward", y.dims(), d.element(), &[d])?;
    same("soft_cap_backward", y.dims(), Dense::F32, &[y])?;
    flat("soft_cap_backward", d, &[d.address(), y.address()], &elements(d, cap))
}

/// Writes the values of a matrix in another type; one of the types is f32, or they are the same.
pub fn cast(out: &Matrix, x: &Matrix) -> Result<()> {
    same("cast", x.dims(), x.element(), &[x])?;
    same("cast", x.dims(), out.element(), &[out])?;
    let (at, p) = ([out.address(), x.address()], elements(x, 1.0));
    match (x.element(), out.element()) {
        (a, b) if a == b => out.copy_from(x),
        (_, Dense::F32) => flat("cast_to_f32", x, &at, &p),
        (Dense::F32, _) => flat("cast_of_f32", out, &at, &p),
        (a, b) => bail!("cast of {a:?} to {b:?}"),
    }
}

fn rows_of(rows: usize, columns: usize) -> Result<Rows> {
    Ok(Rows { rows: rows as u64, columns: width(columns)?, unused: 0 })
}

/// As [`crate::add_bias`]. Shape: bias (1, C).
pub fn add_bias(x: &Matrix, bias: &Matrix) -> Result<()> {
    let (rows, columns) = x.dims();
    same("add_bias", (1, columns), x.element(), &[bias])?;
    if rows == 0 {
        return Ok(());
    }
    let at = [x.address(), bias.address()];
    x.gpu().launch("add_bias", x.element(), Grid::rows(rows, columns), &at, &rows_of(rows, columns)?)
}

/// As [`crate::scale_columns`]. Shape: factors (1, C) in f32.
pub fn scale_columns(x: &Matrix, factors: &Matrix) -> Result<()> {
    let (rows, columns) = x.dims();
    same("scale_columns", (1, columns), Dense::F32, &[factors])?;
    same("scale_columns", (rows, columns), x.element(), &[x])?;
    if rows == 0 {
        return Ok(());
    }
    let p = Gains { rows: rows as u64, columns: width(columns)?, unused: 0 };
    x.gpu().launch(
        "scale_columns",
        x.element(),
        Grid::rows(rows, columns),
        &[x.address(), factors.address()],
        &p,
    )
}

/// As [`crate::add_column_dots`]; sums are in f32, of 64 rows each and of those. Shapes: to and factors (1, C) in f32.
pub fn add_column_dots(to: &Matrix, x: &Matrix, y: &Matrix, factors: &Matrix) -> Result<()> {
    let (rows, columns) = x.dims();
    same("add_column_dots", (1, columns), Dense::F32, &[to, factors])?;
    same("add_column_dots", (rows, columns), x.element(), &[x, y])?;
    let p = Gains { rows: rows as u64, columns: width(columns)?, unused: 0 };
    let at = [to.address(), x.address(), y.address(), factors.address()];
    x.gpu().launch("add_column_dots", x.element(), Grid::elements(columns), &at, &p)
}

/// As [`crate::gather_rows_into`].
pub fn gather_rows_into(out: &Matrix, x: &Matrix, index: &[u32]) -> Result<()> {
    let columns = x.dims().1;
    same("gather_rows", (index.len(), columns), x.element(), &[out])?;
    check_index("gather_rows", index, x.dims().0)?;
    if index.is_empty() {
        return Ok(());
    }
    let (n, index) = (index.len(), indices(x.gpu(), index)?);
    let at = [out.address(), x.address(), index.address()];
    x.gpu().launch("gather_rows", x.element(), Grid::rows(n, columns), &at, &rows_of(n, columns)?)
}

/// As [`crate::scatter_add_rows`].
pub fn scatter_add_rows(out: &Matrix, x: &Matrix, index: &[u32]) -> Result<()> {
    let columns = out.dims().1;
    same("scatter_add_rows", (index.len(), columns), out.element(), &[x])?;
    check_index("scatter_add_rows", index, out.dims().0)?;
    if index.is_empty() {
        return Ok(());
    }
    let (n, index) = (index.len(), indices(x.gpu(), index)?);
    let at = [out.address(), x.address(), index.address()];
    x.gpu().launch("scatter_add_rows", x.element(), Grid::elements(columns), &at, &rows_of(n, columns)?)
}

/// As [`crate::scale_rows`].
pub fn scale_rows(x: &Matrix, factors: &[f64]) -> Result<()> {
    let (rows, columns) = x.dims();
    if factors.len() != rows {
        bail!("scale_rows: {} factors for {rows} rows", factors.len());
    }
    if rows == 0 {
        return Ok(());
    }
    let factors = numbers(x.gpu(), factors.iter().map(|f| (*f as f32).to_le_bytes()))?;
    let at = [x.address(), factors.address()];
    x.gpu().launch("scale_rows", x.element(), Grid::rows(rows, columns), &at, &rows_of(rows, columns)?)
}

/// As [`crate::dropout`]; the result is short-lived.
pub fn dropout(x: &Matrix, key: DropoutKey, row_keys: &[u64]) -> Result<Matrix> {
    let (rows, columns) = x.dims();
    if row_keys.len() != rows || !(0.0..1.0).contains(&key.p) {
        bail!("dropout: {} row keys for {rows} rows, probability {}", row_keys.len(), key.p);
    }
    let out = Matrix::short(x.gpu(), rows, columns, x.element())?;
    if rows > 0 {
        let row_keys = numbers(x.gpu(), row_keys.iter().map(|k| k.to_le_bytes()))?;
        let at = [out.address(), x.address(), row_keys.address()];
        let p = Dropout::new(key, rows, width(columns)?);
        x.gpu().launch("dropout", x.element(), Grid::rows(rows, columns), &at, &p)?;
    }
    Ok(out)
}

/// As [`crate::logprob_stats`]; what is kept on the device goes to [`logprob_unit_gradient`].
pub fn logprob_stats(logits: &Matrix, targets: &[u32]) -> Result<(Vec<LogprobStats>, Kept)> {
    let (rows, vocabulary) = logits.dims();
    check_index("logprob_stats", targets, vocabulary)?;
    if targets.len() != rows {
        bail!("logprob_stats: {} targets for {rows} rows", targets.len());
    }
    let gpu = logits.gpu();
    let (stats, targets) = (Matrix::short(gpu, rows, 4, Dense::F32)?, indices(gpu, targets)?);
    let p = Logprob { rows: rows as u64, vocabulary: width(vocabulary)?, first: 0 };
    if rows > 0 {
        let at = [stats.address(), logits.address(), targets.address()];
        gpu.launch("logprob", logits.element(), Grid::rows(rows, vocabulary), &at, &p)?;
    }
    let of = |s: &[f32]| LogprobStats {
        logp: f64::from(s[0]),
        entropy: f64::from(s[1]),
        mean_logit: f64::from(s[2]),
        logsumexp: f64::from(s[3]),
    };
    let found = stats.to_floats()?.chunks_exact(4).map(of).collect();
    Ok((found, Kept { stats, targets, p }))
}

/// Statistics and targets of a chunk of logits, on the device.
pub struct Kept {
    stats: Matrix,
    targets: Memory,
    p: Logprob,
}

/// As [`crate::logprob_unit_gradient`], but the result is a short-lived matrix of type `element`. Logits are f32.
pub fn logprob_unit_gradient(logits: &Matrix, kept: &Kept, element: Dense) -> Result<Matrix> {
    let (rows, vocabulary) = logits.dims();
    let out = Matrix::short(logits.gpu(), rows, vocabulary, element)?;
    logprob_gradient(&out, logits, (&kept.targets, &kept.stats), &kept.p)?;
    Ok(out)
}

/// Writes the gradient of rows of logits (f32), given all targets and the statistics (rows, 4) of whole rows.
pub(super) fn logprob_gradient(
    out: &Matrix,
    logits: &Matrix,
    (targets, stats): (&Memory, &Matrix),
    p: &Logprob,
) -> Result<()> {
    let dims = (p.rows as usize, p.vocabulary as usize);
    same("logprob_gradient", dims, Dense::F32, &[logits])?;
    same("logprob_gradient", dims, out.element(), &[out])?;
    if dims.0 == 0 {
        return Ok(());
    }
    let at = [out.address(), logits.address(), targets.address(), stats.address()];
    let grid = Grid::rows(dims.0, dims.1);
    logits.gpu().launch("logprob_gradient_of_f32", out.element(), grid, &at, p)
}
