//! Floats as a codec: rounded to nearest, ties to even.

use super::{Codec, PLANES};
use crate::{simd::simd, stored::Dense};
use half::{bf16, f16};

/// Values as f32, f16 or bf16.
#[derive(Clone, Copy, Debug)]
pub struct Float(pub Dense);

impl Codec for Float {
    fn unit(&self) -> usize {
        1
    }
    fn planes(&self, n: usize) -> [usize; PLANES] {
        [n * self.0.size(), 0, 0]
    }
    fn encode(&self, values: &[f32], [out, ..]: [&mut [u8]; PLANES]) -> bool {
        match self.0 {
            Dense::F32 => {
                for (b, v) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *b = v.to_le_bytes();
                }
                true
            }
            Dense::Bf16 => round_bf16(values, out),
            Dense::F16 => {
                let mut sound = true;
                for (b, v) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    let rounded = f16::from_f32(*v);
                    sound &= rounded.is_finite();
                    *b = rounded.to_le_bytes();
                }
                sound
            }
        }
    }
    fn decode(&self, [bytes, ..]: [&[u8]; PLANES], out: &mut [f32]) {
        self.0.widen(bytes, out);
    }
}

simd! {
    /// Rounds finite values to bf16. Returns whether all stay finite.
    fn round_bf16(values: &[f32], out: &mut [u8]) -> bool {
        let mut largest = 0u16;
        for (b, v) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
            let bits = v.to_bits();
            let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
            largest = largest.max(rounded & 0x7fff);
            *b = rounded.to_le_bytes();
        }
        largest < bf16::INFINITY.to_bits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_half() {
        let mut values: Vec<f32> = (0..1 << 16).map(|i| f32::from_bits(i * 0x9e37 + (i << 16))).collect();
        values.retain(|v| v.is_finite() && v.abs() < 3e38);
        values.extend([0.0, -0.0, 1.0, f32::MIN_POSITIVE, -1e-45]);
        let mut out = vec![0; 2 * values.len()];
        assert!(Float(Dense::Bf16).encode(&values, [&mut out, &mut [], &mut []]));
        for (b, v) in out.as_chunks::<2>().0.iter().zip(&values) {
            assert_eq!(*b, bf16::from_f32(*v).to_le_bytes(), "{v}");
        }
        let mut back = vec![0.0; values.len()];
        Float(Dense::Bf16).decode([&out, &[], &[]], &mut back);
        assert!(back.iter().zip(&values).all(|(b, v)| *b == bf16::from_f32(*v).to_f32()));
    }

    #[test]
    fn what_becomes_infinite_is_told() {
        let mut out = [0; 4];
        assert!(!Float(Dense::F16).encode(&[1.0, 65520.0], [&mut out, &mut [], &mut []]));
        assert!(Float(Dense::F16).encode(&[1.0, -65519.0], [&mut out, &mut [], &mut []]));
        assert!(!Float(Dense::Bf16).encode(&[-3.4e38, 1.0], [&mut out, &mut [], &mut []]));
        assert!(Float(Dense::Bf16).encode(&[3.38e38, 1.0], [&mut out, &mut [], &mut []]));
    }
}
