//! Token files (`.kto.arrow`): what kto-tokenize writes and kto-train, kto-eval read.
//!
//! An Arrow IPC *stream* with one row per example and four columns, so pyarrow, datasets, polars and DuckDB
//! read it as it is:
//!
//! | column           | type           | meaning                                                                 |
//! |------------------|----------------|-------------------------------------------------------------------------|
//! | `prompt_ids`     | `list<uint32>` | the prompt, at least one token and fewer than `kto.max_length`           |
//! | `completion_ids` | `list<uint32>` | the completion, at least one token, at most `kto.max_length`             |
//! | `label`          | bool           | true = desirable                                                        |
//! | `prompt_hash`    | uint64         | [`prompt_hash`] of `prompt_ids`: equal prompts have equal hashes         |
//!
//! Schema metadata: `kto.format_version` (1), `kto.tokenizer`, `kto.template`, `kto.vocab_size`, `kto.max_length`,
//! `kto.truncated`, `kto.dropped`, `kto.rows`, `kto.fingerprint`.
//!
//! Completions are *not* cut to `max_length - len(prompt)`: a KL pair joins a prompt with the whole completion of
//! another row, so the trainer cuts after joining. In memory a [`TokenSet`] is flat (offsets and values, no vector
//! per row). Invariant of a set that was read: every rule of the table holds, every id is below the vocabulary
//! size, the rows match the fingerprint. Absent on purpose: compression and memory mapping (a set of a million
//! rows of 500 tokens is 2 GB, and a cut mapped file would end in SIGBUS instead of a message).

mod read;
mod spool;
#[cfg(test)]
mod tests;
mod write;

pub use spool::TokenSpool;

use kto_cli::{Error, Result};
use sha2::{Digest, Sha256};

/// The format version this build writes and reads.
pub const FORMAT_VERSION: &str = "1";

/// What a token file says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenMeta {
    /// SHA-256 (hex) of the bytes of tokenizer.json.
    pub tokenizer: String,
    /// SHA-256 (hex) of the chat template's source; empty when no row was conversational.
    pub template: String,
    /// Every token id is below this.
    pub vocab_size: u32,
    /// The limit the rows were counted against, in tokens of prompt + completion.
    pub max_length: u32,
    /// Rows with prompt + completion longer than `max_length`; the trainer cuts them.
    pub truncated: u64,
    /// Rows left out because the prompt alone reaches `max_length`.
    pub dropped: u64,
}

/// One example, borrowed from a [`TokenSet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRow<'a> {
    /// The prompt's ids, never empty.
    pub prompt_ids: &'a [u32],
    /// The completion's ids, never empty, not cut to fit behind the prompt.
    pub completion_ids: &'a [u32],
    /// True = desirable.
    pub label: bool,
    /// [`prompt_hash`] of `prompt_ids`.
    pub prompt_hash: u64,
}

/// All rows of a token file in flat buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSet {
    /// What the file says about itself.
    pub meta: TokenMeta,
    /// Start of each row's prompt in `prompts`, and the end of the last: rows + 1 numbers.
    prompt_offsets: Vec<usize>,
    prompts: Vec<u32>,
    /// The same for `completions`.
    completion_offsets: Vec<usize>,
    completions: Vec<u32>,
    labels: Vec<bool>,
    hashes: Vec<u64>,
}

impl TokenSet {
    /// Returns a set without rows.
    pub fn new(meta: TokenMeta) -> Self {
        Self {
            meta,
            prompt_offsets: vec![0],
            prompts: Vec::new(),
            completion_offsets: vec![0],
            completions: Vec::new(),
            labels: Vec::new(),
            hashes: Vec::new(),
        }
    }

    /// Appends a row. The caller has made sure that it obeys the rules of the format (`TokenSet::check`).
    pub fn push(&mut self, row: TokenRow<'_>) {
        self.prompts.extend_from_slice(row.prompt_ids);
        self.prompt_offsets.push(self.prompts.len());
        self.completions.extend_from_slice(row.completion_ids);
        self.completion_offsets.push(self.completions.len());
        self.labels.push(row.label);
        self.hashes.push(row.prompt_hash);
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Returns whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Returns row `i`, which must be below [`TokenSet::len`].
    pub fn row(&self, i: usize) -> TokenRow<'_> {
        TokenRow {
            prompt_ids: &self.prompts[self.prompt_offsets[i]..self.prompt_offsets[i + 1]],
            completion_ids: &self.completions[self.completion_offsets[i]..self.completion_offsets[i + 1]],
            label: self.labels[i],
            prompt_hash: self.hashes[i],
        }
    }

    /// Returns the rows in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = TokenRow<'_>> {
        (0..self.len()).map(|i| self.row(i))
    }

    /// Returns the SHA-256 (hex) of all rows: for each the prompt's length and ids, the completion's length and
    /// ids (all u32 little-endian) and one byte for the label.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        self.rows().for_each(|row| note(&mut hash, row));
        hex(hash)
    }

    /// Removes the rows and keeps the buffers.
    fn clear(&mut self) {
        self.prompt_offsets.truncate(1);
        self.prompts.clear();
        self.completion_offsets.truncate(1);
        self.completions.clear();
        self.labels.clear();
        self.hashes.clear();
    }

    /// Checks one row against the rules of the format. `row` counts from 0, messages count from 1.
    fn check(&self, i: usize) -> Result<()> {
        let row = self.row(i);
        let place = i + 1;
        let limit = self.meta.max_length as usize;
        let bad = |what: String| Err(Error::data(format!("row {place}: {what}")));
        if row.prompt_ids.is_empty() {
            return bad("prompt_ids is empty".into());
        }
        if row.completion_ids.is_empty() {
            return bad("completion_ids is empty".into());
        }
        if row.prompt_ids.len() >= limit {
            return bad(format!("a prompt of {} tokens, max_length is {limit}", row.prompt_ids.len()));
        }
        if row.completion_ids.len() > limit {
            return bad(format!(
                "a completion of {} tokens, max_length is {limit}",
                row.completion_ids.len()
            ));
        }
        let size = self.meta.vocab_size;
        if let Some(id) = row.prompt_ids.iter().chain(row.completion_ids).find(|id| **id >= size) {
            return bad(format!("token id {id}, vocab_size is {size}"));
        }
        if row.prompt_hash != prompt_hash(row.prompt_ids) {
            return bad("prompt_hash does not belong to prompt_ids".into());
        }
        Ok(())
    }
}

/// Adds a row to the fingerprint.
fn note(hash: &mut Sha256, row: TokenRow<'_>) {
    let mut bytes = Vec::with_capacity(4 * (row.prompt_ids.len() + row.completion_ids.len()) + 9);
    for ids in [row.prompt_ids, row.completion_ids] {
        bytes.extend_from_slice(&(ids.len() as u32).to_le_bytes());
        bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
    }
    bytes.push(u8::from(row.label));
    hash.update(&bytes);
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Returns the hash that says whether two prompts are the same: the first 8 bytes, little-endian, of the SHA-256 of
/// the ids as little-endian u32.
pub fn prompt_hash(ids: &[u32]) -> u64 {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let digest = Sha256::digest(&bytes);
    digest.iter().take(8).rev().fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}
