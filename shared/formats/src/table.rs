//! Tables of text: CSV and TSV with a header row, strict RFC 4180.
//!
//! Called by kto-convert. Every cell is text; the header names the fields of the row. Strict because the loose readers
//! lose rows in silence: a quote that is never closed swallows the rest of the file, text after a closing quote is glued
//! on. Both end the reading here, since behind a wrong quote nobody can say where a row begins. Ragged rows are bad rows.

use crate::{
    chunks::{self, Chunk, Source},
    json::{self, quoted},
    rows::{Place, ReadOptions, Row, located, too_long},
};
use kto_cli::{Error, Result, input};
use serde_json::{Map, Value};
use std::{
    io::{BufRead, Read},
    sync::Arc,
};

/// The dialect of a table.
#[derive(Clone, Copy, Debug)]
pub struct Dialect {
    /// Between the cells: `,` or a tab.
    pub delimiter: u8,
    /// False when `"` is an ordinary character.
    pub quotes: bool,
}

/// A stream of the rows of one table.
pub struct Table<R> {
    name: Arc<str>,
    reader: R,
    dialect: Dialect,
    options: ReadOptions,
    header: Option<Vec<String>>,
    /// The lines of the current row, with their ends.
    text: Vec<u8>,
    /// Lines read so far.
    lines: u64,
    /// Byte offset behind the last line read.
    offset: u64,
    /// What is wrong behind the rows of the last piece.
    broken: Option<Error>,
}

/// The cells of one row: ranges of unescaped bytes.
type Cells = Vec<Vec<u8>>;

impl<R: BufRead> Table<R> {
    /// Reads a table from a byte stream; `name` stands for it in messages.
    pub fn new(name: String, reader: R, dialect: Dialect, options: ReadOptions) -> Self {
        let (name, text) = (name.into(), Vec::new());
        Self { name, reader, dialect, options, header: None, text, lines: 0, offset: 0, broken: None }
    }

    /// Returns the next row as an object of texts, good or bad. `Err` means that the table itself is broken.
    pub fn next_row(&mut self) -> Result<Option<Row>> {
        if self.header.is_none() && !self.read_header()? {
            return Ok(None);
        }
        let Some((place, cells)) = self.record()? else { return Ok(None) };
        let mut replaced = 0;
        let value = self.row(place, cells, &mut replaced);
        Ok(Some(Row { line: place.line, value, replaced, ..Row::none() }))
    }

    fn row(&self, place: Place, cells: Cells, replaced: &mut u64) -> Result<Value> {
        let header = self.header.as_deref().unwrap_or_default();
        if cells.len() != header.len() {
            let (found, wanted) = (cells.len(), header.len());
            let what = format!("{}:{}: {found} fields, the header has {wanted}", self.name, place.line);
            return Err(Error::data(what));
        }
        let mut row = Map::new();
        for (column, cell) in header.iter().zip(cells) {
            row.insert(column.clone(), Value::String(self.cell(place, cell, replaced)?));
        }
        Ok(Value::Object(row))
    }

    fn cell(&self, place: Place, cell: Vec<u8>, replaced: &mut u64) -> Result<String> {
        String::from_utf8(cell).or_else(|e| {
            if self.options.lossy {
                let (text, count) = json::repair(e.as_bytes());
                *replaced += count;
                return Ok(String::from_utf8_lossy(&text).into_owned());
            }
            // The place in the row as it stands in the file, not in the unescaped cell.
            let fault = json::parse(&self.text).err().filter(|f| f.what.starts_with("invalid UTF-8"));
            Err(match fault {
                Some(fault) => located(&self.name, place, &fault),
                None => Error::data(format!("{}:{}: invalid UTF-8", self.name, place.line)),
            })
        })
    }

    /// Reads the header; false when the input has none.
    fn read_header(&mut self) -> Result<bool> {
        let Some((place, cells)) = self.record()? else { return Ok(false) };
        let mut names = Vec::with_capacity(cells.len());
        for cell in cells {
            names.push(self.cell(place, cell, &mut 0)?);
        }
        let at = format!("{}:{}", self.name, place.line);
        if let [only] = names.as_slice() {
            let other = [';', '\t', ',', '|'].into_iter().find(|c| only.contains(*c));
            if let Some(separator) = only.strip_prefix("sep=").and_then(|s| s.chars().next()).or(other) {
                let flag = if separator == '\t' { "tab".to_owned() } else { format!("'{separator}'") };
                let skip = if only.starts_with("sep=") { ", without the sep= line" } else { "" };
                return Err(Error::data(format!("{at}: the header has one column, {}", quoted(only)))
                    .with_hint(format!("--delimiter {flag}{skip}")));
            }
        }
        if let Some(twice) = names.iter().enumerate().find_map(|(i, n)| names[..i].contains(n).then_some(n)) {
            let all = names.iter().map(|n| quoted(n)).collect::<Vec<_>>().join(", ");
            return Err(Error::data(format!("{at}: column {} appears twice in {all}", quoted(twice))));
        }
        self.header = Some(names);
        Ok(true)
    }

    /// Reads one row of one or more lines; blank lines are passed over.
    fn record(&mut self) -> Result<Option<(Place, Cells)>> {
        let mut place;
        loop {
            place = Place { line: self.lines + 1, column: 1, offset: self.offset };
            self.text.clear();
            self.text.shrink_to(1 << 20);
            if !self.more(place)? {
                return Ok(None);
            }
            if place.offset == 0 && self.text.starts_with(b"\xef\xbb\xbf") {
                self.text.drain(..3);
            }
            if !self.text.trim_ascii().is_empty() {
                break;
            }
        }
        let (mut cells, mut at) = (Cells::new(), 0);
        loop {
            let mut cell = Vec::new();
            at = if self.dialect.quotes && self.text.get(at) == Some(&b'"') {
                self.quoted_cell(place, at + 1, &mut cell)?
            } else {
                self.plain_cell(at, &mut cell)?
            };
            cells.push(cell);
            if self.text.get(at) != Some(&self.dialect.delimiter) {
                return Ok(Some((place, cells)));
            }
            at += 1;
        }
    }

    /// Takes a cell without quotes; returns the position of what ends it.
    fn plain_cell(&self, at: usize, cell: &mut Vec<u8>) -> Result<usize> {
        let rest = &self.text[at..];
        let end = rest.iter().position(|b| *b == self.dialect.delimiter || *b == b'\n').unwrap_or(rest.len());
        let mut text = &rest[..end];
        if rest.get(end) != Some(&self.dialect.delimiter) {
            text = text.strip_suffix(b"\r").unwrap_or(text);
        }
        if self.dialect.quotes && text.contains(&b'"') {
            let what =
                format!("{}:{}: a quote inside a field that does not begin with one", self.name, self.lines);
            return Err(Error::data(what).with_hint("--no-quotes takes quotes as ordinary text"));
        }
        if text.contains(&b'\r') {
            let what = format!("{}:{}: CR without LF outside quotes (old Mac text?)", self.name, self.lines);
            return Err(Error::data(what).with_hint("tr '\\r' '\\n' < FILE"));
        }
        cell.extend_from_slice(text);
        Ok(at + end)
    }

    /// Takes a quoted cell whose opening quote is behind `at`; returns the position of what ends it.
    fn quoted_cell(&mut self, place: Place, mut at: usize, cell: &mut Vec<u8>) -> Result<usize> {
        let opened = self.lines;
        loop {
            let Some(quote) = self.text[at..].iter().position(|b| *b == b'"') else {
                cell.extend_from_slice(&self.text[at..]);
                at = self.text.len();
                if !self.more(place)? {
                    let what =
                        format!("{}:{opened}: the quote opened on this line is never closed", self.name);
                    return Err(Error::data(what));
                }
                continue;
            };
            cell.extend_from_slice(&self.text[at..at + quote]);
            at += quote + 1;
            match self.text.get(at) {
                Some(b'"') => {
                    cell.push(b'"');
                    at += 1;
                }
                None | Some(b'\n') => return Ok(at),
                Some(b'\r') if matches!(self.text.get(at + 1), None | Some(b'\n')) => return Ok(at + 1),
                Some(byte) if *byte == self.dialect.delimiter => return Ok(at),
                Some(_) => {
                    let began = if opened == self.lines {
                        String::new()
                    } else {
                        format!(" that began on line {opened}")
                    };
                    let what = format!(
                        "{}:{}: text after the closing quote of a field{began}",
                        self.name, self.lines
                    );
                    return Err(Error::data(what).with_hint("a quote inside a quoted field is written twice"));
                }
            }
        }
    }

    /// Appends one more line to `self.text`; false at the end of the input.
    fn more(&mut self, place: Place) -> Result<bool> {
        let before = self.text.len();
        let cap = self.options.max_line.saturating_add(1).saturating_sub(before as u64);
        let read = self.reader.by_ref().take(cap).read_until(b'\n', &mut self.text);
        let read = read.map_err(|e| input::error(&format!("{}:{}", self.name, self.lines + 1), &e))?;
        if self.text.len() as u64 > self.options.max_line {
            return Err(too_long(&self.name, place.line, "row", self.options.max_line));
        }
        if let Some(nul) = self.text[before..].iter().position(|b| *b == 0) {
            let at = self.offset + nul as u64;
            return Err(Error::data(format!(
                "{}:{}: {} at offset {at}",
                self.name,
                self.lines + 1,
                json::NUL
            )));
        }
        self.offset += read as u64;
        self.lines += u64::from(read > 0);
        Ok(read > 0)
    }
}

impl<R: BufRead + Send> Source for Table<R> {
    fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        let (mut text, mut rows) = (Vec::new(), Vec::new());
        while text.len() < chunks::SIZE {
            match self.next_row() {
                Ok(Some(row)) => {
                    let start = text.len();
                    text.extend_from_slice(self.text.trim_ascii_end());
                    rows.push((row, start..text.len()));
                }
                Ok(None) => break,
                Err(error) if rows.is_empty() => return Err(error),
                Err(error) => {
                    self.broken = Some(error);
                    break;
                }
            }
        }
        Ok((!rows.is_empty()).then(|| Chunk::parsed(&self.name, text, rows)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CSV: Dialect = Dialect { delimiter: b',', quotes: true };

    fn read(text: &[u8], dialect: Dialect) -> Result<Vec<(u64, Result<Value>)>> {
        let mut table = Table::new("f".into(), text, dialect, ReadOptions { max_line: 200, lossy: false });
        let mut rows = Vec::new();
        while let Some(row) = table.next_row()? {
            rows.push((row.line, row.value));
        }
        Ok(rows)
    }

    fn good(text: &str) -> Vec<(u64, Value)> {
        read(text.as_bytes(), CSV).unwrap().into_iter().map(|(line, v)| (line, v.unwrap())).collect()
    }

    #[test]
    fn cells_come_out_as_written() {
        let rows = good("\u{feff}a,b\r\n1,\"x, \"\"y\"\"\nz\"\r\n\r\n,\"\"\n\"q\",é");
        let expected = [
            (2, json!({"a": "1", "b": "x, \"y\"\nz"})),
            (5, json!({"a": "", "b": ""})),
            (6, json!({"a": "q", "b": "é"})),
        ];
        assert_eq!(rows, expected);
        assert!(good("a,b\n").is_empty());
        assert!(good("").is_empty());
        let tabs = Dialect { delimiter: b'\t', quotes: false };
        let rows = read(b"a\tb\nsay \"x\"\t\"\n", tabs).unwrap();
        assert_eq!(rows[0].1.as_ref().unwrap(), &json!({"a": "say \"x\"", "b": "\""}));
    }

    #[test]
    fn ragged_rows_and_bad_text_are_bad_rows() {
        let rows = read(b"a,b\n1\n1,2,3\n\"x\n\xff\",2\n1,2\n", CSV).unwrap();
        let errors: Vec<_> = rows[..3].iter().map(|(_, r)| r.as_ref().unwrap_err().to_string()).collect();
        let expected = [
            "f:2: 1 fields, the header has 2",
            "f:3: 3 fields, the header has 2",
            "f:5:1: invalid UTF-8 (byte 0xff)",
        ];
        assert_eq!(errors, expected);
        assert!(rows[3].1.is_ok());
    }

    #[test]
    fn wrong_quotes_and_headers_end_the_table() {
        for (text, expected) in [
            ("a,b\n1,2\n3,\"4\n5,6\n", "f:3: the quote opened on this line is never closed"),
            ("a,b\n\"1\"x,2\n", "f:2: text after the closing quote of a field"),
            ("a,b\n\"1,2\n3,\"4\"\n", "f:3: text after the closing quote of a field that began on line 2"),
            ("a,b\n1,x\"y\"\n", "f:2: a quote inside a field that does not begin with one"),
            ("a,b,a\n", "f:1: column \"a\" appears twice in \"a\", \"b\", \"a\""),
            ("a;b\n1;2\n", "f:1: the header has one column, \"a;b\""),
            ("sep=;\na;b\n", "f:1: the header has one column, \"sep=;\""),
            ("a,b\r1,2\r", "f:1: CR without LF outside quotes (old Mac text?)"),
            ("a,b\n1,\0\n", "f:2: NUL bytes at offset 6"),
            (&format!("a,b\n1,\"{}\n", "x\n".repeat(200)), "f:2: row longer than 200 bytes"),
        ] {
            assert_eq!(read(text.as_bytes(), CSV).unwrap_err().to_string(), expected, "{text}");
        }
    }
}
