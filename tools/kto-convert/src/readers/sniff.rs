//! Which form an input has: the flag, else the file name, else the first character.

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

/// Tells the form of an opened input. What was looked at is put back in front of it.
pub fn format(path: &Path, input: &mut Input, given: Option<Format>) -> Result<Format> {
    if let Some(format) = given.or_else(|| by_name(path)) {
        return Ok(format);
    }
    let head = look(input)?;
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&head).trim_ascii_start();
    let format = match text.first() {
        Some(b'[') => Ok(Format::Json),
        Some(first) if is_table(*first, text) => {
            let format = if text.contains(&b'\t') { "tsv" } else { "csv" };
            let what = format!("{}:1: neither a JSON object nor a JSON array", input.name);
            Err(Error::data(what).with_hint(format!("--in-format {format} reads a table with a header row")))
        }
        _ => Ok(Format::Jsonl),
    };
    let rest = mem::replace(&mut input.reader, Box::new(io::empty()));
    input.reader = Box::new(Cursor::new(head).chain(rest));
    format
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

/// `.csv` and `.tsv`, also with `.gz` behind. The JSON forms are told by their first character.
fn by_name(path: &Path) -> Option<Format> {
    let stem = path.file_stem().map(Path::new)?;
    let plain = if path.extension() == Some(OsStr::new("gz")) { stem } else { path };
    match plain.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "csv" => Some(Format::Csv),
        "tsv" => Some(Format::Tsv),
        _ => None,
    }
}

/// A first line of words with separators between them, which no JSON value begins with.
fn is_table(first: u8, line: &[u8]) -> bool {
    let known = line.starts_with(b"version https://") || line.starts_with(b"PAR1");
    (first.is_ascii_alphabetic() || first == b'"')
        && !known
        && line.iter().any(|b| matches!(b, b',' | b'\t' | b';'))
}
