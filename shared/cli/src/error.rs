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
    /// 129: SIGHUP.
    HungUp,
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
            Kind::HungUp => 129,
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
    /// Returns the error of opening or reading an input: 66 when it is missing or not to be opened, 65 when the bytes
    /// are not what they should be (a cut or corrupt gzip stream), else 74.
    pub fn reading(path: &Path, error: &io::Error) -> Self {
        use io::ErrorKind as E;
        let kind = match error.kind() {
            E::NotFound
            | E::PermissionDenied
            | E::IsADirectory
            | E::NotADirectory
            | E::InvalidFilename
            | E::InvalidInput => Kind::NoInput,
            E::InvalidData | E::UnexpectedEof => Kind::Data,
            E::OutOfMemory => Kind::OutOfMemory,
            // A loop of symbolic links; its ErrorKind is not stable yet.
            _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => Kind::NoInput,
            _ => Kind::Io,
        };
        Self::new(kind, format!("{}: {}", escape(&path.display().to_string()), io_text(error)))
    }
    /// Returns the error of writing an output: 73 when it cannot be created, [`Kind::ClosedPipe`] when its reader is
    /// gone, else 74.
    pub fn writing(path: &Path, error: &io::Error) -> Self {
        use io::ErrorKind as E;
        let kind = match error.kind() {
            E::NotFound
            | E::PermissionDenied
            | E::AlreadyExists
            | E::IsADirectory
            | E::NotADirectory
            | E::InvalidFilename
            | E::InvalidInput
            | E::ReadOnlyFilesystem => Kind::CantCreate,
            E::BrokenPipe => Kind::ClosedPipe,
            _ => Kind::Io,
        };
        Self::new(kind, format!("{}: {}", escape(&path.display().to_string()), io_text(error)))
    }
    /// Returns the error (71) of worker threads that cannot be started.
    pub fn threads(error: impl fmt::Display) -> Self {
        let text = error.to_string();
        let text = text.split(" (os error").next().unwrap_or_default().to_lowercase();
        Self::new(Kind::OutOfMemory, format!("cannot start the worker threads: {text}"))
            .with_hint("a smaller --threads, or raise ulimit -u")
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
    /// Returns the same error with another kind.
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }
    /// Returns the hint.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

/// The operating system's words without Rust's "(os error 2)".
pub(crate) fn io_text(error: &io::Error) -> String {
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

/// Makes a text from a file safe for a terminal: control characters, and the marks that reorder or hide text,
/// become escapes like `\n` or `\u{1b}`.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
        {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_files_cannot_reach_the_terminal() {
        assert_eq!(escape("a\u{1b}[2Jb\n\0é漢"), "a\\u{1b}[2Jb\\n\\u{0}é漢");
        assert_eq!(escape("x\u{202e}y"), "x\\u{202e}y");
    }

    #[test]
    fn operating_system_errors_get_their_codes() {
        let os = io::Error::from_raw_os_error;
        let at = Path::new("x");
        assert_eq!(Error::reading(at, &os(2)).to_string(), "x: no such file or directory");
        assert_eq!(Error::reading(at, &os(2)).kind(), Kind::NoInput);
        assert_eq!(Error::reading(at, &os(5)).kind(), Kind::Io);
        assert_eq!(Error::writing(at, &os(28)).kind(), Kind::Io);
        assert_eq!(Error::writing(at, &os(13)).kind(), Kind::CantCreate);
        assert_eq!(Error::writing(at, &os(32)).kind(), Kind::ClosedPipe);
        assert_eq!(Error::reading(at, &io::Error::from(io::ErrorKind::UnexpectedEof)).kind(), Kind::Data);
    }

    #[test]
    fn places_are_put_in_front() {
        let failed: Result<()> = Err(Error::data("label missing").with_hint("--label-map"));
        let error = failed.at("a.jsonl:3").unwrap_err();
        assert_eq!(
            (error.to_string().as_str(), error.hint()),
            ("a.jsonl:3: label missing", Some("--label-map"))
        );
    }
}
