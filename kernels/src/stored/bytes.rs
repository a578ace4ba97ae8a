//! Bytes that somebody else owns, such as a tensor inside a memory-mapped file.

use std::{
    ops::{Deref, Range},
    sync::Arc,
};

/// A range of bytes that somebody else owns (a memory map). Cheap to clone; keeps the owner alive.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Bytes {
    /// Returns the bytes `range` of `owner`, or `None` when it has fewer.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Option<Self> {
        (*owner).as_ref().get(range.clone())?;
        Some(Self { owner, range })
    }

    /// Returns the bytes `part` of these.
    pub(super) fn part(&self, part: Range<usize>) -> Option<Self> {
        let range = self.range.start.checked_add(part.start)?..self.range.start.checked_add(part.end)?;
        if part.end > self.range.len() { None } else { Self::new(self.owner.clone(), range) }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Arc::new(bytes), range }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    /// An owner that shrinks, which no sane one does, leaves nothing.
    #[inline]
    fn deref(&self) -> &[u8] {
        (*self.owner).as_ref().get(self.range.clone()).unwrap_or_default()
    }
}
