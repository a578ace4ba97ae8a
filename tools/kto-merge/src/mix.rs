//! How the changes of several adapters become one, element by element.
//!
//! Linear: Σ wᵢ Δᵢ. TIES (arXiv 2306.01708): of each Δᵢ only elements of at least the magnitude that the density's share of the tensor
//! reaches; the sign of Σ wᵢ Δᵢ is elected; the mean of the wᵢ Δᵢ that have it. DARE (arXiv 2311.03099): an element of Δᵢ stays with
//! the probability of the density and is divided by it; which ones is a function of seed, adapter, module and index.

use crate::{args::Method, delta::Part};
use kto_kernels::random;
use kto_weights::Values;
use rayon::prelude::*;

/// A way of mixing, ready for one weight.
pub struct Mix {
    /// Which.
    pub method: Method,
    density: f64,
    /// Least magnitude that stays, for each part.
    thresholds: Vec<f32>,
    /// Key of the random numbers, for each part.
    keys: Vec<u64>,
}

/// Rows that a task looks at.
const ROWS: usize = 16;

impl Mix {
    /// Prepares mixing for a weight. For TIES this computes the changes twice, to find the thresholds.
    pub fn new(
        method: Method,
        density: f64,
        seed: u64,
        module: &str,
        parts: &[Part],
        base: &dyn Values,
    ) -> Self {
        let name = module.bytes().fold(0, |key, byte| random::key(&[key, u64::from(byte)]));
        let keys = parts.iter().map(|p| random::key(&[seed, p.adapter as u64, name])).collect();
        let thresholds = match method {
            Method::Ties => parts.iter().map(|part| threshold(part, base, density)).collect(),
            _ => vec![0.0; parts.len()],
        };
        Self { method, density, thresholds, keys }
    }

    /// Mixes `changes`, shape (parts, n), of the n elements of the weight from `start` on into `out`.
    pub fn mix(&self, parts: &[Part], start: usize, changes: &mut [f32], out: &mut [f32]) {
        let n = out.len();
        for (i, (part, change)) in parts.iter().zip(changes.chunks_mut(n)).enumerate() {
            self.sparse(i, start, change);
            let weight = part.weight as f32;
            change.iter_mut().for_each(|v| *v *= weight);
        }
        let signs = matches!(self.method, Method::Ties | Method::DareTies);
        for (i, o) in out.iter_mut().enumerate() {
            let given = || changes.iter().skip(i).step_by(n);
            let sum: f32 = given().sum();
            *o = sum;
            if signs {
                let agree = |v: &&f32| **v != 0.0 && (**v > 0.0) == (sum > 0.0);
                let count = given().filter(agree).count();
                *o = if sum == 0.0 { 0.0 } else { given().filter(agree).sum::<f32>() / count.max(1) as f32 };
            }
        }
    }

    /// Takes away what does not stay of a change whose first element has the index `start`.
    fn sparse(&self, part: usize, start: usize, change: &mut [f32]) {
        match self.method {
            Method::Linear => {}
            Method::Ties => {
                let least = self.thresholds[part];
                change.iter_mut().filter(|v| v.abs() < least).for_each(|v| *v = 0.0);
            }
            Method::Dare | Method::DareTies => {
                let enlarged = 1.0 / self.density as f32;
                for (i, v) in change.iter_mut().enumerate() {
                    let stays = random::uniform(self.keys[part], (start + i) as u64) < self.density;
                    *v = if stays { *v * enlarged } else { 0.0 };
                }
            }
        }
    }
}

/// Returns the magnitude that exactly the density's share of the elements of a change reaches, more where several are equal.
/// Magnitudes of floats are in the order of their bits; the upper and then the lower half of the bits are counted.
fn threshold(part: &Part, base: &dyn Values, density: f64) -> f32 {
    let wanted = (density * base.len() as f64).round().max(1.0) as u64;
    let upper = counts(part, base, |bits| Some(bits >> 16));
    let (half, above) = reach(&upper, wanted);
    let lower = counts(part, base, |bits| (bits >> 16 == half).then_some(bits & 0xffff));
    let (low, _) = reach(&lower, wanted - above);
    f32::from_bits(half << 16 | low)
}

/// Returns the largest bin from which on at least `wanted` are counted, and how many lie above it.
fn reach(counts: &[u64], wanted: u64) -> (u32, u64) {
    let mut above = 0;
    for (bin, n) in counts.iter().enumerate().rev() {
        if above + n >= wanted {
            return (bin as u32, above);
        }
        above += n;
    }
    (0, above)
}

fn counts(part: &Part, base: &dyn Values, bin: impl Fn(u32) -> Option<u32> + Sync) -> Vec<u64> {
    let columns = base.columns();
    let rows = base.len() / columns.max(1);
    (0..rows.div_ceil(ROWS))
        .into_par_iter()
        .fold(
            || vec![0u64; 1 << 16],
            |mut counts, task| {
                let n = ROWS.min(rows - task * ROWS) * columns;
                let (mut values, mut change) = (vec![0.0; n], vec![0.0; n]);
                base.read(task * ROWS * columns, &mut values);
                part.rows(task * ROWS, &values, &mut change);
                for bin in change.iter().filter_map(|v| bin(v.abs().to_bits())) {
                    counts[bin as usize] += 1;
                }
                counts
            },
        )
        .reduce(
            || vec![0u64; 1 << 16],
            |mut a, b| {
                a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                a
            },
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use kto_formats::lora::LoraModule;
    use kto_weights::Held;

    fn module(values: &[f32]) -> LoraModule {
        let n = values.len();
        LoraModule {
            a: values.to_vec(),
            b: vec![1.0],
            r: 1,
            in_features: n,
            out_features: 1,
            scale: 1.0,
            magnitude: None,
        }
    }

    fn mixed(method: Method, density: f64, changes: &[&[f32]], weights: &[f64]) -> Vec<f32> {
        let modules: Vec<_> = changes.iter().map(|c| module(c)).collect();
        let parts: Vec<Part> = modules
            .iter()
            .zip(weights)
            .enumerate()
            .map(|(adapter, (module, w))| Part { module, weight: *w, adapter })
            .collect();
        let zeros = vec![0.0; changes[0].len()];
        let base = Held { values: &zeros, columns: zeros.len() };
        let mix = Mix::new(method, density, 7, "m", &parts, &base);
        let mut changes: Vec<f32> = changes.concat();
        let mut out = vec![0.0; zeros.len()];
        mix.mix(&parts, 0, &mut changes, &mut out);
        out
    }

    #[test]
    fn ties_keeps_the_largest_and_the_elected_sign() {
        let a = [1.0, -2.0, 0.1, 4.0];
        let b = [3.0, 1.5, -0.2, -1.0];
        // Half of each: a keeps −2 and 4, b keeps 3 and 1.5. At the second place the sum is −0.5, so −2 alone counts.
        assert_eq!(mixed(Method::Ties, 0.5, &[&a, &b], &[1.0, 1.0]), [3.0, -2.0, 0.0, 4.0]);
        assert_eq!(mixed(Method::Ties, 1.0, &[&a, &b], &[1.0, 1.0]), [2.0, -2.0, -0.2, 4.0]);
        assert_eq!(mixed(Method::Linear, 0.5, &[&a, &b], &[0.5, 2.0]), [6.5, 2.0, -0.35, 0.0]);
    }

    #[test]
    fn dare_keeps_its_share_and_the_mean() {
        let ones = vec![1.0f32; 20_000];
        let made = mixed(Method::Dare, 0.25, &[&ones], &[1.0]);
        let kept = made.iter().filter(|v| **v != 0.0).count();
        assert!((4_800..5_200).contains(&kept), "{kept}");
        assert!(made.iter().all(|v| *v == 0.0 || *v == 4.0));
        assert_eq!(made, mixed(Method::Dare, 0.25, &[&ones], &[1.0]));
    }
}
