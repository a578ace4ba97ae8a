//! Rows of a product of two thin matrices, added to rows of another one: what merging a LoRA adapter consists of.
//!
//! Every element is summed by one thread in the order of the rank and no multiply-add is fused, so the bits are the same everywhere.

use crate::simd::simd;
use std::array::from_fn;

/// Rows and columns whose sums stay in registers.
const ROWS: usize = 4;
const COLUMNS: usize = 32;
/// Columns of a single row whose sums stay in the first-level cache.
const WIDE: usize = 1024;

simd! {
    /// Adds factor · B · A to rows. Shapes: rows (n, in), b (n, R), a (R, in), all row-major.
    pub fn add_low_rank(rows: &mut [f32], columns: usize, b: &[f32], a: &[f32], factor: f32) {
        let (n, r) = (rows.len() / columns, a.len() / columns);
        let (blocked, banded) = (n - n % ROWS, columns - columns % COLUMNS);
        let mut band = Vec::with_capacity(r * COLUMNS);
        for from in (0..if blocked > 0 { banded } else { 0 }).step_by(COLUMNS) {
            // Side by side: lines that lie a power of two apart would push each other out of the cache.
            band.clear();
            a.chunks_exact(columns).for_each(|a| band.extend_from_slice(&a[from..][..COLUMNS]));
            let blocks = rows[..blocked * columns].chunks_exact_mut(ROWS * columns).zip(b.chunks_exact(ROWS * r));
            for (rows, b) in blocks {
                for (row, sums) in rows.chunks_exact_mut(columns).zip(&tile(b, r, &band)) {
                    add(&mut row[from..][..COLUMNS], sums, factor);
                }
            }
        }
        for (i, (row, b)) in rows.chunks_exact_mut(columns).zip(b.chunks_exact(r)).enumerate() {
            let first = if i < blocked { banded } else { 0 };
            for from in (first..columns).step_by(WIDE) {
                let row = &mut row[from..];
                let width = row.len().min(WIDE);
                let mut sums = [0.0; WIDE];
                for (a, b) in a.chunks_exact(columns).zip(b) {
                    add(&mut sums[..width], &a[from..], *b);
                }
                add(&mut row[..width], &sums, factor);
            }
        }
    }
}

/// Returns the sums of the rows of `b` over a band of A.
#[inline(always)]
fn tile(b: &[f32], r: usize, band: &[f32]) -> [[f32; COLUMNS]; ROWS] {
    let b: [&[f32]; ROWS] = from_fn(|i| &b[i * r..][..r]);
    let mut sums = [[0.0; COLUMNS]; ROWS];
    for (k, a) in band.as_chunks::<COLUMNS>().0.iter().enumerate() {
        let a = *a;
        for (sums, b) in sums.iter_mut().zip(&b) {
            add(sums, &a, b[k]);
        }
    }
    sums
}

/// Adds factor · more to `sums`.
#[inline(always)]
fn add(sums: &mut [f32], more: &[f32], factor: f32) {
    sums.iter_mut().zip(more).for_each(|(s, &v)| *s += factor * v);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_is_that_of_f64_on_odd_sizes() {
        for (rows, columns, r) in [(1, 1, 1), (2, 7, 2), (3, 1025, 3), (9, 96, 5), (6, 2048, 16)] {
            let wave = |n: usize, seed: usize| -> Vec<f32> {
                (0..n).map(|i| ((i * 7 + seed) as f32).sin()).collect()
            };
            let (a, b, base) = (wave(r * columns, 1), wave(rows * r, 2), wave(rows * columns, 3));
            let mut merged = base.clone();
            add_low_rank(&mut merged, columns, &b, &a, 0.25);
            for (at, w) in merged.iter().enumerate() {
                let (row, i) = (at / columns, at % columns);
                let sum: f64 =
                    (0..r).map(|k| f64::from(b[row * r + k]) * f64::from(a[k * columns + i])).sum();
                let expected = f64::from(base[at]) + 0.25 * sum;
                assert!((f64::from(*w) - expected).abs() < 1e-6 * r as f64, "{rows} × {columns} r {r}: {at}");
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_rows_beside() {
        let (columns, r) = (75, 7);
        let wave =
            |n: usize, seed: usize| -> Vec<f32> { (0..n).map(|i| ((i * 7 + seed) as f32).sin()).collect() };
        let (a, b, base) = (wave(r * columns, 1), wave(6 * r, 2), wave(6 * columns, 3));
        let mut together = base.clone();
        add_low_rank(&mut together, columns, &b, &a, 0.3);
        for (i, base) in base.chunks(columns).enumerate() {
            let mut alone = base.to_vec();
            add_low_rank(&mut alone, columns, &b[i * r..][..r], &a, 0.3);
            assert_eq!(alone, together[i * columns..][..columns], "row {i}");
        }
    }
}
