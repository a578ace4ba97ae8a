//! What llama.cpp's files have otherwise: the order of rows of queries and keys, and Gemma's norms.

use super::names::Change;
use crate::{Changed, Values};
use std::ops::Range;

/// Which way a tensor goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Into a file of llama.cpp.
    Into,
    /// Out of it.
    OutOf,
}

/// Returns the values as they are on the other side.
pub fn changed<'a>(values: Box<dyn Values + 'a>, change: Change, way: Way) -> Box<dyn Values + 'a> {
    match change {
        Change::None => values,
        Change::Interleaved(heads) => Box::new(Reordered::new(values, heads, way)),
        Change::PlusOne => {
            let by = if way == Way::Into { 1.0 } else { -1.0 };
            let change = Box::new(move |_, out: &mut [f32]| out.iter_mut().for_each(|v| *v += by));
            Box::new(Changed { values, change })
        }
    }
}

/// Returns whether so many rows are whole heads.
pub fn fits(change: Change, rows: usize) -> bool {
    match change {
        Change::Interleaved(heads) => heads > 0 && rows > 0 && rows.is_multiple_of(2 * heads),
        _ => true,
    }
}

/// Rows of queries or keys. In llama.cpp's Llama the two halves of each head take turns, because it rotates neighbouring elements where
/// transformers rotates halves.
pub struct Reordered<'a> {
    values: Box<dyn Values + 'a>,
    pub columns: usize,
    /// Rows of a head.
    pub rows: usize,
    way: Way,
}

impl<'a> Reordered<'a> {
    pub fn new(values: Box<dyn Values + 'a>, heads: usize, way: Way) -> Self {
        // Of a bias every element is a row.
        let columns = if values.columns() == values.len() { 1 } else { values.columns() };
        let rows = values.len() / columns.max(1) / heads.max(1);
        Self { values, columns, rows, way }
    }
}

impl Values for Reordered<'_> {
    fn len(&self) -> usize {
        self.values.len()
    }
    fn columns(&self) -> usize {
        self.values.columns()
    }
    fn read(&self, start: usize, out: &mut [f32]) {
        let columns = self.columns;
        for (i, row) in out.chunks_mut(columns).enumerate() {
            let (head, j) = ((start / columns + i) / self.rows, (start / columns + i) % self.rows);
            let half = self.rows / 2;
            let from = head * self.rows
                + match self.way {
                    Way::Into => j % 2 * half + j / 2,
                    Way::OutOf => j % half * 2 + j / half,
                };
            self.values.read(from * columns, row);
        }
    }
    // Rows are read in another order than they lie; they go with the rest of the file.
    fn done(&self, range: Range<usize>) {
        if range.end == self.len() {
            self.values.done(0..range.end);
        }
    }
}
