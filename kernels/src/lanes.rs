//! Sums over a row with a fixed order of additions that SIMD can follow.

use crate::real::Real;

/// Partial sums side by side, so that the loop is SIMD; the order of all additions is fixed.
const LANES: usize = 16;

/// Returns Σ f(j) for j below `n`.
#[inline(always)]
pub(crate) fn lane_sum<T: Real>(n: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let whole = n / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(at + l);
        }
    }
    let mut sum = T::ZERO;
    for lane in lanes {
        sum += lane;
    }
    for j in whole..n {
        sum += f(j);
    }
    sum
}
