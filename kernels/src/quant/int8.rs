//! LLM.int8() of bitsandbytes: one signed byte a value, one f32 scale a row. Bit exact with `int8_vectorwise_quant`.
//!
//! transformers rounds a weight to f16 before it hands it over, so values are rounded first.
//! Formula: scale = largest magnitude of the row; code = rint(x · (1/scale · 127)); a row of zeros has codes 0.

use super::{Codec, PLANES, four_bit::largest};
use crate::simd::simd;
use half::{f16, slice::HalfFloatSliceExt};

/// Codes of a matrix with this many columns.
#[derive(Clone, Copy, Debug)]
pub struct Int8 {
    /// Values of a row.
    pub columns: usize,
}

impl Codec for Int8 {
    fn unit(&self) -> usize {
        self.columns
    }
    fn planes(&self, n: usize) -> [usize; PLANES] {
        [n, 4 * (n / self.columns.max(1)), 0]
    }
    fn encode(&self, values: &[f32], [codes, scales, _]: [&mut [u8]; PLANES]) -> bool {
        let mut sound = true;
        let (mut row, mut halves) = (vec![0.0; self.columns], vec![f16::ZERO; self.columns]);
        let rows = values.chunks(self.columns.max(1)).zip(codes.chunks_mut(self.columns.max(1)));
        for ((values, codes), scale) in rows.zip(scales.as_chunks_mut::<4>().0) {
            halves.convert_from_f32_slice(values);
            halves.convert_to_f32_slice(&mut row);
            let absmax = magnitude(&row);
            sound &= absmax.is_finite();
            *scale = absmax.to_le_bytes();
            // torch divides a number by a tensor as the number times the reciprocals.
            let factor = if absmax > 0.0 { 1.0 / absmax * 127.0 } else { 0.0 };
            round(&row, factor, codes);
        }
        sound
    }
    fn decode(&self, [codes, scales, _]: [&[u8]; PLANES], out: &mut [f32]) {
        let rows = out.chunks_mut(self.columns.max(1)).zip(codes.chunks(self.columns.max(1)));
        for ((out, codes), scale) in rows.zip(scales.as_chunks::<4>().0) {
            let scale = f32::from_le_bytes(*scale);
            for (o, code) in out.iter_mut().zip(codes) {
                *o = f32::from(*code as i8) * scale * (1.0 / 127.0);
            }
        }
    }
}

simd! {
    fn magnitude(row: &[f32]) -> f32 {
        largest(row)
    }
}

simd! {
    fn round(row: &[f32], factor: f32, codes: &mut [u8]) {
        for (code, v) in codes.iter_mut().zip(row) {
            *code = (v * factor).round_ties_even() as i8 as u8;
        }
    }
}
