//! NF4 of bitsandbytes as stored: 4-bit codes in blocks with one scale each, the scales floats or 8-bit codes themselves.
//!
//! Blocks run over the flat row-major matrix and may cross rows. A block's 16 possible values are computed once and looked up,
//! so double-quantized scales stay as they are: one costs a table look-up, a product and a sum for a block of values.
//! Formula: value = round(code[q] · scale), one rounding to f32 and one to the checkpoint's dtype.

use super::{
    Bytes, Dense, dense, expect,
    parts::{Widening, bytes_of},
};
use crate::gpu::{DequantizeNf4, float_code};
use candle_core::{Result, bail};
use std::{ops::Range, sync::Arc};

/// What a file holds of an NF4 matrix.
pub struct Nf4Parts {
    /// Two codes a byte, the earlier in the high half.
    pub packed: Bytes,
    /// The 16 values.
    pub code: [f32; 16],
    /// One scale for each block.
    pub scales: Nf4Scales,
    /// Values that share a scale: a power of two, at least 2.
    pub block: usize,
    /// What values are rounded to before they are widened.
    pub round: Dense,
}

/// The scales of the blocks.
#[derive(Clone)]
pub enum Nf4Scales {
    /// Floats.
    Plain(Dense, Bytes),
    /// Double quantization: `map[codes[i]] · absmax[i / block] + offset`.
    Nested {
        /// One code a scale.
        codes: Bytes,
        /// The 256 values.
        map: Box<[f32; 256]>,
        /// One scale for each `block` scales.
        absmax: Vec<f32>,
        /// A power of two.
        block: usize,
        /// Mean of the scales.
        offset: f32,
    },
}

/// The checked form of [`Nf4Parts`].
#[derive(Clone)]
pub(super) struct Nf4 {
    packed: Bytes,
    code: [f32; 16],
    scales: Arc<Nf4Scales>,
    /// log₂ of the values that share a scale.
    shift: u32,
    /// log₂ of the scales that share a scale.
    nested_shift: u32,
    round: Dense,
    elements: usize,
}

impl Nf4 {
    pub fn new(parts: Nf4Parts, elements: usize) -> Result<Self> {
        let Nf4Parts { packed, code, scales, block, round } = parts;
        if !block.is_power_of_two() || block < 2 {
            bail!("a block of {block} values is not a power of two");
        }
        expect("packed bytes", packed.len(), Some(elements.div_ceil(2)))?;
        let blocks = elements.div_ceil(block);
        let nested_shift = match &scales {
            Nf4Scales::Plain(dtype, bytes) => {
                expect("bytes of scales", bytes.len(), blocks.checked_mul(dtype.size()))?;
                0
            }
            Nf4Scales::Nested { codes, absmax, block, .. } => {
                if !block.is_power_of_two() {
                    bail!("a block of {block} scales is not a power of two");
                }
                expect("codes of scales", codes.len(), Some(blocks))?;
                expect("nested scales", absmax.len(), Some(blocks.div_ceil(*block)))?;
                block.ilog2()
            }
        };
        let scales = Arc::new(scales);
        Ok(Self { packed, code, scales, shift: block.ilog2(), nested_shift, round, elements })
    }

    pub fn bytes(&self) -> usize {
        self.packed.len()
            + match &*self.scales {
                Nf4Scales::Plain(_, bytes) => bytes.len(),
                Nf4Scales::Nested { codes, absmax, .. } => codes.len() + 4 * (absmax.len() + 256),
            }
    }

    pub fn parts(&self) -> (Widening, Vec<&[u8]>) {
        let mut p = DequantizeNf4 {
            elements: self.elements as u64,
            shift: self.shift,
            nested_shift: self.nested_shift,
            nested: 0,
            scale_type: 0,
            round_type: float_code(self.round),
            offset: 0.0,
            code: self.code,
        };
        let parts: Vec<&[u8]> = match &*self.scales {
            Nf4Scales::Plain(dtype, scales) => {
                p.scale_type = float_code(*dtype);
                vec![&self.packed, scales, &[], &[]]
            }
            Nf4Scales::Nested { codes, map, absmax, offset, .. } => {
                (p.nested, p.offset) = (1, *offset);
                vec![&self.packed, codes, bytes_of(&map[..]), bytes_of(absmax)]
            }
        };
        (Widening::Nf4(p), parts)
    }

    /// Returns the slices that the matrix consists of, looked up once for many pieces.
    #[inline(always)]
    pub fn view(&self) -> View<'_> {
        let scales = match &*self.scales {
            Nf4Scales::Plain(dtype, bytes) => Scales::Plain(*dtype, bytes),
            Nf4Scales::Nested { codes, map, absmax, offset, .. } => {
                Scales::Nested { codes, map, absmax, shift: self.nested_shift, offset: *offset }
            }
        };
        View {
            packed: &self.packed,
            code: &self.code,
            scales,
            shift: self.shift,
            round: self.round,
            elements: self.elements,
        }
    }
}

/// A matrix while pieces of it are widened.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    packed: &'a [u8],
    code: &'a [f32; 16],
    scales: Scales<'a>,
    shift: u32,
    round: Dense,
    elements: usize,
}

#[derive(Clone, Copy)]
enum Scales<'a> {
    Plain(Dense, &'a [u8]),
    Nested { codes: &'a [u8], map: &'a [f32; 256], absmax: &'a [f32], shift: u32, offset: f32 },
}

impl View<'_> {
    #[inline(always)]
    fn scale(&self, block: usize) -> f32 {
        match &self.scales {
            Scales::Plain(dtype, bytes) => dense::one(*dtype, bytes, block),
            Scales::Nested { codes, map, absmax, shift, offset } => {
                let code = codes.get(block).copied().unwrap_or_default();
                map[usize::from(code)] * absmax.get(block >> shift).copied().unwrap_or_default() + offset
            }
        }
    }

    /// Calls `f(scale, first element, number of elements)` for every block that the range touches.
    #[inline(always)]
    fn for_blocks(&self, range: Range<usize>, mut f: impl FnMut(f32, usize, usize)) {
        let (mut at, end) = (range.start, range.end.min(self.elements));
        while at < end {
            let block = at >> self.shift;
            let stop = ((block + 1) << self.shift).min(end);
            f(self.scale(block), at, stop - at);
            at = stop;
        }
    }

    /// The 16 values that a block with this scale can hold.
    #[inline(always)]
    fn values(&self, scale: f32) -> [f32; 16] {
        self.code.map(|v| self.round.round(v * scale))
    }

    pub fn widen(&self, start: usize, out: &mut [f32]) {
        self.for_blocks(start..start + out.len(), |scale, at, n| {
            look_up(self.packed, at, &self.values(scale), &mut out[at - start..at - start + n]);
        });
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub fn widen_avx2(&self, start: usize, out: &mut [f32]) {
        use super::avx2::Table;
        self.for_blocks(start..start + out.len(), |scale, at, n| {
            let table = Table::new(self.code, scale, self.round);
            table.look_up(self.packed, at, &mut out[at - start..at - start + n]);
        });
    }

    /// Returns whether no element of the range can be other than finite, from the scales alone.
    pub fn all_finite(&self, range: Range<usize>) -> bool {
        // One product with the largest value bounds all of them.
        let largest = self.code.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let mut sound = true;
        self.for_blocks(range, |scale, _, _| sound &= self.round.round(scale * largest).is_finite());
        sound
    }
}

/// Writes the values of the codes from `at` on, of which there are enough.
#[inline(always)]
pub(super) fn look_up(packed: &[u8], at: usize, values: &[f32; 16], out: &mut [f32]) {
    let out = match out.split_first_mut() {
        Some((first, rest)) if at % 2 == 1 => {
            *first = values[usize::from(packed[at / 2] & 15)];
            rest
        }
        _ => out,
    };
    let bytes = packed.get(at.div_ceil(2)..).unwrap_or_default();
    for (pair, byte) in out.chunks_mut(2).zip(bytes) {
        pair[0] = values[usize::from(byte >> 4)];
        if let Some(second) = pair.get_mut(1) {
            *second = values[usize::from(byte & 15)];
        }
    }
}
