//! The language-model head on completion positions only, a few rows at a time.
//!
//! Log-probabilities and their unit-coefficient gradient come from one pass over a (chunk × V) buffer;
//! where the head is frozen, no gradient of its size exists. A head of which a GPU holds one tile at a time is gone through once
//! for the rows of all packs, and once more for their gradients.

use crate::{buffers::Buffer, numeric::Numeric, pack::Entry};
use candle_core::{Result as Computed, Tensor as HostTensor};
use kto_cli::Result;
use kto_kernels::{
    LogprobStats,
    device::{
        Device, Factor, FrozenWeight, Onto, Product, Tensor, gather_rows, logprobs, logprobs_in_tiles,
        multiply, scale_rows, soft_cap,
    },
};

/// Where the chunks' logits go, and how many rows a chunk has.
pub(crate) struct Chunks<'a> {
    pub device: &'a Device,
    pub logits: &'a Buffer,
    pub rows: usize,
    /// Logits s become cap · tanh(s / cap).
    pub cap: Option<f64>,
}

/// Returns the statistics of every entry, and writes ∇ of each of the first `unit` entries' log-probability with respect to its row.
/// Shapes: normed (rows, C), head (V, C), unit (trained entries, C).
pub(crate) fn run(
    chunks: &Chunks,
    normed: &Tensor,
    head: &FrozenWeight,
    entries: &[Entry],
    unit: Option<&Tensor>,
) -> Result<Vec<LogprobStats>> {
    let mut stats = Vec::with_capacity(entries.len());
    let trained = unit.map_or(Ok(0), |u| u.dims2().map(|(rows, _)| rows)).numeric()?;
    let mut start = 0;
    while start < entries.len() {
        // Equal chunks: every one of them packs the whole head.
        let left = if start < trained { trained - start } else { entries.len() - start };
        let end = start + left.div_ceil(left.div_ceil(chunks.rows));
        let part = &entries[start..end];
        let rows: Vec<u32> = part.iter().map(|e| e.head_row).collect();
        let targets: Vec<u32> = part.iter().map(|e| e.target).collect();
        let logits = chunks.logits.rows(0, part.len())?;
        let mut chunk = || {
            let picked = gather_rows(normed, &rows)?;
            multiply(&logits, Onto::Zero, &[Product::new(&picked, Factor::Linear(head))])?;
            chunks.cap.map_or(Ok(()), |cap| soft_cap(&logits, cap))?;
            let unit = unit.filter(|_| start < trained);
            let (chunk, gradient) = logprobs(chunks.device, &logits, &targets, (unit.is_some(), chunks.cap))?;
            if let Some((unit, gradient)) = unit.zip(gradient) {
                let unit = unit.narrow(start, part.len())?;
                multiply(&unit, Onto::Zero, &[Product::new(&gradient, Factor::Weight(head))])?;
            }
            stats.extend(chunk);
            Ok(())
        };
        chunk().numeric()?;
        start = end;
    }
    Ok(stats)
}

/// Adds to the gradient `to` of a trained head, `coefficients` being those of the entries, all trained.
///
/// What a row counts for is known only after the way up, so its logits are computed a second time, chunk by chunk: to keep them, or a
/// sum of its own for every coefficient, would take rows × V or branches × V × C numbers. Shapes: normed (rows, C), head and to (V, C).
pub(crate) fn add_weight_gradient(
    chunks: &Chunks,
    normed: &Tensor,
    head: &FrozenWeight,
    (entries, coefficients): (&[Entry], &[f64]),
    to: &HostTensor,
) -> Result<()> {
    let to = Tensor::Host(to.clone());
    let rows = entries.len().div_ceil(entries.len().div_ceil(chunks.rows).max(1)).max(1);
    for (part, coefficients) in entries.chunks(rows).zip(coefficients.chunks(rows)) {
        let (index, targets): (Vec<u32>, Vec<u32>) = part.iter().map(|e| (e.head_row, e.target)).unzip();
        let logits = chunks.logits.rows(0, part.len())?;
        let chunk = || {
            let picked = gather_rows(normed, &index)?;
            multiply(&logits, Onto::Zero, &[Product::new(&picked, Factor::Linear(head))])?;
            chunks.cap.map_or(Ok(()), |cap| soft_cap(&logits, cap))?;
            let (_, gradient) = logprobs(chunks.device, &logits, &targets, (true, chunks.cap))?;
            let Some(gradient) = gradient else { return Ok(()) };
            scale_rows(&gradient, coefficients)?;
            multiply(&to, Onto::Itself, &[Product::new(&gradient.t()?, Factor::Plain(&picked))])
        };
        chunk().numeric()?;
    }
    Ok(())
}

/// As [`run`], with the head in tiles and `rows` rows at a time: `entries` are (row of `last`, target) of all packs, the trained ones
/// first; `norm` writes rows of `last` (rows, C) normed.
pub(crate) fn run_in_tiles(
    (head, rows, cap): (&FrozenWeight, usize, Option<f64>),
    last: &Tensor,
    norm: impl Fn(&Tensor, &Tensor) -> Computed<()>,
    entries: &[(u32, u32)],
    unit: Option<&Tensor>,
) -> Result<Vec<LogprobStats>> {
    let mut stats = Vec::with_capacity(entries.len());
    let trained = unit.map_or(Ok(0), |u| u.dims2().map(|(rows, _)| rows)).numeric()?;
    let parts = [(&entries[..trained], unit), (&entries[trained..], None)];
    for (entries, unit) in parts {
        for (number, part) in entries.chunks(rows).enumerate() {
            let (of_last, targets): (Vec<u32>, Vec<u32>) = part.iter().copied().unzip();
            let chunk = || {
                let picked = gather_rows(last, &of_last)?;
                let normed = picked.zeros_like()?;
                norm(&normed, &picked)?;
                let unit = unit.map(|u| u.narrow(number * rows, part.len())).transpose()?;
                logprobs_in_tiles(head, &normed, &targets, cap, unit.as_ref())
            };
            stats.extend(chunk().numeric()?);
        }
    }
    Ok(stats)
}
