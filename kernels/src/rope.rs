//! Rotary position embedding in the half-split form of Llama and Qwen2.

use crate::{
    parallel::for_rows,
    real::Real,
    simd::simd,
    tensor::{with_type, write},
};
use candle_core::{Result, Tensor, bail};

/// Cosines and sines for positions `0..positions`, each (positions, D/2), kept in f32 as transformers keeps them.
pub struct RopeTable {
    head: usize,
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Computes the table for heads of `head_dim` (even) and base `theta`.
    ///
    /// Angles are rounded as transformers rounds them (exponents, inverse frequencies and products in f32):
    /// at position 100 an angle in f32 is off by 4e-6, which would otherwise be our largest difference.
    pub fn new(head_dim: usize, theta: f64, positions: usize) -> Self {
        let half = head_dim / 2;
        let inverse: Vec<f32> = (0..half)
            .map(|i| 1.0 / (theta as f32 as f64).powf(((2 * i) as f32 / head_dim as f32) as f64) as f32)
            .collect();
        let angles = (0..positions).flat_map(|p| inverse.iter().map(move |f| (p as f32 * f) as f64));
        let (sin, cos) = angles.map(|a| (a.sin() as f32, a.cos() as f32)).unzip();
        Self { head: head_dim, half, cos, sin }
    }

    /// Computes the table for heads of `head_dim` whose first `2 · frequencies.len()` dimensions turn; sines and cosines are times
    /// `factor`.
    pub fn of_frequencies(head_dim: usize, frequencies: &[f64], factor: f64, positions: usize) -> Self {
        let angles =
            (0..positions).flat_map(|p| frequencies.iter().map(move |f| (p as f32 * *f as f32) as f64));
        let (sin, cos) = angles.map(|a| ((a.sin() * factor) as f32, (a.cos() * factor) as f32)).unzip();
        Self { head: head_dim, half: frequencies.len(), cos, sin }
    }

    /// Puts the rows of another table behind these: positions of the other one count from the number of rows here. Both must turn the
    /// same part of the same heads.
    pub fn followed_by(mut self, other: Self) -> Self {
        debug_assert_eq!((self.head, self.half), (other.head, other.half));
        self.cos.extend(other.cos);
        self.sin.extend(other.sin);
        self
    }

    /// Returns D.
    pub fn head(&self) -> usize {
        self.head
    }

    /// Returns cosines and sines, each (positions, D/2) row-major: what a device gets.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Returns half of the dimensions of a head that turn.
    pub fn half(&self) -> usize {
        self.half
    }

    fn row(&self, position: u32) -> Option<(&[f32], &[f32])> {
        let start = position as usize * self.half;
        Some((self.cos.get(start..start + self.half)?, self.sin.get(start..start + self.half)?))
    }
}

/// Rotates every head of `x` (T, H·D) in place by the angle of its row's position; with `inverse` by the opposite angle,
/// which is the backward pass. `positions` has T entries, all inside the table.
pub fn rope(x: &Tensor, table: &RopeTable, positions: &[u32], inverse: bool) -> Result<()> {
    let (t, c) = x.dims2()?;
    let half = table.half;
    if half == 0 || 2 * half > table.head || c % table.head != 0 || positions.len() != t {
        bail!("rope: input ({t}, {c}), head size {}, {} positions", table.head, positions.len());
    }
    if let Some(p) = positions.iter().find(|p| table.row(**p).is_none()) {
        bail!("rope: position {p} is past the table");
    }
    with_type!(x, T => write::<T>(x, |x| {
        for_rows(x, c, |i, row| {
            let Some((cos, sin)) = table.row(positions[i]) else { return };
            let sign = T::of(if inverse { -1.0 } else { 1.0 });
            for head in row.chunks_mut(table.head) {
                let (low, high) = head[..2 * half].split_at_mut(half);
                rotate(low, high, cos, sin, sign);
            }
        });
        Ok(())
    }))
}

simd! {
    fn rotate<T: Real>(low: &mut [T], high: &mut [T], cos: &[f32], sin: &[f32], sign: T) {
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (a, b) = (*low, *high);
            let (cos, sin) = (T::of(f64::from(*cos)), T::of(f64::from(*sin)) * sign);
            *low = a * cos - b * sin;
            *high = b * cos + a * sin;
        }
    }
}
