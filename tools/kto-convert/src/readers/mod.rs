//! Inputs of every form as one stream of chunks.
//!
//! The seam for more forms: a source in kto-formats, a way to recognise it in [`sniff`], and nothing else changes.

mod files;
mod part;
mod sniff;
mod trees;

use crate::plan::Plan;
use kto_cli::{Error, Kind, Result, escape, input};
use kto_formats::{
    chunks::{Chunk, Source},
    columnar::{ArrowStream, ParquetFile},
    json_texts::JsonTexts,
    jsonl::LineChunks,
    table::Table,
};
use std::{
    fs::File,
    io::{self, BufRead, Seek, SeekFrom},
    path::Path,
};

pub use files::expand;
pub use part::{Part, parts};

/// Reads the inputs of a plan one behind the other.
pub struct Inputs<'a> {
    plan: &'a Plan,
    parts: std::vec::IntoIter<Part>,
    open: Option<Open>,
    /// The number of the open input.
    number: u32,
}

struct Open {
    source: Box<dyn Source>,
    table: bool,
}

/// A chunk and what must be known of its input.
pub struct Piece {
    /// The rows.
    pub chunk: Chunk,
    /// The number of the input, from 0.
    pub input: u32,
    /// Every cell is text, so that words must stand for bools.
    pub table: bool,
}

impl<'a> Inputs<'a> {
    /// Opens nothing yet.
    pub fn new(plan: &'a Plan, parts: Vec<Part>) -> Self {
        Self { plan, parts: parts.into_iter(), open: None, number: 0 }
    }

    /// Returns the next chunk, good or bad rows; `Err` means that an input is broken behind the rows before.
    pub fn next_piece(&mut self) -> Result<Option<Piece>> {
        loop {
            let Some(open) = &mut self.open else {
                let Some(part) = self.parts.next() else { return Ok(None) };
                self.open = Some(open_part(&part, self.plan)?);
                continue;
            };
            if let Some(chunk) = open.source.next_chunk()? {
                return Ok(Some(Piece { chunk, input: self.number, table: open.table }));
            }
            self.open = None;
            self.number += 1;
        }
    }
}

/// Opens an input in the form that the plan, its name or its first bytes tell.
fn open_part(part: &Part, plan: &Plan) -> Result<Open> {
    let path = part.path.as_path();
    let (mut input, plain) = match part.bytes {
        None => (input::open(path)?, None),
        Some((from, to)) => part::open(path, from, to, plan.provenance).map(|(i, p)| (i, Some(p)))?,
    };
    let format = match &plain {
        // Behind its beginning, a file of lines has nothing to be told by.
        Some(_) => sniff::Form::Lines,
        None => sniff::form(path, &mut input, plan.format)?,
    };
    let (bytes, read) = (input.reader, plan.read);
    let source: Box<dyn Source> = match format {
        sniff::Form::Texts => trees::grouped(JsonTexts::new(input.name, bytes, read), plan)?,
        sniff::Form::Lines => {
            let lines = LineChunks::new(input.name, bytes, read).behind(plain.unwrap_or_default());
            trees::grouped(lines, plan)?
        }
        sniff::Form::Table(usual) => Box::new(Table::new(input.name, bytes, plan.dialect(usual), read)),
        sniff::Form::Parquet => {
            let file = seekable(path, bytes, &input.name)?;
            trees::grouped(ParquetFile::new(input.name, file)?, plan)?
        }
        sniff::Form::Arrow { file } => trees::grouped(ArrowStream::open(input.name, bytes, file)?, plan)?,
    };
    Ok(Open { source, table: matches!(format, sniff::Form::Table(_)) })
}

/// Parquet is read from its end: a stream, or a compressed file, goes to a temporary file first.
fn seekable(path: &Path, mut bytes: Box<dyn BufRead + Send>, name: &str) -> Result<File> {
    let plain = sniff::is_plain_parquet(path);
    if plain {
        return input::open_file(path);
    }
    let failed =
        |e: io::Error| Error::new(Kind::Io, format!("temporary file for {name}: {}", escape(&e.to_string())));
    let mut file = tempfile::tempfile().map_err(failed)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = io::Read::read(&mut bytes, &mut buffer).map_err(|e| input::error(name, &e))?;
        if read == 0 {
            break;
        }
        io::Write::write_all(&mut file, &buffer[..read]).map_err(failed)?;
    }
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    Ok(file)
}
