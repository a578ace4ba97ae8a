//! Writes safetensors files whose tensors grow side by side, in one pass over their sources.
//!
//! Called by kto-weights: codes and scales of a quantized weight come out together but lie apart in the file, and one small tensor of it
//! has a length that is known only then. So bytes are written where they belong, tensors of unknown length lie at the end, and the header,
//! for which room was left, comes last. Invariant: the file appears under its name only when every announced byte was written.

use crate::safetensors_out::{TensorSpec, header, standard_order};
use kto_cli::{Error, Result, atomic::AtomicFile, escape};
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
}

impl PlacedWriter {
    /// Starts `path`. `fixed` tensors have the sizes that are given, `late` ones at most these.
    pub fn new(
        path: &Path,
        mut fixed: Vec<TensorSpec>,
        late: &[TensorSpec],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        standard_order(&mut fixed);
        let all: Vec<_> = fixed.iter().chain(late).cloned().collect();
        let start = 8 + header(&all, metadata).len() as u64;
        let mut end = start;
        let mut places = BTreeMap::new();
        for spec in &fixed {
            places.insert(spec.name.clone(), (end, spec.bytes(), 0));
            end += spec.bytes();
        }
        let (file, metadata) = (AtomicFile::create(path)?, metadata.clone());
        Ok(Self { file, metadata, fixed, places, late: Vec::new(), expected: late.len(), start, end })
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
        self.file.write_at(bytes, *offset + *written)?;
        *written += bytes.len() as u64;
        Ok(())
    }

    /// Gives a late tensor, a run of bytes.
    pub fn late(&mut self, spec: TensorSpec, bytes: Vec<u8>) {
        self.late.push((spec, bytes));
    }

    /// Makes the file final. An internal error when bytes are missing.
    pub fn finish(mut self) -> Result<()> {
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
        self.file.commit()
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
        let start = || PlacedWriter::new(&path, specs.clone(), &late, &pt_metadata()).unwrap();
        let mut writer = start();
        for _ in 0..2 {
            writer.append("codes", &[7, 8]).unwrap();
            writer.append("scales", &1.5f32.to_le_bytes()).unwrap();
        }
        assert!(writer.append("codes", &[1]).is_err() && writer.append("other", &[1]).is_err());
        writer.late(TensorSpec::new("b.state", Dtype::U8, [3]), b"xyz".to_vec());
        writer.late(TensorSpec::new("a.state", Dtype::U8, [5]), b"hello".to_vec());
        assert!(!path.exists());
        writer.finish().unwrap();
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
}
