//! Log-probabilities of target tokens from rows of logits, and their unit-coefficient gradient.
//!
//! KTO's gradient of a row is one scalar times ∇Σlogp, so the gradient computed here has coefficient one
//! and is scaled later, when the batch's KL estimate is known.

use crate::{
    parallel::{Shared, each, for_rows},
    real::Real,
    simd::simd,
    tensor::{read, same_type, with_type, write},
};
use candle_core::{Result, Tensor, bail};

/// What one row of logits says about its target.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogprobStats {
    /// Natural log-probability of the target.
    pub logp: f64,
    /// Entropy of the row's distribution in nats.
    pub entropy: f64,
    /// Mean of the row's logits.
    pub mean_logit: f64,
    /// log Σ exp(logit).
    pub logsumexp: f64,
}

/// Returns the statistics of every row. Shapes: logits (T, V); `targets` has T entries below V.
/// Formula: `logp = x[target] − lse`, `entropy = lse − Σ softmax(x)·x`; sums over the vocabulary in f64.
pub fn logprob_stats(logits: &Tensor, targets: &[u32]) -> Result<Vec<LogprobStats>> {
    let (t, v) = dims(logits, targets)?;
    let mut out = vec![LogprobStats::default(); t];
    with_type!(logits, T => {
        let reader = read(logits);
        let data = reader.slice::<T>()?;
        // One row is a lot of work: rows are handed out singly.
        let at = Shared(out.as_mut_ptr());
        each(t, true, |i| {
            // SAFETY: every row is taken once.
            unsafe { *at.at(i) = row_stats(&data[i * v..][..v], targets[i] as usize) };
        });
    });
    Ok(out)
}

/// Partial sums side by side, so that a loop over a row is SIMD; the order of all additions is fixed.
const LANES: usize = 16;
/// Elements summed in the element type before the sums are widened to f64.
const RUN: usize = 1024;

simd! {
    fn row_stats<T: Real>(x: &[T], target: usize) -> LogprobStats {
        let max = maximum(x);
        let (mut sum, mut weighted, mut total) = (0.0f64, 0.0f64, 0.0f64);
        for run in x.chunks(RUN) {
            let (mut s, mut w, mut t) = ([T::ZERO; LANES], [T::ZERO; LANES], [T::ZERO; LANES]);
            let groups = run.chunks_exact(LANES);
            let rest = groups.remainder();
            for group in groups {
                for l in 0..LANES {
                    // Relative to the maximum, so that the sum of products is exact enough in f32.
                    let d = group[l] - max;
                    let e = d.exp::<FUSED>();
                    s[l] += e;
                    w[l] += e * d;
                    t[l] += group[l];
                }
            }
            for (l, v) in rest.iter().enumerate() {
                let d = *v - max;
                let e = d.exp::<FUSED>();
                s[l] += e;
                w[l] += e * d;
                t[l] += *v;
            }
            let widen = |lanes: [T; LANES]| lanes.iter().map(|v| v.wide()).sum::<f64>();
            sum += widen(s);
            weighted += widen(w);
            total += widen(t);
        }
        let log_sum = sum.ln();
        LogprobStats {
            logp: (x[target] - max).wide() - log_sum,
            entropy: log_sum - weighted / sum,
            mean_logit: total / x.len() as f64,
            logsumexp: max.wide() + log_sum,
        }
    }
}

#[inline(always)]
fn maximum<T: Real>(x: &[T]) -> T {
    let mut lanes = [T::NEG_INFINITY; LANES];
    let larger = |m: &mut T, v: T| *m = if v > *m { v } else { *m };
    let groups = x.chunks_exact(LANES);
    let rest = groups.remainder();
    for group in groups {
        for l in 0..LANES {
            larger(&mut lanes[l], group[l]);
        }
    }
    rest.iter().enumerate().for_each(|(l, v)| larger(&mut lanes[l], *v));
    lanes.into_iter().fold(T::NEG_INFINITY, |m, v| if v > m { v } else { m })
}

simd! {
    /// `row ← −softmax(row)`
    fn negative_softmax<T: Real>(row: &mut [T], logsumexp: T) {
        for x in row.iter_mut() {
            *x = -(*x - logsumexp).exp::<FUSED>();
        }
    }
}

/// Replaces every row of logits by the gradient of its target's log-probability: `onehot(target) − softmax(x)`.
pub fn logprob_unit_gradient(logits: &Tensor, targets: &[u32], stats: &[LogprobStats]) -> Result<()> {
    let (t, v) = dims(logits, targets)?;
    if stats.len() != t {
        bail!("logprob_unit_gradient: {} statistics for {t} rows", stats.len());
    }
    same_type(logits, logits)?;
    with_type!(logits, T => write::<T>(logits, |data| {
        for_rows(data, v, |i, row| {
            negative_softmax(row, T::of(stats[i].logsumexp));
            row[targets[i] as usize] += T::ONE;
        });
        Ok(())
    }))
}

fn dims(logits: &Tensor, targets: &[u32]) -> Result<(usize, usize)> {
    let (t, v) = logits.dims2()?;
    if targets.len() != t {
        bail!("{} targets for {t} rows of logits", targets.len());
    }
    match targets.iter().find(|x| **x as usize >= v) {
        Some(x) => bail!("target {x} is outside a vocabulary of {v}"),
        None => Ok((t, v)),
    }
}
