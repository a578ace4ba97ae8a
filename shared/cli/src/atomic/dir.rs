//! A directory that appears whole or not at all.

use super::{
    creating, equal,
    partial::{self, Finished, Seal},
    resolve, sync_dir, tolerate_unsupported,
};
use crate::{Error, Kind, Result, escape, manifest, record::IN_DIRECTORY, stale};
use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io,
    path::{Path, PathBuf},
};

/// A directory under construction: write into [`AtomicDir::path`], then [`AtomicDir::commit`].
/// Dropped without commit, it leaves nothing behind.
pub struct AtomicDir {
    shown: PathBuf,
    target: PathBuf,
    temporary: PathBuf,
    force: bool,
    if_changed: bool,
    /// Of one that may outlive this run: what an earlier one has left in it.
    partial: Option<Grown>,
    keep: Cell<bool>,
    /// Hashes of files that were hashed as they were written, by path, if they are of use.
    hashes: RefCell<Option<BTreeMap<PathBuf, String>>>,
    /// Open and locked while the writer lives.
    _lock: File,
}

/// What is known of a directory that several runs work on.
struct Grown {
    job: String,
    resumed: bool,
    finished: RefCell<BTreeMap<String, Finished>>,
    notes: Vec<String>,
}

impl AtomicDir {
    /// Starts a directory that will become `target`. Refuses (73) when `target` exists and `force` is not set; with
    /// `force` an existing directory is replaced at [`AtomicDir::commit`], unless it holds the working directory.
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        Self::create_if_changed(target, force, false)
    }
    /// The same; with `if_changed` an existing directory with the same content is left alone at [`AtomicDir::commit`],
    /// and one with another content is refused (73) only there.
    pub fn create_if_changed(target: &Path, force: bool, if_changed: bool) -> Result<Self> {
        let fail = |e: io::Error| creating(target, &e);
        let resolved = resolve(target).map_err(fail)?;
        refuse_existing(target, &resolved, force || if_changed)?;
        let make = |path: &Path| {
            DirBuilder::new().create(path)?;
            File::open(path)
        };
        let (temporary, lock) = stale::create(&resolved, make).map_err(fail)?;
        let shown = target.to_path_buf();
        let keep = Cell::new(false);
        let hashes = RefCell::new(None);
        Ok(Self {
            shown,
            target: resolved,
            temporary,
            force,
            if_changed,
            partial: None,
            keep,
            hashes,
            _lock: lock,
        })
    }
    /// The same for a long job: the directory grows as `NAME.partial`, and a run that is killed leaves it for the next one with the same
    /// `job`, a text that tells everything the content depends on. Of what it holds then only files stay that were finished
    /// ([`AtomicDir::finish`]) and whose `seal` is the one they were finished with. Files in it must be made atomically. Errors also: 75
    /// while another run works on it.
    pub fn resume(target: &Path, force: bool, if_changed: bool, job: &str, seal: &Seal) -> Result<Self> {
        let resolved = resolve(target).map_err(|e| creating(target, &e))?;
        refuse_existing(target, &resolved, force || if_changed)?;
        let partial::Partial { path, lock, resumed, finished, notes } =
            partial::open(target, &resolved, job, seal)?;
        let partial = Grown { job: job.into(), resumed, finished: RefCell::new(finished), notes };
        Ok(Self {
            shown: target.to_path_buf(),
            target: resolved,
            temporary: path,
            force,
            if_changed,
            partial: Some(partial),
            keep: Cell::new(false),
            hashes: RefCell::new(None),
            _lock: lock,
        })
    }
    /// Returns whether an earlier run has worked on this directory.
    pub fn resumed(&self) -> bool {
        self.partial.as_ref().is_some_and(|grown| grown.resumed)
    }
    /// Returns what an earlier run has left and is not used, a line each.
    pub fn notes(&self) -> &[String] {
        self.partial.as_ref().map_or(&[], |grown| &grown.notes)
    }
    /// Returns whether the file `name` in it is there, finished by this run or an earlier one.
    pub fn is_finished(&self, name: &str) -> bool {
        self.partial.as_ref().is_some_and(|grown| grown.finished.borrow().contains_key(name))
    }
    /// Notes a file that is about to get its name, for a later run. To be called before that: then no file stands there that the journal
    /// does not know.
    pub fn finish(&self, name: &str, file: Finished) -> Result<()> {
        let Some(grown) = &self.partial else { return Ok(()) };
        grown.finished.borrow_mut().insert(name.into(), file);
        partial::write_journal(&self.temporary, &grown.job, &grown.finished.borrow())
    }
    /// Says whether a directory of [`AtomicDir::resume`] stays when it is dropped without commit.
    pub fn keep(&self, keep: bool) {
        self.keep.set(keep && self.partial.is_some());
    }
    /// Asks who writes large files into the directory for their hashes.
    pub fn want_hashes(&self, want: bool) {
        self.hashes.replace(want.then(BTreeMap::new));
    }
    /// Returns whether hashes are of use.
    pub fn wants_hashes(&self) -> bool {
        self.hashes.borrow().is_some()
    }
    /// Notes the SHA-256 of a file of the directory, which saves reading it again.
    pub fn note_hash(&self, path: PathBuf, sha256: String) {
        if let Some(hashes) = &mut *self.hashes.borrow_mut() {
            hashes.insert(path, sha256);
        }
    }
    /// Returns the hashes that were noted.
    pub(crate) fn hashes(&self) -> BTreeMap<PathBuf, String> {
        self.hashes.borrow().clone().unwrap_or_default()
    }
    /// The temporary directory to write into.
    pub fn path(&self) -> &Path {
        &self.temporary
    }
    /// Makes the directory final: fsync of every file, rename, fsync of the parent.
    pub fn commit(mut self) -> Result<()> {
        if self.partial.is_some() {
            self.leave_partial().map_err(|e| Error::writing(&self.shown, &e))?;
        }
        let fail = |e: io::Error| Error::writing(&self.shown, &e);
        if self.if_changed && self.target.exists() {
            if equal::trees(&self.temporary, &self.target, Some(IN_DIRECTORY)) {
                return self.renew_manifest();
            }
            refuse_existing(&self.shown, &self.target, self.force)?;
            equal::keep_times(&self.temporary, &self.target).map_err(fail)?;
        }
        sync_tree(&self.temporary).map_err(fail)?;
        if self.force && self.target.exists() {
            replace(&self.temporary, &self.target).map_err(fail)?;
        } else {
            match rename_with(&self.temporary, &self.target, RenameFlags::NOREPLACE) {
                Err(e) if is_unsupported(&e) => fs::rename(&self.temporary, &self.target),
                other => other,
            }
            .map_err(fail)?;
        }
        sync_dir(&stale::folder_of(&self.target)).map_err(fail)
        // Drop removes what is left under the temporary name: nothing, or the directory that was replaced.
    }
    /// Turns a partial directory into a temporary one, once all of it is on the disk: from here on it is whole, and what is left of a
    /// kill is nobody's work any more.
    fn leave_partial(&mut self) -> io::Result<()> {
        sync_tree(&self.temporary)?;
        let from = RefCell::new(Some(&self.temporary));
        // The lock goes with the directory: it is held on what was opened, not on its name.
        let (temporary, lock) = stale::create(&self.target, |path| {
            DirBuilder::new().create(path)?;
            if let Some(from) = from.take() {
                fs::rename(from, path)?;
            }
            File::open(path)
        })?;
        self.temporary = temporary;
        self._lock = lock;
        self.partial = None;
        self.keep.set(false);
        match fs::remove_file(self.temporary.join(partial::JOURNAL)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        fs::remove_file(self.temporary.join(partial::JOB))
    }
    /// Puts the new manifest into the directory that is kept, unless it says the same.
    fn renew_manifest(&self) -> Result<()> {
        let (new, old) = (self.temporary.join(IN_DIRECTORY), self.target.join(IN_DIRECTORY));
        let fail = |e: io::Error| Error::writing(&self.shown, &e);
        match (fs::read(&new), fs::read(&old)) {
            (Ok(new), Ok(old)) if manifest::is_same(&old, &new) => Ok(()),
            (Ok(_), _) => fs::rename(&new, &old).and_then(|()| sync_dir(&self.target)).map_err(fail),
            (Err(_), _) => Ok(()),
        }
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if self.keep.get() {
            return;
        }
        let _ = fs::remove_dir_all(&self.temporary);
    }
}

fn refuse_existing(shown: &Path, target: &Path, force: bool) -> Result<()> {
    let refuse = |what: &str| {
        Error::new(Kind::CantCreate, format!("{}: {what}", escape(&shown.display().to_string())))
    };
    let metadata = match fs::metadata(target) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(creating(shown, &e)),
    };
    if !metadata.is_dir() {
        return Err(refuse("exists and is not a directory"));
    }
    if !force {
        return Err(refuse("already exists").with_hint("--force replaces it"));
    }
    let whole = fs::canonicalize(target).map_err(|e| creating(shown, &e))?;
    if std::env::current_dir().is_ok_and(|here| here.starts_with(&whole)) {
        return Err(refuse("holds the working directory and is not replaced"));
    }
    Ok(())
}

/// Puts `new` in the place of the directory `old`. Where the file system can swap two names, no moment exists at which
/// `old` is missing; the old content ends under the temporary name.
fn replace(new: &Path, old: &Path) -> io::Result<()> {
    match rename_with(new, old, RenameFlags::EXCHANGE) {
        Err(e) if is_unsupported(&e) => {}
        other => return other,
    }
    let aside = stale::aside(old);
    fs::rename(old, &aside)?;
    fs::rename(new, old).inspect_err(|_| {
        let _ = fs::rename(&aside, old);
    })?;
    let _ = fs::remove_dir_all(&aside);
    Ok(())
}

fn rename_with(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    renameat_with(CWD, from, CWD, to, flags).map_err(io::Error::from)
}

fn is_unsupported(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::NOSYS, Errno::NOTSUP].iter().any(|e| error.raw_os_error() == Some(e.raw_os_error()))
}

/// Forces every file and directory under `folder` to the disk.
fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            tolerate_unsupported(File::open(entry.path())?.sync_all())?;
        }
    }
    sync_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(target: &Path, force: bool, text: &str) -> Result<()> {
        let dir = AtomicDir::create(target, force)?;
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/file"), text).unwrap();
        dir.commit()
    }

    #[test]
    fn existing_directories_are_replaced_only_with_force() {
        let top = tempfile::tempdir().unwrap();
        let target = top.path().join("model");
        make(&target, false, "1").unwrap();
        assert_eq!(make(&target, false, "2").unwrap_err().kind(), Kind::CantCreate);
        assert_eq!(fs::read_to_string(target.join("sub/file")).unwrap(), "1");
        make(&target, true, "3").unwrap();
        assert_eq!(fs::read_to_string(target.join("sub/file")).unwrap(), "3");
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_drop_leaves_nothing() {
        let top = tempfile::tempdir().unwrap();
        drop(AtomicDir::create(&top.path().join("model"), false).unwrap());
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_and_the_working_directory_are_never_replaced() {
        let top = tempfile::tempdir().unwrap();
        let file = top.path().join("file");
        fs::write(&file, "x").unwrap();
        for target in [file.as_path(), Path::new("/"), Path::new("."), Path::new("..")] {
            let error = AtomicDir::create(target, true).map(|_| ()).unwrap_err();
            assert_eq!(error.kind(), Kind::CantCreate, "{}", target.display());
        }
    }

    #[test]
    fn someone_else_was_faster() {
        let top = tempfile::tempdir().unwrap();
        let target = top.path().join("model");
        let dir = AtomicDir::create(&target, false).unwrap();
        fs::create_dir(&target).unwrap();
        assert_eq!(dir.commit().unwrap_err().kind(), Kind::CantCreate);
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 1);
    }
}
