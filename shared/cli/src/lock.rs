//! One process per run directory. The kernel frees the lock when its holder dies, so nobody ever has to remove a file.

use crate::{Error, Kind, Result, escape};
use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Seek, Write},
    path::Path,
};

/// A held lock; freed when dropped.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
    enforced: bool,
}

impl RunLock {
    /// Locks `dir/.lock`. Held by another process: [`Kind::TryAgain`] (75) with its pid and host.
    pub fn acquire(dir: &Path) -> Result<Self> {
        let path = dir.join(".lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| Error::writing(&path, &e))?;
        let enforced = match file.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => return Err(held(dir, &mut file)),
            // A file system without locks: go on, as cargo does; the caller may warn.
            Err(TryLockError::Error(_)) => false,
        };
        let text = format!("pid {} on {}\n", std::process::id(), host());
        // Only a courtesy for the message above: a full disk must not prevent the run.
        let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes()));
        Ok(Self { _file: file, enforced })
    }
    /// Whether the file system really keeps others out.
    pub fn is_enforced(&self) -> bool {
        self.enforced
    }
}

fn held(dir: &Path, file: &mut File) -> Error {
    let mut holder = String::new();
    let _ = file.take(200).read_to_string(&mut holder);
    let holder = if holder.trim().is_empty() { "another process" } else { holder.trim() };
    let dir = escape(&dir.display().to_string());
    Error::new(Kind::TryAgain, format!("{dir}: locked by {}", escape(holder)))
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_holder_is_told_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = RunLock::acquire(dir.path()).unwrap();
        assert!(first.is_enforced());
        let error = RunLock::acquire(dir.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::TryAgain);
        assert!(error.to_string().contains(&format!("locked by pid {} on ", std::process::id())), "{error}");
        drop(first);
        RunLock::acquire(dir.path()).unwrap();
    }

    #[test]
    fn a_missing_directory_cannot_be_locked() {
        assert_eq!(RunLock::acquire(Path::new("no/such/dir")).unwrap_err().kind(), Kind::CantCreate);
    }
}
