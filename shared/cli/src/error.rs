//! The one error type: a place, what was found, what to do, and the exit code it maps to.

use std::{fmt, io, path::Path};

/// Result of everything that can end a tool.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as the caller of the process needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 2: wrong flags or arguments.
    Usage,
    /// 65: the content of an input is wrong.
    Data,
    /// 66: a named input does not exist or cannot be opened.
    NoInput,
    /// 69: a device or back end is not there.
    Unavailable,
    /// 70: a defect of the tool itself.
    Internal,
    /// 71: out of memory, or the plan does not fit.
    OutOfMemory,
    /// 73: an output cannot be created.
    CantCreate,
    /// 74: reading or writing failed.
    Io,
    /// 75: try again later (a lock is held).
    TryAgain,
    /// 78: configuration, fingerprint or resume mismatch.
    Config,
    /// 0: the reader of our standard output went away; stop quietly.
    ClosedPipe,
    /// 130: SIGINT.
    Interrupted,
    /// 143: SIGTERM.
    Terminated,
}

impl Kind {
    /// Returns the process exit code.
    pub fn code(self) -> u8 {
        match self {
            Kind::Usage => 2,
            Kind::Data => 65,
            Kind::NoInput => 66,
            Kind::Unavailable => 69,
            Kind::Internal => 70,
            Kind::OutOfMemory => 71,
            Kind::CantCreate => 73,
            Kind::Io => 74,
            Kind::TryAgain => 75,
            Kind::Config => 78,
            Kind::ClosedPipe => 0,
            Kind::Interrupted => 130,
            Kind::Terminated => 143,
        }
    }
}

/// One clear line, perhaps a hint, and the exit code.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
}

impl Error {
    /// Returns an error of `kind`. The message is lower case, without a full stop, and begins with the place
    /// (`file:line: …`) where there is one.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }
    /// Returns a usage error (2).
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }
    /// Returns a bad-input error (65).
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(Kind::Data, message)
    }
    /// Returns a mismatch error (78).
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Kind::Config, message)
    }
    /// Returns an internal error (70).
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }
    /// Returns the error of opening or reading an input: 66 when it is missing or not to be opened, else 74.
    pub fn reading(path: &Path, error: &io::Error) -> Self {
        use io::ErrorKind as E;
        let kind = match error.kind() {
            E::NotFound | E::PermissionDenied | E::IsADirectory | E::NotADirectory | E::FilesystemLoop => Kind::NoInput,
            _ => Kind::Io,
        };
        Self::new(kind, format!("{}: {}", escape(&path.display().to_string()), io_text(error)))
    }
    /// Returns the error of creating an output (73 when it cannot be created, 74 on I/O failure).
    pub fn writing(path: &Path, error: &io::Error) -> Self {
        use io::ErrorKind as E;
        let kind = match error.kind() {
            E::NotFound | E::PermissionDenied | E::AlreadyExists | E::IsADirectory | E::NotADirectory | E::ReadOnlyFilesystem => Kind::CantCreate,
            _ => Kind::Io,
        };
        Self::new(kind, format!("{}: {}", escape(&path.display().to_string()), io_text(error)))
    }
    /// Adds what to do: a command or a flag.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
    /// Returns the kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }
    /// Returns the hint.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

/// The operating system's words without Rust's "(os error 2)".
fn io_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error") {
        Some(at) => text[..at].to_lowercase(),
        None => text,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Puts the place in front of an error's message.
pub trait Context<T> {
    /// Prefixes the message with `place: `.
    fn at(self, place: impl fmt::Display) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn at(self, place: impl fmt::Display) -> Result<T> {
        self.map_err(|mut e| {
            e.message = format!("{place}: {}", e.message);
            e
        })
    }
}

/// Makes a text from a file safe for a terminal: control characters become `\u{…}` escapes.
pub fn escape(text: &str) -> String {
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect()
}
