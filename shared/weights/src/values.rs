//! Where the values of a tensor come from: the trait, values that are held, and values that something is done to on their way.

use std::ops::Range;

/// Where the values of a tensor come from.
pub trait Values: Sync {
    /// Returns how many there are.
    fn len(&self) -> usize;
    /// Returns whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Returns the length of a row: reads begin at a multiple of it and ask for whole rows.
    fn columns(&self) -> usize;
    /// Writes the values from `start` on into `out`. Several threads do so at a time.
    fn read(&self, start: usize, out: &mut [f32]);
    /// Says that a range will not be read again.
    fn done(&self, _range: Range<usize>) {}
}

/// Values that are held, such as those of a module that was trained whole.
pub struct Held<'a> {
    /// All of them.
    pub values: &'a [f32],
    /// Length of a row.
    pub columns: usize,
}

impl Values for Held<'_> {
    fn len(&self) -> usize {
        self.values.len()
    }
    fn columns(&self) -> usize {
        self.columns
    }
    fn read(&self, start: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.values[start..start + out.len()]);
    }
}

/// What is done to the values that were read from an index on.
pub type Change<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// Values that change as they are read.
pub struct Changed<'a> {
    /// As they were.
    pub values: Box<dyn Values + 'a>,
    /// What is done to them.
    pub change: Box<Change<'a>>,
}

impl Values for Changed<'_> {
    fn len(&self) -> usize {
        self.values.len()
    }
    fn columns(&self) -> usize {
        self.values.columns()
    }
    fn read(&self, start: usize, out: &mut [f32]) {
        self.values.read(start, out);
        (self.change)(start, out);
    }
    fn done(&self, range: Range<usize>) {
        self.values.done(range);
    }
}
