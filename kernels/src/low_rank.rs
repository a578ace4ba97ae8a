//! Rows of a product of two thin matrices, added to rows of another one: what merging a LoRA adapter consists of.
//!
//! Every element is summed by one thread in the order of the rank and no multiply-add is fused, so the bits are the same everywhere.

use crate::simd::simd;

/// Columns of a row whose sums stay in the first-level cache.
const TILE: usize = 1024;

simd! {
    /// Adds factor · b · A to a row. Shapes: row (in), b (R), A (R, in) row-major.
    pub fn add_low_rank(row: &mut [f32], b: &[f32], a: &[f32], factor: f32) {
        let columns = row.len();
        for (tile, out) in row.chunks_mut(TILE).enumerate() {
            let mut sums = [0.0f32; TILE];
            let sums = &mut sums[..out.len()];
            for (k, &factor) in b.iter().enumerate() {
                let a = &a[k * columns + tile * TILE..][..out.len()];
                sums.iter_mut().zip(a).for_each(|(s, &v)| *s += factor * v);
            }
            out.iter_mut().zip(&*sums).for_each(|(w, &s)| *w += factor * s);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_is_that_of_f64_on_odd_sizes() {
        for (columns, r) in [(1, 1), (7, 2), (1025, 3), (2048, 16)] {
            let wave = |n: usize, seed: usize| -> Vec<f32> {
                (0..n).map(|i| ((i * 7 + seed) as f32).sin()).collect()
            };
            let (a, b, base) = (wave(r * columns, 1), wave(r, 2), wave(columns, 3));
            let mut row = base.clone();
            add_low_rank(&mut row, &b, &a, 0.25);
            for (i, w) in row.iter().enumerate() {
                let sum: f64 = (0..r).map(|k| f64::from(b[k]) * f64::from(a[k * columns + i])).sum();
                let expected = f64::from(base[i]) + 0.25 * sum;
                assert!((f64::from(*w) - expected).abs() < 1e-6 * r as f64, "{columns} r {r}: {i}");
            }
        }
    }
}
