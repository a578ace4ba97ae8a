//! Affine quantization of MLX as stored: codes of 2 to 8 bits, and for each group of a row a scale and a bias.
//!
//! A row is a stream of codes, least significant bit first, and a whole number of groups, so the matrix is one stream too.
//! Eight codes are as many bytes as a code has bits, and four of them fit 32 bits: that is the unit of the SIMD form.
//! Formula: value = round(round(code · scale) + bias), rounded to the dtype of scale and bias as MLX on a CPU does.

use super::{Bytes, Dense, dense, elements, expect, parts::Widening};
use crate::gpu::{DequantizeAffine, float_code};
use candle_core::{Result, bail};
use std::ops::Range;

/// What a file holds of a matrix in affine quantization.
pub struct AffineParts {
    /// Codes, least significant bit first.
    pub packed: Bytes,
    /// Type of scales and biases, and of the values.
    pub dtype: Dense,
    /// One for each group.
    pub scales: Bytes,
    /// One for each group.
    pub biases: Bytes,
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: usize,
    /// Values in a group: a power of two, at least 32, that divides the columns.
    pub group: usize,
}

/// The checked form of [`AffineParts`].
#[derive(Clone)]
pub(super) struct Affine {
    packed: Bytes,
    dtype: Dense,
    scales: Bytes,
    biases: Bytes,
    bits: usize,
    /// log₂ of the values in a group.
    shift: u32,
}

impl Affine {
    pub fn new(parts: AffineParts, rows: usize, columns: usize) -> Result<Self> {
        let AffineParts { packed, dtype, scales, biases, bits, group } = parts;
        if !matches!(bits, 2..=6 | 8)
            || !group.is_power_of_two()
            || group < 32
            || !columns.is_multiple_of(group)
        {
            bail!("{bits} bits in groups of {group} for {columns} columns");
        }
        let n = elements(rows, columns)?;
        expect("packed bytes", packed.len(), n.checked_mul(bits).map(|b| b / 8))?;
        for (what, bytes) in [("bytes of scales", &scales), ("bytes of biases", &biases)] {
            expect(what, bytes.len(), (n / group).checked_mul(dtype.size()))?;
        }
        Ok(Self { packed, dtype, scales, biases, bits, shift: group.ilog2() })
    }

    pub fn bytes(&self) -> usize {
        self.packed.len() + self.scales.len() + self.biases.len()
    }

    pub fn bits(&self) -> usize {
        self.bits
    }

    pub fn parts(&self, elements: usize) -> (Widening, Vec<&[u8]>) {
        let (elements, bits, float) = (elements as u64, self.bits as u32, float_code(self.dtype));
        let p = DequantizeAffine { elements, bits, shift: self.shift, float, unused: 0 };
        (Widening::Affine(p), vec![&self.packed, &self.scales, &self.biases])
    }

    #[inline(always)]
    pub fn view(&self) -> View<'_> {
        View {
            packed: &self.packed,
            dtype: self.dtype,
            scales: &self.scales,
            biases: &self.biases,
            bits: self.bits,
            shift: self.shift,
        }
    }
}

/// A matrix while pieces of it are widened.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub packed: &'a [u8],
    pub dtype: Dense,
    scales: &'a [u8],
    biases: &'a [u8],
    pub bits: usize,
    shift: u32,
}

/// Scale and bias of one group.
#[derive(Clone, Copy)]
pub(super) struct Line {
    pub scale: f32,
    pub bias: f32,
}

impl View<'_> {
    #[inline(always)]
    fn line(&self, group: usize) -> Line {
        Line {
            scale: dense::one(self.dtype, self.scales, group),
            bias: dense::one(self.dtype, self.biases, group),
        }
    }

    /// Calls `f(scale and bias, first element, part of out)` for every group that the range touches.
    #[inline(always)]
    fn for_groups(&self, start: usize, out: &mut [f32], mut f: impl FnMut(Line, usize, &mut [f32])) {
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let group = at >> self.shift;
            let here = (((group + 1) << self.shift) - at).min(rest.len());
            let (now, later) = std::mem::take(&mut rest).split_at_mut(here);
            f(self.line(group), at, now);
            at += here;
            rest = later;
        }
    }

    /// The code of element `at`; 0 behind the end.
    #[inline(always)]
    fn code(&self, at: usize) -> u16 {
        let bit = at * self.bits;
        let byte = |i: usize| u16::from(self.packed.get(i).copied().unwrap_or_default());
        (byte(bit / 8) | byte(bit / 8 + 1) << 8) >> (bit % 8) & ((1 << self.bits) - 1)
    }

    #[inline(always)]
    fn value(&self, line: Line, code: u16) -> f32 {
        self.dtype.round(self.dtype.round(f32::from(code) * line.scale) + line.bias)
    }

    pub fn widen(&self, start: usize, out: &mut [f32]) {
        self.for_groups(start, out, |line, at, now| self.decode(line, at, now));
    }

    #[inline(always)]
    pub fn decode(&self, line: Line, at: usize, out: &mut [f32]) {
        for (i, o) in out.iter_mut().enumerate() {
            *o = self.value(line, self.code(at + i));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub fn widen_avx2(&self, start: usize, out: &mut [f32]) {
        self.for_groups(start, out, |line, at, now| super::avx2::decode(self, line, at, now));
    }

    /// Returns whether no element of the range can be other than finite: values lie between those of the extreme codes.
    pub fn all_finite(&self, range: Range<usize>) -> bool {
        let groups = range.start >> self.shift..range.end.div_ceil(1 << self.shift);
        groups
            .into_iter()
            .map(|group| self.line(group))
            .all(|line| [0, (1 << self.bits) - 1].into_iter().all(|code| self.value(line, code).is_finite()))
    }
}
