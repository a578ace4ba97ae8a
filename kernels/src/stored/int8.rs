//! LLM.int8() of bitsandbytes as stored: 8-bit codes and one scale a row.
//!
//! Formula: value = code · scale · (1/127), each product rounded to f32, as bitsandbytes' `int8_vectorwise_dequant`.

use super::{Bytes, Dense, dense, expect, parts::Widening};
use crate::gpu::{DequantizeInt8, float_code};
use candle_core::Result;
use std::ops::Range;

/// The f32 that bitsandbytes writes as 7.874015718698502e-3.
const STEP: f32 = 1.0 / 127.0;

#[derive(Clone)]
pub(super) struct Int8 {
    codes: Bytes,
    dtype: Dense,
    scales: Bytes,
    columns: usize,
}

impl Int8 {
    pub fn new(codes: Bytes, dtype: Dense, scales: Bytes, rows: usize, columns: usize) -> Result<Self> {
        expect("codes", codes.len(), Some(super::elements(rows, columns)?))?;
        expect("bytes of scales", scales.len(), rows.checked_mul(dtype.size()))?;
        Ok(Self { codes, dtype, scales, columns })
    }

    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.len()
    }

    pub fn parts(&self, rows: usize) -> (Widening, Vec<&[u8]>) {
        let (rows, columns, scale_type) = (rows as u64, self.columns as u32, float_code(self.dtype));
        (Widening::Int8(DequantizeInt8 { rows, columns, scale_type }), vec![&self.codes, &self.scales])
    }

    #[inline(always)]
    pub fn view(&self) -> View<'_> {
        View { codes: &self.codes, dtype: self.dtype, scales: &self.scales, columns: self.columns.max(1) }
    }
}

/// A matrix while pieces of it are widened.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    codes: &'a [u8],
    dtype: Dense,
    scales: &'a [u8],
    columns: usize,
}

impl View<'_> {
    #[inline(always)]
    fn scale(&self, row: usize) -> f32 {
        dense::one(self.dtype, self.scales, row)
    }

    /// Compiled for the baseline and, inside [`View::widen_avx2`], for AVX2: no operation is contracted.
    #[inline(always)]
    pub fn widen(&self, start: usize, out: &mut [f32]) {
        let mut at = start;
        let mut rest = out;
        while !rest.is_empty() {
            let row = at / self.columns;
            let here = ((row + 1) * self.columns - at).min(rest.len());
            let (now, later) = std::mem::take(&mut rest).split_at_mut(here);
            let scale = self.scale(row);
            for (o, code) in now.iter_mut().zip(self.codes.get(at..).unwrap_or_default()) {
                *o = f32::from(*code as i8) * scale * STEP;
            }
            at += here;
            rest = later;
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub fn widen_avx2(&self, start: usize, out: &mut [f32]) {
        self.widen(start, out);
    }

    /// Returns whether no element of the range can be other than finite, from the scales alone.
    pub fn all_finite(&self, range: Range<usize>) -> bool {
        let rows = range.start / self.columns..range.end.div_ceil(self.columns);
        rows.into_iter().all(|row| (self.scale(row) * 128.0).is_finite())
    }
}
