//! A dynamic map with its search: a table look-up and one comparison a value, with the results of [`nearest`].
//!
//! Called once per value and step by [`crate::adamw8`], where the search through 256 values would be most of the time.
//! Called within [`crate::simd`], it becomes gathers: so both tables are of 32 bits.
//! Invariant: equal to [`nearest`] for every f32 but NaN. The index grows with the magnitude, and the bits of a magnitude grow with it; their upper half
//! cuts the magnitudes into buckets of 1/128 of a binade, which are narrower than the map's gaps: a bucket meets one end of a gap at most.

use super::{ZERO, nearest, signed, unsigned};
use std::sync::LazyLock;

/// Upper halves of the bits of 2^-23, below which every magnitude is nearest to 0, and of 1.
const FIRST: u32 = 0x3400;
const LAST: u32 = 0x3f80;
const BUCKETS: usize = (LAST - FIRST + 1) as usize;

static SIGNED: LazyLock<Codec> = LazyLock::new(|| Codec::new(signed(), ZERO));
static UNSIGNED: LazyLock<Codec> = LazyLock::new(|| Codec::new(unsigned(), 0));

/// A map with the tables of its search. The place of a magnitude is its distance from the index of 0.
pub struct Codec {
    map: &'static [f32; 256],
    zero: u8,
    /// Place of the least magnitude of each bucket.
    starts: [u32; BUCKETS],
    /// Bits of the least magnitude whose place is above this one; for the last none has such bits.
    ends: [u32; 256],
}

impl Codec {
    /// Returns the signed map's.
    pub fn signed() -> &'static Self {
        &SIGNED
    }

    /// Returns the unsigned map's.
    pub fn unsigned() -> &'static Self {
        &UNSIGNED
    }

    fn new(map: &'static [f32; 256], zero: u8) -> Self {
        let mut ends = [u32::MAX; 256];
        for (end, pair) in ends.iter_mut().zip(map[zero as usize..].windows(2)) {
            let middle = (pair[0] + pair[1]) * 0.5;
            let up = map[nearest(map, middle) as usize] == pair[1];
            *end = if up { middle.to_bits() } else { middle.next_up().to_bits() };
        }
        let mut starts = [0; BUCKETS];
        for (upper, start) in (FIRST..).zip(&mut starts) {
            *start = u32::from(nearest(map, f32::from_bits(upper << 16)) - zero);
        }
        Self { map, zero, starts, ends }
    }

    /// Returns the index of the value 0.
    pub fn zero(&self) -> u8 {
        self.zero
    }

    /// Returns what [`nearest`] returns for a number. Without a branch: signs and gaps are as good as random.
    #[inline(always)]
    pub fn nearest(&self, x: f32) -> u8 {
        let (magnitude, sign) = (x.to_bits() & (u32::MAX >> 1), (x.to_bits() >> 31) as i32);
        let bucket = (magnitude >> 16).clamp(FIRST, LAST) - FIRST;
        let start = self.starts[bucket as usize];
        let place = start as i32 + i32::from(magnitude >= self.ends[start as usize & 255]);
        // The two's complement of a negative number's place. The signed map has no −1, the unsigned one nothing below 0.
        (i32::from(self.zero) + ((place ^ -sign) + sign)).max(0) as u8
    }

    /// Writes the codes of finite values, a block, and returns the block's largest magnitude.
    #[inline(always)]
    pub fn encode(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        // As integers, whose maximum compilers make SIMD of.
        let bits = values.iter().fold(0, |most, v| v.abs().to_bits().max(most));
        let largest = f32::from_bits(bits);
        let inverse = 1.0 / largest;
        if inverse.is_finite() {
            codes.iter_mut().zip(values).for_each(|(c, v)| *c = self.nearest(v * inverse));
        } else if largest > 0.0 {
            codes.iter_mut().zip(values).for_each(|(c, v)| *c = self.nearest(v / largest));
        } else {
            codes.fill(self.zero);
        }
        largest
    }

    /// Writes the values of a block's codes.
    #[inline(always)]
    pub fn decode(&self, codes: &[u8], absmax: f32, values: &mut [f32]) {
        values.iter_mut().zip(codes).for_each(|(v, c)| *v = self.map[*c as usize] * absmax);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both searches are step functions that grow with the magnitude, and within a bucket the codec's has one step at most.
    /// So they are equal everywhere when they are at both ends of every bucket and on both sides of every step.
    #[test]
    fn the_search_is_equal_to_nearest_everywhere() {
        for codec in [Codec::signed(), Codec::unsigned()] {
            let buckets = (0..0x7f80u32).flat_map(|upper| [upper << 16, (upper << 16) | 0xffff]);
            let buckets = buckets.chain([f32::INFINITY.to_bits()]);
            let steps = codec.map.windows(2).flat_map(|w| {
                let middle = (w[0].abs() + w[1].abs()) * 0.5;
                [middle.next_down(), middle, middle.next_up(), w[0].abs(), w[1].abs()].map(f32::to_bits)
            });
            let mut checked = 0;
            for x in buckets.chain(steps).map(f32::from_bits) {
                for x in [x, -x] {
                    assert_eq!(codec.nearest(x), nearest(codec.map, x), "{x:e}");
                    checked += 1;
                }
            }
            assert!(checked > 130_000);
            // One step at most: no two ends lie in one bucket.
            let ends: Vec<u32> = codec.ends.iter().filter(|e| **e != u32::MAX).map(|e| e >> 16).collect();
            assert_eq!(ends.len(), 255 - codec.zero as usize);
            assert!(ends.windows(2).all(|w| w[0] < w[1]) && ends[0] > FIRST && ends.last() < Some(&LAST));
        }
    }

    #[test]
    fn a_block_keeps_its_largest_value_and_its_zeros() {
        for codec in [Codec::signed(), Codec::unsigned()] {
            for largest in [1e-44f32, 1e-39, 3e-39, 1.0, 0.3, 1e20, f32::MAX] {
                let values = [0.0, largest, -0.0, largest * 0.5];
                let (mut codes, mut back) = ([9; 4], [f32::NAN; 4]);
                let absmax = codec.encode(&values, &mut codes);
                assert_eq!((absmax, codes[0], codes[1], codes[2]), (largest, codec.zero, 255, codec.zero));
                codec.decode(&codes, absmax, &mut back);
                assert_eq!((back[0].to_bits(), back[1], back[2].to_bits()), (0, largest, 0));
                assert!((back[3] - values[3]).abs() <= 0.01 * largest, "{largest:e}: {back:?}");
            }
            let mut codes = [9; 3];
            assert_eq!((codec.encode(&[0.0, -0.0, 0.0], &mut codes), codes), (0.0, [codec.zero; 3]));
        }
    }
}
