//! Records as a Parquet file.
//!
//! A column file has types. They follow from the first records (up to [`FIRST`] bytes of them), lists and structs included, as
//! `datasets` infers them; a later record that does not fit ends the run rather than lose a field.

mod column;
mod kind;

use kind::Kind;
use kto_cli::{Error, Result, output::Output};
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::properties::WriterProperties,
};
use serde_json::{Map, Value};
use std::{io, path::Path};

/// Text of records from which the types are inferred, and of one row group.
const FIRST: usize = 32 << 20;

/// The output.
pub struct ParquetSink {
    out: Option<Output>,
    writer: Option<ArrowWriter<Output>>,
    kind: Kind,
    rows: Vec<Value>,
    /// Text of the rows.
    bytes: usize,
    /// Records before the rows.
    written: u64,
}

impl ParquetSink {
    /// Writes to `out`.
    pub fn new(out: Output) -> Self {
        Self { out: Some(out), writer: None, kind: Kind::Null, rows: Vec::new(), bytes: 0, written: 0 }
    }

    /// Takes records, one a line.
    pub fn write(&mut self, lines: &[u8]) -> Result<()> {
        for line in lines.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            let row = serde_json::from_slice(line).map_err(|e| Error::internal(e.to_string()))?;
            self.rows.push(row);
            self.bytes += line.len();
            if self.bytes >= FIRST {
                self.group()?;
            }
        }
        Ok(())
    }

    /// Makes the file final.
    pub fn finish(mut self) -> Result<()> {
        self.group()?;
        let Some(writer) = self.writer.take() else {
            return Err(Error::internal("a Parquet file without a schema"));
        };
        writer.into_inner().map_err(failed)?.finish()
    }

    /// Writes a row group.
    fn group(&mut self) -> Result<()> {
        for (i, row) in self.rows.iter().enumerate() {
            let seen = Kind::of(row);
            if self.writer.is_none() {
                self.kind = std::mem::replace(&mut self.kind, Kind::Null).merged(seen);
            } else if !self.kind.takes(&seen) {
                let what = format!(
                    "record {} does not fit the column types of the records before",
                    self.written + i as u64 + 1
                );
                return Err(Error::data(what).with_hint("--out-format jsonl has no types"));
            }
        }
        let batch = column::batch(&self.kind, &self.rows)?;
        if self.writer.is_none() {
            let level = ZstdLevel::try_new(3).map_err(failed)?;
            let properties = WriterProperties::builder().set_compression(Compression::ZSTD(level)).build();
            let Some(out) = self.out.take() else { return Err(Error::internal("the output was taken")) };
            let writer = ArrowWriter::try_new(out, batch.schema(), Some(properties)).map_err(failed)?;
            self.writer = Some(writer);
        }
        if let Some(writer) = &mut self.writer {
            writer.write(&batch).and_then(|()| writer.flush()).map_err(failed)?;
        }
        self.written += self.rows.len() as u64;
        self.rows.clear();
        self.bytes = 0;
        Ok(())
    }
}

/// The fields of a record.
fn fields(row: &Value) -> Option<&Map<String, Value>> {
    row.as_object()
}

/// The error of the writer: that of the output below it, or a defect.
fn failed(error: ParquetError) -> Error {
    if let ParquetError::External(inner) = &error
        && let Some(io) = inner.downcast_ref::<io::Error>()
    {
        return kto_cli::output::error(Path::new("output"), io);
    }
    Error::internal(format!("Parquet: {error}"))
}
