//! Writes safetensors files whose tensors grow side by side, in one pass over their sources.
//!
//! Called by kto-weights: codes and scales of a quantized weight come out together but lie apart in the file, and one small tensor of it
//! has a length that is known only then. So bytes are written where they belong, tensors of unknown length lie at the end, and the header,
//! for which room was left, comes last. Invariant: the file appears under its name only when every announced byte was written.
//!
//! Its seal tells a later run whether a file is still what was written. Each tensor is hashed as its bytes come; the seal is the hash
//! (XXH3 of 128 bits: against accidents, not against somebody who can write a journal as well) of the header and these hashes by name.

use crate::safetensors_out::{TensorSpec, header, standard_order};
use crate::tensors::TensorStore;
use kto_cli::{
    Error, Result,
    atomic::{AtomicFile, Finished},
    escape,
    hash::Sha256Hex,
    signal,
};
use std::{collections::BTreeMap, path::Path};
use twox_hash::XxHash3_128;

/// Bytes that are read for a seal at a time, and then forgotten.
const PIECE: usize = 16 << 20;

/// A safetensors file under construction.
pub struct PlacedWriter {
    file: AtomicFile,
    metadata: BTreeMap<String, String>,
    fixed: Vec<TensorSpec>,
    places: BTreeMap<String, Place>,
    late: Vec<(TensorSpec, Vec<u8>)>,
    /// How many late tensors there must be.
    expected: usize,
    /// Where the data begins.
    start: u64,
    /// Where the late tensors begin.
    end: u64,
    /// The hash of the file up to an offset, as long as bytes come in their order.
    hash: Option<(Sha256Hex, u64)>,
}

/// A tensor in the file.
struct Place {
    offset: u64,
    /// Bytes, and how many of them have been written.
    size: u64,
    written: u64,
    /// The hash of those.
    hash: XxHash3_128,
}

impl PlacedWriter {
    /// Starts `path`. `fixed` tensors have the sizes that are given, `late` ones at most these. With `hashed` a file without late tensors is
    /// hashed as it is written, as far as its tensors come in the order of the file.
    pub fn new(
        path: &Path,
        mut fixed: Vec<TensorSpec>,
        late: &[TensorSpec],
        metadata: &BTreeMap<String, String>,
        hashed: bool,
    ) -> Result<Self> {
        standard_order(&mut fixed);
        let all: Vec<_> = fixed.iter().chain(late).cloned().collect();
        let text = header(&all, metadata);
        let start = 8 + text.len() as u64;
        let mut end = start;
        let mut places = BTreeMap::new();
        for spec in &fixed {
            let (size, hash) = (spec.bytes(), XxHash3_128::new());
            places.insert(spec.name.clone(), Place { offset: end, size, written: 0, hash });
            end += spec.bytes();
        }
        let (file, metadata) = (AtomicFile::create(path)?, metadata.clone());
        let hash = (hashed && late.is_empty()).then(|| {
            let mut hash = Sha256Hex::new();
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
            (hash, start)
        });
        Ok(Self { file, metadata, fixed, places, late: Vec::new(), expected: late.len(), start, end, hash })
    }

    /// Appends to what the fixed tensor `name` has.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(Place { offset, size, written, hash }) = self.places.get_mut(name) else {
            return Err(Error::internal(format!("tensor \"{}\" was not announced", escape(name))));
        };
        if *written + bytes.len() as u64 > *size {
            let text = format!("{} bytes after {written} of {size}", bytes.len());
            return Err(Error::internal(format!("tensor \"{}\": {text}", escape(name))));
        }
        let at = *offset + *written;
        let mut write = || {
            hash.write(bytes);
            self.file.write_at(bytes, at)
        };
        match self.hash.take_if(|(_, next)| *next == at) {
            Some((mut whole, next)) => {
                whole.update_beside(bytes, write)?;
                self.hash = Some((whole, next + bytes.len() as u64));
            }
            None => {
                self.hash = None;
                write()?;
            }
        }
        *written += bytes.len() as u64;
        Ok(())
    }

    /// Gives a late tensor, a run of bytes.
    pub fn late(&mut self, spec: TensorSpec, bytes: Vec<u8>) {
        self.late.push((spec, bytes));
    }

    /// Makes the file final; returns its hash if it is known. `finished` hears of the file right before it gets its name. An internal
    /// error when bytes are missing.
    pub fn finish(mut self, finished: impl FnOnce(Finished) -> Result<()>) -> Result<Option<String>> {
        let short = self.places.iter().find(|(_, place)| place.size != place.written);
        if let Some((name, _)) = short {
            return Err(Error::internal(format!("tensor \"{}\" was not written in full", escape(name))));
        }
        if self.late.len() != self.expected {
            return Err(Error::internal(format!("{} late tensors of {}", self.late.len(), self.expected)));
        }
        let mut hashes: BTreeMap<String, u128> =
            std::mem::take(&mut self.places).into_iter().map(|(n, p)| (n, p.hash.finish_128())).collect();
        self.late.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let mut end = self.end;
        for (spec, bytes) in &self.late {
            self.file.write_at(bytes, end)?;
            end += bytes.len() as u64;
            hashes.insert(spec.name.clone(), XxHash3_128::oneshot(bytes));
        }
        let all: Vec<_> = self.fixed.into_iter().chain(self.late.into_iter().map(|(spec, _)| spec)).collect();
        let mut text = header(&all, &self.metadata);
        let room = (self.start - 8) as usize;
        if text.len() > room {
            return Err(Error::internal("a safetensors header longer than its room"));
        }
        text.extend(std::iter::repeat_n(' ', room - text.len()));
        let mut bytes = (room as u64).to_le_bytes().to_vec();
        bytes.extend(text.into_bytes());
        self.file.write_at(&bytes, 0)?;
        let hashes = hashes.iter().map(|(name, hash)| (name.as_str(), *hash));
        finished(Finished { size: end, seal: sealed(&bytes, hashes) })?;
        self.file.commit()?;
        Ok(self.hash.filter(|(_, next)| *next == end).map(|(hash, _)| hash.finish()))
    }
}

/// Returns the seal of a safetensors file, as [`PlacedWriter::finish`] gives it. Errors: what is no such file; a stop.
pub fn seal(path: &Path) -> Result<String> {
    let store = TensorStore::open_file(path)?;
    let hash = |name: &str, data: &[u8]| {
        let mut hash = XxHash3_128::new();
        for (i, piece) in data.chunks(PIECE).enumerate() {
            signal::check()?;
            hash.write(piece);
            store.release_part(name, i * PIECE..i * PIECE + piece.len());
        }
        Ok((name.to_string(), hash.finish_128()))
    };
    let hashes = store.views().map(|v| hash(v.name, v.data)).collect::<Result<Vec<_>>>()?;
    let hashes = hashes.iter().map(|(name, hash)| (name.as_str(), *hash));
    Ok(sealed(store.header(), hashes))
}

/// `header` is the file up to the first tensor; `hashes` come by name.
fn sealed<'a>(header: &[u8], hashes: impl Iterator<Item = (&'a str, u128)>) -> String {
    let mut hash = XxHash3_128::new();
    hash.write(header);
    for (name, of_bytes) in hashes {
        hash.write(&(name.len() as u64).to_le_bytes());
        hash.write(name.as_bytes());
        hash.write(&of_bytes.to_le_bytes());
    }
    format!("xxh3-{:032x}", hash.finish_128())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{safetensors_out::pt_metadata, tensors::TensorStore};
    use safetensors::Dtype;

    #[test]
    fn tensors_grow_side_by_side() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let specs =
            vec![TensorSpec::new("codes", Dtype::U8, [4]), TensorSpec::new("scales", Dtype::F32, [2])];
        let late = [TensorSpec::new("a.state", Dtype::U8, [100]), TensorSpec::new("b.state", Dtype::U8, [9])];
        let start = || PlacedWriter::new(&path, specs.clone(), &late, &pt_metadata(), true).unwrap();
        let mut writer = start();
        for _ in 0..2 {
            writer.append("codes", &[7, 8]).unwrap();
            writer.append("scales", &1.5f32.to_le_bytes()).unwrap();
        }
        assert!(writer.append("codes", &[1]).is_err() && writer.append("other", &[1]).is_err());
        writer.late(TensorSpec::new("b.state", Dtype::U8, [3]), b"xyz".to_vec());
        writer.late(TensorSpec::new("a.state", Dtype::U8, [5]), b"hello".to_vec());
        assert!(!path.exists());
        assert_eq!(writer.finish(|_| Ok(())).unwrap(), None, "the header is not known at the beginning");
        let store = TensorStore::open_file(&path).unwrap();
        assert_eq!(store.require("codes").unwrap().data, [7, 8, 7, 8]);
        assert_eq!(store.require("scales").unwrap().to_f32().unwrap(), [1.5, 1.5]);
        assert_eq!(store.require("a.state").unwrap().data, b"hello");
        assert_eq!(store.require("b.state").unwrap().data, b"xyz");
        assert_eq!(store.metadata()["format"], "pt");
        std::fs::remove_file(&path).unwrap();
        let mut writer = start();
        writer.append("codes", &[1; 4]).unwrap();
        assert!(writer.finish(|_| Ok(())).is_err() && !path.exists());
    }

    #[test]
    fn the_hash_is_that_of_the_file_when_tensors_come_in_its_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let specs: Vec<_> = ["a", "b"].map(|name| TensorSpec::new(name, Dtype::U8, [4])).into();
        let write = |order: [&str; 2], hashed: bool| {
            let mut writer = PlacedWriter::new(&path, specs.clone(), &[], &pt_metadata(), hashed).unwrap();
            for name in order {
                writer.append(name, &[1, 2]).unwrap();
                writer.append(name, &[3, 4]).unwrap();
            }
            writer.finish(|_| Ok(())).unwrap()
        };
        let hash = write(["a", "b"], true);
        assert_eq!(hash, Some(kto_cli::hash::sha256_hex(&std::fs::read(&path).unwrap())));
        assert!(write(["b", "a"], true).is_none() && write(["a", "b"], false).is_none());
    }

    /// Also where tensors grow side by side and one comes late; and of every byte.
    #[test]
    fn the_seal_of_the_file_is_the_one_it_was_finished_with() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let specs = vec![TensorSpec::new("a", Dtype::U8, [6]), TensorSpec::new("b", Dtype::F32, [2])];
        let late = [TensorSpec::new("a.state", Dtype::U8, [100])];
        let mut writer = PlacedWriter::new(&path, specs, &late, &pt_metadata(), false).unwrap();
        for _ in 0..2 {
            writer.append("a", &[7, 8, 9]).unwrap();
            writer.append("b", &1.5f32.to_le_bytes()).unwrap();
        }
        writer.late(TensorSpec::new("a.state", Dtype::U8, [5]), b"hello".to_vec());
        let mut noted = None;
        writer
            .finish(|finished| {
                assert!(!path.exists(), "noted before it has its name");
                noted = Some(finished);
                Ok(())
            })
            .unwrap();
        let (noted, bytes) = (noted.unwrap(), std::fs::read(&path).unwrap());
        assert_eq!(noted, Finished { size: bytes.len() as u64, seal: seal(&path).unwrap() });
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 0x20;
            std::fs::write(&path, other).unwrap();
            assert!(seal(&path).ok() != Some(noted.seal.clone()), "byte {at}");
        }
    }
}
