//! The directory in which a long output grows, so that a run that was killed can be gone on with.
//!
//! It is called `NAME.partial` beside the target and visible, because it may be large. What it will become is written in it first; a
//! later run with the same job goes on, one with another job begins anew. A directory that does not say is nobody's: it is left alone.

use super::creating;
use crate::{Error, Kind, Result, escape, stale};
use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

/// Name of the file that says what the directory will become.
pub(super) const JOB: &str = ".kto-job";
/// What the target's name gets.
const SUFFIX: &str = ".partial";

/// A partial directory, locked.
pub(super) struct Partial {
    pub path: PathBuf,
    pub lock: File,
    /// Whether an earlier run with the same job has worked on it.
    pub resumed: bool,
}

/// Makes or opens the partial directory of `resolved` for a job. Errors: 73 when something else is there, 75 when another run
/// works on it.
pub(super) fn open(shown: &Path, resolved: &Path, job: &str) -> Result<Partial> {
    let mut name = OsString::from(resolved.file_name().unwrap_or_default());
    name.push(SUFFIX);
    let path = stale::folder_of(resolved).join(name);
    let fail = |e: io::Error| creating(shown, &e);
    let place = || escape(&path.display().to_string());
    match DirBuilder::new().create(&path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(fail(e)),
        _ => {}
    }
    if !fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir()) {
        return Err(Error::new(Kind::CantCreate, format!("{}: in the way of the partial result", place())));
    }
    let lock = File::open(&path).map_err(fail)?;
    if let Err(TryLockError::WouldBlock) = lock.try_lock() {
        return Err(Error::new(Kind::TryAgain, format!("{}: another run is writing it", place())));
    }
    stale::sweep(&path);
    let marker = path.join(JOB);
    let resumed = match fs::read_to_string(&marker) {
        Ok(text) if text == job => true,
        Ok(_) => {
            clear(&path, &marker).map_err(fail)?;
            false
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if fs::read_dir(&path).map_err(fail)?.next().is_some() {
                let text = format!("{}: not empty, and not the partial result of an earlier run", place());
                return Err(Error::new(Kind::CantCreate, text).with_hint("move it away"));
            }
            false
        }
        Err(e) => return Err(fail(e)),
    };
    if !resumed {
        super::write(&marker, job.as_bytes())?;
    }
    Ok(Partial { path, lock, resumed })
}

/// Removes everything, the marker last: a kill in between leaves a directory that still says whose it is.
fn clear(path: &Path, marker: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.path() == marker {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_file(marker)
}

#[cfg(test)]
mod tests {
    use super::super::AtomicDir;
    use super::*;

    fn start(target: &Path, job: &str) -> Result<AtomicDir> {
        AtomicDir::resume(target, true, false, job)
    }

    #[test]
    fn the_same_job_goes_on_and_another_begins_anew() {
        let top = tempfile::tempdir().unwrap();
        let target = top.path().join("model");
        let partial = top.path().join("model.partial");
        let first = start(&target, "a").unwrap();
        assert!(!first.resumed() && first.path() == partial);
        fs::write(first.path().join("shard"), "1").unwrap();
        first.keep(true);
        drop(first);
        let second = start(&target, "a").unwrap();
        assert!(second.resumed());
        assert_eq!(start(&target, "a").err().unwrap().kind(), Kind::TryAgain);
        second.keep(true);
        drop(second);
        let other = start(&target, "b").unwrap();
        assert!(!other.resumed() && !partial.join("shard").exists());
        fs::write(other.path().join("shard"), "2").unwrap();
        other.commit().unwrap();
        let left: Vec<_> = fs::read_dir(top.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["model"]);
        let left: Vec<_> = fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["shard"]);
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir(top.path().join("m.partial")).unwrap();
        fs::write(top.path().join("m.partial/mine"), "x").unwrap();
        assert_eq!(start(&top.path().join("m"), "a").err().unwrap().kind(), Kind::CantCreate);
        assert!(top.path().join("m.partial/mine").exists());
        fs::write(top.path().join("n.partial"), "x").unwrap();
        assert_eq!(start(&top.path().join("n"), "a").err().unwrap().kind(), Kind::CantCreate);
    }

    #[test]
    fn without_keep_nothing_is_left() {
        let top = tempfile::tempdir().unwrap();
        drop(start(&top.path().join("m"), "a").unwrap());
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 0);
    }
}
