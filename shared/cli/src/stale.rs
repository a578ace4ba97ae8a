//! Temporary names beside a target, and the removal of those whose writer was killed.
//!
//! A name is `.<final>.<pid>[.<tag>].kto-tmp`. The writer holds a file lock on it while it lives, so a name is stale
//! only when its pid is gone *and* its lock is free: pids repeat, and containers that share a disk do not share pids.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

const SUFFIX: &[u8] = b".kto-tmp";
/// Tag of a directory that was moved aside while its successor took its place.
const OLD: &[u8] = b"old";

/// Folders this process has already swept. Held while a name is made and locked, so that no thread of this process
/// sees a name without its lock.
static SWEPT: Mutex<Option<HashSet<PathBuf>>> = Mutex::new(None);

/// Makes a temporary name for `target` with `make`, which must fail with `AlreadyExists` on a name in use; then locks
/// what `make` returns. Sweeps the folder on the first call.
pub(crate) fn create(target: &Path, make: impl Fn(&Path) -> io::Result<File>) -> io::Result<(PathBuf, File)> {
    let mut swept = swept();
    let folder = folder_of(target);
    if swept.get_or_insert_default().insert(folder.clone()) {
        sweep(&folder);
    }
    for attempt in 0..1000_u32 {
        let tag = if attempt == 0 { String::new() } else { format!(".n{attempt}") };
        let path = folder.join(name(target, tag.as_bytes()));
        match make(&path) {
            Ok(file) => {
                // A file system without locks leaves only the pid, which is good enough there.
                let _ = file.try_lock();
                return Ok((path, file));
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Returns the name under which `target` is moved aside.
pub(crate) fn aside(target: &Path) -> PathBuf {
    folder_of(target).join(name(target, &[b".", OLD].concat()))
}

/// Returns the folder that holds `path`, never empty.
pub(crate) fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

fn swept() -> MutexGuard<'static, Option<HashSet<PathBuf>>> {
    SWEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn name(target: &Path, tag: &[u8]) -> OsString {
    let last = target.file_name().unwrap_or_default().as_bytes();
    // File names end at 255 bytes; a cut name still shows whose it is.
    let last = &last[..last.len().min(200)];
    let pid = std::process::id().to_string();
    OsString::from_vec([b".", last, b".", pid.as_bytes(), tag, SUFFIX].concat())
}

/// Removes what dead writers left in `folder`; failures are not ours to report.
pub(crate) fn sweep(folder: &Path) {
    sweep_if(folder, is_dead);
}

/// The same in a folder that the caller holds locked, into which no thread of this process writes yet: a free lock is enough there. A
/// writer that was just killed keeps its pid until its parent asks for it.
pub(crate) fn sweep_locked(folder: &Path) {
    sweep_if(folder, |_| true);
}

fn sweep_if(folder: &Path, is_dead: impl Fn(u32) -> bool) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let file_name = entry.file_name();
        let Some(left) = parse(&file_name) else { continue };
        let path = entry.path();
        // No writer makes anything else, and to open a FIFO or a device may wait for ever.
        let Ok(kind) = entry.file_type() else { continue };
        if !(kind.is_file() || kind.is_dir()) || !is_dead(left.pid) || !is_free(&path) {
            continue;
        }
        let is_dir = kind.is_dir();
        let original = folder.join(left.target);
        let _ = match () {
            // Killed between two renames: the old directory is still the best one.
            () if left.is_old && !original.exists() => fs::rename(&path, &original),
            () if is_dir => fs::remove_dir_all(&path),
            () => fs::remove_file(&path),
        };
    }
}

struct Leftover<'a> {
    target: &'a OsStr,
    pid: u32,
    is_old: bool,
}

fn parse(name: &OsStr) -> Option<Leftover<'_>> {
    let rest = name.as_bytes().strip_prefix(b".")?.strip_suffix(SUFFIX)?;
    let (mut rest, mut last) = split_last(rest)?;
    let is_old = last == OLD;
    if is_old || last.first() == Some(&b'n') {
        (rest, last) = split_last(rest)?;
    }
    let pid = std::str::from_utf8(last).ok()?.parse().ok()?;
    (!rest.is_empty()).then(|| Leftover { target: OsStr::from_bytes(rest), pid, is_old })
}

fn split_last(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().rposition(|b| *b == b'.')?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

fn is_dead(pid: u32) -> bool {
    if pid == std::process::id() {
        return true; // From an earlier process of the same number, unless the lock says otherwise.
    }
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return true };
    rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH)
}

fn is_free(path: &Path) -> bool {
    // What has become a link or a FIFO since is neither followed nor waited for.
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
    match OpenOptions::new().read(true).custom_flags(flags as i32).open(path).map(|file| file.try_lock()) {
        Ok(Ok(())) | Ok(Err(fs::TryLockError::Error(_))) => true,
        Ok(Err(fs::TryLockError::WouldBlock)) | Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        let name_of = |target: &str, tag: &[u8]| name(Path::new(target), tag);
        let plain = name_of("a/b.c.1.jsonl", b"");
        let left = parse(&plain).unwrap();
        assert_eq!(
            (left.target, left.pid, left.is_old),
            (OsStr::new("b.c.1.jsonl"), std::process::id(), false)
        );
        assert!(parse(&name_of("b", b".old")).unwrap().is_old);
        assert_eq!(parse(&name_of("b", b".n12")).unwrap().target, OsStr::new("b"));
        for foreign in [".kto-tmp", "b.77.kto-tmp", ".b.x.kto-tmp", ".77.kto-tmp", ".b.77.tmp"] {
            assert!(parse(OsStr::new(foreign)).is_none(), "{foreign}");
        }
        assert!(name_of(&"x".repeat(255), b".old").len() < 255);
    }

    #[test]
    fn only_the_dead_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let touch = |name: &str| fs::write(dir.path().join(name), b"").unwrap();
        let dead = 999_999_999; // Above the largest pid of Linux.
        touch(&format!(".x.{dead}.kto-tmp"));
        touch(&format!(".x.{}.kto-tmp", rustix::process::getppid().unwrap().as_raw_nonzero()));
        touch("other.kto-tmp");
        fs::create_dir(dir.path().join(format!(".d.{dead}.kto-tmp"))).unwrap();
        fs::create_dir(dir.path().join(format!(".lost.{dead}.old.kto-tmp"))).unwrap();
        sweep(dir.path());
        let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(dir.path().join("lost").is_dir() && dir.path().join("other.kto-tmp").exists());
    }

    #[test]
    fn neither_fifos_nor_links_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in [".fifo.999999999.kto-tmp", ".fifo.999999999.old.kto-tmp"] {
            assert!(std::process::Command::new("mkfifo").arg(path(name)).status().unwrap().success());
        }
        std::os::unix::fs::symlink(".fifo.999999999.kto-tmp", path(".link.999999999.kto-tmp")).unwrap();
        let (done, wait) = std::sync::mpsc::channel();
        let folder = dir.path().to_path_buf();
        std::thread::spawn(move || {
            sweep(&folder);
            sweep_locked(&folder);
            done.send(()).unwrap();
        });
        wait.recv_timeout(std::time::Duration::from_secs(60)).expect("the sweep waits for a FIFO");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
        assert!(!is_free(&path(".link.999999999.kto-tmp")));
    }

    #[test]
    fn in_a_locked_folder_a_free_lock_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let alive = rustix::process::getppid().unwrap().as_raw_nonzero();
        let [free, held] = ["free", "held"].map(|name| dir.path().join(format!(".{name}.{alive}.kto-tmp")));
        fs::write(&free, b"").unwrap();
        let lock = File::create_new(&held).unwrap();
        lock.try_lock().unwrap();
        sweep(dir.path());
        assert!(free.exists() && held.exists());
        sweep_locked(dir.path());
        assert!(!free.exists() && held.exists());
    }

    #[test]
    fn a_live_writer_of_this_process_keeps_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let make = |path: &Path| File::create_new(path);
        let (first, _held) = create(&dir.path().join("x"), make).unwrap();
        sweep(dir.path());
        assert!(first.exists());
        let (second, _) = create(&dir.path().join("x"), make).unwrap();
        assert_ne!(first, second);
        sweep(dir.path());
        assert!(first.exists() && !second.exists());
    }
}
