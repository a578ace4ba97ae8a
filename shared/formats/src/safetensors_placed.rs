//! Writes safetensors files whose tensors grow side by side, in one pass over their sources.
//!
//! Called by kto-weights: codes and scales of a quantized weight come out together but lie apart in the file, and one small tensor of it
//! has a length that is known only then. So bytes are written where they belong, tensors of unknown length lie at the end, and the header,
//! for which room was left, comes last. Invariant: the file appears under its name only when every announced byte was written.

use crate::safetensors_out::{TensorSpec, header, standard_order};
use kto_cli::{Error, Result, atomic::AtomicFile, escape, hash::Sha256Hex};
use std::{collections::BTreeMap, path::Path};

/// A safetensors file under construction.
pub struct PlacedWriter {
    file: AtomicFile,
    metadata: BTreeMap<String, String>,
    fixed: Vec<TensorSpec>,
    /// By name: offset in the file, bytes, and how many of them have been written.
    places: BTreeMap<String, (u64, u64, u64)>,
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
            places.insert(spec.name.clone(), (end, spec.bytes(), 0));
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
        let Some((offset, size, written)) = self.places.get_mut(name) else {
            return Err(Error::internal(format!("tensor \"{}\" was not announced", escape(name))));
        };
        if *written + bytes.len() as u64 > *size {
            let text = format!("{} bytes after {written} of {size}", bytes.len());
            return Err(Error::internal(format!("tensor \"{}\": {text}", escape(name))));
        }
        let at = *offset + *written;
        self.file.write_at(bytes, at)?;
        *written += bytes.len() as u64;
        self.hash = self.hash.take().filter(|(_, next)| *next == at).map(|(mut hash, next)| {
            hash.update(bytes);
            (hash, next + bytes.len() as u64)
        });
        Ok(())
    }

    /// Gives a late tensor, a run of bytes.
    pub fn late(&mut self, spec: TensorSpec, bytes: Vec<u8>) {
        self.late.push((spec, bytes));
    }

    /// Makes the file final; returns its hash if it is known. An internal error when bytes are missing.
    pub fn finish(mut self) -> Result<Option<String>> {
        let short = self.places.iter().find(|(_, (_, size, written))| size != written);
        if let Some((name, _)) = short {
            return Err(Error::internal(format!("tensor \"{}\" was not written in full", escape(name))));
        }
        if self.late.len() != self.expected {
            return Err(Error::internal(format!("{} late tensors of {}", self.late.len(), self.expected)));
        }
        self.late.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let mut end = self.end;
        for (_, bytes) in &self.late {
            self.file.write_at(bytes, end)?;
            end += bytes.len() as u64;
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
        self.file.commit()?;
        Ok(self.hash.filter(|(_, next)| *next == end).map(|(hash, _)| hash.finish()))
    }
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
        assert_eq!(writer.finish().unwrap(), None, "the header is not known at the beginning");
        let store = TensorStore::open_file(&path).unwrap();
        assert_eq!(store.require("codes").unwrap().data, [7, 8, 7, 8]);
        assert_eq!(store.require("scales").unwrap().to_f32().unwrap(), [1.5, 1.5]);
        assert_eq!(store.require("a.state").unwrap().data, b"hello");
        assert_eq!(store.require("b.state").unwrap().data, b"xyz");
        assert_eq!(store.metadata()["format"], "pt");
        std::fs::remove_file(&path).unwrap();
        let mut writer = start();
        writer.append("codes", &[1; 4]).unwrap();
        assert!(writer.finish().is_err() && !path.exists());
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
            writer.finish().unwrap()
        };
        let hash = write(["a", "b"], true);
        assert_eq!(hash, Some(kto_cli::hash::sha256_hex(&std::fs::read(&path).unwrap())));
        assert!(write(["b", "a"], true).is_none() && write(["a", "b"], false).is_none());
    }
}
