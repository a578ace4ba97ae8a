//! Which form an input has: the flag, else its first bytes, else the file name.

use crate::args::Format;
use kto_cli::{
    Error, Result,
    input::{self, Input},
};
use std::{
    ffi::OsStr,
    io::{self, BufRead, Cursor, Read},
    mem,
    path::Path,
};

/// Blank lines before the data, and the part of its first line, that are looked at.
const LOOK: u64 = 64 << 10;

/// How an input is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// One JSON value a line.
    Lines,
    /// A JSON array, or JSON values one behind the other.
    Texts,
    /// A table of text with this delimiter, unless another one is given.
    Table(u8),
    /// A Parquet file.
    Parquet,
    /// An Arrow stream or file.
    Arrow { file: bool },
}

/// Tells the form of an opened input. What was looked at is put back in front of it.
pub fn form(path: &Path, input: &mut Input, given: Option<Format>) -> Result<Form> {
    let head = look(input)?;
    let form = match (given, columns(&head)) {
        (Some(Format::Parquet), _) => Ok(Form::Parquet),
        (Some(Format::Arrow), found) => Ok(found.unwrap_or(Form::Arrow { file: false })),
        (Some(Format::Json), _) => Ok(Form::Texts),
        (Some(Format::Jsonl), _) => Ok(Form::Lines),
        (Some(Format::Csv), _) => Ok(Form::Table(b',')),
        (Some(Format::Tsv), _) => Ok(Form::Table(b'\t')),
        (None, Some(found)) => Ok(found),
        (None, None) => by_name(path).map_or_else(|| by_text(&head, &input.name), Ok),
    };
    let rest = mem::replace(&mut input.reader, Box::new(io::empty()));
    input.reader = Box::new(Cursor::new(head).chain(rest));
    form
}

/// A file of columns by its mark.
fn columns(head: &[u8]) -> Option<Form> {
    const STREAM: &[u8] = b"\xff\xff\xff\xff";
    match head {
        [b'P', b'A', b'R', b'1', ..] => Some(Form::Parquet),
        [b'A', b'R', b'R', b'O', b'W', b'1', ..] => Some(Form::Arrow { file: true }),
        head if head.starts_with(STREAM) => Some(Form::Arrow { file: false }),
        _ => None,
    }
}

/// True when the file itself, not something inside it, is Parquet.
pub fn is_plain_parquet(path: &Path) -> bool {
    let mut head = [0; 4];
    path != Path::new("-")
        && path.metadata().is_ok_and(|m| m.is_file())
        && input::open_file(path).is_ok_and(|mut file| file.read_exact(&mut head).is_ok())
        && &head == b"PAR1"
}

fn by_text(head: &[u8], name: &str) -> Result<Form> {
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    match text.first() {
        // An object that goes on behind its first line.
        Some(b'{') if text.trim_ascii() == b"{" => Ok(Form::Texts),
        Some(b'[') => Ok(Form::Texts),
        Some(first) if is_table(*first, text) => {
            let format = if text.contains(&b'\t') { "tsv" } else { "csv" };
            let what = format!("{name}:1: neither a JSON object nor a JSON array");
            Err(Error::data(what).with_hint(format!("--in-format {format} reads a table with a header row")))
        }
        _ => Ok(Form::Lines),
    }
}

/// Reads up to the end of the first line that is not blank, and no further: a pipe may have no more to give yet.
fn look(input: &mut Input) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    while (head.len() as u64) < LOOK && head.trim_ascii_start().is_empty() {
        let left = LOOK - head.len() as u64;
        let read = input.reader.by_ref().take(left).read_until(b'\n', &mut head);
        if read.map_err(|e| input::error(&input.name, &e))? == 0 {
            break;
        }
    }
    Ok(head)
}

/// `.csv` and `.tsv`, also compressed. All other forms are told by their first bytes.
fn by_name(path: &Path) -> Option<Form> {
    let stem = path.file_stem().map(Path::new)?;
    let compressed = ["gz", "zst"].iter().any(|e| path.extension() == Some(OsStr::new(e)));
    let plain = if compressed { stem } else { path };
    match plain.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "csv" => Some(Form::Table(b',')),
        "tsv" => Some(Form::Table(b'\t')),
        _ => None,
    }
}

/// A first line of words with separators between them, which no JSON value begins with.
fn is_table(first: u8, line: &[u8]) -> bool {
    (first.is_ascii_alphabetic() || first == b'"')
        && !line.starts_with(b"version https://")
        && line.iter().any(|b| matches!(b, b',' | b'\t' | b';'))
}
