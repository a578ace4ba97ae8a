//! The data stream of a tool: standard output, or a file that appears whole or not at all.
//!
//! Standard output is written through one large buffer that bypasses the line buffering of `std::io::stdout`.

use crate::{Error, Kind, Result, atomic::AtomicFile, error::io_text};
use std::{
    fs::File,
    io::{self, BufWriter, Write},
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::Path,
};

const STDOUT: &str = "standard output";

/// Where a tool's data goes. Dropping it without [`Output::finish`] leaves no file.
pub enum Output {
    /// Standard output, buffered once.
    Stdout(BufWriter<File>),
    /// A file that is renamed into place by [`Output::finish`].
    File(Box<AtomicFile>),
}

impl Output {
    /// Opens `path`, or standard output for `None`, `-` and `/dev/stdout`.
    pub fn create(path: Option<&Path>) -> Result<Self> {
        match path {
            Some(path) if !is_stdout(path) => Ok(Self::File(Box::new(AtomicFile::create(path)?))),
            _ => stdout(),
        }
    }
    /// With `on`, a file that would get the bytes it has is left alone.
    pub fn if_changed(self, on: bool) -> Self {
        match self {
            Self::File(file) => Self::File(Box::new(file.if_changed(on))),
            stdout => stdout,
        }
    }
    /// Writes `bytes`; a closed reader is [`Kind::ClosedPipe`], any other failure 74.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Stdout(w) => w.write_all(bytes).map_err(|e| error(Path::new(STDOUT), &e)),
            Self::File(f) => AtomicFile::write(f, bytes),
        }
    }
    /// Flushes and makes the output final.
    pub fn finish(self) -> Result<()> {
        match self {
            Self::Stdout(mut w) => w.flush().map_err(|e| error(Path::new(STDOUT), &e)),
            Self::File(f) => f.commit(),
        }
    }
}

/// The same stream for serializers. A closed reader is [`io::ErrorKind::BrokenPipe`]; see [`error`].
impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stdout(w) => Write::write(w, bytes),
            Self::File(f) => Write::write(f.as_mut(), bytes),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout(w) => w.flush(),
            Self::File(f) => f.flush(),
        }
    }
}

/// Prints the path of what a tool has made, so that `$(kto-… -o DIR)` composes. A tool that writes a directory ends
/// with it.
pub fn print_path(path: &Path) -> Result<()> {
    let mut out = stdout()?;
    out.write(path.as_os_str().as_bytes())?;
    out.write(b"\n")?;
    out.finish()
}

/// Returns the error of writing to `name` (a path, or "standard output"): [`Kind::ClosedPipe`] when the reader went
/// away, else 74.
pub fn error(name: &Path, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Error::new(Kind::ClosedPipe, format!("{} closed", name.display())),
        _ => Error::new(
            Kind::Io,
            format!("{}: {}", crate::escape(&name.display().to_string()), io_text(error)),
        ),
    }
}

/// `/dev/stdout` must not be resolved and renamed over: with `> file` the shell holds that file.
pub(crate) fn is_stdout(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path == Path::new(name))
}

fn stdout() -> Result<Output> {
    let fd = io::stdout().as_fd().try_clone_to_owned().map_err(|e| error(Path::new(STDOUT), &e))?;
    Ok(Output::Stdout(BufWriter::with_capacity(1 << 16, File::from(fd))))
}
