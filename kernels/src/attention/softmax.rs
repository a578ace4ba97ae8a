//! Softmax over a row that comes tile by tile (arXiv 1805.02867), and its way back.
//!
//! Rows are padded to whole groups of [`LANES`]; the order of all additions is fixed.

use crate::{real::Real, simd::simd};
use std::ops::Range;

/// Elements taken together, so that a loop over a row is SIMD.
pub(super) const LANES: usize = 16;

/// What is known of a row after some of its tiles.
#[derive(Clone, Copy)]
pub(super) struct State<T> {
    /// The largest score.
    pub max: T,
    /// Sum of all e^(score − max).
    pub sum: T,
}

impl<T: Real> State<T> {
    /// Of a row without scores.
    pub const NONE: Self = Self { max: T::NEG_INFINITY, sum: T::ZERO };
}

#[inline(always)]
fn total<T: Real>(lanes: [T; LANES]) -> T {
    let mut sum = T::ZERO;
    for lane in lanes {
        sum += lane;
    }
    sum
}

/// Masks what is not visible in a padded row: minus infinity before it and in the last group that has something to see, zero behind.
/// Returns the groups up to that.
#[inline(always)]
fn mask<T: Real>(row: &mut [T], visible: Range<usize>) -> &mut [[T; LANES]] {
    let (row, hidden) = row.split_at_mut(visible.end.next_multiple_of(LANES));
    row[..visible.start].fill(T::NEG_INFINITY);
    row[visible.end..].fill(T::NEG_INFINITY);
    hidden.fill(T::ZERO);
    row.as_chunks_mut::<LANES>().0
}

/// tanh by our exponential; absolute errors are some roundings of 1.
#[inline(always)]
fn tanh<T: Real, const FUSED: bool>(x: T) -> T {
    let two = T::ONE + T::ONE;
    T::ONE - two / ((x * two).exp::<FUSED>() + T::ONE)
}

simd! {
    /// `s ← cap·tanh(s / cap)`
    pub(crate) fn cap<T: Real>(scores: &mut [T], cap: T) {
        for s in scores.iter_mut() {
            *s = cap * tanh::<T, FUSED>(*s / cap);
        }
    }
}

simd! {
    /// `ds ← ds·(1 − tanh²(s / cap))` for scores s before their cap.
    pub(super) fn uncap<T: Real>(ds: &mut [T], scores: &[T], cap: T) {
        for (d, s) in ds.iter_mut().zip(scores) {
            let t = tanh::<T, FUSED>(*s / cap);
            *d *= T::ONE - t * t;
        }
    }
}

simd! {
    /// Turns the visible scores of a tile's row into e^(score − max) and the others into zeros. Returns the factor that
    /// earlier tiles' values have to be multiplied with.
    pub(super) fn weigh<T: Real>(row: &mut [T], visible: Range<usize>, state: &mut State<T>) -> T {
        if visible.is_empty() {
            row.fill(T::ZERO);
            return T::ONE;
        }
        let groups = mask(row, visible);
        let mut lanes = [T::NEG_INFINITY; LANES];
        for group in groups.iter() {
            for l in 0..LANES {
                lanes[l] = if group[l] > lanes[l] { group[l] } else { lanes[l] };
            }
        }
        let mut max = state.max;
        for lane in lanes {
            max = if lane > max { lane } else { max };
        }
        let mut sums = [T::ZERO; LANES];
        for group in groups.iter_mut() {
            for l in 0..LANES {
                group[l] = (group[l] - max).exp::<FUSED>();
                sums[l] += group[l];
            }
        }
        let factor = (state.max - max).exp::<FUSED>();
        *state = State { max, sum: state.sum * factor + total(sums) };
        factor
    }
}

simd! {
    /// Turns the visible scores of a tile's row into probabilities and the others into zeros.
    pub(super) fn probabilities<T: Real>(row: &mut [T], visible: Range<usize>, max: T, inverse: T) {
        if visible.is_empty() {
            row.fill(T::ZERO);
            return;
        }
        for group in mask(row, visible) {
            for v in group.iter_mut() {
                *v = (*v - max).exp::<FUSED>() * inverse;
            }
        }
    }
}

simd! {
    /// `ds ← p∘(ds − dot)` for padded rows.
    pub(super) fn backward<T: Real>(ds: &mut [T], p: &[T], dot: T) {
        for (d, p) in ds.iter_mut().zip(p) {
            *d = *p * (*d - dot);
        }
    }
}

simd! {
    /// Returns the sum of the products of two rows.
    pub(super) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        let mut sums = [T::ZERO; LANES];
        for (a, b) in a.iter().zip(b) {
            for l in 0..LANES {
                sums[l] += a[l] * b[l];
            }
        }
        let mut sum = total(sums);
        for (a, b) in a_rest.iter().zip(b_rest) {
            sum += *a * *b;
        }
        sum
    }
}
