//! The table of NF4, quantization in its usual blocks of 64, and double quantization of the scales. Bit exact.
//!
//! The search for codes is [`FourBit`]'s. Source: bitsandbytes 0.50.2 (golden vectors in testdata/bnb), arXiv 2305.14314.

use super::{Codec, FourBit, Kind, dynamic_map};
use rayon::prelude::*;

/// Values that share one scale.
pub const BLOCK: usize = 64;
/// Scales that share one scale in double quantization.
pub const NESTED_BLOCK: usize = 256;
/// The code of the value 0.
pub(super) const ZERO: u8 = 7;
/// Blocks that one task works on.
const TASK_BLOCKS: usize = 1024;

/// The 16 values, ascending.
pub const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Half-way points of neighbouring values, rounded to f32.
pub(super) const PIVOTS: [f32; 15] = {
    let mut pivots = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        pivots[i] = (CODE[i] + CODE[i + 1]) / 2.0;
        i += 1;
    }
    pivots
};

/// Quantized values.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4 {
    /// Two codes a byte, the earlier one in the high half; an odd last value is followed by code 7.
    pub packed: Vec<u8>,
    /// Largest magnitude of each block of 64.
    pub absmax: Vec<f32>,
}

/// Scales after double quantization: `absmax[i] ≈ code_map[codes[i]] · absmax2[i / 256] + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct Nested {
    /// One code of the signed dynamic map per scale.
    pub codes: Vec<u8>,
    /// Largest magnitude of each block of 256 (scale − offset).
    pub absmax: Vec<f32>,
    /// Mean of the scales.
    pub offset: f32,
}

/// Returns the NF4 codes and scales of finite values, in blocks of 64.
pub fn quantize_nf4(values: &[f32]) -> Nf4 {
    let codec = FourBit { kind: Kind::Nf4, block: BLOCK };
    let [mut packed, mut scales, _] = codec.planes(values.len()).map(|n| vec![0; n]);
    codec.encode(values, [&mut packed, &mut scales, &mut []]);
    let absmax = scales.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Nf4 { packed, absmax }
}

/// Returns the scales in 8 bits. The offset is the mean summed in f64 (bitsandbytes sums in f32 in an order that
/// depends on the device; the file carries the value, so any mean is valid).
pub fn double_quantize(absmax: &[f32]) -> Nested {
    let sum: f64 = absmax.iter().map(|&v| f64::from(v)).sum();
    let offset = (sum / absmax.len().max(1) as f64) as f32;
    let centred: Vec<f32> = absmax.iter().map(|v| v - offset).collect();
    let (codes, absmax) = dynamic_map::quantize(&centred, NESTED_BLOCK);
    Nested { codes, absmax, offset }
}

impl Nested {
    /// Returns the scales as a reader will see them.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut scales = dynamic_map::dequantize(&self.codes, &self.absmax, NESTED_BLOCK);
        scales.iter_mut().for_each(|v| *v += self.offset);
        scales
    }
}

/// Writes `code[q] · absmax` of every value into `out` (f32, before any rounding to the weights' dtype).
pub fn dequantize(packed: &[u8], absmax: &[f32], out: &mut [f32]) {
    assert!(packed.len() == out.len().div_ceil(2) && absmax.len() == out.len().div_ceil(BLOCK));
    let task = TASK_BLOCKS * BLOCK;
    out.par_chunks_mut(task).zip(packed.par_chunks(task / 2)).zip(absmax.par_chunks(TASK_BLOCKS)).for_each(
        |((out, packed), absmax)| {
            for ((y, p), &m) in out.chunks_mut(BLOCK).zip(packed.chunks(BLOCK / 2)).zip(absmax) {
                for (pair, &byte) in y.chunks_mut(2).zip(p) {
                    pair[0] = CODE[usize::from(byte >> 4)] * m;
                    if let Some(second) = pair.get_mut(1) {
                        *second = CODE[usize::from(byte & 15)] * m;
                    }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests;
