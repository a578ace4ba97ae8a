//! The best approximation of a matrix by one of low rank, from its rows alone.
//!
//! Randomized subspace iteration (Halko, Martinsson, Tropp 2011): random directions, a few passes over the rows that turn them towards the
//! largest singular vectors, then the decomposition of what is left, which is small. Exact to rounding when the matrix has no larger
//! rank. All in f64; the rows are computed anew in every pass and never held.

use kto_cli::{Result, signal};
use kto_kernels::random;
use rayon::prelude::*;

/// Directions beyond the rank.
const MORE: usize = 8;
/// Passes that turn the directions.
const TURNS: usize = 2;
/// Parts into which rows are divided, whatever the number of threads.
const PARTS: usize = 8;

/// A matrix that can write any of its rows.
pub trait Rows: Sync {
    /// Returns rows and columns.
    fn shape(&self) -> (usize, usize);
    /// Writes rows from `first` on into `out`, whole rows.
    fn read(&self, first: usize, out: &mut [f32]);
}

/// Two factors: B (rows, R) and A (R, columns), both with the roots of the singular values, and the share of the squared length of the matrix
/// that their product has.
pub struct Factors {
    /// Left factor.
    pub b: Vec<f32>,
    /// Right factor.
    pub a: Vec<f32>,
    /// Between 0 and 1.
    pub share: f64,
}

/// Decomposes. The rank is cut to the smaller side.
pub fn factor(matrix: &dyn Rows, rank: usize, seed: u64) -> Result<Factors> {
    let (rows, columns) = matrix.shape();
    let k = (rank + MORE).min(rows).min(columns);
    let mut directions: Vec<f64> = (0..columns * k)
        .map(|i| {
            // About normal.
            (0..4).map(|j| random::uniform(random::key(&[seed, j]), i as u64) - 0.5).sum::<f64>()
        })
        .collect();
    orthonormalize(&mut directions, columns, k);
    let mut left = Vec::new();
    let mut right = Vec::new();
    let mut length = 0.0;
    for _ in 0..=TURNS {
        signal::check()?;
        left = times(matrix, &directions, k);
        orthonormalize(&mut left, rows, k);
        (right, length) = transposed_times(matrix, &left, k);
        directions.clone_from(&right);
        orthonormalize(&mut directions, columns, k);
    }
    // right (columns, k): matrix ≈ left · rightᵀ. Its Gram matrix gives the singular values and vectors.
    let gram = gram(&right, columns, k);
    let (values, vectors) = eigen(gram, k);
    let rank = rank.min(k);
    let mut b = vec![0.0f32; rows * rank];
    let mut a = vec![0.0f32; rank * columns];
    let mut kept = 0.0;
    for (j, (value, vector)) in values.iter().zip(vectors.chunks(k)).take(rank).enumerate() {
        let sigma = value.max(0.0).sqrt();
        kept += value.max(0.0);
        if sigma == 0.0 {
            continue;
        }
        let root = sigma.sqrt();
        for (row, out) in left.chunks(k).zip(b.chunks_mut(rank)) {
            out[j] = (root * dot(row, vector)) as f32;
        }
        for (row, out) in right.chunks(k).zip(&mut a[j * columns..][..columns]) {
            *out = (dot(row, vector) / root) as f32;
        }
    }
    let share = if length > 0.0 { (kept / length).min(1.0) } else { 1.0 };
    Ok(Factors { b, a, share })
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Returns matrix · directions: (rows, k).
fn times(matrix: &dyn Rows, directions: &[f64], k: usize) -> Vec<f64> {
    let (rows, columns) = matrix.shape();
    let mut out = vec![0.0; rows * k];
    out.par_chunks_mut(k).enumerate().for_each_init(
        || vec![0.0f32; columns],
        |row, (i, out)| {
            matrix.read(i, row);
            for (v, d) in row.iter().zip(directions.chunks(k)) {
                let v = f64::from(*v);
                out.iter_mut().zip(d).for_each(|(o, d)| *o += v * d);
            }
        },
    );
    out
}

/// Returns matrixᵀ · left, (columns, k), and the squared length of the matrix.
fn transposed_times(matrix: &dyn Rows, left: &[f64], k: usize) -> (Vec<f64>, f64) {
    let (rows, columns) = matrix.shape();
    let step = rows.div_ceil(PARTS).max(1);
    let parts: Vec<(Vec<f64>, f64)> = (0..rows.div_ceil(step))
        .into_par_iter()
        .map(|part| {
            let (mut sum, mut length, mut row) = (vec![0.0; columns * k], 0.0, vec![0.0f32; columns]);
            for i in part * step..((part + 1) * step).min(rows) {
                matrix.read(i, &mut row);
                let left = &left[i * k..][..k];
                for (v, out) in row.iter().zip(sum.chunks_mut(k)) {
                    let v = f64::from(*v);
                    length += v * v;
                    out.iter_mut().zip(left).for_each(|(o, l)| *o += v * l);
                }
            }
            (sum, length)
        })
        .collect();
    let mut parts = parts.into_iter();
    let (mut sum, mut length) = parts.next().unwrap_or_else(|| (vec![0.0; columns * k], 0.0));
    for (part, more) in parts {
        sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
        length += more;
    }
    (sum, length)
}

/// Makes the columns of a (rows, k) matrix orthonormal, twice for precision; a column without a direction of its own becomes zero.
fn orthonormalize(matrix: &mut [f64], rows: usize, k: usize) {
    let column = |m: &[f64], j: usize| -> Vec<f64> { (0..rows).map(|i| m[i * k + j]).collect() };
    let mut done: Vec<Vec<f64>> = Vec::with_capacity(k);
    for j in 0..k {
        let mut v = column(matrix, j);
        let before = dot(&v, &v).sqrt();
        for _ in 0..2 {
            for other in &done {
                let along = dot(&v, other);
                v.iter_mut().zip(other).for_each(|(v, o)| *v -= along * o);
            }
        }
        let length = dot(&v, &v).sqrt();
        let factor = if length > 1e-12 * before && length > 0.0 { 1.0 / length } else { 0.0 };
        v.iter_mut().for_each(|v| *v *= factor);
        done.push(v);
    }
    for (j, v) in done.iter().enumerate() {
        v.iter().enumerate().for_each(|(i, v)| matrix[i * k + j] = *v);
    }
}

fn gram(matrix: &[f64], rows: usize, k: usize) -> Vec<f64> {
    let mut gram = vec![0.0; k * k];
    for row in matrix.chunks(k).take(rows) {
        for (i, x) in row.iter().enumerate() {
            gram[i * k..][..k].iter_mut().zip(row).for_each(|(g, y)| *g += x * y);
        }
    }
    gram
}

/// Returns the eigenvalues of a symmetric matrix, largest first, and the eigenvectors as rows: Jacobi's rotations.
fn eigen(mut m: Vec<f64>, k: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors = vec![0.0; k * k];
    (0..k).for_each(|i| vectors[i * k + i] = 1.0);
    for _ in 0..60 {
        let off: f64 =
            (0..k).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| m[i * k + j] * m[i * k + j]).sum();
        let diagonal: f64 = (0..k).map(|i| m[i * k + i] * m[i * k + i]).sum();
        if off <= 1e-30 * diagonal {
            break;
        }
        for p in 0..k {
            for q in p + 1..k {
                let apq = m[p * k + q];
                if apq == 0.0 {
                    continue;
                }
                let theta = (m[q * k + q] - m[p * k + p]) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for i in 0..k {
                    let (x, y) = (m[i * k + p], m[i * k + q]);
                    (m[i * k + p], m[i * k + q]) = (c * x - s * y, s * x + c * y);
                }
                for i in 0..k {
                    let (x, y) = (m[p * k + i], m[q * k + i]);
                    (m[p * k + i], m[q * k + i]) = (c * x - s * y, s * x + c * y);
                    let (x, y) = (vectors[p * k + i], vectors[q * k + i]);
                    (vectors[p * k + i], vectors[q * k + i]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|a, b| m[b * k + b].total_cmp(&m[a * k + a]));
    let values = order.iter().map(|i| m[i * k + i]).collect();
    let sorted = order.iter().flat_map(|i| vectors[i * k..][..k].to_vec()).collect();
    (values, sorted)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dense(usize, usize, Vec<f32>);

    impl Rows for Dense {
        fn shape(&self) -> (usize, usize) {
            (self.0, self.1)
        }
        fn read(&self, first: usize, out: &mut [f32]) {
            out.copy_from_slice(&self.2[first * self.1..][..out.len()]);
        }
    }

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        (0..n).map(|i| (random::uniform(seed, i as u64) - 0.5) as f32).collect()
    }

    fn product(b: &[f32], a: &[f32], rows: usize, columns: usize) -> Vec<f32> {
        let r = b.len() / rows;
        let element = |i: usize| -> f32 {
            (0..r)
                .map(|k| f64::from(b[i / columns * r + k]) * f64::from(a[k * columns + i % columns]))
                .sum::<f64>() as f32
        };
        (0..rows * columns).map(element).collect()
    }

    #[test]
    fn a_matrix_of_low_rank_comes_back() {
        for (rows, columns, r) in [(40, 60, 3), (7, 5, 2), (1, 9, 1), (90, 33, 12)] {
            let whole = product(&noise(rows * r, 1), &noise(r * columns, 2), rows, columns);
            let made = factor(&Dense(rows, columns, whole.clone()), r, 3).unwrap();
            let back = product(&made.b, &made.a, rows, columns);
            let error = whole.iter().zip(&back).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(error < 1e-5 && made.share > 0.999_999, "{rows} × {columns}: {error} {}", made.share);
        }
    }

    #[test]
    fn what_is_cut_off_is_what_must_be() {
        // Singular values 1, 1/2, 1/4, …: the best approximation of rank 2 leaves 1/15 + … of the squared length.
        let n = 12;
        let mut diagonal = vec![0.0; n * n];
        (0..n).for_each(|i| diagonal[i * n + i] = 0.5f32.powi(i as i32));
        let made = factor(&Dense(n, n, diagonal), 2, 5).unwrap();
        assert!((made.share - 0.9375).abs() < 1e-4, "{}", made.share);
        let zeros = factor(&Dense(3, 4, vec![0.0; 12]), 2, 1).unwrap();
        assert!(zeros.b.iter().chain(&zeros.a).all(|v| *v == 0.0) && zeros.share == 1.0);
    }
}
