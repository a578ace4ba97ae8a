//! The forms with one scale, or scale and minimum, for 32 values.
//!
//! Layout of a block: scale (f16), minimum (f16, Q5_1 alone), the fifth bits (32 of them, Q5 alone), then codes: value i in the low
//! half of byte i, value i + 16 in its high half. Q8_0 has a signed byte a value.

use super::{half, read_half};
use crate::{quant::four_bit::largest, simd::simd};

/// The value of the largest magnitude, with its sign; the first of several.
fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most: f32, &v| if v.abs() > most.abs() { v } else { most })
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

pub fn q4_0(x: &[f32], out: &mut [u8]) -> bool {
    let d = extreme(x) / -8.0;
    let id = inverse(d);
    let Some(stored) = half(d) else { return false };
    out[..2].copy_from_slice(&stored.to_le_bytes());
    let code = |v: f32| ((v * id + 8.5) as i8).min(15) as u8;
    for (i, byte) in out[2..].iter_mut().enumerate() {
        *byte = code(x[i]) | code(x[i + 16]) << 4;
    }
    true
}

pub fn from_q4_0(block: &[u8], out: &mut [f32]) {
    let d = read_half(block);
    for (i, byte) in block[2..].iter().enumerate() {
        out[i] = (f32::from(byte & 15) - 8.0) * d;
        out[i + 16] = (f32::from(byte >> 4) - 8.0) * d;
    }
}

pub fn q5_0(x: &[f32], out: &mut [u8]) -> bool {
    let d = extreme(x) / -16.0;
    let id = inverse(d);
    let Some(stored) = half(d) else { return false };
    out[..2].copy_from_slice(&stored.to_le_bytes());
    five_bits(&mut out[2..], |i| ((x[i] * id + 16.5) as i8).min(31) as u8);
    true
}

pub fn q5_1(x: &[f32], out: &mut [u8]) -> bool {
    let (low, high) = x
        .iter()
        .fold((f32::MAX, f32::MIN), |(l, h), &v| (if v < l { v } else { l }, if v > h { v } else { h }));
    let d = (high - low) / 31.0;
    let id = inverse(d);
    let (Some(stored), Some(minimum)) = (half(d), half(low)) else { return false };
    out[..2].copy_from_slice(&stored.to_le_bytes());
    out[2..4].copy_from_slice(&minimum.to_le_bytes());
    five_bits(&mut out[4..], |i| ((x[i] - low) * id + 0.5) as u8);
    true
}

/// Writes 32 codes of 5 bits: the fifth bits first.
fn five_bits(out: &mut [u8], code: impl Fn(usize) -> u8) {
    let mut fifth = 0u32;
    for i in 0..16 {
        let (a, b) = (code(i), code(i + 16));
        out[4 + i] = (a & 15) | (b & 15) << 4;
        fifth |= u32::from(a >> 4 & 1) << i | u32::from(b >> 4 & 1) << (i + 16);
    }
    out[..4].copy_from_slice(&fifth.to_le_bytes());
}

pub fn from_q5(block: &[u8], out: &mut [f32], with_minimum: bool) {
    let d = read_half(block);
    let (shift, minimum, rest) =
        if with_minimum { (0.0, read_half(&block[2..]), &block[4..]) } else { (16.0, 0.0, &block[2..]) };
    let fifth = u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]);
    for i in 0..16 {
        let byte = rest[4 + i];
        let a = (byte & 15) | ((fifth >> i & 1) as u8 * 16);
        let b = (byte >> 4) | ((fifth >> (i + 16) & 1) as u8 * 16);
        let value = |code: u8| (f32::from(code) - shift) * d;
        // Without a minimum a zero keeps its sign.
        let value = |code| if with_minimum { value(code) + minimum } else { value(code) };
        out[i] = value(a);
        out[i + 16] = value(b);
    }
}

simd! {
    pub fn q8_0(x: &[f32], out: &mut [u8]) -> bool {
        let d = largest(x) / 127.0;
        let id = inverse(d);
        let Some(stored) = half(d) else { return false };
        out[..2].copy_from_slice(&stored.to_le_bytes());
        for (byte, v) in out[2..].iter_mut().zip(x) {
            // Halves away from zero, as `round`, which is no vector instruction.
            let (v, whole) = (v * id, (v * id).trunc());
            let away = if (v - whole).abs() >= 0.5 { 1f32.copysign(v) } else { 0.0 };
            *byte = (whole + away) as i8 as u8;
        }
        true
    }
}

pub fn from_q8_0(block: &[u8], out: &mut [f32]) {
    let d = read_half(block);
    for (o, byte) in out.iter_mut().zip(&block[2..]) {
        *o = f32::from(*byte as i8) * d;
    }
}
