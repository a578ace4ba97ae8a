//! SHA-256 in hexadecimal: fingerprints of data, tokenizers, templates and models.

use crate::{Error, Result, input, signal};
use sha2::{Digest, Sha256};
use std::{
    fmt::Write as _,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// Bytes read at a time.
const BUFFER: usize = 1 << 20;
/// Bytes from which on another thread is worth its start.
const BESIDE: usize = 1 << 18;

/// Returns the SHA-256 of `bytes` as 64 lower-case hexadecimal digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    let mut hash = Sha256Hex::new();
    hash.update(bytes);
    hash.finish()
}

/// A SHA-256 computed piece by piece; also an [`io::Write`].
#[derive(Clone, Default)]
pub struct Sha256Hex {
    state: Sha256,
}

impl Sha256Hex {
    /// Returns the hash of nothing so far.
    pub fn new() -> Self {
        Self::default()
    }
    /// Takes in `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.state.update(bytes);
    }
    /// Takes in the bytes of numbers, the lowest first.
    pub fn update_floats(&mut self, values: &[f32]) {
        // Many at a time: calls for four bytes cost ten times as much.
        for part in values.chunks(BUFFER / 64) {
            self.update(&part.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
        }
    }
    /// Takes in `bytes` on another thread, if there are many, while this one does `work`.
    pub fn update_beside<T>(&mut self, bytes: &[u8], work: impl FnOnce() -> T) -> T {
        if bytes.len() < BESIDE {
            self.update(bytes);
            return work();
        }
        let (done, taken) = thread::scope(|scope| {
            let state = &mut self.state;
            let other = thread::Builder::new().spawn_scoped(scope, || state.update(bytes));
            (work(), other.is_ok())
        });
        // Without another thread, this one does both.
        if !taken {
            self.update(bytes);
        }
        done
    }
    /// Returns the 64 digits.
    pub fn finish(self) -> String {
        let mut text = String::with_capacity(64);
        for byte in self.state.finalize() {
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

/// Size and hash of a file; no hash for a pipe or a device, whose bytes come once, nor for what is gone by now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hashed {
    /// Bytes.
    pub size: u64,
    /// Lowercase hexadecimal.
    pub sha256: Option<String>,
}

/// Hashes whole files, several at a time.
pub fn files(paths: &[PathBuf]) -> Result<Vec<Hashed>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(paths.len()));
    let work = || {
        while let Some((at, path)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, paths.get(i)?)))
        {
            let result = file(path);
            done.lock().unwrap_or_else(PoisonError::into_inner).push((at, result));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(paths.len());
    thread::scope(|scope| {
        for _ in 1..threads {
            // Without another thread, this one does all of it.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

fn file(path: &Path) -> Result<Hashed> {
    let fail = |e: &io::Error| Error::reading(path, e);
    // Looked at before it is opened: opening a FIFO would wait for its writer.
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => {}
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(&e)),
        _ => return Ok(Hashed::default()),
    }
    let (mut file, mut hash, mut size) = (input::open_file(path)?, Sha256Hex::new(), 0);
    let mut buffer = vec![0; BUFFER];
    loop {
        signal::check()?;
        match file.read(&mut buffer) {
            Ok(0) => return Ok(Hashed { size, sha256: Some(hash.finish()) }),
            Ok(n) => {
                hash.update(&buffer[..n]);
                size += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(fail(&e)),
        }
    }
}

impl io::Write for Sha256Hex {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn files_are_hashed_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..9).map(|n| dir.path().join(n.to_string())).collect();
        paths[1..].iter().enumerate().for_each(|(n, p)| fs::write(p, vec![b'x'; n << 19]).unwrap());
        let hashed = files(&[&paths[..], &["/dev/null".into()]].concat()).unwrap();
        let expected = |n: usize| Hashed { size: n as u64, sha256: Some(sha256_hex(&vec![b'x'; n])) };
        assert_eq!(hashed[0], Hashed::default(), "gone");
        assert_eq!(hashed[9], Hashed::default(), "a device");
        (0..8).for_each(|n| assert_eq!(hashed[n + 1], expected(n << 19)));
    }

    #[test]
    fn known_answers_of_fips_180() {
        assert_eq!(sha256_hex(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        let mut pieces = Sha256Hex::new();
        pieces.update(b"a");
        pieces.update(b"bc");
        let mut floats = Sha256Hex::new();
        floats.update_floats(&vec![1.5; BUFFER / 64 + 1]);
        assert_eq!(floats.finish(), sha256_hex(&1.5f32.to_le_bytes().repeat(BUFFER / 64 + 1)));
        let mut beside = Sha256Hex::new();
        let long = vec![b'x'; BESIDE];
        assert_eq!([&b"ab"[..], &long].map(|bytes| beside.update_beside(bytes, || bytes.len())), [2, BESIDE]);
        assert_eq!(beside.finish(), sha256_hex(&[&b"ab"[..], &long].concat()));
        assert_eq!(pieces.finish(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
