//! Rows on their way from a file to a record: what every row reader yields and how a JSON row is parsed.
//!
//! Called by the readers of this crate ([`crate::jsonl`], [`crate::json`], [`crate::table`]). A row is good or
//! bad; only a broken stream ends the reading, so a caller may count bad rows and go on.

use crate::json::{self, Fault};
use kto_cli::{Error, Result};
use serde_json::Value;

/// The longest line that is read when the caller sets no other cap: 64 MiB.
pub const MAX_LINE: u64 = 64 << 20;

/// How a reader treats what it meets.
#[derive(Clone, Copy, Debug)]
pub struct ReadOptions {
    /// The longest line or array element in bytes.
    pub max_line: u64,
    /// Replace invalid UTF-8 and lone surrogates by U+FFFD instead of refusing the row.
    pub lossy: bool,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { max_line: MAX_LINE, lossy: false }
    }
}

/// Where a text begins in its input.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Line, from 1.
    pub line: u64,
    /// Byte column of the line, from 1.
    pub column: u64,
    /// Byte offset in the (decoded) input.
    pub offset: u64,
}

impl Place {
    /// Moves behind `text`.
    pub fn advance(&mut self, text: &[u8]) {
        self.offset += text.len() as u64;
        match text.iter().rposition(|b| *b == b'\n') {
            None => self.column += text.len() as u64,
            Some(last) => {
                self.line += text.iter().filter(|b| **b == b'\n').count() as u64;
                self.column = (text.len() - last) as u64;
            }
        }
    }
}

/// One row of an input, good or bad.
#[derive(Debug)]
pub struct Row {
    /// The line of the input on which the row begins, from 1.
    pub line: u64,
    /// The row, or what is wrong with it (65, with `name:line`). A bad row does not end the stream.
    pub value: Result<Value>,
    /// Top-level fields whose numbers a [`Value`] cannot hold exactly, as JSON text.
    pub exact: Vec<(String, String)>,
    /// Characters replaced by U+FFFD ([`ReadOptions::lossy`]).
    pub replaced: u64,
    /// Rows of the input that it stands for: 1, or more when they were put together.
    pub rows: u64,
}

impl Row {
    /// A row that cannot be read.
    pub(crate) fn bad(line: u64, error: Error) -> Self {
        Self { line, value: Err(error), ..Self::none() }
    }

    /// A row without anything, to be filled.
    pub fn none() -> Self {
        Self { line: 0, value: Ok(Value::Null), exact: Vec::new(), replaced: 0, rows: 1 }
    }
}

/// Parses the JSON text of one row that begins at `place`.
pub(crate) fn parse_row(name: &str, place: Place, text: &[u8], options: ReadOptions) -> Row {
    let mut row = Row { line: place.line, ..Row::none() };
    let mut repaired = Vec::new();
    let mut parsed = json::parse(text);
    if parsed.is_err() && options.lossy {
        (repaired, row.replaced) = json::repair(text);
        if row.replaced > 0 {
            parsed = json::parse(&repaired);
        }
    }
    match parsed {
        Ok(parsed) => {
            if parsed.inexact {
                row.exact = json::exact_fields(if row.replaced > 0 { &repaired } else { text });
            }
            row.value = Ok(parsed.value);
        }
        Err(fault) => row.value = Err(located(name, place, &fault)),
    }
    row
}

/// Puts a fault of a text into its file.
pub(crate) fn located(name: &str, place: Place, fault: &Fault) -> Error {
    let line = place.line + fault.line - 1;
    let column = if fault.line == 1 { (place.column + fault.column).saturating_sub(1) } else { fault.column };
    let what = match (fault.column, fault.what.as_str()) {
        (0, what) => format!("{name}:{line}: {what}"),
        (at, json::NUL) => format!("{name}:{line}: NUL bytes at offset {}", place.offset + at - 1),
        (_, what) => format!("{name}:{line}:{column}: {what}"),
    };
    match &fault.hint {
        Some(hint) => Error::data(what).with_hint(hint.clone()),
        None => Error::data(what),
    }
}

/// The error of a line, array element or table row over the cap.
pub(crate) fn too_long(name: &str, line: u64, what: &str, cap: u64) -> Error {
    let size =
        if cap.is_multiple_of(1 << 20) { format!("{} MiB", cap >> 20) } else { format!("{cap} bytes") };
    Error::data(format!("{name}:{line}: {what} longer than {size}"))
        .with_hint("--max-line SIZE raises the limit")
}
