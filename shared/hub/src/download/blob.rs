//! One file: its bytes as a blob, its name as a link.
//!
//! What has come of a file lies in `blobs/<etag>.incomplete`; a later run hashes it and asks for the rest. Only whole
//! files with the right hash get the blob's name. A lock, the same as huggingface_hub's, keeps two downloads of a file
//! apart.

use super::http::{Meta, Source};
use kto_cli::{Error, Kind, Progress, Result, Ui, atomic, disk, hash::Sha256Hex, signal, units};
use sha1::{Digest, Sha1};
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    path::{Component, Path, PathBuf},
    thread::sleep,
    time::Duration,
};

/// Requests in a row that bring no new byte, at most.
const TRIES: u32 = 4;
/// Before the second try; each further wait is three times as long.
const PAUSE: Duration = Duration::from_millis(300);
/// Between two looks at a lock.
const INTERVAL: Duration = Duration::from_millis(200);
/// Bytes read at a time.
const BUFFER: usize = 1 << 18;

/// The folders of a model in the cache.
pub struct Place {
    pub locks: PathBuf,
    pub blobs: PathBuf,
    pub snapshot: PathBuf,
}

/// Fetches a file unless its blob is there, and links it to `path` in the snapshot.
pub fn fetch(source: &Source, place: &Place, path: &Path, ui: &Ui, progress: &Progress) -> Result<()> {
    let meta = source.meta()?;
    let blob = place.blobs.join(&meta.etag);
    let lock = lock(&place.locks.join(format!("{}.lock", meta.etag)), ui)?;
    if blob.exists() {
        progress.add(meta.size.unwrap_or(0));
    } else {
        Incoming::open(source, &meta, place.blobs.join(format!("{}.incomplete", meta.etag)))?
            .run(&blob, progress)?;
    }
    if !path.exists() {
        link(&blob, path)?;
    }
    drop(lock);
    Ok(())
}

/// Waits for the lock of a blob. A file system without locks is no error: the hash tells a torn blob.
fn lock(path: &Path, ui: &Ui) -> Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let file = file.map_err(|e| Error::writing(path, &e))?;
    let mut told = false;
    while let Err(TryLockError::WouldBlock) = file.try_lock() {
        if !told {
            ui.note("another process is fetching this file; waiting");
            told = true;
        }
        signal::check()?;
        sleep(INTERVAL);
    }
    Ok(file)
}

/// A blob on its way.
struct Incoming<'a> {
    source: &'a Source<'a>,
    meta: &'a Meta,
    path: PathBuf,
    file: File,
    /// Bytes that are there, and their hash.
    have: u64,
    hash: Sha256Hex,
    /// The beginning was left by an earlier run.
    resumed: bool,
}

impl<'a> Incoming<'a> {
    fn open(source: &'a Source<'a>, meta: &'a Meta, path: PathBuf) -> Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let file = file.map_err(|e| Error::writing(&path, &e))?;
        let mut this = Self { source, meta, path, file, have: 0, hash: Sha256Hex::new(), resumed: false };
        this.take_over()?;
        if let Some(size) = meta.size {
            disk::require_free(&this.path, size - this.have)?;
        }
        Ok(this)
    }

    /// Hashes what an earlier run has left.
    fn take_over(&mut self) -> Result<()> {
        let old = &mut self.file;
        let mut buffer = vec![0; BUFFER];
        loop {
            match old.read(&mut buffer).map_err(|e| Error::reading(&self.path, &e))? {
                0 => break,
                n => self.hash.update(&buffer[..n]),
            }
            signal::check()?;
        }
        self.have = old.metadata().map_err(|e| Error::reading(&self.path, &e))?.len();
        self.resumed = self.have > 0;
        match self.meta.size {
            Some(size) if size < self.have => self.restart(),
            _ => Ok(()),
        }
    }

    fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(|e| Error::writing(&self.path, &e))?;
        (self.have, self.hash, self.resumed) = (0, Sha256Hex::new(), false);
        Ok(())
    }

    fn run(mut self, blob: &Path, progress: &Progress) -> Result<()> {
        progress.add(self.have);
        self.receive(progress)?;
        if let Err(error) = self.verify() {
            let resumed = self.resumed;
            self.restart()?;
            if resumed {
                // The earlier run's bytes may have been the wrong ones.
                self.receive(progress)?;
                self.verify()?;
            } else {
                let _ = fs::remove_file(&self.path);
                return Err(error);
            }
        }
        self.file.sync_all().map_err(|e| Error::writing(&self.path, &e))?;
        atomic::rename(&self.path, blob)
    }

    /// Asks for the rest until all of it is there.
    fn receive(&mut self, progress: &Progress) -> Result<()> {
        let (mut best, mut vain) = (self.have, 0);
        while self.meta.size != Some(self.have) {
            let end = self.source.part(self.have).and_then(|part| match part {
                None => self.restart().map(|()| None),
                Some(part) => {
                    if part.from != self.have {
                        self.restart()?;
                    }
                    match part.from == self.have {
                        true => self.copy(part.reader, progress).map(Some),
                        false => Err(Error::data("the hub answers with other bytes than were asked for")),
                    }
                }
            });
            match end {
                // Without a size the end of the body is the end of the file.
                Ok(Some(None)) if self.meta.size.is_none() => return Ok(()),
                Err(error) if !matches!(error.kind(), Kind::Unavailable | Kind::TryAgain) => {
                    return Err(error);
                }
                Err(error) if vain + 1 == TRIES => return Err(error),
                _ => {}
            }
            vain = if self.have > best { 0 } else { vain + 1 };
            best = best.max(self.have);
            if vain == TRIES {
                return Err(self.cut());
            }
            signal::check()?;
            sleep(if vain > 0 { PAUSE * 3_u32.pow(vain - 1) } else { Duration::ZERO });
        }
        Ok(())
    }

    fn cut(&self) -> Error {
        let size = self.meta.size.map_or("more".into(), units::size);
        let what = format!("the connection ends after {} of {size}", units::size(self.have));
        Error::new(Kind::Io, what).with_hint("run it again, what has been fetched is kept")
    }

    /// Appends a body. Returns how it was cut short, if it was.
    fn copy(&mut self, mut reader: Box<dyn Read>, progress: &Progress) -> Result<Option<io::Error>> {
        let mut buffer = vec![0; BUFFER];
        loop {
            signal::check()?;
            let n = match reader.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Ok(Some(e)),
            };
            if self.meta.size.is_some_and(|size| self.have + n as u64 > size) {
                self.restart()?;
                return Err(Error::data("the hub sends more bytes than it announced"));
            }
            self.file.write_all(&buffer[..n]).map_err(|e| Error::writing(&self.path, &e))?;
            self.hash.update(&buffer[..n]);
            self.have += n as u64;
            progress.add(n as u64);
        }
    }

    /// Compares with the hash that the name promises: SHA-256, or git's of a small file. Other names promise none.
    fn verify(&mut self) -> Result<()> {
        let meta: &'a Meta = self.meta;
        let etag = meta.etag.as_str();
        if !etag.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(());
        }
        let (kind, found) = match etag.len() {
            64 => ("SHA-256", self.hash.clone().finish()),
            40 => ("git hash", git_hash(&mut self.file).map_err(|e| Error::reading(&self.path, &e))?),
            _ => return Ok(()),
        };
        if found == etag {
            return Ok(());
        }
        Err(Error::data(format!("what the hub sent has the {kind} {found}, it announced {etag}"))
            .with_hint("run it again; if it stays so, check HF_ENDPOINT and the proxy"))
    }
}

/// The hash under which git keeps a file.
fn git_hash(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut hash = Sha1::new();
    hash.update(format!("blob {}\0", file.metadata()?.len()));
    let mut buffer = vec![0; BUFFER];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// Makes `path` a relative link to the blob; where there are no links, a copy.
fn link(blob: &Path, path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| Error::writing(folder, &e))?;
    let fresh = folder.join(format!(".{}.{}.kto-tmp", name_of(path), std::process::id()));
    let _ = fs::remove_file(&fresh);
    let made =
        std::os::unix::fs::symlink(way(folder, blob), &fresh).or_else(|_| fs::copy(blob, &fresh).map(drop));
    made.map_err(|e| Error::writing(path, &e))?;
    atomic::rename(&fresh, path)
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The way from a folder to a file, by the folders they share.
fn way(folder: &Path, file: &Path) -> PathBuf {
    let (from, to): (Vec<Component>, Vec<Component>) =
        (folder.components().collect(), file.components().collect());
    let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let up = from[shared..].iter().map(|_| Component::ParentDir);
    up.chain(to[shared..].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_and_hashes() {
        assert_eq!(way(Path::new("/c/m/snapshots/x"), Path::new("/c/m/blobs/b")), Path::new("../../blobs/b"));
        assert_eq!(way(Path::new("m/snapshots/x/a"), Path::new("m/blobs/b")), Path::new("../../../blobs/b"));
        let mut file = tempfile::tempfile().unwrap();
        // `git hash-object` of an empty file and of "hello\n".
        assert_eq!(git_hash(&mut file).unwrap(), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        file.write_all(b"hello\n").unwrap();
        assert_eq!(git_hash(&mut file).unwrap(), "ce013625030ba8dba906f756967f9e9ca394464a");
    }
}
