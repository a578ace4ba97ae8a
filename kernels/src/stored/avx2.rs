//! AVX2 forms, eight codes at a time: a look-up for NF4 (sixteen values in two registers), arithmetic for affine codes.

use super::{
    Dense,
    affine::{self, Line},
    nf4,
};
use std::arch::x86_64::*;

/// The 16 values of one block.
pub(super) struct Table {
    low: __m256,
    high: __m256,
}

impl Table {
    /// Computes `round(code · scale)`.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub fn new(code: &[f32; 16], scale: f32, round: Dense) -> Self {
        let scale = _mm256_set1_ps(scale);
        // SAFETY: the array has 16 floats; the loads are unaligned.
        let (low, high) = unsafe { (_mm256_loadu_ps(code.as_ptr()), _mm256_loadu_ps(code.as_ptr().add(8))) };
        Self {
            low: rounded(_mm256_mul_ps(low, scale), round),
            high: rounded(_mm256_mul_ps(high, scale), round),
        }
    }

    /// Writes the values of the codes from `at` on, of which there are enough. The earlier code of a byte is its high half.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub fn look_up(&self, packed: &[u8], at: usize, out: &mut [f32]) {
        let first = out.len().min(at % 2);
        let bytes = packed.get((at + first) / 2..).unwrap_or_default();
        let (eights, rest) = out[first..].as_chunks_mut::<8>();
        let done = eights.len();
        let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        for (o, b) in eights.iter_mut().zip(bytes.as_chunks::<4>().0) {
            let codes = _mm256_srlv_epi32(_mm256_set1_epi32(i32::from_le_bytes(*b)), shifts);
            // The permutation reads three bits of a code; the fourth, moved to the sign, chooses the half.
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            let low = _mm256_permutevar8x32_ps(self.low, codes);
            let high = _mm256_permutevar8x32_ps(self.high, codes);
            // SAFETY: `o` has 8 floats; the store is unaligned.
            unsafe { _mm256_storeu_ps(o.as_mut_ptr(), _mm256_blendv_ps(low, high, upper)) };
        }
        if first + rest.len() > 0 {
            let mut values = [0.0f32; 16];
            // SAFETY: the array has 16 floats; the stores are unaligned.
            unsafe {
                _mm256_storeu_ps(values.as_mut_ptr(), self.low);
                _mm256_storeu_ps(values.as_mut_ptr().add(8), self.high);
            }
            nf4::look_up(packed, at + first + 8 * done, &values, rest);
            nf4::look_up(packed, at, &values, &mut out[..first]);
        }
    }
}

/// Decodes the affine codes from `at` on, of which there are enough and all in one group.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn decode(view: &affine::View, line: Line, at: usize, out: &mut [f32]) {
    // Eight codes begin at a byte where their first index is a multiple of eight.
    let (head, aligned) = out.split_at_mut((at.next_multiple_of(8) - at).min(out.len()));
    let (eights, rest) = aligned.as_chunks_mut::<8>();
    let first = at + head.len();
    let bits = view.bits as i32;
    let (scale, bias) = (_mm256_set1_ps(line.scale), _mm256_set1_ps(line.bias));
    let shifts = _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, 0, bits, 2 * bits, 3 * bits);
    let mask = _mm256_set1_epi32((1 << bits) - 1);
    let bytes = view.packed.get(first / 8 * view.bits..).unwrap_or_default();
    for (i, o) in eights.iter_mut().enumerate() {
        let word = word(bytes.get(i * view.bits..).unwrap_or_default());
        let (low, high) = (word as i32, (word >> (4 * bits)) as i32);
        let words = _mm256_set_m128i(_mm_set1_epi32(high), _mm_set1_epi32(low));
        let codes = _mm256_and_si256(_mm256_srlv_epi32(words, shifts), mask);
        let product = rounded(_mm256_mul_ps(_mm256_cvtepi32_ps(codes), scale), view.dtype);
        let value = rounded(_mm256_add_ps(product, bias), view.dtype);
        // SAFETY: `o` has 8 floats; the store is unaligned.
        unsafe { _mm256_storeu_ps(o.as_mut_ptr(), value) };
    }
    view.decode(line, first + 8 * eights.len(), rest);
    view.decode(line, at, head);
}

/// The first eight bytes as a word; zeros behind the end.
#[inline]
fn word(bytes: &[u8]) -> u64 {
    match bytes.first_chunk::<8>() {
        Some(eight) => u64::from_le_bytes(*eight),
        None => bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    }
}

/// Rounds to `dtype`, nearest and ties to even, and widens again.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn rounded(v: __m256, dtype: Dense) -> __m256 {
    match dtype {
        Dense::F32 => v,
        Dense::F16 => _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)),
        Dense::Bf16 => {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v);
            let cut = _mm256_and_si256(up, _mm256_set1_epi32(0xffff_0000u32 as i32));
            // A NaN stays one, with the bits that the half crate gives it.
            let quiet = _mm256_set1_epi32(0x0040_0000);
            let kept =
                _mm256_and_si256(_mm256_or_si256(bits, quiet), _mm256_set1_epi32(0xffff_0000u32 as i32));
            _mm256_blendv_ps(_mm256_castsi256_ps(cut), _mm256_castsi256_ps(kept), nan)
        }
    }
}
