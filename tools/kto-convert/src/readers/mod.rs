//! Inputs of every form as one stream of rows.
//!
//! The seam for more forms: a variant of [`Reader`], a way to recognise it in [`sniff`], and nothing else changes.

mod sniff;

use crate::{args::Format, plan::Plan};
use kto_cli::{Result, input};
use kto_formats::{json_array::JsonArray, jsonl::JsonLines, rows::Row, table::Table};
use std::{io::BufRead, path::Path};

type Bytes = Box<dyn BufRead + Send>;

/// An open input.
pub enum Reader {
    /// A JSON array.
    Array(JsonArray<Bytes>),
    /// JSON Lines.
    Lines(JsonLines<Bytes>),
    /// CSV or TSV.
    Table(Table<Bytes>),
}

impl Reader {
    /// Opens `path` in the form that the plan, its name or its first character tell. Returns the name for messages too.
    pub fn open(path: &Path, plan: &Plan) -> Result<(String, Self)> {
        let mut input = input::open(path)?;
        let format = sniff::format(path, &mut input, plan.format)?;
        let (name, bytes) = (input.name.clone(), input.reader);
        let reader = match format {
            Format::Json => Self::Array(JsonArray::new(input.name, bytes, plan.read)),
            Format::Jsonl => Self::Lines(JsonLines::from_reader(input.name, bytes).with_options(plan.read)),
            Format::Csv => Self::Table(Table::new(input.name, bytes, plan.dialect(b','), plan.read)),
            Format::Tsv => Self::Table(Table::new(input.name, bytes, plan.dialect(b'\t'), plan.read)),
        };
        Ok((name, reader))
    }

    /// Returns the next row, good or bad; `Err` means that the input is broken.
    pub fn next_row(&mut self) -> Result<Option<Row>> {
        match self {
            Self::Array(array) => array.next_row(),
            Self::Lines(lines) => lines.next_row(),
            Self::Table(table) => table.next_row(),
        }
    }

    /// True when every cell is text, so that words must stand for bools.
    pub fn is_table(&self) -> bool {
        matches!(self, Self::Table(_))
    }
}
