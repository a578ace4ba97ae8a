//! Floats as stored: f32, f16 and bf16, little-endian.

use half::{bf16, f16};
use std::ops::Range;

/// A float type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dense {
    /// 32 bits.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of an f32.
    Bf16,
}

impl Dense {
    /// Returns the bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Writes values rounded to this type, as far as `out` has room for them.
    pub fn encode(self, values: &[f32], out: &mut [u8]) {
        match self {
            Self::F32 => {
                let each = |(o, v): (&mut [u8], &f32)| o.copy_from_slice(&v.to_le_bytes());
                out.chunks_exact_mut(4).zip(values).for_each(each);
            }
            Self::F16 => {
                let each = |(o, v): (&mut [u8], &f32)| o.copy_from_slice(&f16::from_f32(*v).to_le_bytes());
                out.chunks_exact_mut(2).zip(values).for_each(each);
            }
            Self::Bf16 => {
                let each = |(o, v): (&mut [u8], &f32)| o.copy_from_slice(&bf16::from_f32(*v).to_le_bytes());
                out.chunks_exact_mut(2).zip(values).for_each(each);
            }
        }
    }

    /// Writes as many values as `out` holds, as f32.
    pub(crate) fn widen(self, bytes: &[u8], out: &mut [f32]) {
        widen(self, bytes, 0, out);
    }

    /// Rounds a value into its bytes. Returns whether it is finite there.
    pub(crate) fn store(self, v: f32, bytes: &mut [u8]) -> bool {
        match self {
            Self::F32 => bytes.copy_from_slice(&v.to_le_bytes()),
            Self::F16 => bytes.copy_from_slice(&f16::from_f32(v).to_le_bytes()),
            Self::Bf16 => bytes.copy_from_slice(&bf16::from_f32(v).to_le_bytes()),
        }
        self.round(v).is_finite()
    }

    /// Rounds to this type, nearest and ties to even, and widens again.
    #[inline(always)]
    pub(crate) fn round(self, v: f32) -> f32 {
        match self {
            Self::F32 => v,
            Self::F16 => f16::from_f32(v).to_f32(),
            Self::Bf16 => bf16::from_f32(v).to_f32(),
        }
    }
}

/// The bytes of the elements from `start` on, at most `n` of them.
#[inline(always)]
fn part(dtype: Dense, bytes: &[u8], start: usize, n: usize) -> &[u8] {
    let size = dtype.size();
    let end = bytes.len().min((start + n) * size);
    bytes.get(start * size..end).unwrap_or_default()
}

#[inline(always)]
pub(super) fn widen(dtype: Dense, bytes: &[u8], start: usize, out: &mut [f32]) {
    let bytes = part(dtype, bytes, start, out.len());
    match dtype {
        Dense::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
        }
        Dense::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        Dense::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f16::from_le_bytes(*b).to_f32();
            }
        }
    }
}

/// Element `index`; 0 behind the end.
#[inline(always)]
pub(super) fn one(dtype: Dense, bytes: &[u8], index: usize) -> f32 {
    let mut value = [0.0];
    widen(dtype, bytes, index, &mut value);
    value[0]
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen_avx2(dtype: Dense, bytes: &[u8], start: usize, out: &mut [f32]) {
    use std::arch::x86_64::*;
    if dtype != Dense::F16 {
        return widen(dtype, bytes, start, out);
    }
    let bytes = part(dtype, bytes, start, out.len());
    let (eights, rest) = bytes.as_chunks::<16>();
    let (wide, narrow) = out[..bytes.len() / 2].as_chunks_mut::<8>();
    for (o, b) in wide.iter_mut().zip(eights) {
        // SAFETY: `b` has 16 bytes and `o` 8 floats; both accesses are unaligned.
        unsafe { _mm256_storeu_ps(o.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(b.as_ptr().cast()))) };
    }
    widen(dtype, rest, 0, narrow);
}

/// Returns whether the elements `range` hold neither a NaN nor an infinity, without branches in the loop.
pub(super) fn all_finite(dtype: Dense, bytes: &[u8], range: Range<usize>) -> bool {
    let bytes = part(dtype, bytes, range.start, range.len());
    let halves = |exponent: u16| {
        let mut bad = 0u16;
        for b in bytes.as_chunks::<2>().0 {
            bad |= u16::from(u16::from_le_bytes(*b) & exponent == exponent);
        }
        bad == 0
    };
    match dtype {
        Dense::F16 => halves(0x7c00),
        Dense::Bf16 => halves(0x7f80),
        Dense::F32 => {
            let mut bad = 0u32;
            for b in bytes.as_chunks::<4>().0 {
                bad |= u32::from(u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000);
            }
            bad == 0
        }
    }
}
