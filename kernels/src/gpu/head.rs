//! Log-probabilities and their gradients through a head whose rows come to the device in tiles.
//!
//! A tile gives each row of logits statistics of its own columns; joined on the host they are those of the whole vocabulary. The
//! gradient needs the joined log Σ exp, so for it every tile comes, and is multiplied, a second time.

use super::{
    Grid, Logprob,
    matrix::Matrix,
    operations::{cast, check_index, indices, logprob_gradient, soft_cap, soft_cap_backward, width},
    products::{Base, Term, Tiles, multiply},
};
use crate::{Dense, LogprobStats};
use candle_core::{Result, bail};

/// Returns the statistics of `x · Wᵀ` at `targets`, and writes to `unit` the gradient of every log-probability with respect to its
/// row of x. Logits s become cap · tanh(s / cap). Shapes: x and unit (rows, C), W (V, C), targets (rows).
pub fn logprobs_in_tiles(
    tiles: &Tiles,
    x: &Matrix,
    targets: &[u32],
    cap: Option<f64>,
    unit: Option<&Matrix>,
) -> Result<Vec<LogprobStats>> {
    let (rows, columns) = x.dims();
    check_index("logprobs_in_tiles", targets, tiles.rows)?;
    if targets.len() != rows || columns != tiles.columns {
        bail!(
            "logprobs_in_tiles: {} targets and {:?} for {rows} rows",
            targets.len(),
            (columns, tiles.columns)
        );
    }
    if rows == 0 {
        return Ok(Vec::new());
    }
    let gpu = x.gpu();
    let index = indices(gpu, targets)?;
    let memory = Matrix::short(gpu, rows, tiles.tile_rows, Dense::F32)?;
    let logits_of = |tile: &Matrix| -> Result<Matrix> {
        let logits = memory.first(rows, tile.dims().0)?;
        multiply(&logits, Base::Zero, [Ok(Term { a: x, b: tile.t(), scale: 1.0 })])?;
        cap.map_or(Ok(()), |cap| soft_cap(&logits, cap))?;
        Ok(logits)
    };
    let params = |first: usize, tile: &Matrix| -> Result<Logprob> {
        Ok(Logprob { rows: rows as u64, vocabulary: width(tile.dims().0)?, first: width(first)? })
    };
    let parts = Matrix::short(gpu, tiles.tiles.len() * rows, 4, Dense::F32)?;
    tiles.each(x, |first, tile| {
        let (logits, p) = (logits_of(&tile)?, params(first, &tile)?);
        let stats = parts.narrow(first / tiles.tile_rows * rows, rows)?;
        let at = [stats.address(), logits.address(), index.address()];
        gpu.launch("logprob", Dense::F32, Grid::rows(rows, logits.dims().1), &at, &p)
    })?;
    let parts: Vec<[f32; 4]> = parts.to_floats()?.as_chunks().0.to_vec();
    let joined: Vec<LogprobStats> =
        (0..rows).map(|row| join(tiles, targets[row], parts.iter().skip(row).step_by(rows))).collect();
    let Some(unit) = unit else { return Ok(joined) };

    let ends: Vec<f32> = joined.iter().flat_map(|s| [0.0, 0.0, 0.0, s.logsumexp as f32]).collect();
    let stats = Matrix::short(gpu, rows, 4, Dense::F32)?;
    stats.write(&ends)?;
    let gradients = Matrix::short(gpu, rows, tiles.tile_rows, x.element())?;
    let sum = Matrix::short(gpu, rows, columns, Dense::F32)?;
    tiles.each(x, |first, tile| {
        let (logits, p) = (logits_of(&tile)?, params(first, &tile)?);
        let gradient = gradients.first(rows, tile.dims().0)?;
        logprob_gradient(&gradient, &logits, (&index, &stats), &p)?;
        cap.map_or(Ok(()), |cap| soft_cap_backward(&gradient, &logits, cap))?;
        let onto = if first == 0 { Base::Zero } else { Base::Itself };
        multiply(&sum, onto, [Ok(Term { a: &gradient, b: tile, scale: 1.0 })])
    })?;
    cast(unit, &sum)?;
    Ok(joined)
}

/// Joins what the tiles say of one row: logp (of what is not in the tile, −log Σ exp), entropy, mean, log Σ exp.
fn join<'a>(tiles: &Tiles, target: u32, parts: impl Iterator<Item = &'a [f32; 4]> + Clone) -> LogprobStats {
    let wide = |part: &[f32; 4]| part.map(f64::from);
    let largest = parts.clone().fold(f64::NEG_INFINITY, |most, part| most.max(wide(part)[3]));
    let sum: f64 = parts.clone().map(|part| (wide(part)[3] - largest).exp()).sum();
    let logsumexp = largest + sum.ln();
    let (mut expected, mut total, mut logit) = (0.0, 0.0, f64::NAN);
    for (tile, part) in parts.enumerate() {
        let [logp, entropy, mean, end] = wide(part);
        // A tile's entropy is its log Σ exp less its expected logit.
        expected += (end - logsumexp).exp() * (end - entropy);
        total += mean * tiles.rows_of(tile) as f64;
        if target as usize / tiles.tile_rows == tile {
            logit = logp + end;
        }
    }
    LogprobStats {
        logp: logit - logsumexp,
        entropy: logsumexp - expected,
        mean_logit: total / tiles.rows as f64,
        logsumexp,
    }
}
