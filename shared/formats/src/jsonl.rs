//! JSON Lines: one JSON value a line.
//!
//! Called by every tool that reads records. Only `\n` ends a line (a `\r` before it is a blank, U+2028 is text), blank
//! lines are passed over, a byte-order mark is accepted on the first line. A line longer than the cap stops the read
//! before it is in memory. A bad line does not end the stream: the next call goes on behind it.

use crate::{
    buffers::{Buffer, Buffers},
    chunks::{self, Chunk, Source},
    rows::{Place, ReadOptions, Row, parse_row, too_long},
};
use kto_cli::{Error, Result, input};
use serde_json::Value;
use std::{
    io::{BufRead, Read},
    sync::Arc,
};

/// A stream of JSON values, one a line.
pub struct JsonLines<R = Box<dyn BufRead + Send>> {
    name: String,
    reader: R,
    options: ReadOptions,
    line: u64,
    offset: u64,
    buffer: Vec<u8>,
}

impl JsonLines {
    /// Reads an opened input.
    pub fn new(input: input::Input) -> Self {
        Self::from_reader(input.name, input.reader)
    }
}

impl<R: BufRead> JsonLines<R> {
    /// Reads any byte stream; `name` stands for it in messages.
    pub fn from_reader(name: String, reader: R) -> Self {
        Self { name, reader, options: ReadOptions::default(), line: 0, offset: 0, buffer: Vec::new() }
    }

    /// Sets the cap and the treatment of broken text.
    pub fn with_options(mut self, options: ReadOptions) -> Self {
        self.options = options;
        self
    }

    /// Returns the next value and its line; `None` at the end. Errors carry `name:line`.
    #[allow(clippy::should_implement_trait, reason = "fallible and ends at None, as every reader here")]
    pub fn next(&mut self) -> Result<Option<(u64, Value)>> {
        match self.next_row()? {
            None => Ok(None),
            Some(row) => Ok(Some((row.line, row.value?))),
        }
    }

    /// Returns the next row, good or bad. `Err` means that the stream itself is broken and cannot go on.
    pub fn next_row(&mut self) -> Result<Option<Row>> {
        loop {
            let start = self.offset;
            if !self.read_line()? {
                return Ok(None);
            }
            self.line += 1;
            let place = Place { line: self.line, column: 1, offset: start };
            let row = line_row(&self.name, place, &self.buffer, self.options)?;
            if self.buffer.len() as u64 > self.options.max_line {
                self.skip_line()?;
            }
            if row.is_some() {
                return Ok(row);
            }
        }
    }

    /// Reads up to and with the next `\n`, at most one byte over the cap. False at the end of the input.
    fn read_line(&mut self) -> Result<bool> {
        self.buffer.clear();
        // A single huge line must not keep its buffer for the rest of the file.
        self.buffer.shrink_to(1 << 20);
        let cap = self.options.max_line.saturating_add(1);
        let read = self.reader.by_ref().take(cap).read_until(b'\n', &mut self.buffer);
        let read = read.map_err(|e| input::error(&format!("{}:{}", self.name, self.line + 1), &e))?;
        self.offset += read as u64;
        Ok(read > 0)
    }

    /// Passes over the rest of a line that was too long, a buffer at a time.
    fn skip_line(&mut self) -> Result<()> {
        while self.buffer.last() != Some(&b'\n') && self.read_line()? {}
        Ok(())
    }
}

/// What a line holds.
pub(crate) enum Line<'a> {
    /// Nothing.
    Blank,
    /// More bytes than the cap.
    Long(Row),
    /// JSON, or what should be.
    Text(Place, &'a [u8]),
}

/// Returns the row of a line (with or without its end); `None` for a blank one. A line of more bytes than the cap is a bad row,
/// also when only its beginning is given. `Err`: this is no text at all.
pub(crate) fn line_row(name: &str, place: Place, line: &[u8], options: ReadOptions) -> Result<Option<Row>> {
    Ok(match line_text(name, place, line, options)? {
        Line::Blank => None,
        Line::Long(row) => Some(row),
        Line::Text(place, text) => Some(parse_row(name, place, text, options)),
    })
}

/// Returns what a line holds, without blanks and a byte-order mark around it.
pub(crate) fn line_text<'a>(
    name: &str,
    place: Place,
    line: &'a [u8],
    options: ReadOptions,
) -> Result<Line<'a>> {
    let first = place.line == 1;
    if let Some(what) = binary(line).filter(|_| first) {
        let error = Error::data(format!("{name}: this is {what}, not JSON Lines"));
        let tables = ["a Parquet file", "an Arrow file"].contains(&what);
        return Err(if tables { error.with_hint("kto-convert makes JSON Lines of it") } else { error });
    }
    if line.len() as u64 > options.max_line {
        return Ok(Line::Long(Row::bad(place.line, too_long(name, place.line, "line", options.max_line))));
    }
    let bom = if first && line.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    let text = line[bom..].trim_ascii_end();
    if text.trim_ascii_start().is_empty() {
        return Ok(Line::Blank);
    }
    Ok(Line::Text(Place { offset: place.offset + bom as u64, ..place }, text))
}

/// JSON Lines in pieces of whole lines.
pub struct LineChunks<R> {
    name: Arc<str>,
    reader: R,
    options: ReadOptions,
    /// Where `held` begins.
    place: Place,
    /// Bytes behind the last piece.
    held: Buffer,
    buffers: Buffers,
}

/// A reader that has given less than this at once has no more at the moment: what is there goes on.
const TRICKLE: usize = 16 << 10;

impl<R: BufRead> LineChunks<R> {
    /// Reads any byte stream; `name` stands for it in messages.
    pub fn new(name: String, reader: R, options: ReadOptions) -> Self {
        let place = Place { line: 1, column: 1, offset: 0 };
        let buffers = Buffers::new(chunks::SIZE + chunks::SIZE / 2);
        Self { name: name.into(), reader, options, place, held: buffers.take(), buffers }
    }

    /// Counts lines from one that has `lines` others before it.
    pub fn behind(mut self, lines: u64) -> Self {
        self.place.line += lines;
        self
    }

    /// Appends what the reader has; returns how much that was, 0 at the end of the input.
    fn more(&mut self) -> Result<usize> {
        let bytes = self.reader.fill_buf().map_err(|e| {
            let at = self.place.line + memchr::memchr_iter(b'\n', &self.held).count() as u64;
            input::error(&format!("{}:{at}", self.name), &e)
        })?;
        let taken = bytes.len();
        self.held.extend_from_slice(bytes);
        self.reader.consume(taken);
        Ok(taken)
    }

    /// Returns the held bytes up to `end` as a piece.
    fn cut(&mut self, end: usize) -> Chunk {
        // The rest of a line goes into a buffer that will take the next piece.
        let mut rest = self.buffers.take();
        rest.extend_from_slice(&self.held[end..]);
        let mut text = std::mem::replace(&mut self.held, rest);
        text.truncate(end);
        let place = self.place;
        self.place.line += memchr::memchr_iter(b'\n', &text).count() as u64;
        self.place.offset += end as u64;
        Chunk::lines(&self.name, self.options, text, place)
    }

    /// Returns the bad row of a line whose beginning is held, and passes over the rest of it.
    fn long_line(&mut self) -> Result<Chunk> {
        let place = self.place;
        let row = line_row(&self.name, place, &self.held, self.options)?;
        loop {
            self.place.offset += self.held.len() as u64;
            self.held.clear();
            self.held.shrink_to(chunks::SIZE);
            let read = self.more()?;
            if let Some(end) = memchr::memchr(b'\n', &self.held) {
                self.held.drain(..=end);
                self.place.offset += end as u64 + 1;
                self.place.line += 1;
            } else if read > 0 {
                continue;
            }
            return Ok(Chunk::parsed(
                &self.name,
                Vec::new(),
                row.into_iter().map(|row| (row, 0..0)).collect(),
            ));
        }
    }
}

impl<R: BufRead + Send> Source for LineChunks<R> {
    fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        loop {
            // A read that fails behind whole lines fails again in the next call.
            let read = self.more()?;
            if read == 0 {
                return Ok((!self.held.is_empty()).then(|| self.cut(self.held.len())));
            }
            if self.held.len() >= chunks::SIZE || read < TRICKLE {
                // A line that is still growing is not searched again from its beginning.
                let from = if self.held.len() < 2 * chunks::SIZE { 0 } else { self.held.len() - read };
                match memchr::memrchr(b'\n', &self.held[from..]) {
                    Some(last) => return Ok(Some(self.cut(from + last + 1))),
                    None if self.held.len() as u64 > self.options.max_line => {
                        return self.long_line().map(Some);
                    }
                    None => {}
                }
            }
        }
    }
}

/// Names the binary formats that are mistaken for records, by their first bytes.
fn binary(head: &[u8]) -> Option<&'static str> {
    const FORMS: [(&[u8], &str); 3] = [
        (b"\xff\xff\xff\xff", "an Arrow stream (a token file?)"),
        (b"ARROW1", "an Arrow file"),
        (b"PAR1", "a Parquet file"),
    ];
    // The length of a header of less than 4 GiB, then the header.
    let safetensors = head.len() > 10 && head[4..8] == [0; 4] && head[8..].starts_with(b"{\"");
    let form = FORMS.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, what)| *what);
    form.or(safetensors.then_some("a safetensors file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &[u8]) -> Vec<Result<(u64, Value)>> {
        let mut lines = JsonLines::from_reader("f".into(), text);
        let mut rows = Vec::new();
        while let Some(row) = lines.next_row().unwrap() {
            rows.push(row.value.map(|v| (row.line, v)));
        }
        rows
    }

    fn good(text: &[u8]) -> Vec<(u64, Value)> {
        read(text).into_iter().map(Result::unwrap).collect()
    }

    #[test]
    fn lines_are_counted_as_an_editor_counts_them() {
        let rows = good(b"\xef\xbb\xbf{\"a\":1}\r\n\n  \n{\"a\":\"x\xe2\x80\xa8\xc2\x85y\"}\n[3]");
        assert_eq!(rows, [(1, json!({"a": 1})), (4, json!({"a": "x\u{2028}\u{85}y"})), (5, json!([3]))]);
    }

    #[test]
    fn a_bad_line_does_not_end_the_stream() {
        let rows = read(b"{\"a\":\n{\"a\":2}\n\xef\xbb\xbf{}\n");
        assert_eq!(rows[0].as_ref().unwrap_err().to_string(), "f:1:5: unexpected end of the JSON text");
        assert_eq!(rows[1].as_ref().unwrap(), &(2, json!({"a": 2})));
        assert!(rows[2].is_err(), "a byte-order mark belongs at the very start");
    }

    #[test]
    fn a_long_line_is_passed_over_without_being_held() {
        let mut text = vec![b'a'; 5000];
        text.extend_from_slice(b"\n{\"a\":1}\n");
        let options = ReadOptions { max_line: 100, lossy: false };
        let mut lines = JsonLines::from_reader("f".into(), &text[..]).with_options(options);
        let row = lines.next_row().unwrap().unwrap();
        assert_eq!(row.value.unwrap_err().to_string(), "f:1: line longer than 100 bytes");
        assert!(lines.buffer.capacity() < 1000);
        assert_eq!(lines.next().unwrap(), Some((2, json!({"a": 1}))));
    }

    /// Reads in chunks from a reader of `size` bytes a time.
    fn chunked(text: &[u8], size: usize, max_line: u64) -> Vec<(u64, Result<Value>)> {
        let reader = std::io::BufReader::with_capacity(size, text);
        let mut lines = LineChunks::new("f".into(), reader, ReadOptions { max_line, lossy: false });
        let mut rows = Vec::new();
        while let Some(chunk) = lines.next_chunk().unwrap() {
            let each = |row: Row, _: &[u8]| {
                rows.push((row.line, row.value));
                Ok(())
            };
            chunk.rows(each).unwrap();
        }
        rows
    }

    #[test]
    fn chunks_give_the_rows_of_the_whole() {
        let long = "x".repeat(90);
        let text = format!(
            "\u{feff}{{\"a\":1}}\r\n\n  \n{{\"b\":\"{long}\"}}\n{{\"a\":\n[3]\n{{\"c\":\"{long}\"}}\n7"
        );
        let whole: Vec<String> = {
            let options = ReadOptions { max_line: 64, lossy: false };
            let mut lines = JsonLines::from_reader("f".into(), text.as_bytes()).with_options(options);
            let mut rows = Vec::new();
            while let Some(row) = lines.next_row().unwrap() {
                rows.push(format!("{} {:?}", row.line, row.value.map_err(|e| e.to_string())));
            }
            rows
        };
        assert_eq!(whole.len(), 6);
        for size in 1..200 {
            let rows = chunked(text.as_bytes(), size, 64);
            let rows: Vec<_> =
                rows.into_iter().map(|(n, v)| format!("{n} {:?}", v.map_err(|e| e.to_string()))).collect();
            assert_eq!(rows, whole, "{size}");
        }
    }

    #[test]
    fn binary_files_are_named_and_end_the_stream() {
        for (head, what) in [
            (&b"\xff\xff\xff\xff\x10\0\0\0\n"[..], "an Arrow stream (a token file?)"),
            (b"ARROW1\0\0", "an Arrow file"),
            (b"PAR1\x15", "a Parquet file"),
            (b"\x40\0\0\0\0\0\0\0{\"a\":1}", "a safetensors file"),
        ] {
            let error = JsonLines::from_reader("f".into(), head).next_row().unwrap_err();
            assert_eq!(error.to_string(), format!("f: this is {what}, not JSON Lines"));
            let table = what.ends_with("Arrow file") || what.ends_with("Parquet file");
            assert_eq!(error.hint().is_some(), table, "{what}");
        }
    }

    #[test]
    fn nul_bytes_are_named_with_their_offset() {
        let rows = read(b"{\"a\":1}\n\0\0\0\0");
        assert_eq!(rows[1].as_ref().unwrap_err().to_string(), "f:2: NUL bytes at offset 8");
    }

    #[test]
    fn lossy_counts_what_it_replaces() {
        let options = ReadOptions { lossy: true, ..ReadOptions::default() };
        let text = b"{\"a\":\"\xff\"}\n{\"a\":\"\\ud83e\"}\n";
        let mut lines = JsonLines::from_reader("f".into(), &text[..]).with_options(options);
        let row = lines.next_row().unwrap().unwrap();
        assert_eq!((row.value.unwrap(), row.replaced), (json!({"a": "\u{fffd}"}), 1));
        assert_eq!(lines.next().unwrap(), Some((2, json!({"a": "\u{fffd}"}))));
    }
}
