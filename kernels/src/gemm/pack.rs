//! Copies of the operands in the order in which tiles read them.
//!
//! A panel of B is [k][columns of a tile], zero beyond the matrix; frozen weights are widened to the element type on the way,
//! so a quantized or half-precision weight never exists as a whole in f32.

use super::Right;
use crate::real::{Operand, Real};
use std::ops::Range;

/// Elements of a row of a stored weight that are widened at once.
const RUN: usize = 256;

/// Where neighbouring panels go.
#[derive(Clone, Copy)]
pub(super) struct Panels<T> {
    /// The first one, `[rows][columns]`.
    pub at: *mut T,
    /// Columns of a panel.
    pub columns: usize,
    /// Elements from one panel to the next.
    pub step: usize,
}

/// Copies rows `rows` of columns `first..first + width` of `b` into neighbouring panels.
///
/// # Safety
/// `b` must be valid for these rows and `first + width` columns, the panels for `rows · columns` elements each.
pub(super) unsafe fn panels<T: Real>(
    b: &Right<T>,
    rows: Range<usize>,
    first: usize,
    width: usize,
    to: Panels<T>,
) {
    match b {
        Right::Matrix(m) if m.column == 1 => {
            for (p, row) in rows.enumerate() {
                // SAFETY: the caller's promise.
                unsafe { spread(m.at.offset(row as isize * m.row).add(first), p, width, to) };
            }
        }
        // A wide run of a row is widened many times faster than its pieces.
        Right::Rows(w) => with_scratch(width, |scratch: &mut [T]| {
            for (p, row) in rows.enumerate() {
                T::widen_rows(w, row, first, width, scratch);
                // SAFETY: the scratch holds `width` elements; the panels are the caller's promise.
                unsafe { spread(scratch.as_ptr(), p, width, to) };
            }
        }),
        // Columns of b lie apart: a panel at a time.
        Right::Matrix(m) => {
            let k = rows.len();
            for_panels(width, to, |at, few, panel| {
                // SAFETY: the caller's promise.
                unsafe {
                    let at = m.at.offset(rows.start as isize * m.row + (first + at) as isize * m.column);
                    interleave(Operand { at, ..*m }, k, few, to.columns, panel);
                }
            });
        }
        Right::Columns(w) => with_scratch(to.columns * RUN, |scratch: &mut [T]| {
            for_panels(width, to, |at, few, panel| {
                for start in rows.clone().step_by(RUN) {
                    let run = RUN.min(rows.end - start);
                    T::widen_rows(w, first + at, start, run, &mut scratch[..few * run]);
                    let from = Operand { at: scratch.as_ptr(), row: 1, column: run as isize };
                    let below = (start - rows.start) * to.columns;
                    // SAFETY: the scratch holds `few` rows of `run` elements; the panel has rows for them.
                    unsafe { interleave(from, run, few, to.columns, panel.wrapping_add(below)) };
                }
            });
        }),
    }
}

/// Calls `f(first column, number of columns, panel)` for every panel that `width` columns fill.
#[inline(always)]
fn for_panels<T: Copy>(width: usize, to: Panels<T>, mut f: impl FnMut(usize, usize, *mut T)) {
    for (i, at) in (0..width).step_by(to.columns).enumerate() {
        f(at, to.columns.min(width - at), to.at.wrapping_add(i * to.step));
    }
}

/// Copies `width` neighbouring elements into row `p` of as many panels as they fill; the last is filled up with zeros.
///
/// # Safety
/// `from` must be valid for `width` elements, the panels for row `p`.
unsafe fn spread<T: Real>(from: *const T, p: usize, width: usize, to: Panels<T>) {
    let columns = to.columns;
    for_panels(width, to, |at, few, panel| {
        // SAFETY: the caller's promise.
        unsafe {
            let (source, target) = (from.add(at), panel.add(p * columns));
            if few == columns && columns.is_multiple_of(SIDE) {
                // Runs of known length become vector moves; a call for every short row would cost more than the copy.
                for j in (0..columns).step_by(SIDE) {
                    std::ptr::copy_nonoverlapping(source.add(j), target.add(j), SIDE);
                }
            } else {
                std::ptr::copy_nonoverlapping(source, target, few);
                (few..columns).for_each(|j| *target.add(j) = T::ZERO);
            }
        }
    });
}

/// Side of the squares that are transposed in registers.
const SIDE: usize = 8;

/// # Safety
/// `from` must be valid for (k, width), `panel` for `k · columns` elements.
unsafe fn interleave<T: Real>(from: Operand<T>, k: usize, width: usize, columns: usize, panel: *mut T) {
    let squares = if from.row == 1 { (width / SIDE * SIDE, k / SIDE * SIDE) } else { (0, 0) };
    let turn = T::transpose_square();
    // SAFETY: the caller's promise; columns past the width are zeros.
    unsafe {
        for p in (0..squares.1).step_by(SIDE) {
            for j in (0..squares.0).step_by(SIDE) {
                let source = from.at.offset(j as isize * from.column).add(p);
                turn(source, from.column as usize, panel.add(p * columns + j), columns);
            }
        }
        for p in 0..k {
            let begin = if p < squares.1 { squares.0 } else { 0 };
            for j in begin..columns {
                *panel.add(p * columns + j) = if j < width {
                    *from.at.offset(p as isize * from.row + j as isize * from.column)
                } else {
                    T::ZERO
                };
            }
        }
    }
}

/// Transposes a square of [`SIDE`] rows at distance `from_row` into rows at distance `to_row`.
pub(crate) type TransposeSquare<T> = unsafe fn(from: *const T, from_row: usize, to: *mut T, to_row: usize);

/// Returns the fastest form for f32.
pub(crate) fn transpose_square_f32() -> TransposeSquare<f32> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        return transpose_square_avx2;
    }
    transpose_square::<f32>
}

/// # Safety
/// Both squares must be valid.
pub(crate) unsafe fn transpose_square<T: Copy>(from: *const T, from_row: usize, to: *mut T, to_row: usize) {
    for i in 0..SIDE {
        for j in 0..SIDE {
            // SAFETY: the caller's promise.
            unsafe { *to.add(j * to_row + i) = *from.add(i * from_row + j) };
        }
    }
}

/// # Safety
/// Both squares must be valid and the processor must have AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn transpose_square_avx2(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller's promise.
    unsafe {
        let row = |i: usize| _mm256_loadu_ps(from.add(i * from_row));
        let (r0, r1, r2, r3) = (row(0), row(1), row(2), row(3));
        let (r4, r5, r6, r7) = (row(4), row(5), row(6), row(7));
        // Pairs, then fours within the two halves of a register, then the halves themselves.
        let (a0, a1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
        let (a2, a3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
        let (a4, a5) = (_mm256_unpacklo_ps(r4, r5), _mm256_unpackhi_ps(r4, r5));
        let (a6, a7) = (_mm256_unpacklo_ps(r6, r7), _mm256_unpackhi_ps(r6, r7));
        const LOW: i32 = 0b01_00_01_00;
        const HIGH: i32 = 0b11_10_11_10;
        let (b0, b1) = (_mm256_shuffle_ps::<LOW>(a0, a2), _mm256_shuffle_ps::<HIGH>(a0, a2));
        let (b2, b3) = (_mm256_shuffle_ps::<LOW>(a1, a3), _mm256_shuffle_ps::<HIGH>(a1, a3));
        let (b4, b5) = (_mm256_shuffle_ps::<LOW>(a4, a6), _mm256_shuffle_ps::<HIGH>(a4, a6));
        let (b6, b7) = (_mm256_shuffle_ps::<LOW>(a5, a7), _mm256_shuffle_ps::<HIGH>(a5, a7));
        let first = [(b0, b4), (b1, b5), (b2, b6), (b3, b7)];
        for (j, (low, high)) in first.into_iter().enumerate() {
            _mm256_storeu_ps(to.add(j * to_row), _mm256_permute2f128_ps::<0x20>(low, high));
            _mm256_storeu_ps(to.add((j + 4) * to_row), _mm256_permute2f128_ps::<0x31>(low, high));
        }
    }
}

/// Copies rows `0..m` of columns `first..first + k` of `a` into `block`, `[m][k]`.
///
/// # Safety
/// `a` must be valid for m rows and `first + k` columns, `block` for `m · k` elements.
pub(super) unsafe fn rows<T: Real>(a: Operand<T>, m: usize, first: usize, k: usize, block: *mut T) {
    // SAFETY: the caller's promise.
    unsafe {
        let at = a.at.offset(first as isize * a.column);
        if a.column == 1 {
            for i in 0..m {
                std::ptr::copy_nonoverlapping(at.offset(i as isize * a.row), block.add(i * k), k);
            }
        } else {
            // Columns are the short strides here: read along them.
            for p in 0..k {
                let column = at.offset(p as isize * a.column);
                for i in 0..m {
                    *block.add(i * k + p) = *column.offset(i as isize * a.row);
                }
            }
        }
    }
}

/// Calls `f` with `n` elements of this thread's scratch, aligned to a cache line. Contents are arbitrary numbers.
pub(crate) fn with_scratch<T: Real, R>(n: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    // Taken out while in use: a thread that waits for others may start another product.
    let mut buffer = T::scratch().with_borrow_mut(|buffers| {
        let fitting =
            (0..buffers.len()).filter(|i| buffers[*i].len() >= n + 64).min_by_key(|i| buffers[*i].len());
        fitting.map(|i| buffers.swap_remove(i)).or_else(|| buffers.pop()).unwrap_or_default()
    });
    if buffer.len() < n + 64 {
        buffer = vec![T::ZERO; n + 64];
    }
    let skip = buffer.as_ptr().align_offset(64).min(64);
    let result = f(&mut buffer[skip..skip + n]);
    T::scratch().with_borrow_mut(|buffers| buffers.push(buffer));
    result
}
