//! The writing half: a schema with metadata, batches of a few thousand rows, the end-of-stream marker.

use super::{FORMAT_VERSION, TokenMeta, TokenRow, TokenSet};
use arrow_array::{ArrayRef, BooleanArray, ListArray, RecordBatch, UInt32Array, UInt64Array};
use arrow_buffer::{OffsetBuffer, ScalarBuffer};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{ArrowError, DataType, Field, Schema};
use std::{
    io::{self, Write},
    ops::Range,
    sync::Arc,
};

/// Rows of a batch, at most.
const BATCH_ROWS: usize = 4096;
/// Tokens of a column of a batch, at most (but always one row): keeps the 32-bit offsets of Arrow lists far away.
const BATCH_TOKENS: usize = 1 << 24;

impl TokenSet {
    /// Writes the whole stream. The bytes depend on the rows and the metadata only.
    /// Errors: those of `out`; the caller knows its name.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let schema = Arc::new(schema(&self.meta, self.len(), self.fingerprint()));
        let mut writer = StreamWriter::try_new(&mut *out, &schema).map_err(io_error)?;
        let mut start = 0;
        while start < self.len() {
            let rows = self.next_batch(start);
            start = rows.end;
            writer.write(&self.batch(rows, &schema)?).map_err(io_error)?;
        }
        writer.finish().map_err(io_error)?;
        drop(writer);
        out.flush()
    }

    fn next_batch(&self, start: usize) -> Range<usize> {
        let full = |end: usize| {
            self.prompt_offsets[end] - self.prompt_offsets[start] > BATCH_TOKENS
                || self.completion_offsets[end] - self.completion_offsets[start] > BATCH_TOKENS
        };
        let mut end = start + 1;
        while end < self.len() && end - start < BATCH_ROWS && !full(end + 1) {
            end += 1;
        }
        start..end
    }

    pub(super) fn batch(&self, rows: Range<usize>, schema: &Arc<Schema>) -> io::Result<RecordBatch> {
        let labels: BooleanArray = self.labels[rows.clone()].to_vec().into();
        let hashes = UInt64Array::from_iter_values(self.hashes[rows.clone()].iter().copied());
        let columns: Vec<ArrayRef> = vec![
            Arc::new(list(&self.prompt_offsets[rows.start..=rows.end], &self.prompts)?),
            Arc::new(list(&self.completion_offsets[rows.start..=rows.end], &self.completions)?),
            Arc::new(labels),
            Arc::new(hashes),
        ];
        RecordBatch::try_new(schema.clone(), columns).map_err(io_error)
    }
}

/// The schema of a file with these rows.
pub(super) fn schema(meta: &TokenMeta, rows: usize, fingerprint: String) -> Schema {
    let fields: Vec<Field> = vec![
        Field::new("prompt_ids", list_type(), false),
        Field::new("completion_ids", list_type(), false),
        Field::new("label", DataType::Boolean, false),
        Field::new("prompt_hash", DataType::UInt64, false),
    ];
    Schema::new_with_metadata(
        fields,
        [
            ("kto.format_version", FORMAT_VERSION.to_string()),
            ("kto.tokenizer", meta.tokenizer.clone()),
            ("kto.template", meta.template.clone()),
            ("kto.vocab_size", meta.vocab_size.to_string()),
            ("kto.max_length", meta.max_length.to_string()),
            ("kto.truncated", meta.truncated.to_string()),
            ("kto.dropped", meta.dropped.to_string()),
            ("kto.rows", rows.to_string()),
            ("kto.fingerprint", fingerprint),
        ],
    )
}

/// Returns whether a batch must end before this row, as [`TokenSet::next_batch`] ends it.
pub(super) fn is_full(batch: &TokenSet, row: TokenRow<'_>) -> bool {
    let tokens = batch.prompts.len() + row.prompt_ids.len() > BATCH_TOKENS
        || batch.completions.len() + row.completion_ids.len() > BATCH_TOKENS;
    batch.len() == BATCH_ROWS || (!batch.is_empty() && tokens)
}

/// The type of the two id columns: neither rows nor ids are null.
pub(super) fn list_type() -> DataType {
    DataType::List(Arc::new(item_field()))
}

fn item_field() -> Field {
    Field::new("item", DataType::UInt32, false)
}

/// offsets: (rows + 1,) positions in `values`; the array holds the values between the first and the last.
fn list(offsets: &[usize], values: &[u32]) -> io::Result<ListArray> {
    let first = offsets[0];
    let last = offsets[offsets.len() - 1];
    let relative: Result<Vec<i32>, _> = offsets.iter().map(|o| i32::try_from(o - first)).collect();
    let relative = relative.map_err(|_| io::Error::other("a row has more than 2^31 tokens"))?;
    let values = UInt32Array::from_iter_values(values[first..last].iter().copied());
    let offsets = OffsetBuffer::new(ScalarBuffer::from(relative));
    ListArray::try_new(Arc::new(item_field()), offsets, Arc::new(values), None).map_err(io_error)
}

/// Gives back the operating system's error, so that a closed pipe stays recognisable.
pub(super) fn io_error(error: ArrowError) -> io::Error {
    match error {
        ArrowError::IoError(_, inner) => inner,
        other => io::Error::other(other.to_string()),
    }
}
