//! The block forms of ggml that kto-quantize writes into GGUF files, and in [`ReadOnly`] those that it only reads.
//!
//! A row is a whole number of blocks; a block is one run of bytes in one plane. The simple forms round to 4, 5 or 8 bits with one or
//! two half-precision numbers a block of 32; the K forms ([`k`]) search scales for blocks of 256. The rules are those of ggml's
//! reference quantizers without an importance matrix. Sums are taken in ggml's order without contraction; a ggml that its compiler
//! gave fused multiply-adds picks another code here and there.

mod k;
mod read_only;
mod search;
mod simple;
#[cfg(test)]
mod tests;

pub use read_only::ReadOnly;

use super::{Codec, PLANES};

/// A block form of ggml.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ggml {
    /// 4 bits, one scale for 32 values.
    Q4_0,
    /// 5 bits, one scale for 32 values.
    Q5_0,
    /// 5 bits, scale and minimum for 32 values.
    Q5_1,
    /// 8 bits, one scale for 32 values.
    Q8_0,
    /// 4 bits, 6-bit scales and minima for 32 of 256 values.
    Q4K,
    /// 5 bits, 6-bit scales and minima for 32 of 256 values.
    Q5K,
    /// 6 bits, 8-bit scales for 16 of 256 values.
    Q6K,
}

impl Ggml {
    /// Returns values and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Q4_0 => (32, 18),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }
}

impl Codec for Ggml {
    fn unit(&self) -> usize {
        self.block().0
    }
    fn planes(&self, n: usize) -> [usize; PLANES] {
        let (values, bytes) = self.block();
        [n / values * bytes, 0, 0]
    }
    fn encode(&self, values: &[f32], [out, ..]: [&mut [u8]; PLANES]) -> bool {
        let (unit, bytes) = self.block();
        let mut sound = true;
        for (x, out) in values.chunks_exact(unit).zip(out.chunks_exact_mut(bytes)) {
            sound &= match self {
                Self::Q4_0 => simple::q4_0(x, out),
                Self::Q5_0 => simple::q5_0(x, out),
                Self::Q5_1 => simple::q5_1(x, out),
                Self::Q8_0 => simple::q8_0(x, out),
                Self::Q4K => k::q4(x, out),
                Self::Q5K => k::q5(x, out),
                Self::Q6K => k::q6(x, out),
            };
        }
        sound
    }
    fn decode(&self, [bytes, ..]: [&[u8]; PLANES], out: &mut [f32]) {
        let (unit, size) = self.block();
        for (out, block) in out.chunks_exact_mut(unit).zip(bytes.chunks_exact(size)) {
            match self {
                Self::Q4_0 => simple::from_q4_0(block, out),
                Self::Q5_0 => simple::from_q5(block, out, false),
                Self::Q5_1 => simple::from_q5(block, out, true),
                Self::Q8_0 => simple::from_q8_0(block, out),
                Self::Q4K => k::from_q4(block, out),
                Self::Q5K => k::from_q5(block, out),
                Self::Q6K => k::from_q6(block, out),
            }
        }
    }
}

/// Rounds to half precision; `None` when that is not finite.
fn half(v: f32) -> Option<half::f16> {
    Some(half::f16::from_f32(v)).filter(|h| h.is_finite())
}

/// Reads a half-precision number.
fn read_half(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}
