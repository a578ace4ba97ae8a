//! Writing a token file that is larger than the memory.
//!
//! The stream begins with counts and a fingerprint that are known only when the last row is. So the batches are written as they
//! fill, to memory up to [`HELD`] and beyond it to a temporary file without a name; at the end the schema goes out first and the
//! batches behind it, as they are: a batch does not depend on the schema's metadata. The bytes are those of
//! [`TokenSet::write`].

use super::{TokenMeta, TokenRow, TokenSet, hex, note, write};
use arrow_ipc::writer::StreamWriter;
use sha2::{Digest, Sha256};
use std::{
    io::{self, Seek, SeekFrom, Write},
    sync::Arc,
};
use tempfile::SpooledTempFile;

/// Bytes that are held before a file is made.
const HELD: usize = 32 << 20;

/// A token file under construction.
pub struct TokenSpool {
    /// What the file will say about itself.
    pub meta: TokenMeta,
    /// Rows of the batch that is being filled.
    batch: TokenSet,
    rows: usize,
    hash: Sha256,
    batches: StreamWriter<SpooledTempFile>,
    /// Bytes of the schema in front of the batches, which is not the final one.
    header: u64,
}

impl TokenSpool {
    /// Starts a file without rows. Errors: those of the temporary file.
    pub fn new(meta: TokenMeta) -> io::Result<Self> {
        let batch = TokenSet::new(TokenMeta::default());
        let schema = Arc::new(write::schema(&TokenMeta::default(), 0, String::new()));
        let batches = StreamWriter::try_new(SpooledTempFile::new(HELD), &schema).map_err(write::io_error)?;
        let mut spool = Self { meta, batch, rows: 0, hash: Sha256::new(), batches, header: 0 };
        spool.header = spool.batches.get_mut().stream_position()?;
        Ok(spool)
    }

    /// Appends a row, as [`TokenSet::push`].
    pub fn push(&mut self, row: TokenRow<'_>) -> io::Result<()> {
        if write::is_full(&self.batch, row) {
            self.end_batch()?;
        }
        note(&mut self.hash, row);
        self.batch.push(row);
        self.rows += 1;
        Ok(())
    }

    /// Returns whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Writes the whole stream. Errors: those of `out` and of the temporary file.
    pub fn write(mut self, out: &mut impl Write) -> io::Result<()> {
        if !self.batch.is_empty() {
            self.end_batch()?;
        }
        self.batches.finish().map_err(write::io_error)?;
        let schema = Arc::new(write::schema(&self.meta, self.rows, hex(self.hash)));
        // Only the schema: dropped without an end, it leaves the stream open for the batches.
        drop(StreamWriter::try_new(&mut *out, &schema).map_err(write::io_error)?);
        let file = self.batches.get_mut();
        file.seek(SeekFrom::Start(self.header))?;
        io::copy(file, out)?;
        out.flush()
    }

    fn end_batch(&mut self) -> io::Result<()> {
        let schema = Arc::new(write::schema(&TokenMeta::default(), 0, String::new()));
        let batch = self.batch.batch(0..self.batch.len(), &schema)?;
        self.batch.clear();
        self.batches.write(&batch).map_err(write::io_error)
    }
}
