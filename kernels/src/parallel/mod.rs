//! Work split over rows. Which thread takes a row never changes what is computed for it.

mod team;

pub use team::with_team;

use rayon::prelude::*;
use std::marker::PhantomData;

/// Below this many elements a call stays on one thread: waking others costs more.
pub(crate) const SMALL: usize = 1 << 14;

/// Calls `f` for every index, on several threads if `parallel`: by the team of this thread, else by rayon.
pub(crate) fn each(n: usize, parallel: bool, f: impl Fn(usize) + Sync) {
    if !parallel || n < 2 {
        (0..n).for_each(f);
    } else if !team::run(n, &f) {
        (0..n).into_par_iter().with_max_len(1).for_each(&f);
    }
}

/// Calls `f(row, out_row)` for every row of a row-major matrix with `columns` columns.
pub(crate) fn for_rows<T: Send>(out: &mut [T], columns: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if columns == 0 {
        return;
    }
    let (total, rows) = (out.len(), (SMALL / 4 / columns).max(1));
    let (blocks, at) = (total.div_ceil(columns * rows), Shared(out.as_mut_ptr()));
    each(blocks, total >= SMALL, |block| {
        let start = block * columns * rows;
        // SAFETY: blocks are disjoint parts of `out`, which is borrowed meanwhile; each is taken once.
        let chunk =
            unsafe { std::slice::from_raw_parts_mut(at.at(start), (columns * rows).min(total - start)) };
        chunk.chunks_mut(columns).enumerate().for_each(|(i, row)| f(block * rows + i, row));
    });
}

/// A slice in pieces that several tasks change at the same time.
pub(crate) struct Pieces<'a, T> {
    at: Shared<T>,
    len: usize,
    piece: usize,
    _borrowed: PhantomData<&'a mut [T]>,
}

impl<'a, T> Pieces<'a, T> {
    /// Cuts `slice` into pieces of `piece` elements; the last may be shorter.
    pub fn new(slice: &'a mut [T], piece: usize) -> Self {
        Self { at: Shared(slice.as_mut_ptr()), len: slice.len(), piece: piece.max(1), _borrowed: PhantomData }
    }

    /// Returns piece `i`; nothing behind the end.
    ///
    /// # Safety
    /// No piece may be asked for again while the slice that it was before is alive.
    #[allow(clippy::mut_from_ref)] // what the contract above is about
    pub unsafe fn take(&self, i: usize) -> &'a mut [T] {
        let start = i.saturating_mul(self.piece).min(self.len);
        // SAFETY: within the borrowed slice, and apart from all other pieces.
        unsafe { std::slice::from_raw_parts_mut(self.at.at(start), self.piece.min(self.len - start)) }
    }
}

/// A pointer that may cross threads; the tasks that share it write disjoint places.
pub(crate) struct Shared<T>(pub *mut T);
// By hand: a derive would ask that T is Copy.
impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}
// SAFETY: only handed to tasks whose written ranges do not overlap; every use says why.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Returns the pointer `offset` elements on. A method, so that closures capture the whole wrapper.
    pub fn at(self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}
