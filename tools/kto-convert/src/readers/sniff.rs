//! Which form an input has: the flag, else the file name, else the first character.

use crate::args::Format;
use kto_cli::{
    Error, Result,
    input::{self, Input},
};
use std::{ffi::OsStr, path::Path};

/// Tells the form of an opened input without consuming any of it.
pub fn format(path: &Path, input: &mut Input, given: Option<Format>) -> Result<Format> {
    if let Some(format) = given.or_else(|| by_name(path)) {
        return Ok(format);
    }
    let head = input.reader.fill_buf().map_err(|e| input::error(&input.name, &e))?;
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let text = text.trim_ascii_start();
    match text.first() {
        Some(b'[') => Ok(Format::Json),
        Some(first) if is_table(*first, text) => {
            let format = if first_line(text).contains(&b'\t') { "tsv" } else { "csv" };
            let what = format!("{}:1: neither a JSON object nor a JSON array", input.name);
            Err(Error::data(what).with_hint(format!("--in-format {format} reads a table with a header row")))
        }
        _ => Ok(Format::Jsonl),
    }
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

fn first_line(text: &[u8]) -> &[u8] {
    text.split(|b| *b == b'\n').next().unwrap_or_default()
}

/// A first line of words with separators between them, which no JSON value begins with.
fn is_table(first: u8, text: &[u8]) -> bool {
    let line = first_line(text);
    let known = line.starts_with(b"version https://") || line.starts_with(b"PAR1");
    (first.is_ascii_alphabetic() || first == b'"')
        && !known
        && line.iter().any(|b| matches!(b, b',' | b'\t' | b';'))
}
