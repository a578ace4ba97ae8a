//! Block forms of ggml that files have and kto-quantize does not write: decoding alone.
//!
//! Q4_1: scale, minimum (f16), codes of 4 bits. Q2_K: 16 bytes of scale and minimum (4 bits each), 64 bytes of codes, two f16. Q3_K: 32
//! bytes of third bits, 64 of lower bits, 12 with sixteen 6-bit scales, one f16. IQ4_NL and IQ4_XS: codes into a table of 16 values, with one
//! scale for 32 values, or 6-bit scales for 32 of 256. That values are ggml's is checked against `testdata/gguf`.

use super::read_half;

/// A block form that is only read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOnly {
    /// 4 bits, scale and minimum for 32 values.
    Q4_1,
    /// 2 bits, 4-bit scales and minima for 16 of 256 values.
    Q2K,
    /// 3 bits, 6-bit scales for 16 of 256 values.
    Q3K,
    /// 4 bits of a table, one scale for 32 values.
    Iq4Nl,
    /// 4 bits of a table, 6-bit scales for 32 of 256 values.
    Iq4Xs,
}

/// What the codes of IQ4_NL and IQ4_XS stand for, times the scale.
const TABLE: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl ReadOnly {
    /// Returns values and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Q4_1 => (32, 20),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Iq4Nl => (32, 18),
            Self::Iq4Xs => (256, 136),
        }
    }

    /// Decodes whole blocks.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let (unit, size) = self.block();
        for (out, block) in out.chunks_exact_mut(unit).zip(bytes.chunks_exact(size)) {
            match self {
                Self::Q4_1 => q4_1(block, out),
                Self::Q2K => q2(block, out),
                Self::Q3K => q3(block, out),
                Self::Iq4Nl => table(read_half(block), &block[2..], out),
                Self::Iq4Xs => iq4_xs(block, out),
            }
        }
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, minimum) = (read_half(block), read_half(&block[2..]));
    for (i, byte) in block[4..].iter().enumerate() {
        out[i] = f32::from(byte & 15) * d + minimum;
        out[i + 16] = f32::from(byte >> 4) * d + minimum;
    }
}

/// The two bits of value `i`: four values share a byte, 32 apart.
fn pair(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

fn q2(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, dmin) = (read_half(&block[80..]), read_half(&block[82..]));
    for (i, o) in out.iter_mut().enumerate() {
        let both = scales[i / 16];
        let (step, shift) = (d * f32::from(both & 15), dmin * f32::from(both >> 4));
        *o = step * f32::from(pair(codes, i)) - shift;
    }
}

fn q3(block: &[u8], out: &mut [f32]) {
    let (third, codes, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = read_half(&block[108..]);
    let scale = |j: usize| {
        let low = packed[j % 8] >> (j / 8 * 4) & 15;
        let upper = packed[8 + j % 4] >> (j / 4 * 2) & 3;
        f32::from((low | upper << 4) as i8 - 32)
    };
    for (i, o) in out.iter_mut().enumerate() {
        let has_third = third[i % 32] >> (i / 32) & 1;
        *o = d * scale(i / 16) * f32::from(pair(codes, i) as i8 - 4 * (1 - has_third as i8));
    }
}

/// 32 values of the table: the lower halves of the bytes first.
fn table(scale: f32, codes: &[u8], out: &mut [f32]) {
    for (i, byte) in codes.iter().enumerate() {
        out[i] = scale * f32::from(TABLE[usize::from(byte & 15)]);
        out[i + 16] = scale * f32::from(TABLE[usize::from(byte >> 4)]);
    }
}

fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = read_half(block);
    let upper = u16::from_le_bytes([block[2], block[3]]);
    for (j, (out, codes)) in out.chunks_exact_mut(32).zip(block[8..].chunks_exact(16)).enumerate() {
        let low = block[4 + j / 2] >> (j % 2 * 4) & 15;
        let scale = (u16::from(low) | (upper >> (2 * j) & 3) << 4) as i8 - 32;
        table(d * f32::from(scale), codes, out);
    }
}
