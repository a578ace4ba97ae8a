//! Rows of column files: Parquet, Arrow IPC streams and Arrow files (what `datasets` saves).
//!
//! Called by kto-convert. A row becomes the JSON object that the same data would be in JSON Lines, so every shape is found in the
//! same way; the row's number, from 1, stands for its line. Structs have every field of their type, so a field without a value
//! inside one is left out; a column without a value is null.

mod value;

pub(crate) use value::rows;

use crate::{
    chunks::{Chunk, Source},
    frames::{Form, Frames},
};
use arrow_array::RecordBatch;
use arrow_schema::Schema;
use kto_cli::{Context, Error, Result, escape, guard};
use parquet::{
    arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
    errors::ParquetError,
};
use std::{collections::VecDeque, fs::File, io::Read, sync::Arc};

/// Rows of a piece. A conversation is some kilobytes.
const ROWS: usize = 128;

/// A Parquet file.
pub struct ParquetFile {
    name: Arc<str>,
    batches: ParquetRecordBatchReader,
    rows: u64,
}

impl ParquetFile {
    /// Reads the footer. Errors are 65.
    pub fn new(name: String, file: File) -> Result<Self> {
        let open = || {
            let options = ArrowReaderOptions::new().with_skip_arrow_metadata(false);
            let builder = ParquetRecordBatchReaderBuilder::try_new_with_options(file, options)?;
            let schema = Arc::clone(builder.schema());
            Ok::<_, ParquetError>((schema, builder.with_batch_size(ROWS).build()?))
        };
        let (schema, batches) =
            guard::catch("corrupt Parquet file", open).at(&name)?.map_err(|e| corrupt(&name, &e))?;
        check(&schema).at(&name)?;
        Ok(Self { name: name.into(), batches, rows: 0 })
    }
}

fn corrupt(name: &str, error: &dyn std::fmt::Display) -> Error {
    Error::data(format!("{name}: corrupt Parquet file: {}", escape(&error.to_string())))
}

impl Source for ParquetFile {
    fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        let next = guard::catch("corrupt Parquet file", || self.batches.next());
        let batch = match next.at(format_args!("{}: behind row {}", self.name, self.rows))? {
            None => return Ok(None),
            Some(batch) => {
                batch.map_err(|e| corrupt(&format!("{}: behind row {}", self.name, self.rows), &e))?
            }
        };
        let first = self.rows + 1;
        self.rows += batch.num_rows() as u64;
        Ok(Some(Chunk::batch(&self.name, batch, first)))
    }
}

/// An Arrow IPC stream, or an Arrow file.
pub struct ArrowStream<R> {
    name: Arc<str>,
    frames: Frames<R>,
    /// Pieces of the last batch.
    ready: VecDeque<RecordBatch>,
    rows: u64,
}

impl<R: Read> ArrowStream<R> {
    /// Reads the schema. `file`: the bytes are an Arrow file, not a stream. Errors are 65.
    pub fn open(name: String, reader: R, file: bool) -> Result<Self> {
        let mut frames = Frames::new(reader, if file { Form::File } else { Form::Stream });
        let schema = frames.schema().at(&name)?;
        check(&schema).at(&name)?;
        Ok(Self { name: name.into(), frames, ready: VecDeque::new(), rows: 0 })
    }
}

impl<R: Read + Send> Source for ArrowStream<R> {
    fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        while self.ready.is_empty() {
            let ready = &mut self.ready;
            let pieces = |batch: RecordBatch| {
                let starts = (0..batch.num_rows()).step_by(ROWS);
                ready.extend(starts.map(|at| batch.slice(at, ROWS.min(batch.num_rows() - at))));
                Ok(())
            };
            if !self.frames.batches(pieces).at(&*self.name)? {
                return Ok(None);
            }
        }
        let Some(batch) = self.ready.pop_front() else { return Ok(None) };
        let first = self.rows + 1;
        self.rows += batch.num_rows() as u64;
        Ok(Some(Chunk::batch(&self.name, batch, first)))
    }
}

/// Refuses columns that no JSON value stands for, and names that appear twice.
fn check(schema: &Schema) -> Result<()> {
    for (i, field) in schema.fields().iter().enumerate() {
        let name = crate::json::quoted(field.name());
        if !value::is_read(field.data_type()) {
            let found = escape(&field.data_type().to_string());
            return Err(Error::data(format!("column {name} has type {found}, which is not read")));
        }
        if schema.fields()[..i].iter().any(|other| other.name() == field.name()) {
            return Err(Error::data(format!("column {name} appears twice")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
