//! The 4-bit forms of bitsandbytes: NF4 and FP4 codes in blocks with one f32 scale each. Bit exact.
//!
//! Blocks run over the flat row-major tensor and cross rows. One rule for all sizes: code = number of pivots below
//! `x · (1/absmax)` (a value on a pivot takes the lower value's code), a block of zeros has absmax 0 and the code
//! of zero. The CPU and CUDA code of bitsandbytes 0.50 differ from each other in blocks of zeros and of subnormals; this rule decodes
//! like both, and like neither where they lose a zero.
//! Source: bitsandbytes 0.50.2 (golden vectors in testdata/bnb), arXiv 2305.14314.

use super::{Codec, PLANES, nf4};
use crate::simd::simd;

/// Values whose codes are found at a time.
const STEP: usize = 64;

/// Which 16 values a block consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Quantiles of the normal distribution.
    Nf4,
    /// A float of one sign bit, two exponent bits and one bit of fraction.
    Fp4,
}

/// The values of FP4 by code: sign, two bits of exponent and one of fraction, in the order of bitsandbytes, over 12.
const FP4: [f32; 16] = {
    let twelfths = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let mut values = [0.0; 16];
    let mut code = 1;
    while code < 8 {
        values[code] = twelfths[code] / 12.0;
        values[code + 8] = -values[code];
        code += 1;
    }
    // bitsandbytes stores the second zero without its sign.
    values
};

/// The codes of FP4 in ascending order of their values. Of the two zeros bitsandbytes gives small positive values the one with the
/// sign bit, on the CPU; its CUDA code does the opposite. Both decode to zero.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// Half-way points of neighbouring values, rounded to f32.
const FP4_PIVOTS: [f32; 15] = {
    let mut pivots = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        pivots[i] = (FP4[FP4_ORDER[i] as usize] + FP4[FP4_ORDER[i + 1] as usize]) / 2.0;
        i += 1;
    }
    pivots
};

impl Kind {
    /// Returns the values by code.
    pub fn values(self) -> [f32; 16] {
        match self {
            Self::Nf4 => nf4::CODE,
            Self::Fp4 => FP4,
        }
    }

    /// Returns the code of 0.
    fn zero(self) -> u8 {
        match self {
            Self::Nf4 => nf4::ZERO,
            Self::Fp4 => 0,
        }
    }
}

/// 4-bit codes and f32 scales: two codes a byte, the earlier in the high half; an odd last value is followed by the code of 0.
#[derive(Clone, Copy, Debug)]
pub struct FourBit {
    /// Which values.
    pub kind: Kind,
    /// Values that share a scale: even.
    pub block: usize,
}

impl Codec for FourBit {
    fn unit(&self) -> usize {
        self.block
    }
    fn planes(&self, n: usize) -> [usize; PLANES] {
        [n.div_ceil(2), 4 * n.div_ceil(self.block), 0]
    }
    fn encode(&self, values: &[f32], [packed, scales, _]: [&mut [u8]; PLANES]) -> bool {
        encode(self.kind == Kind::Nf4, self.block, values, packed, scales);
        true
    }
    fn decode(&self, [packed, scales, _]: [&[u8]; PLANES], out: &mut [f32]) {
        let values = self.kind.values();
        let blocks = out.chunks_mut(self.block).zip(packed.chunks(self.block / 2));
        for ((out, packed), scale) in blocks.zip(scales.as_chunks::<4>().0) {
            let scaled = values.map(|v| v * f32::from_le_bytes(*scale));
            for (pair, byte) in out.chunks_mut(2).zip(packed) {
                pair[0] = scaled[usize::from(byte >> 4)];
                if let Some(second) = pair.get_mut(1) {
                    *second = scaled[usize::from(byte & 15)];
                }
            }
        }
    }
}

simd! {
    fn encode(nf4: bool, block: usize, values: &[f32], packed: &mut [u8], scales: &mut [u8]) {
        let kind = if nf4 { Kind::Nf4 } else { Kind::Fp4 };
        let blocks = values.chunks(block).zip(packed.chunks_mut(block / 2));
        for ((x, packed), scale) in blocks.zip(scales.as_chunks_mut::<4>().0) {
            let absmax = largest(x);
            *scale = absmax.to_le_bytes();
            for (x, packed) in x.chunks(STEP).zip(packed.chunks_mut(STEP / 2)) {
                let codes = if absmax > 0.0 { codes(kind, &scaled(x, absmax)) } else { [kind.zero(); STEP] };
                for (byte, pair) in packed.iter_mut().zip(codes.as_chunks::<2>().0) {
                    *byte = pair[0] << 4 | pair[1];
                }
            }
        }
    }
}

/// Largest magnitude, in 16 lanes so that it vectorizes; exact in any order.
#[inline(always)]
pub(super) fn largest(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = if v.abs() > *lane { v.abs() } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(0.0, |m, v| if v.abs() > m { v.abs() } else { m })
}

/// The values over `absmax`; zeros behind the last.
#[inline(always)]
fn scaled(x: &[f32], absmax: f32) -> [f32; STEP] {
    let inverse = 1.0 / absmax;
    let mut scaled = [0.0f32; STEP];
    if inverse.is_finite() {
        scaled.iter_mut().zip(x).for_each(|(s, v)| *s = v * inverse);
    } else {
        // Below about 2.9e-39 the reciprocal overflows.
        scaled.iter_mut().zip(x).for_each(|(s, v)| *s = v / absmax);
    }
    scaled
}

/// For each value the code: by the number of pivots strictly below it.
#[inline(always)]
fn codes(kind: Kind, scaled: &[f32; STEP]) -> [u8; STEP] {
    let mut counts = [0i32; STEP];
    for pivot in if kind == Kind::Nf4 { nf4::PIVOTS } else { FP4_PIVOTS } {
        for (count, &v) in counts.iter_mut().zip(scaled) {
            *count += i32::from(v > pivot);
        }
    }
    match kind {
        Kind::Nf4 => counts.map(|c| c as u8),
        Kind::Fp4 => counts.map(|c| FP4_ORDER[c as usize]),
    }
}

#[cfg(test)]
mod tests;
