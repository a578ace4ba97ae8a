//! Copies of the operands in the order in which tiles read them.
//!
//! A panel of B is [k][columns of a tile], zero beyond the matrix; frozen weights are widened to the element type on the way,
//! so a quantized or half-precision weight never exists as a whole in f32.

use super::Right;
use crate::real::{Operand, Real};
use std::ops::Range;

/// Elements of a row of a stored weight that are widened at once.
const RUN: usize = 256;

/// Copies rows `rows` of columns `first..first + width` (at most `columns`) of `b` into `panel` ([rows][columns]).
///
/// # Safety
/// `b` must be valid for these rows and `first + width` columns, `panel` for `rows · columns` elements.
pub(super) unsafe fn panel<T: Real>(
    b: &Right<T>,
    rows: Range<usize>,
    first: usize,
    width: usize,
    columns: usize,
    panel: *mut T,
) {
    let k = rows.len();
    match b {
        Right::Matrix(m) => {
            // SAFETY: the caller's promise.
            let at = unsafe { m.at.offset(rows.start as isize * m.row + first as isize * m.column) };
            let from = Operand { at, ..*m };
            // SAFETY: as above.
            unsafe { matrix_panel(from, k, width, columns, panel) }
        }
        Right::Columns(w) => with_scratch(columns * RUN, |scratch: &mut [T]| {
            for at in (0..k).step_by(RUN) {
                let run = RUN.min(k - at);
                T::widen_rows(w, first, rows.start + at, run, &mut scratch[..width * run]);
                let from = Operand { at: scratch.as_ptr(), row: 1, column: run as isize };
                // SAFETY: the scratch holds `width` rows of `run` elements; the panel has rows `at..at + run`.
                unsafe { matrix_panel(from, run, width, columns, panel.add(at * columns)) };
            }
        }),
        Right::Rows(w) if width == columns => {
            // SAFETY: the caller's promise; written by this call alone.
            let panel = unsafe { std::slice::from_raw_parts_mut(panel, k * columns) };
            T::widen_rows(w, rows.start, first, columns, panel);
        }
        Right::Rows(w) => {
            for p in 0..k {
                // SAFETY: row p of the panel, `columns` elements, written by this call alone.
                let row = unsafe { std::slice::from_raw_parts_mut(panel.add(p * columns), columns) };
                T::widen(w, rows.start + p, first, &mut row[..width]);
                row[width..].fill(T::ZERO);
            }
        }
    }
}

/// # Safety
/// `from` must be valid for (k, width), `panel` for `k · columns` elements.
unsafe fn matrix_panel<T: Real>(from: Operand<T>, k: usize, width: usize, columns: usize, panel: *mut T) {
    // SAFETY: the caller's promise, for all three forms.
    unsafe {
        if from.column == 1 {
            let eights = if width == columns && columns.is_multiple_of(SIDE) { columns } else { 0 };
            for p in 0..k {
                let (source, target) = (from.at.offset(p as isize * from.row), panel.add(p * columns));
                // Runs of known length become vector moves; a call for every short row would cost more than the copy.
                for j in (0..eights).step_by(SIDE) {
                    std::ptr::copy_nonoverlapping(source.add(j), target.add(j), SIDE);
                }
                if eights > 0 {
                    continue;
                }
                std::ptr::copy_nonoverlapping(source, target, width);
                for j in width..columns {
                    *target.add(j) = T::ZERO;
                }
            }
        } else {
            interleave(from, k, width, columns, panel);
        }
    }
}

/// Side of the squares that are transposed in registers.
const SIDE: usize = 8;

/// # Safety
/// As [`matrix_panel`].
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

/// Copies rows `0..m` of columns `first..first + k` of `a` into `block` ([m][k]).
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
pub(super) fn with_scratch<T: Real, R>(n: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
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
