//! e^x in f32 by a polynomial, written so that compilers turn loops over it into SIMD; libm's is a call for every element.

/// Returns e^x within 2 units in the last place; 0 below −87.3, where the result would be subnormal, e^88 above 88, NaN for NaN.
///
/// The kernels ask for differences to a maximum and for sigmoids, where neither end matters.
/// Range reduction `x = n·ln 2 + r` with ln 2 in two parts (Cody and Waite), then a degree-7 polynomial of `r` (coefficients of
/// Cephes' expf) in pairs (Estrin), whose chain is half as long as Horner's, then the exponent is added.
#[inline(always)]
#[allow(clippy::excessive_precision)]
pub(crate) fn exp<const FUSED: bool>(x: f32) -> f32 {
    // Adding 1.5·2^23 rounds to an integer that sits in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let add = |a: f32, b: f32, c: f32| if FUSED { a.mul_add(b, c) } else { a * b + c };
    // Selects, not branches, and not `min`: they keep loops vectorizable and let NaN through.
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = add(n, 2.121_944_4e-4, add(n, -0.693_359_375, x));
    let r2 = r * r;
    let low = add(1.666_666_55e-1, r, 5.000_000_1e-1);
    let middle = add(8.333_451_9e-3, r, 4.166_579_6e-2);
    let high = add(1.987_569_15e-4, r, 1.398_199_95e-3);
    let y = add(add(add(high, r2, middle), r2, low), r2, r) + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { y * power }
}

#[cfg(test)]
mod tests {
    /// Both forms.
    fn exp(x: f32) -> f32 {
        let (plain, fused) = (super::exp::<false>(x), super::exp::<true>(x));
        assert!(
            plain.is_nan() == fused.is_nan() && (plain - fused).abs() <= 3.0 * f32::EPSILON * plain.abs()
                || plain.is_nan()
        );
        fused
    }

    #[test]
    fn close_to_libm_everywhere() {
        let mut worst = 0.0f64;
        for i in 0..=2_000_000u32 {
            let x = -87.25 + 175.2 * (i as f32 / 2_000_000.0);
            let truth = (x as f64).exp();
            worst = worst.max((exp(x) as f64 - truth).abs() / truth);
        }
        assert!(worst < 2.0 * f32::EPSILON as f64, "{worst:e}");
    }

    #[test]
    fn corners() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), exp(88.0));
        assert_eq!(exp(1e30), exp(88.0));
        assert!(exp(88.0).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }
}
