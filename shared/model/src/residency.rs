//! Which of the base's memory-mapped pages are in memory: read ahead before use, given back after it.
//!
//! Called by [`crate::base`]. Pages of a map are the file's: dropping them loses nothing, reading ahead only saves waiting.
//! Deliberately absent: any effect on results, and errors (advice that the system does not take is harmless).

use kto_formats::tensors::{Access, Map, TensorStore};
use std::{ops::Range, sync::Arc};

/// Gaps in a file that are smaller than this are not worth a call of their own.
const GAP: usize = 64 << 10;

/// What the system maps around a page that is touched (64 KiB on Linux), at most.
const AROUND: usize = 128 << 10;

/// The bytes of some tensors, as runs in their files.
#[derive(Clone, Default)]
pub(crate) struct Pages {
    runs: Vec<(Arc<Map>, Range<usize>)>,
}

impl Pages {
    /// Returns the pages of the tensors `names`.
    pub fn of<'a>(store: &TensorStore, names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut all: Vec<_> = names.into_iter().filter_map(|name| store.bytes(name)).collect();
        all.sort_by_key(|(map, range)| (Arc::as_ptr(map) as usize, range.start));
        let mut runs: Vec<(Arc<Map>, Range<usize>)> = Vec::new();
        for (map, range) in all {
            match runs.last_mut() {
                Some((last, run)) if Arc::ptr_eq(last, &map) && range.start <= run.end + GAP => {
                    run.end = run.end.max(range.end);
                }
                _ => runs.push((map, range)),
            }
        }
        Self { runs }
    }

    /// Begins to read the pages from the file, on a thread of its own: the system call may wait for the disk.
    pub fn prefetch(&self) {
        if self.runs.is_empty() {
            return;
        }
        let runs = self.runs.clone();
        let work = move || runs.iter().for_each(|(map, range)| map.advise(range.clone(), Access::WillNeed));
        // Without a thread to spare the pages are read when they are touched.
        let _ = std::thread::Builder::new().name("prefetch".into()).spawn(work);
    }

    /// Gives the pages back to the system, with the neighbours that came in with them.
    pub fn release(&self) {
        for (map, range) in &self.runs {
            map.release(range.start.saturating_sub(AROUND)..(range.end + AROUND).min(map.len()));
        }
    }
}
