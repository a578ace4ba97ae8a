//! Pieces of an input: cut off in order by one thread, parsed in any order by others.
//!
//! Called by kto-convert and kto-tokenize. A reader ([`crate::jsonl::LineChunks`], [`crate::json_texts::JsonTexts`],
//! [`crate::table::Table`], [`crate::columnar`]) yields [`Chunk`]s; [`Chunk::rows`] gives their rows, good or bad. The rows of all
//! chunks in order are the rows of the input, wherever it was cut. A chunk is about [`SIZE`] bytes, or one longer row.

use crate::{
    buffers::Buffer,
    columnar, json,
    jsonl::{Line, line_text},
    rows::{Place, ReadOptions, Row, parse_row},
};
use arrow_array::RecordBatch;
use kto_cli::Result;
use serde_json::Value;
use std::{ops::Range, sync::Arc};

/// Bytes of a chunk: large enough that handing it over does not count, small enough for the second cache.
pub const SIZE: usize = 512 << 10;

/// Where the rows of an input come from.
pub trait Source: Send {
    /// Returns the next piece; `None` at the end. `Err` means that the input is broken behind the pieces before.
    fn next_chunk(&mut self) -> Result<Option<Chunk>>;
}

/// What takes the rows of a chunk.
pub trait Taker {
    /// Is shown the JSON text of the row on `line`; true when it needs nothing more.
    fn text(&mut self, line: u64, text: &[u8]) -> bool;
    /// Takes a row and its text (empty for a row of a column file). An error ends the chunk.
    fn row(&mut self, row: Row, text: &[u8]) -> Result<()>;
}

/// Takes rows only.
struct Each<F>(F);

impl<F: FnMut(Row, &[u8]) -> Result<()>> Taker for Each<F> {
    fn text(&mut self, _: u64, _: &[u8]) -> bool {
        false
    }
    fn row(&mut self, row: Row, text: &[u8]) -> Result<()> {
        (self.0)(row, text)
    }
}

/// A piece of an input.
pub struct Chunk {
    name: Arc<str>,
    options: ReadOptions,
    content: Content,
}

enum Content {
    /// Whole lines, the last one perhaps without its end.
    Lines { text: Buffer, place: Place },
    /// JSON texts that lie in one buffer.
    Texts { text: Vec<u8>, rows: Vec<(Place, Range<usize>)> },
    /// Rows that are there already, each with its text in the buffer.
    Rows { text: Vec<u8>, rows: Vec<(Row, Range<usize>)> },
    /// Rows of a column file; `first` is the number of the first one.
    Batch { batch: RecordBatch, first: u64 },
}

impl Chunk {
    pub(crate) fn lines(name: &Arc<str>, options: ReadOptions, text: Buffer, place: Place) -> Self {
        Self { name: Arc::clone(name), options, content: Content::Lines { text, place } }
    }
    pub(crate) fn texts(
        name: &Arc<str>,
        options: ReadOptions,
        text: Vec<u8>,
        rows: Vec<(Place, Range<usize>)>,
    ) -> Self {
        Self { name: Arc::clone(name), options, content: Content::Texts { text, rows } }
    }
    pub(crate) fn parsed(name: &Arc<str>, text: Vec<u8>, rows: Vec<(Row, Range<usize>)>) -> Self {
        let options = ReadOptions::default();
        Self { name: Arc::clone(name), options, content: Content::Rows { text, rows } }
    }
    pub(crate) fn batch(name: &Arc<str>, batch: RecordBatch, first: u64) -> Self {
        let options = ReadOptions::default();
        Self { name: Arc::clone(name), options, content: Content::Batch { batch, first } }
    }

    /// Rows that were read and changed.
    pub fn of_rows(name: &str, rows: Vec<Row>) -> Self {
        Self::parsed(&name.into(), Vec::new(), rows.into_iter().map(|row| (row, 0..0)).collect())
    }

    /// Whether the first row is a good one that `test` accepts. Only that row is parsed.
    pub fn begins_with(&self, test: impl Fn(&Value) -> bool) -> bool {
        let good = |text: &[u8]| json::parse(text).is_ok_and(|parsed| test(&parsed.value));
        match &self.content {
            Content::Lines { text, .. } => {
                let line = text.split(|b| *b == b'\n').find(|line| !line.trim_ascii().is_empty());
                line.is_some_and(|line| good(line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line)))
            }
            Content::Texts { text, rows } => {
                rows.first().is_some_and(|(_, range)| good(&text[range.clone()]))
            }
            Content::Rows { rows, .. } => {
                rows.first().is_some_and(|(row, _)| row.value.as_ref().is_ok_and(&test))
            }
            Content::Batch { batch, first } => {
                let mut good = false;
                let one = batch.slice(0, batch.num_rows().min(1));
                let looked = columnar::rows(&self.name, &one, *first, |row| {
                    good = row.value.as_ref().is_ok_and(&test);
                    Ok(())
                });
                looked.is_ok() && good
            }
        }
    }

    /// The input's name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Gives every row and its text (empty for a row of a column file) to `each`, in order, until one of them fails. An error
    /// of its own says that the input is broken.
    pub fn rows(self, each: impl FnMut(Row, &[u8]) -> Result<()>) -> Result<()> {
        self.give(&mut Each(each))
    }

    /// The same to a [`Taker`], which sees the text of a row before it is parsed.
    pub fn give(self, taker: &mut impl Taker) -> Result<()> {
        let (name, options) = (&*self.name, self.options);
        match self.content {
            Content::Lines { text, mut place } => {
                let mut rest = text.as_slice();
                while !rest.is_empty() {
                    let end = memchr::memchr(b'\n', rest).map_or(rest.len(), |at| at + 1);
                    let (line, behind) = rest.split_at(end);
                    match line_text(name, place, line, options)? {
                        Line::Blank => {}
                        Line::Long(row) => taker.row(row, line.trim_ascii_end())?,
                        Line::Text(at, text) => {
                            if !taker.text(place.line, text) {
                                taker.row(parse_row(name, at, text, options), line.trim_ascii_end())?;
                            }
                        }
                    }
                    place = Place { line: place.line + 1, column: 1, offset: place.offset + end as u64 };
                    rest = behind;
                }
                Ok(())
            }
            Content::Texts { text, rows } => rows.into_iter().try_for_each(|(place, range)| {
                let text = &text[range];
                if taker.text(place.line, text) {
                    return Ok(());
                }
                taker.row(parse_row(name, place, text, options), text)
            }),
            Content::Rows { text, rows } => {
                rows.into_iter().try_for_each(|(row, range)| taker.row(row, &text[range]))
            }
            Content::Batch { batch, first } => columnar::rows(name, &batch, first, |row| taker.row(row, b"")),
        }
    }
}
