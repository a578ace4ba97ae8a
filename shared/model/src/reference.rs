//! Reference log-probabilities: one forward pass over every needed (prompt, completion) pair, kept beside the run.

use crate::{
    rows::{Batch, Job, Packing},
    sweep::Sweep,
};
use kto_cli::{Error, Result, escape, hash::Sha256Hex};
use kto_formats::{
    safetensors_out::{SafetensorsWriter, TensorSpec},
    tensors::TensorStore,
    tokens::TokenSet,
};
use safetensors::Dtype;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
};

/// How the pass is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassForm {
    /// Tokens after which a row is cut.
    pub max_length: usize,
    /// Rows of a pack, about.
    pub pack_rows: usize,
    /// Rows of one sweep, about: large enough to fetch a block's weights seldom.
    pub sweep_rows: usize,
}

impl PassForm {
    /// Returns the form of a pass that memory does not restrict.
    pub fn roomy(max_length: usize) -> Self {
        Self { max_length, pack_rows: 2048, sweep_rows: 16384 }
    }
}

/// Summed log-probability of the completion of one row after the prompt of another (or the same) row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reference {
    logps: BTreeMap<(u32, u32), f64>,
}

/// A (prompt row, completion row) pair.
pub type Pair = (u32, u32);

impl Reference {
    /// Returns the log-probability of a pair.
    pub fn get(&self, prompt: usize, completion: usize) -> Result<f64> {
        let found = self.logps.get(&(prompt as u32, completion as u32)).copied();
        found.ok_or_else(|| {
            Error::internal(format!("no reference log-probability for rows {prompt} and {completion}"))
        })
    }

    /// Returns whether every pair is there.
    pub fn covers(&self, pairs: &BTreeSet<Pair>) -> bool {
        pairs.iter().all(|p| self.logps.contains_key(p))
    }

    /// Returns the number of pairs.
    pub fn len(&self) -> usize {
        self.logps.len()
    }

    /// Returns whether there is no pair.
    pub fn is_empty(&self) -> bool {
        self.logps.is_empty()
    }

    /// Scores the missing ones of `pairs` with `sweep`: the base, or an adapter on it. `step` is called after every sweep with what is
    /// there by then and the number of pairs just done; its error ends the pass.
    ///
    /// Sweeps are cut from all pairs, whatever is there already: a pass that was interrupted goes on with the same packs
    /// and so ends with the same bits.
    pub fn extend(
        &mut self,
        sweep: &Sweep,
        tokens: &TokenSet,
        form: PassForm,
        pairs: &BTreeSet<Pair>,
        mut step: impl FnMut(&Self, usize) -> Result<()>,
    ) -> Result<()> {
        let pairs: Vec<Pair> = pairs.iter().copied().collect();
        let limits = sweep.base.architecture.limits(form.max_length);
        for cut in sweeps(tokens, &pairs, form.sweep_rows) {
            let chunk = &pairs[cut];
            if !chunk.iter().all(|p| self.logps.contains_key(p)) {
                let packing = Packing::Shared(form.pack_rows);
                let batch = Batch::new(tokens, limits, &jobs(chunk), packing);
                let stats = batch.by_job(&sweep.forward(&batch.packs, false)?.branches);
                self.logps.extend(chunk.iter().zip(&stats).map(|(pair, s)| (*pair, s.logps)));
            }
            step(self, chunk.len())?;
        }
        Ok(())
    }

    /// Writes the cache under `key`, which names base, adapter, tokens and form, sealed by a hash.
    pub fn write(&self, path: &Path, key: &str) -> Result<()> {
        let n = self.logps.len();
        let pairs: Vec<u8> =
            self.logps.keys().flat_map(|p| [p.0.to_le_bytes(), p.1.to_le_bytes()]).flatten().collect();
        let logps: Vec<u8> = self.logps.values().flat_map(|v| v.to_le_bytes()).collect();
        let metadata = BTreeMap::from([
            (KEY.to_string(), key.to_string()),
            (SEAL.to_string(), seal(key, &pairs, &logps)),
        ]);
        let specs = vec![
            TensorSpec::new("logps".to_string(), Dtype::F64, [n]),
            TensorSpec::new("pairs".to_string(), Dtype::U32, [n, 2]),
        ];
        let mut writer = SafetensorsWriter::new(path, specs, &metadata)?;
        writer.write("logps", &logps)?;
        writer.write("pairs", &pairs)?;
        writer.finish()
    }

    /// Reads a cache; `None` when there is none. Errors: it cannot be read, was made under another key, or does not match its
    /// seal. Nothing is lost with it but the time to make it anew.
    pub fn read(path: &Path, key: &str) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let store = TensorStore::open_file(path)?;
        let bad = |what: &str| Error::data(format!("{}: {what}", escape(&path.display().to_string())));
        let metadata = |name: &str| store.metadata().get(name).map(String::as_str);
        if metadata(KEY) != Some(key) {
            return Err(bad("made of another base, adapter or data"));
        }
        let (logps, pairs) = (store.require("logps")?, store.require("pairs")?);
        let sealed = metadata(SEAL) == Some(&seal(key, pairs.data, logps.data));
        if !sealed || logps.dtype != Dtype::F64 || pairs.dtype != Dtype::U32 {
            return Err(bad("damaged: its numbers are not those of its checksum"));
        }
        let pair = |b: &[u8; 8]| {
            let both = u64::from_le_bytes(*b);
            (both as u32, (both >> 32) as u32)
        };
        let keys = pairs.data.as_chunks().0.iter().map(pair);
        let values = logps.data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b));
        Ok(Some(Self { logps: keys.zip(values).collect() }))
    }
}

/// What the cache is of, in the file's metadata.
const KEY: &str = "kto.reference_key";
/// SHA-256 over key and numbers, in the file's metadata.
const SEAL: &str = "kto.reference_sha256";

fn seal(key: &str, pairs: &[u8], logps: &[u8]) -> String {
    let mut hash = Sha256Hex::new();
    // The key has a fixed length, and there are as many pairs as numbers.
    [key.as_bytes(), pairs, logps].into_iter().for_each(|part| hash.update(part));
    hash.finish()
}

/// Returns the work of a sweep over `pairs`.
pub fn jobs(pairs: &[Pair]) -> Vec<Job> {
    let job = |p: &Pair| Job { prompt: p.0 as usize, completion: p.1 as usize, gradient: false };
    pairs.iter().map(job).collect()
}

/// Cuts `pairs` into sweeps of about `limit` rows (prompts counted for every pair: an upper bound).
pub fn sweeps(tokens: &TokenSet, pairs: &[Pair], limit: usize) -> Vec<Range<usize>> {
    let (mut cuts, mut start, mut rows) = (Vec::new(), 0, 0);
    for (i, pair) in pairs.iter().enumerate() {
        let own =
            tokens.row(pair.0 as usize).prompt_ids.len() + tokens.row(pair.1 as usize).completion_ids.len();
        if i > start && rows + own > limit {
            cuts.push(start..i);
            (start, rows) = (i, 0);
        }
        rows += own;
    }
    if start < pairs.len() {
        cuts.push(start..pairs.len());
    }
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_changed_bit_is_taken_for_a_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reference.safetensors");
        let key = kto_cli::hash::sha256_hex(b"base and data");
        let whole =
            Reference { logps: BTreeMap::from([((0, 0), -1.5), ((0, 1), -0.0), ((7, u32::MAX), -99.25)]) };
        assert_eq!(Reference::read(&path, &key).unwrap(), None);
        whole.write(&path, &key).unwrap();
        assert_eq!(Reference::read(&path, &key).unwrap().unwrap(), whole);
        assert!(Reference::read(&path, &key[1..]).is_err());
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut other = bytes.clone();
                other[at] ^= 1 << bit;
                std::fs::write(&path, other).unwrap();
                // A bit of the header may mean nothing: an escape of JSON, a space that fills up.
                if let Ok(read) = Reference::read(&path, &key) {
                    assert_eq!(read.as_ref(), Some(&whole), "byte {at}, bit {bit}");
                }
            }
        }
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert!(Reference::read(&path, &key).is_err(), "cut at {length}");
        }
    }
}
