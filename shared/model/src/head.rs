//! The language-model head on completion positions only, a few rows at a time.
//!
//! Log-probabilities and their unit-coefficient gradient come from one pass over a (chunk × V) buffer;
//! the head itself is frozen, so no gradient of its size exists.

use crate::pack::Entry;
use candle_core::{Result, Tensor};
use kto_kernels::{LogprobStats, gather_rows, logprob_stats, logprob_unit_gradient, matmul};

/// Size in elements of the logits buffer.
const BUFFER: usize = 1 << 23;

/// What the head says about a pack's entries.
pub(crate) struct HeadOutput {
    /// One for each entry.
    pub stats: Vec<LogprobStats>,
    /// ∇ of each of the first `gradient` entries' log-probability with respect to its row (gradient, C).
    pub unit: Option<Tensor>,
}

/// Shapes: normed (rows, C), head (V, C). The first `gradient` entries get a gradient.
pub(crate) fn run(normed: &Tensor, head: &Tensor, entries: &[Entry], gradient: usize) -> Result<HeadOutput> {
    let chunk = (BUFFER / head.dim(0)?).clamp(16, 1024);
    let mut stats = Vec::with_capacity(entries.len());
    let mut unit = Vec::new();
    let (trained, others) = entries.split_at(gradient);
    for (part, wanted) in [(trained, true), (others, false)] {
        for entries in part.chunks(chunk) {
            let rows: Vec<u32> = entries.iter().map(|e| e.head_row).collect();
            let targets: Vec<u32> = entries.iter().map(|e| e.target).collect();
            let logits = matmul(&gather_rows(normed, &rows)?, &head.t()?)?;
            let chunk_stats = logprob_stats(&logits, &targets)?;
            if wanted {
                logprob_unit_gradient(&logits, &targets, &chunk_stats)?;
                unit.push(matmul(&logits, head)?);
            }
            stats.extend(chunk_stats);
        }
    }
    let unit = if unit.is_empty() { None } else { Some(Tensor::cat(&unit, 0)?) };
    Ok(HeadOutput { stats, unit })
}
