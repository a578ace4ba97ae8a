//! Room on the disk, asked before a long write.

use crate::{Error, Kind, Result, escape, stale};
use std::path::Path;

/// What is asked for beyond the bytes of an output: a manifest, a journal, the blocks that files fill up to.
pub const MARGIN: u64 = 1 << 20;

/// Fails (74) when the file system that will hold `target` has less than `bytes` and [`MARGIN`] to give. File systems that do not
/// say pass.
pub fn require_free(target: &Path, bytes: u64) -> Result<()> {
    let bytes = bytes.saturating_add(MARGIN);
    let Ok(stat) = rustix::fs::statvfs(stale::folder_of(target)) else { return Ok(()) };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if stat.f_blocks == 0 || free >= bytes {
        return Ok(());
    }
    let (need, have) = (bytes.div_ceil(1_000_000), free / 1_000_000);
    let place = escape(&target.display().to_string());
    Err(Error::new(Kind::Io, format!("{place}: {need} MB are needed, the disk has {have} MB free")))
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
