//! Small floats of MLX as stored: codes of 4 or 8 bits that are floats themselves, and for each group of a row a scale in 8 bits.
//!
//! A row is a whole number of groups, so the matrix is one stream. Of 4-bit codes the lower half of a byte comes first. Formula: value = code ·
//! scale, exact in f32: codes are E2M1 or E4M3, scales powers of two (E8M0) or E4M3. Deliberately absent: a form for GPUs, and finding codes.

use super::{Bytes, elements, expect};
use candle_core::{Result, bail};
use std::ops::Range;

/// The kinds of small floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MicroFloat {
    /// E2M1 in groups of 32, powers of two as scales.
    Mxfp4,
    /// E2M1 in groups of 16, E4M3 as scales.
    Nvfp4,
    /// E4M3 in groups of 32, powers of two as scales.
    Mxfp8,
}

impl MicroFloat {
    /// Returns the bits of a code.
    pub fn bits(self) -> usize {
        if self == Self::Mxfp8 { 8 } else { 4 }
    }

    /// Returns the values that share a scale.
    pub fn group(self) -> usize {
        if self == Self::Nvfp4 { 16 } else { 32 }
    }

    #[inline(always)]
    fn scale(self, code: u8) -> f32 {
        match self {
            Self::Nvfp4 => E4M3[usize::from(code)],
            _ => E8M0[usize::from(code)],
        }
    }
}

/// Values of four bits: a sign, two bits of exponent, one of fraction.
const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
static E4M3: [f32; 256] = e4m3();
static E8M0: [f32; 256] = e8m0();

/// 2^n for n from -149 to 127.
const fn power(n: i32) -> f32 {
    f32::from_bits(if n < -126 { 1 << (n + 149) } else { ((n + 127) as u32) << 23 })
}

/// A sign, four bits of exponent, three of fraction; all ones are no number, and there is no infinity.
const fn e4m3() -> [f32; 256] {
    let (mut all, mut code) = ([0.0; 256], 0);
    while code < 256 {
        let (exponent, fraction) = ((code >> 3 & 15) as i32, (code & 7) as f32);
        let size = match (exponent, code & 7) {
            (15, 7) => f32::NAN,
            (0, _) => fraction * power(-9),
            _ => (8.0 + fraction) * power(exponent - 10),
        };
        all[code] = if code & 128 != 0 { -size } else { size };
        code += 1;
    }
    all
}

/// Powers of two; all ones are infinite in MLX.
const fn e8m0() -> [f32; 256] {
    let (mut all, mut code) = ([f32::INFINITY; 256], 0);
    while code < 255 {
        all[code] = power(code as i32 - 127);
        code += 1;
    }
    all
}

/// The checked form of a matrix of small floats.
#[derive(Clone)]
pub(super) struct Micro {
    packed: Bytes,
    scales: Bytes,
    kind: MicroFloat,
}

impl Micro {
    pub fn new(kind: MicroFloat, packed: Bytes, scales: Bytes, rows: usize, columns: usize) -> Result<Self> {
        if !columns.is_multiple_of(kind.group()) {
            bail!("{kind:?} in groups of {} for {columns} columns", kind.group());
        }
        let n = elements(rows, columns)?;
        expect("packed bytes", packed.len(), n.checked_mul(kind.bits()).map(|b| b / 8))?;
        expect("bytes of scales", scales.len(), Some(n / kind.group()))?;
        Ok(Self { packed, scales, kind })
    }

    pub fn bytes(&self) -> usize {
        self.packed.len() + self.scales.len()
    }

    pub fn kind(&self) -> MicroFloat {
        self.kind
    }

    pub fn parts(&self) -> Vec<&[u8]> {
        vec![&self.packed, &self.scales]
    }

    #[inline(always)]
    pub fn view(&self) -> View<'_> {
        View { packed: &self.packed, scales: &self.scales, kind: self.kind }
    }
}

/// A matrix while pieces of it are widened.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    packed: &'a [u8],
    scales: &'a [u8],
    kind: MicroFloat,
}

impl View<'_> {
    #[inline(always)]
    pub fn widen(&self, start: usize, out: &mut [f32]) {
        let (mut at, mut rest, group) = (start, out, self.kind.group());
        while !rest.is_empty() {
            let here = (group - at % group).min(rest.len());
            let (now, later) = std::mem::take(&mut rest).split_at_mut(here);
            self.decode(self.kind.scale(self.scales[at / group]), at, now);
            at += here;
            rest = later;
        }
    }

    /// Writes values of one group.
    #[inline(always)]
    fn decode(&self, scale: f32, at: usize, out: &mut [f32]) {
        if self.kind == MicroFloat::Mxfp8 {
            let codes = &self.packed[at..][..out.len()];
            out.iter_mut().zip(codes).for_each(|(o, code)| *o = E4M3[usize::from(*code)] * scale);
            return;
        }
        let value = |i: usize| E2M1[usize::from(self.packed[i / 2] >> (4 * (i % 2)) & 15)] * scale;
        if !at.is_multiple_of(2) || !out.len().is_multiple_of(2) {
            out.iter_mut().enumerate().for_each(|(i, o)| *o = value(at + i));
            return;
        }
        let codes = &self.packed[at / 2..][..out.len() / 2];
        for (pair, code) in out.chunks_exact_mut(2).zip(codes) {
            pair[0] = E2M1[usize::from(code & 15)] * scale;
            pair[1] = E2M1[usize::from(code >> 4)] * scale;
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub fn widen_avx2(&self, start: usize, out: &mut [f32]) {
        self.widen(start, out);
    }

    /// Returns whether no element of the range can be other than finite.
    pub fn all_finite(&self, range: Range<usize>) -> bool {
        let (group, eight) = (self.kind.group(), self.kind == MicroFloat::Mxfp8);
        let largest = if eight { 448.0 } else { 6.0 };
        let mut scales = self.scales[range.start / group..range.end.div_ceil(group)].iter();
        scales.all(|code| (self.kind.scale(*code) * largest).is_finite())
            && (!eight || self.packed[range].iter().all(|code| code & 127 != 127))
    }
}
