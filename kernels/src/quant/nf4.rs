//! NF4 of bitsandbytes: 4-bit codes in blocks of 64, and double quantization of the scales. Bit exact.
//!
//! Called by kto-quantize. Blocks run over the flat row-major tensor and cross rows. One rule for all sizes:
//! code = number of pivots below `x · (1/absmax)` (a value on a pivot takes the lower code), a block of zeros has
//! absmax 0 and code 7. The CPU and CUDA code of bitsandbytes 0.50 differ from each other in blocks of zeros and of
//! subnormals; this rule decodes like both, and like neither where they lose a zero.
//! Source: bitsandbytes 0.50.2 (golden vectors in testdata/bnb), arXiv 2305.14314.

use super::dynamic_map;
use rayon::prelude::*;

/// Values that share one scale.
pub const BLOCK: usize = 64;
/// Scales that share one scale in double quantization.
pub const NESTED_BLOCK: usize = 256;
/// The code of the value 0.
const ZERO: u8 = 7;
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
const PIVOTS: [f32; 15] = {
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

/// Returns the NF4 codes and scales of finite values.
pub fn quantize_nf4(values: &[f32]) -> Nf4 {
    let mut packed = vec![0; values.len().div_ceil(2)];
    let mut absmax = vec![0.0; values.len().div_ceil(BLOCK)];
    quantize_into(values, &mut packed, &mut absmax);
    Nf4 { packed, absmax }
}

/// As [`quantize_nf4`], into buffers of ⌈n/2⌉ bytes and ⌈n/64⌉ scales. To quantize a long tensor piece by piece,
/// every piece but the last must be a multiple of 64 values.
pub fn quantize_into(values: &[f32], packed: &mut [u8], absmax: &mut [f32]) {
    assert!(packed.len() == values.len().div_ceil(2) && absmax.len() == values.len().div_ceil(BLOCK));
    let task = TASK_BLOCKS * BLOCK;
    values
        .par_chunks(task)
        .zip(packed.par_chunks_mut(task / 2))
        .zip(absmax.par_chunks_mut(TASK_BLOCKS))
        .for_each(|((values, packed), absmax)| {
            for ((x, p), m) in values.chunks(BLOCK).zip(packed.chunks_mut(BLOCK / 2)).zip(absmax) {
                *m = quantize_block(x, p);
            }
        });
}

/// Writes the scale of every block of `values`: the first half of [`quantize_into`] alone.
pub fn block_absmax(values: &[f32], absmax: &mut [f32]) {
    assert_eq!(absmax.len(), values.len().div_ceil(BLOCK));
    values.par_chunks(TASK_BLOCKS * BLOCK).zip(absmax.par_chunks_mut(TASK_BLOCKS)).for_each(
        |(values, absmax)| {
            for (x, m) in values.chunks(BLOCK).zip(absmax) {
                *m = largest(x);
            }
        },
    );
}

/// Largest magnitude, in eight lanes so that it vectorizes; exact in any order.
fn largest(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (eights, rest) = x.as_chunks::<8>();
    for eight in eights {
        for (lane, v) in lanes.iter_mut().zip(eight) {
            *lane = if v.abs() > *lane { v.abs() } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(0.0, |m, v| if v.abs() > m { v.abs() } else { m })
}

/// Packs one block of at most 64 values and returns its scale.
fn quantize_block(x: &[f32], packed: &mut [u8]) -> f32 {
    let absmax = largest(x);
    let mut codes = [ZERO; BLOCK];
    if absmax > 0.0 {
        let inverse = 1.0 / absmax;
        let mut scaled = [0.0f32; BLOCK];
        if inverse.is_finite() {
            scaled.iter_mut().zip(x).for_each(|(s, v)| *s = v * inverse);
        } else {
            // Below about 2.9e-39 the reciprocal overflows.
            scaled.iter_mut().zip(x).for_each(|(s, v)| *s = v / absmax);
        }
        codes = count_pivots(&scaled);
    }
    for (byte, pair) in packed.iter_mut().zip(codes.as_chunks::<2>().0) {
        *byte = pair[0] << 4 | pair[1];
    }
    absmax
}

/// For each value the number of pivots strictly below it.
fn count_pivots(scaled: &[f32; BLOCK]) -> [u8; BLOCK] {
    let mut counts = [0i32; BLOCK];
    for pivot in PIVOTS {
        for (count, &v) in counts.iter_mut().zip(scaled) {
            *count += i32::from(v > pivot);
        }
    }
    counts.map(|c| c as u8)
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
