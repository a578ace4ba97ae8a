//! The affine quantization of MLX: groups of a row share a scale and a bias. Bit exact with MLX on a CPU.
//!
//! All in f32, from values widened: with n = 2^bits − 1, scale = max((max − min) / n, 1e-7), negative unless |min| > |max|; the edge
//! is the end of the larger magnitude. q = rint(edge / scale); unless it is 0, scale = edge / q and bias = edge, else bias = 0.
//! code = clamp(rint((x − bias) / scale), 0, n), from the f32 scale and bias; these are then rounded to the dtype of the weights.
//! So zero is on the grid, and code 0 is the edge itself. MLX's GPU kernels differ in a few codes in a thousand (they round halves
//! away from zero); both load everywhere.

use super::{Codec, PLANES};
use crate::{simd::simd, stored::Dense};

/// Smallest magnitude of a scale.
const EPSILON: f32 = 1e-7;

/// Codes of `bits` bits, least significant first; scales; biases.
#[derive(Clone, Copy, Debug)]
pub struct Affine {
    /// 2, 3, 4, 5, 6 or 8.
    pub bits: usize,
    /// Values that share a scale and a bias: 32, 64 or 128, dividing the columns.
    pub group: usize,
    /// What scales and biases are stored as: the dtype of the weights.
    pub dtype: Dense,
}

impl Codec for Affine {
    fn unit(&self) -> usize {
        self.group
    }
    fn planes(&self, n: usize) -> [usize; PLANES] {
        let lines = n / self.group * self.dtype.size();
        [n * self.bits / 8, lines, lines]
    }
    fn encode(&self, values: &[f32], [packed, scales, biases]: [&mut [u8]; PLANES]) -> bool {
        let size = self.dtype.size();
        let groups = values.chunks_exact(self.group).zip(packed.chunks_mut(self.group * self.bits / 8));
        let lines = scales.chunks_mut(size).zip(biases.chunks_mut(size));
        let mut sound = true;
        for ((x, packed), (scale, bias)) in groups.zip(lines) {
            let mut codes = [0; 128];
            let codes = &mut codes[..x.len()];
            let line = quantize(self.bits, x, codes);
            pack(self.bits, codes, packed);
            sound &= self.dtype.store(line.0, scale) & self.dtype.store(line.1, bias);
        }
        sound
    }
    fn decode(&self, [packed, scales, biases]: [&[u8]; PLANES], out: &mut [f32]) {
        let size = self.dtype.size();
        let groups = out.chunks_exact_mut(self.group).zip(packed.chunks(self.group * self.bits / 8));
        for ((out, packed), (scale, bias)) in groups.zip(scales.chunks(size).zip(biases.chunks(size))) {
            let (mut s, mut b) = ([0.0], [0.0]);
            self.dtype.widen(scale, &mut s);
            self.dtype.widen(bias, &mut b);
            for (i, o) in out.iter_mut().enumerate() {
                let code = unpack(self.bits, packed, i);
                *o = self.dtype.round(self.dtype.round(f32::from(code) * s[0]) + b[0]);
            }
        }
    }
}

simd! {
    /// Writes the codes of a group and returns scale and bias.
    fn quantize(bits: usize, x: &[f32], codes: &mut [u8]) -> (f32, f32) {
        let (mut low, mut high) = ([f32::INFINITY; 16], [f32::NEG_INFINITY; 16]);
        for chunk in x.as_chunks::<16>().0 {
            for ((low, high), &v) in low.iter_mut().zip(&mut high).zip(chunk) {
                *low = if v < *low { v } else { *low };
                *high = if v > *high { v } else { *high };
            }
        }
        let (low, high) = ends(low, high);
        let n = ((1u32 << bits) - 1) as f32;
        let below = low.abs() > high.abs();
        let mut scale = ((high - low) / n).max(EPSILON);
        scale = if below { scale } else { -scale };
        let edge = if below { low } else { high };
        let steps = (edge / scale).round_ties_even();
        let mut bias = 0.0;
        if steps != 0.0 {
            scale = edge / steps;
            bias = edge;
        }
        for (code, &v) in codes.iter_mut().zip(x) {
            // Adding 2²³ rounds to even and leaves the integer in the low bits.
            *code = (((v - bias) / scale).clamp(0.0, n) + 8_388_608.0).to_bits() as u8;
        }
        (scale, bias)
    }
}

/// Returns the least and the largest value of all lanes, halving them: one after the other they would wait for each other.
#[inline(always)]
fn ends(mut low: [f32; 16], mut high: [f32; 16]) -> (f32, f32) {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            let (l, h) = (low[i + half], high[i + half]);
            low[i] = if l < low[i] { l } else { low[i] };
            high[i] = if h > high[i] { h } else { high[i] };
        }
    }
    (low[0], high[0])
}

/// Eight codes fill as many bytes as a code has bits.
fn pack(bits: usize, codes: &[u8], packed: &mut [u8]) {
    for (eight, bytes) in codes.as_chunks::<8>().0.iter().zip(packed.chunks_mut(bits)) {
        let word = eight.iter().rev().fold(0u64, |word, &code| word << bits | u64::from(code));
        bytes.copy_from_slice(&word.to_le_bytes()[..bits]);
    }
}

fn unpack(bits: usize, packed: &[u8], index: usize) -> u16 {
    let bit = index * bits;
    let byte = |i: usize| u16::from(packed.get(i).copied().unwrap_or_default());
    (byte(bit / 8) | byte(bit / 8 + 1) << 8) >> (bit % 8) & ((1 << bits) - 1)
}

#[cfg(test)]
mod tests;
