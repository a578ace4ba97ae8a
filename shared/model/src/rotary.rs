//! The frequencies of a rotary position embedding.
//!
//! Called by [`crate::base`]. Source of the formulas: transformers 5.23, modeling_rope_utils.py; held against it by testdata/families. What
//! config.json says is read by `kto_formats::rope`. Invariant: what a sequence computes depends on its own length only. transformers decides
//! by the longest sequence of the batch, and its dynamic scaling remembers the longest one of the process.

pub use kto_formats::rope::{Rotary, Scaling};
use std::f64::consts::PI;

/// Returns the frequencies (dim / 2) for a sequence of `length` positions.
pub fn frequencies(rotary: &Rotary, length: usize) -> Vec<f64> {
    // Exponents, powers and reciprocals in f32, as transformers rounds them.
    let of = |theta: f64, i: usize| (theta as f32 as f64).powf(f64::from((2 * i) as f32 / rotary.dim as f32));
    let base = |theta: f64| (0..rotary.dim / 2).map(move |i| f64::from(1.0 / of(theta, i) as f32));
    let length = length as f64;
    match &rotary.scaling {
        Scaling::Default => base(rotary.theta).collect(),
        Scaling::Linear { factor } => base(rotary.theta).map(|f| f / factor).collect(),
        Scaling::Dynamic { factor, original } => {
            let stretch = factor * length.max(*original) / original - (factor - 1.0);
            let dim = rotary.dim as f64;
            base(rotary.theta * stretch.powf(dim / (dim - 2.0))).collect()
        }
        Scaling::Llama3 { factor, low, high, original } => base(rotary.theta)
            .map(|f| {
                let turns = original * f / (2.0 * PI);
                let part = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - part) * f / factor + part * f
            })
            .collect(),
        Scaling::Yarn { factor, .. } => {
            let (start, end) = ramp(rotary);
            let kept = |i: usize| 1.0 - ((i as f64 - start) / (end - start)).clamp(0.0, 1.0);
            base(rotary.theta).enumerate().map(|(i, f)| f / factor * (1.0 - kept(i)) + f * kept(i)).collect()
        }
        Scaling::Long { short, long, original, .. } => {
            let divisors = if length > *original { long } else { short };
            base(rotary.theta).zip(divisors).map(|(f, divisor)| f / divisor).collect()
        }
    }
}

/// The dimensions between which YaRN interpolates.
fn ramp(rotary: &Rotary) -> (f64, f64) {
    let Scaling::Yarn { fast, slow, truncate, original, .. } = rotary.scaling else { return (0.0, 1.0) };
    let dim = rotary.dim as f64;
    let at = |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * rotary.theta.ln());
    let (mut start, mut end) = (at(fast), at(slow));
    if truncate {
        (start, end) = (start.floor(), end.ceil());
    }
    (start, end) = (start.max(0.0), end.min(dim - 1.0));
    if start == end { (start, end + 0.001) } else { (start, end) }
}
