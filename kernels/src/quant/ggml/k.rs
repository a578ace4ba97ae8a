//! The K forms: blocks of 256 values in groups whose scales are themselves 6 or 8 bits of one half-precision number.
//!
//! Q4_K: scale, scale of minima (f16), 12 bytes with eight 6-bit scales and minima, 128 bytes of codes. Q5_K: the same with 32 bytes of
//! fifth bits before the codes. Q6_K: 128 bytes of low halves, 64 bytes of upper pairs, 16 signed scales, one f16 behind them.

use super::{
    half, read_half,
    search::{Grid, NOTHING, each, nearest, side_by_side, symmetric, with_minimum},
};
use crate::simd::simd;

/// Values of a block.
const BLOCK: usize = 256;
/// Values of a group that has a minimum.
const GROUP: usize = 32;

pub fn q4(x: &[f32], out: &mut [u8]) -> bool {
    let mut codes = [0; BLOCK];
    if !scales_and_codes(x, Grid { most: 15.0, first: -1.0, tries: 20 }, &mut codes, out) {
        return false;
    }
    low_halves(&codes, &mut out[16..]);
    true
}

pub fn q5(x: &[f32], out: &mut [u8]) -> bool {
    let mut codes = [0; BLOCK];
    if !scales_and_codes(x, Grid { most: 31.0, first: -0.5, tries: 15 }, &mut codes, out) {
        return false;
    }
    let (fifth, low) = out[16..].split_at_mut(32);
    fifth.fill(0);
    for (group, codes) in codes.chunks(GROUP).enumerate() {
        for (byte, code) in fifth.iter_mut().zip(codes) {
            *byte |= (code >> 4) << group;
        }
    }
    low_halves(&codes, low);
    true
}

/// Writes the four lower bits of the codes: those of two neighbouring groups share bytes.
fn low_halves(codes: &[u8; BLOCK], out: &mut [u8]) {
    for (pair, bytes) in codes.chunks(2 * GROUP).zip(out.chunks_mut(GROUP)) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = pair[i] & 15 | (pair[i + GROUP] & 15) << 4;
        }
    }
}

simd! {
    /// Finds scales, minima and codes and writes the 16 bytes of the former. Returns whether they are finite.
    fn scales_and_codes(x: &[f32], grid: Grid, codes: &mut [u8; BLOCK], out: &mut [u8]) -> bool {
        let groups = side_by_side::<8, GROUP>(x);
        let mut sums = [0.0; 8];
        for v in &groups {
            sums = each(|g| sums[g] + v[g] * v[g]);
        }
        let average = sums.map(|sum| (sum / GROUP as f32).sqrt());
        let mut weights = groups;
        for v in &mut weights {
            *v = each(|g| average[g] + v[g].abs());
        }
        let found = with_minimum(&groups, &weights, grid);
        let most = |all: &[f32; 8]| all.iter().fold(0.0, |m: f32, &v| if v > m { v } else { m });
        let (most_scale, most_minimum) = (most(&found.scale), most(&found.minimum));
        let steps = |most: f32| if most > 0.0 { 63.0 / most } else { 0.0 };
        let (scale_steps, minimum_steps) = (steps(most_scale), steps(most_minimum));
        let (Some(d), Some(dmin)) = (half(most_scale / 63.0), half(most_minimum / 63.0)) else { return false };
        out[..2].copy_from_slice(&d.to_le_bytes());
        out[2..4].copy_from_slice(&dmin.to_le_bytes());
        let packed = &mut out[4..16];
        packed.fill(0);
        for (j, (scale, minimum)) in found.scale.iter().zip(&found.minimum).enumerate() {
            let six = |steps: f32, v: f32| nearest(steps * v, 0.0, 63.0) as u8;
            put_six(packed, j, six(scale_steps, *scale), six(minimum_steps, *minimum));
        }
        let (d, dmin) = (d.to_f32(), dmin.to_f32());
        for (j, (codes, x)) in codes.chunks_exact_mut(GROUP).zip(x.chunks_exact(GROUP)).enumerate() {
            let (scale, minimum) = get_six(packed, j);
            let (step, shift) = (d * f32::from(scale), dmin * f32::from(minimum));
            for (i, (code, v)) in codes.iter_mut().zip(x).enumerate() {
                // Without a step ggml leaves the code of the search.
                let new = if step == 0.0 { found.codes[i][j] } else { nearest((v + shift) / step, 0.0, grid.most) };
                *code = new as u8;
            }
        }
        true
    }
}

/// Scale and minimum of group `j`: of the first four groups six bits a byte; of the others four bits in the last bytes and two
/// above those of the first.
fn put_six(packed: &mut [u8], j: usize, scale: u8, minimum: u8) {
    if j < 4 {
        packed[j] = scale;
        packed[j + 4] = minimum;
    } else {
        packed[j + 4] = scale & 15 | (minimum & 15) << 4;
        packed[j - 4] |= scale >> 4 << 6;
        packed[j] |= minimum >> 4 << 6;
    }
}

fn get_six(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    }
}

pub fn from_q4(block: &[u8], out: &mut [f32]) {
    from_low_halves(block, &block[16..], out, |_, _| 0);
}

pub fn from_q5(block: &[u8], out: &mut [f32]) {
    let fifth = &block[16..48];
    from_low_halves(block, &block[48..], out, |group, i| (fifth[i] >> group & 1) << 4);
}

fn from_low_halves(block: &[u8], low: &[u8], out: &mut [f32], upper: impl Fn(usize, usize) -> u8) {
    let (d, dmin) = (read_half(block), read_half(&block[2..]));
    for (group, out) in out.chunks_mut(GROUP).enumerate() {
        let (scale, minimum) = get_six(&block[4..16], group);
        let (step, shift) = (d * f32::from(scale), dmin * f32::from(minimum));
        for (i, o) in out.iter_mut().enumerate() {
            let half = low[group / 2 * GROUP + i] >> (group % 2 * 4) & 15;
            *o = step * f32::from(half | upper(group, i)) - shift;
        }
    }
}

simd! {
    pub fn q6(x: &[f32], out: &mut [u8]) -> bool {
        let scales = symmetric(&side_by_side::<16, 16>(x));
        let most = scales.iter().fold(0.0f32, |most, &scale| if scale.abs() > most.abs() { scale } else { most });
        out.fill(0);
        if most.abs() < NOTHING {
            return true;
        }
        let inverse = -128.0 / most;
        let Some(d) = half(1.0 / inverse) else { return false };
        let mut codes = [0u8; BLOCK];
        for (j, (codes, x)) in codes.chunks_exact_mut(16).zip(x.chunks_exact(16)).enumerate() {
            let stored = nearest(inverse * scales[j], -128.0, 127.0);
            out[192 + j] = stored as i8 as u8;
            let step = d.to_f32() * stored;
            for (code, v) in codes.iter_mut().zip(x) {
                // ggml leaves the search's code where the step is zero; the value is zero there whatever the code.
                *code = if step == 0.0 { 32 } else { (nearest(v / step, -32.0, 31.0) + 32.0) as u8 };
            }
        }
        for half in 0..2 {
            let codes = &codes[half * 128..][..128];
            for l in 0..32 {
                let four = [codes[l], codes[l + 32], codes[l + 64], codes[l + 96]];
                out[half * 64 + l] = four[0] & 15 | (four[2] & 15) << 4;
                out[half * 64 + 32 + l] = four[1] & 15 | (four[3] & 15) << 4;
                out[128 + half * 32 + l] =
                    four[0] >> 4 | four[1] >> 4 << 2 | four[2] >> 4 << 4 | four[3] >> 4 << 6;
            }
        }
        out[208..210].copy_from_slice(&d.to_le_bytes());
        true
    }
}

pub fn from_q6(block: &[u8], out: &mut [f32]) {
    let d = read_half(&block[208..]);
    for (i, o) in out.iter_mut().enumerate() {
        let (half, l) = (i / 128, i % 128);
        let (quarter, l) = (l / 32, l % 32);
        let low = block[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
        let upper = block[128 + half * 32 + l] >> (quarter * 2) & 3;
        let scale = f32::from(block[192 + i / 16] as i8);
        *o = d * scale * (f32::from(low | upper << 4) - 32.0);
    }
}
