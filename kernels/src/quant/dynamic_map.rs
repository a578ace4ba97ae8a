//! The dynamic 8-bit codes of bitsandbytes, and block-wise quantization with them.
//!
//! Called by [`crate::quant::nf4`] for the scales of the scales (signed) and by [`crate::adamw8`] for the moments (signed and
//! unsigned). A code has seven decades of magnitude; decade i (from 1e-6 up) holds the midpoints of 2^i equal steps of 0.1…1 with
//! both signs, or of 2^(i+1) steps without; 0 and 1 complete the 256 values.
//! The search is exact, as in the CUDA kernel; the table look-up of the CPU back end (which moves zero) is not copied.

mod codec;

pub use codec::Codec;

use std::sync::LazyLock;

/// Index of the value 0 in the signed map.
pub const ZERO: u8 = 127;

static SIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| map(true));
static UNSIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| map(false));

/// Returns the 256 values in ascending order.
pub fn signed() -> &'static [f32; 256] {
    &SIGNED
}

/// Returns the 256 values from 0 to 1 in ascending order.
pub fn unsigned() -> &'static [f32; 256] {
    &UNSIGNED
}

/// Source: bitsandbytes 0.50.2 `create_dynamic_map`; equal bit for bit.
fn map(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0f32, 1.0];
    for decade in 0..7 {
        let steps = if signed { 1usize << decade } else { 2 << decade };
        let scale = 10f64.powi(decade - 6) as f32;
        let boundaries: Vec<f32> = (0..=steps).map(|k| linspace(k, steps)).collect();
        for pair in boundaries.windows(2) {
            let mean = scale * ((pair[0] + pair[1]) / 2.0);
            values.push(mean);
            if signed {
                values.push(-mean);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    let mut map = [0.0; 256];
    map.copy_from_slice(&values);
    map
}

/// Value k of `steps` + 1 equally spaced ones from 0.1 to 1, counted from the nearer end as torch does.
fn linspace(k: usize, steps: usize) -> f32 {
    let step = (1.0f32 - 0.1) / steps as f32;
    if k < steps.div_ceil(2) { step.mul_add(k as f32, 0.1) } else { (-step).mul_add((steps - k) as f32, 1.0) }
}

/// Returns the index of the value of `map` nearest to `x`; half-way the even index. NaN gives 0.
pub fn nearest(map: &[f32; 256], x: f32) -> u8 {
    let above = map.partition_point(|&v| v < x);
    if above == 0 {
        return 0;
    }
    if above == 256 {
        return 255;
    }
    let below = above - 1;
    let middle = (map[below] + map[above]) * 0.5;
    let up = if below % 2 == 0 { x > middle } else { x >= middle };
    if up { above as u8 } else { below as u8 }
}

/// Quantizes blocks of `block` finite values with the signed map. Returns one code per value and the largest magnitude of each block.
/// Formula: code = nearest(x · (1 / absmax)). A block of zeros gets absmax 0 and the code of 0.
pub fn quantize(values: &[f32], block: usize) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![ZERO; values.len()];
    let chunks = codes.chunks_mut(block).zip(values.chunks(block));
    let absmax = chunks.map(|(codes, values)| Codec::signed().encode(values, codes)).collect();
    (codes, absmax)
}

/// Returns `map[code] · absmax` of the code's block.
pub fn dequantize(codes: &[u8], absmax: &[f32], block: usize) -> Vec<f32> {
    codes.iter().enumerate().map(|(i, &c)| signed()[c as usize] * absmax[i / block]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maps_have_their_landmarks() {
        let map = signed();
        assert!(map.windows(2).all(|w| w[0] < w[1]));
        assert_eq!((map[127], map[255]), (0.0, 1.0));
        assert_eq!(map[0], -0.992_968_74);
        assert!((map[128] - 5.5e-7).abs() < 1e-12 && map[126] == -map[128]);
        let map = unsigned();
        assert!(map.windows(2).all(|w| w[0] < w[1]));
        assert_eq!((map[0], map[255]), (0.0, 1.0));
        assert!((map[1] - 3.25e-7).abs() < 1e-12);
    }

    #[test]
    fn nearest_is_exact() {
        for map in [signed(), unsigned()] {
            for (i, &v) in map.iter().enumerate() {
                assert_eq!(nearest(map, v) as usize, i);
            }
            for i in 0..255 {
                let middle = (map[i] + map[i + 1]) * 0.5;
                assert_eq!(nearest(map, middle.next_up().max(map[i].next_up())) as usize, i + 1);
                assert_eq!(nearest(map, middle.next_down().min(map[i + 1].next_down())) as usize, i);
                assert_eq!(nearest(map, middle) % 2, 0, "half-way between {i} and {}", i + 1);
            }
            assert_eq!((nearest(map, -2.0), nearest(map, 2.0), nearest(map, f32::NAN)), (0, 255, 0));
        }
    }

    #[test]
    fn zeros_stay_zero_and_tiny_blocks_work() {
        let (codes, absmax) = quantize(&[0.0, -0.0, 0.0, 1e-44, 0.0], 3);
        assert_eq!((codes[..3].to_vec(), absmax[0]), (vec![ZERO; 3], 0.0));
        assert_eq!((codes[3], codes[4], absmax[1]), (255, ZERO, 1e-44));
        assert_eq!(dequantize(&codes, &absmax, 3), [0.0, 0.0, 0.0, 1e-44, 0.0]);
    }
}
