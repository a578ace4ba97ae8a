//! Read-only memory maps of input files: the only module of this crate with `unsafe`.
//!
//! Called by [`crate::tensors`]. A map never outlives its file's name check: only regular files are mapped.
//! Our own tools replace files by rename, which keeps old maps valid; when somebody else cuts a mapped file, the tool
//! ends with one line and 74 (`mmap/bus.rs`). Deliberately absent: writable maps.
#![allow(unsafe_code)]

mod bus;

use kto_cli::{Error, Kind, Result, escape};
use serde::{Deserialize, Serialize};
use std::{
    ops::{Deref, Range},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Bytes that one call reads ahead. Linux cuts a longer request to the read-ahead window of the disk, usually 128 KiB.
const READ_AHEAD: usize = 128 << 10;

/// A regular file mapped into memory for reading.
pub struct Map {
    path: PathBuf,
    /// Before the map: fields are dropped in this order.
    _entry: bus::Entry,
    map: memmap2::Mmap,
    stamp: FileStamp,
}

/// What the system says of a file. A file that was written to, or replaced, since then has another one: the time of its last change
/// cannot be set by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    /// Bytes.
    pub size: u64,
    /// Its number in the file system.
    pub inode: u64,
    /// Time of the last write, in nanoseconds since 1970.
    pub modified: i64,
    /// Time of the last change of content, name or mode, likewise.
    pub changed: i64,
}

impl FileStamp {
    fn of(file: &std::fs::Metadata) -> Self {
        let time =
            |seconds: i64, nanoseconds: i64| seconds.wrapping_mul(1_000_000_000).wrapping_add(nanoseconds);
        Self {
            size: file.size(),
            inode: file.ino(),
            modified: time(file.mtime(), file.mtime_nsec()),
            changed: time(file.ctime(), file.ctime_nsec()),
        }
    }
}

impl Map {
    /// Maps `path`. A symbolic link is followed; what it leads to must be a regular file (else 65).
    /// A missing file, a link loop or a lacking permission is 66.
    pub fn open(path: &Path) -> Result<Self> {
        let kind = std::fs::metadata(path).map_err(|e| Error::reading(path, &e))?;
        if !kind.is_file() {
            return Err(Error::new(Kind::Data, format!("{}: not a regular file", shown(path))));
        }
        let file = kto_cli::input::open_file(path)?;
        let stamp = FileStamp::of(&file.metadata().map_err(|e| Error::reading(path, &e))?);
        // SAFETY: the map is private and read-only and is only handed out as `&[u8]`. Inputs are promised not to change
        // while a tool runs; when another process shortens one all the same, SIGBUS ends the process.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::reading(path, &e))?;
        Ok(Self { path: path.into(), _entry: bus::Entry::new(path, &map), map, stamp })
    }

    /// Returns the path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns what the system said of the file when it was opened.
    pub fn stamp(&self) -> FileStamp {
        self.stamp
    }

    /// Returns whether nobody has written to the file since it was opened, as far as the system says. One that was moved or replaced
    /// keeps its bytes for who has mapped it.
    pub(crate) fn is_unchanged(&self) -> bool {
        let Ok(now) = std::fs::metadata(&self.path) else { return true };
        let now = FileStamp::of(&now);
        now.inode != self.stamp.inode || (now.size, now.modified) == (self.stamp.size, self.stamp.modified)
    }

    /// Tells the system how a byte range is about to be used. Failure is harmless and ignored.
    pub fn advise(&self, range: Range<usize>, access: Access) {
        #[cfg(unix)]
        if !range.is_empty() && range.end <= self.map.len() {
            let (advice, step) = match access {
                Access::WillNeed => (memmap2::Advice::WillNeed, READ_AHEAD),
                Access::Sequential => (memmap2::Advice::Sequential, range.len()),
                Access::Random => (memmap2::Advice::Random, range.len()),
            };
            for start in range.clone().step_by(step) {
                let _ = self.map.advise_range(advice, start, step.min(range.end - start));
            }
        }
        #[cfg(not(unix))]
        let _ = (range, access);
    }

    /// Gives the pages of a byte range back to the system; they are read again from the file when touched.
    /// Keeps the resident memory of a tool that walks through a large model small. Failure is harmless and ignored.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty() && range.end <= self.map.len() {
            // SAFETY: the map is shared with the file and never written, so dropping its pages loses nothing:
            // the next access reads the same bytes from the file again.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// How a range of a map is about to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Soon and whole: reading ahead starts now, in the background.
    WillNeed,
    /// From the beginning to the end: more is read ahead than usual.
    Sequential,
    /// Here and there: nothing is read ahead.
    Random,
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

impl Deref for Map {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// A path for a message: control characters escaped.
pub(crate) fn shown(path: &Path) -> String {
    escape(&path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_same_after_release() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Map::open(&path).unwrap();
        map.release(5000..90_000);
        map.release(0..map.len());
        map.release(99_999..200_000);
        for access in [Access::WillNeed, Access::Sequential, Access::Random] {
            map.advise(1..99_999, access);
            map.advise(0..200_000, access);
        }
        assert_eq!(&map[..], &bytes[..]);
    }

    #[test]
    fn directories_and_missing_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Map::open(dir.path()).err().unwrap().kind(), Kind::Data);
        assert_eq!(Map::open(&dir.path().join("none")).err().unwrap().kind(), Kind::NoInput);
    }
}
