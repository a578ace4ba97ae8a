//! Work split over rows. Which thread takes a row never changes what is computed for it.

use rayon::prelude::*;

/// Below this many elements a call stays on one thread: waking others costs more.
const SMALL: usize = 1 << 14;

/// Calls `f(row, out_row)` for every row of a row-major matrix with `columns` columns.
pub(crate) fn for_rows<T: Send>(out: &mut [T], columns: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if columns == 0 {
        return;
    }
    if out.len() < SMALL {
        out.chunks_mut(columns).enumerate().for_each(|(i, row)| f(i, row));
    } else {
        let rows = (SMALL / 4 / columns).max(1);
        out.par_chunks_mut(columns * rows).enumerate().for_each(|(block, chunk)| {
            chunk.chunks_mut(columns).enumerate().for_each(|(i, row)| f(block * rows + i, row));
        });
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
