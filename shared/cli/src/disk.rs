//! Room on the disk, asked before a long write.

use crate::{Error, Kind, Result, escape, stale};
use std::path::Path;

/// Fails (74) when the file system that will hold `target` has less than `bytes` to give. File systems that do not
/// say pass.
pub fn require_free(target: &Path, bytes: u64) -> Result<()> {
    let Ok(stat) = rustix::fs::statvfs(stale::folder_of(target)) else { return Ok(()) };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if stat.f_blocks == 0 || free >= bytes {
        return Ok(());
    }
    let (need, have) = (bytes.div_ceil(1_000_000), free / 1_000_000);
    let place = escape(&target.display().to_string());
    Err(Error::new(Kind::Io, format!("{place}: {need} MB are needed, the disk has {have} MB free")))
}

/// Returns the bytes of the files of a directory: what a run that goes on need not write any more.
pub fn used(directory: &Path) -> u64 {
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).filter(|m| m.is_file()).map(|m| m.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_any_disk_is_refused_before_the_work() {
        let dir = tempfile::tempdir().unwrap();
        require_free(&dir.path().join("x"), 1).unwrap();
        let error = require_free(&dir.path().join("x"), u64::MAX).unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
    }
}
