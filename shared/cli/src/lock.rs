//! One process per run directory. The kernel frees the lock when its holder dies, so nobody ever has to remove a file.

use crate::{Error, Kind, Result, escape, number, signal, units};
use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

/// Time between two looks at a lock that another process holds. The kernel could wake us instead, but then a signal
/// would go unheard.
const INTERVAL: Duration = Duration::from_millis(200);

const NAME: &str = ".lock";

/// How long a process waits for a lock that another one holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    #[default]
    No,
    /// For a time.
    For(Duration),
    /// Until it is free.
    Forever,
}

impl Wait {
    /// Parses the value of `--wait`: a duration, or `forever`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "forever" => Ok(Self::Forever),
            _ => number::duration(text).map(Self::For),
        }
    }

    /// Returns whether a wait that has taken `so_far` is over.
    fn is_over(self, so_far: Duration) -> bool {
        match self {
            Self::No => true,
            Self::For(limit) => so_far >= limit,
            Self::Forever => false,
        }
    }
}

/// A held lock; freed when dropped.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
    enforced: bool,
}

impl RunLock {
    /// Locks `dir/.lock`. Held by another process: [`Kind::TryAgain`] (75) with its pid and host.
    pub fn acquire(dir: &Path) -> Result<Self> {
        Self::acquire_within(dir, Wait::No, |_| ())
    }

    /// The same, but queues as long as `wait` allows; `waiting` hears once who has the lock. A signal ends the wait.
    pub fn acquire_within(dir: &Path, wait: Wait, mut waiting: impl FnMut(&str)) -> Result<Self> {
        let mut file = open(dir)?;
        let (began, mut told) = (Instant::now(), false);
        let enforced = loop {
            match file.try_lock() {
                Ok(()) if is_at(&file, dir) => break true,
                // While this one waited, somebody has removed the directory and perhaps made it anew.
                Ok(()) => {
                    file = open(dir)?;
                    continue;
                }
                // A file system without locks: go on, as cargo does; the caller may warn.
                Err(TryLockError::Error(_)) => break false,
                Err(TryLockError::WouldBlock) => {}
            }
            let holder = holder(dir, &mut file);
            if wait.is_over(began.elapsed()) {
                let waited = match wait {
                    Wait::No => String::new(),
                    _ => format!(", after a wait of {}", units::duration(began.elapsed().as_secs_f64())),
                };
                return Err(Error::new(Kind::TryAgain, format!("{holder}{waited}")));
            }
            if !told {
                waiting(&holder);
                told = true;
            }
            signal::check()?;
            sleep(INTERVAL);
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

fn open(dir: &Path) -> Result<File> {
    let path = dir.join(NAME);
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    open.map_err(|e| Error::writing(&path, &e))
}

/// Whether an open file is the one that others would lock.
fn is_at(file: &File, dir: &Path) -> bool {
    let id = |m: std::fs::Metadata| (m.dev(), m.ino());
    file.metadata().map(id).ok() == std::fs::metadata(dir.join(NAME)).map(id).ok()
}

/// Returns who holds the lock, in words.
fn holder(dir: &Path, file: &mut File) -> String {
    let mut holder = String::new();
    let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(200).read_to_string(&mut holder));
    let holder = if holder.trim().is_empty() { "another process" } else { holder.trim() };
    format!("{}: locked by {}", escape(&dir.display().to_string()), escape(holder))
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

    #[test]
    fn a_wait_ends_when_the_lock_is_free_or_the_time_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let first = RunLock::acquire(dir.path()).unwrap();
        let short = Wait::parse("0.3s").unwrap();
        let error = RunLock::acquire_within(dir.path(), short, |_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::TryAgain);
        assert!(error.to_string().ends_with(", after a wait of 0 s"), "{error}");
        let mut first = Some(first);
        let mut told = Vec::new();
        // The holder leaves when it hears that somebody waits.
        let second = RunLock::acquire_within(dir.path(), Wait::Forever, |holder| {
            told.push(holder.to_string());
            first = None;
        });
        assert!(second.is_ok() && told.len() == 1 && told[0].contains("locked by pid "), "{told:?}");
    }

    #[test]
    fn a_directory_that_was_made_anew_has_another_lock() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let mut first = Some(RunLock::acquire(&run).unwrap());
        let mut others = None;
        let waiting = RunLock::acquire_within(&run, Wait::For(Duration::from_millis(600)), |_| {
            std::fs::remove_dir_all(&run).unwrap();
            std::fs::create_dir(&run).unwrap();
            others = Some(RunLock::acquire(&run).unwrap());
            first = None;
        });
        assert_eq!(waiting.unwrap_err().kind(), Kind::TryAgain);
    }

    #[test]
    fn waits_are_durations() {
        assert_eq!(Wait::parse("forever"), Ok(Wait::Forever));
        assert_eq!(Wait::parse("90s"), Ok(Wait::For(Duration::from_secs(90))));
        assert!(Wait::parse("soon").is_err() && Wait::parse("30").is_err());
    }
}
