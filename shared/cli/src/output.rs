//! The data stream of a tool: standard output, or a file that appears whole or not at all.

use crate::{Error, Kind, Result, atomic::AtomicFile};
use std::{
    io::{self, BufWriter, Write},
    path::Path,
};

/// Where a tool's data goes. Dropping it without [`Output::finish`] leaves no file.
pub enum Output {
    /// Standard output, buffered once.
    Stdout(BufWriter<io::Stdout>),
    /// A file that is renamed into place by [`Output::finish`].
    File(AtomicFile),
}

impl Output {
    /// Opens `path`, or standard output for `None` and `-`.
    pub fn create(path: Option<&Path>) -> Result<Self> {
        match path {
            None => Ok(Self::Stdout(BufWriter::with_capacity(1 << 16, io::stdout()))),
            Some(p) if p == Path::new("-") => Ok(Self::Stdout(BufWriter::with_capacity(1 << 16, io::stdout()))),
            Some(p) => Ok(Self::File(AtomicFile::create(p)?)),
        }
    }
    /// Writes `bytes`; a closed reader is [`Kind::ClosedPipe`], any other failure 74.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Stdout(w) => w.write_all(bytes).map_err(|e| stdout_error(&e)),
            Self::File(f) => f.write(bytes),
        }
    }
    /// Flushes and makes the output final.
    pub fn finish(self) -> Result<()> {
        match self {
            Self::Stdout(mut w) => w.flush().map_err(|e| stdout_error(&e)),
            Self::File(f) => f.commit(),
        }
    }
}

fn stdout_error(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Error::new(Kind::ClosedPipe, "standard output closed"),
        _ => Error::new(Kind::Io, format!("standard output: {error}")),
    }
}
