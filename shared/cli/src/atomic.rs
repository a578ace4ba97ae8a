//! Files and directories that appear whole or not at all: temporary name beside the target, fsync, rename.
//!
//! Used by [`crate::output`] and by every format writer. A reader sees the old content or the new one, also after
//! kill -9 or a full disk. Symbolic links are followed first, FIFOs and devices are written directly and never
//! replaced, the umask and the mode of an existing target are kept.

mod dir;
mod equal;
mod partial;

pub use dir::AtomicDir;
pub use partial::{Finished, Seal};

use crate::{Error, Kind, Result, escape, signal, stale};
use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, BufWriter, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// Write size; large enough that the system call does not count.
const BUFFER: usize = 1 << 20;
/// Bytes at a place from which on they are sent to the disk at once.
const EARLY: usize = 1 << 18;

/// A file under construction. Dropped without [`AtomicFile::commit`], it leaves nothing behind.
pub struct AtomicFile {
    /// As the user gave it, for messages.
    shown: PathBuf,
    /// Where the bytes go meanwhile; `None` for a FIFO or device.
    rename: Option<Rename>,
    writer: BufWriter<File>,
    if_changed: bool,
    /// Whether a target that has other bytes stays.
    keep_other: bool,
}

/// The step that makes a file final.
struct Rename {
    from: PathBuf,
    to: PathBuf,
    mode: Option<u32>,
    done: bool,
}

impl AtomicFile {
    /// Starts writing `target` under a temporary name in the same directory.
    pub fn create(target: &Path) -> Result<Self> {
        let fail = |e: io::Error| creating(target, &e);
        let to = resolve(target).map_err(fail)?;
        let existing = match fs::metadata(&to) {
            Ok(metadata) => Some(metadata),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(fail(e)),
        };
        let shown = target.to_path_buf();
        match existing {
            Some(metadata) if metadata.is_dir() => Err(fail(io::ErrorKind::IsADirectory.into())),
            Some(metadata) if !metadata.is_file() => {
                let file = OpenOptions::new().write(true).open(&to).map_err(fail)?;
                let writer = BufWriter::with_capacity(1 << 16, file);
                Ok(Self { shown, rename: None, writer, if_changed: false, keep_other: false })
            }
            other => {
                let (from, file) = stale::create(&to, |path| File::create_new(path)).map_err(fail)?;
                let mode = other.map(|metadata| metadata.permissions().mode() & 0o777);
                let rename = Some(Rename { from, to, mode, done: false });
                let writer = BufWriter::with_capacity(BUFFER, file);
                Ok(Self { shown, rename, writer, if_changed: false, keep_other: false })
            }
        }
    }
    /// With `on`, a target that has the same bytes already is left alone, its time of change too.
    pub fn if_changed(mut self, on: bool) -> Self {
        self.if_changed = on;
        self
    }
    /// With `on`, a target that has other bytes is not replaced: [`AtomicFile::commit`] fails (73).
    pub fn keep_other(mut self, on: bool) -> Self {
        self.keep_other = on;
        self
    }
    /// Appends `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(|e| Error::writing(&self.shown, &e))
    }
    /// Writes `bytes` at an offset from the beginning; what lies between may be written later. For files alone, not for pipes, and
    /// not after [`AtomicFile::write`].
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let file = self.writer.get_ref();
        file.write_all_at(bytes, offset).map_err(|e| Error::writing(&self.shown, &e))?;
        if bytes.len() >= EARLY {
            write_back(file, offset, bytes.len() as u64);
        }
        Ok(())
    }
    /// Makes the file final: flush, fsync, rename, fsync of the directory.
    pub fn commit(mut self) -> Result<()> {
        self.make_final().map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => {
                let text = format!("{}: already exists", escape(&self.shown.display().to_string()));
                Error::new(Kind::CantCreate, text).with_hint("--force replaces it")
            }
            _ => Error::writing(&self.shown, &e),
        })
    }

    fn make_final(&mut self) -> io::Result<()> {
        self.writer.flush()?;
        let file = self.writer.get_ref();
        let Some(rename) = &mut self.rename else { return tolerate_unsupported(file.sync_all()) };
        if self.if_changed && equal::files(&rename.from, &rename.to) {
            return Ok(()); // Dropped, the temporary file goes away.
        }
        if self.keep_other && rename.to.exists() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if let Some(mode) = rename.mode {
            file.set_permissions(Permissions::from_mode(mode))?;
        }
        tolerate_unsupported(file.sync_all())?;
        fs::rename(&rename.from, &rename.to)?;
        rename.done = true;
        sync_dir(&stale::folder_of(&rename.to))
    }
}

/// The same file for serializers; convert errors with [`crate::output::error`].
impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

impl Drop for Rename {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.from);
        }
    }
}

/// Writes a whole file atomically.
pub fn write(target: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(target)?;
    file.write(bytes)?;
    file.commit()
}

/// Gives a file that is whole, and on the disk, its final name.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    let renamed = fs::rename(from, to).and_then(|()| sync_dir(&stale::folder_of(to)));
    renamed.map_err(|e| Error::writing(to, &e))
}

/// Starts to bring bytes to the disk, so that the fsync at the end finds little to do. Linux does that for bytes it is told will not
/// be read again; they stay in the page cache, as it drops only those that are on the disk already.
fn write_back(file: &File, offset: u64, bytes: u64) {
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(bytes), rustix::fs::Advice::DontNeed);
    #[cfg(not(target_os = "linux"))]
    let _ = (file, offset, bytes);
}

/// Creates a directory, and those above it that are missing. Their names are safe from a power loss when it returns.
pub fn create_dir_all(target: &Path) -> Result<()> {
    let is_missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
    let missing: Vec<&Path> = target.ancestors().take_while(is_missing).collect();
    fs::create_dir_all(target).map_err(|e| Error::writing(target, &e))?;
    missing.into_iter().rev().try_for_each(sync_name)
}

/// Removes what killed writers have left in a directory under temporary names. The first output into a directory does that by
/// itself; this is for one into which nothing may be written any more.
pub fn sweep(folder: &Path) {
    stale::sweep(folder);
}

/// Returns what is said of an output whose making was stopped by a signal: its name, and how it goes on. Other errors stay as they are.
pub fn stopped(error: Error, target: &Path) -> Error {
    if !signal::is_stop(error.kind()) {
        return error;
    }
    let shown = |path: &Path| escape(&path.display().to_string());
    let partial = partial::path_of(target);
    let hint = match partial.exists() {
        true => format!("the same command again goes on with {}", shown(&partial)),
        false => "the same command again begins anew".into(),
    };
    Error::new(error.kind(), format!("{}: {error}", shown(target))).with_hint(hint)
}

/// Waits until the name of a new file or directory is on the disk. To force a file's bytes there does not do that.
pub fn sync_name(path: &Path) -> Result<()> {
    sync_dir(&stale::folder_of(path)).map_err(|e| Error::writing(path, &e))
}

/// Returns the error of starting an output: 73, unless the disk itself failed.
fn creating(target: &Path, error: &io::Error) -> Error {
    let made = Error::writing(target, error);
    if error.kind() == io::ErrorKind::NotFound && !stale::folder_of(target).exists() {
        let folder = stale::folder_of(target);
        return made.with_hint(format!("mkdir -p {}", escape(&folder.display().to_string())));
    }
    if error.kind() == io::ErrorKind::Other { made.with_kind(Kind::CantCreate) } else { made }
}

/// Follows symbolic links of the last component, also to a target that does not exist yet.
fn resolve(target: &Path) -> io::Result<PathBuf> {
    let mut path = target.to_path_buf();
    for _ in 0..40 {
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_symlink() => {
                // Links under /proc and /dev lead to open files that have no name to rename over.
                if path.starts_with("/proc") || path.starts_with("/dev") {
                    return Ok(path);
                }
                let next = fs::read_link(&path)?;
                path = stale::folder_of(&path).join(next);
            }
            Ok(_) => return Ok(path),
            Err(e) if e.kind() == io::ErrorKind::NotFound && path.file_name().is_some() => return Ok(path),
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

fn sync_dir(folder: &Path) -> io::Result<()> {
    tolerate_unsupported(File::open(folder)?.sync_all())
}

/// FIFOs and some network file systems know no fsync.
fn tolerate_unsupported(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// That the names are synced is seen by scripts/power-test.
    #[test]
    fn directories_are_created_with_those_above_them() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        create_dir_all(&deep).unwrap();
        create_dir_all(&deep).unwrap();
        assert!(deep.is_dir());
        fs::write(dir.path().join("file"), "").unwrap();
        let error = create_dir_all(&dir.path().join("file/x")).unwrap_err();
        assert_eq!(error.kind(), Kind::CantCreate);
        assert_eq!(sync_name(&dir.path().join("none/x")).unwrap_err().kind(), Kind::CantCreate);
    }

    #[test]
    fn nothing_appears_before_commit_and_nothing_stays_without_it() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out.jsonl");
        let mut file = AtomicFile::create(&target).unwrap();
        file.write(b"half").unwrap();
        assert_eq!(names(dir.path()), [format!(".out.jsonl.{}.kto-tmp", std::process::id())]);
        drop(file);
        assert!(names(dir.path()).is_empty());
        write(&target, b"whole").unwrap();
        assert_eq!(names(dir.path()), ["out.jsonl"]);
        assert_eq!(fs::read(&target).unwrap(), b"whole");
    }

    #[test]
    fn a_target_with_other_bytes_is_kept_when_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x");
        let make = |text: &[u8]| {
            let mut file = AtomicFile::create(&target).unwrap().if_changed(true).keep_other(true);
            file.write(text).unwrap();
            file.commit()
        };
        make(b"1").unwrap();
        make(b"1").unwrap();
        let error = make(b"2").unwrap_err();
        assert_eq!((error.kind(), error.hint()), (Kind::CantCreate, Some("--force replaces it")));
        assert_eq!((fs::read(&target).unwrap(), names(dir.path()).len()), (b"1".to_vec(), 1));
    }

    #[test]
    fn links_are_followed_and_modes_kept() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("real", &link).unwrap();
        write(&link, b"1").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        fs::set_permissions(&real, Permissions::from_mode(0o640)).unwrap();
        write(&link, b"2").unwrap();
        assert_eq!(fs::read(&real).unwrap(), b"2");
        assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(names(dir.path()), ["link", "real"]);
        let around = dir.path().join("around");
        std::os::unix::fs::symlink("around", &around).unwrap();
        assert_eq!(write(&around, b"").unwrap_err().kind(), Kind::CantCreate);
    }

    #[test]
    fn devices_are_written_and_survive() {
        use std::os::unix::fs::FileTypeExt;
        write(Path::new("/dev/null"), b"x").unwrap();
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        let error = write(Path::new("/dev/full"), b"x").unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (Kind::Io, "/dev/full: no space left on device")
        );
    }

    #[test]
    fn what_cannot_be_created_is_73() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(write(dir.path(), b"").unwrap_err().kind(), Kind::CantCreate);
        let error = write(&dir.path().join("no/such/x"), b"").unwrap_err();
        assert_eq!(error.kind(), Kind::CantCreate);
        assert!(error.hint().is_some_and(|h| h.starts_with("mkdir -p ")));
        write(&dir.path().join("file"), b"").unwrap();
        assert_eq!(write(&dir.path().join("file/x"), b"").unwrap_err().kind(), Kind::CantCreate);
        assert_eq!(write(Path::new(""), b"").unwrap_err().kind(), Kind::CantCreate);
    }
}
