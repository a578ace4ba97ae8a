//! Writes safetensors files as a stream: the header first, then tensor after tensor, whole or in parts.
//!
//! Called by [`crate::adapter`] and by the tools that write models. Invariant: the file appears under its name only
//! when every announced byte was written. The layout is that of the `safetensors` library (the header padded with
//! blanks to 8 bytes); [`standard_order`] gives its order too, so equal tensors make equal files.

use kto_cli::{Error, Result, atomic::AtomicFile, escape};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};

/// What a file will hold under one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The tensor's name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Returns a description of a tensor.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }
    /// Returns the size in bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }
}

/// Sorts as the `safetensors` library does: wide dtypes first (so that everything stays aligned), then by name.
pub fn standard_order(tensors: &mut [TensorSpec]) {
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
}

/// A safetensors file under construction.
pub struct SafetensorsWriter {
    file: AtomicFile,
    /// What is still to come, next at the end.
    waiting: Vec<TensorSpec>,
    /// Bytes of the current tensor already written.
    written: u64,
}

impl SafetensorsWriter {
    /// Starts `path` and writes the header. The tensors must come in this order.
    pub fn new(path: &Path, tensors: Vec<TensorSpec>, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let mut file = AtomicFile::create(path)?;
        let header = header(&tensors, metadata);
        file.write(&(header.len() as u64).to_le_bytes())?;
        file.write(header.as_bytes())?;
        let waiting = tensors.into_iter().rev().collect();
        Ok(Self { file, waiting, written: 0 })
    }

    /// Returns the tensor that the next bytes belong to.
    pub fn next(&self) -> Option<&TensorSpec> {
        self.waiting.last()
    }

    /// Appends bytes of the tensor `name`, all of them or the next part. Writing another tensor than the announced
    /// next one, or more bytes than it has, is an internal error.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.skip_empty(name);
        let Some(tensor) = self.waiting.last() else {
            return Err(Error::internal(format!("tensor \"{}\" was not announced", escape(name))));
        };
        let room = tensor.bytes() - self.written;
        if tensor.name != name || bytes.len() as u64 > room {
            return Err(Error::internal(format!(
                "{} bytes of tensor \"{}\" where {room} of \"{}\" are due",
                bytes.len(),
                escape(name),
                escape(&tensor.name)
            )));
        }
        self.file.write(bytes)?;
        self.written += bytes.len() as u64;
        if self.written == tensor.bytes() {
            self.waiting.pop();
            self.written = 0;
        }
        Ok(())
    }

    /// Passes over tensors without elements, which nobody needs to write.
    fn skip_empty(&mut self, name: &str) {
        while self.waiting.last().is_some_and(|t| t.bytes() == 0 && t.name != name) {
            self.waiting.pop();
        }
    }

    /// Makes the file final. An internal error when bytes are missing.
    pub fn finish(mut self) -> Result<()> {
        self.skip_empty("");
        match self.waiting.last() {
            Some(tensor) => {
                Err(Error::internal(format!("tensor \"{}\" was not written in full", escape(&tensor.name))))
            }
            None => self.file.commit(),
        }
    }
}

/// Returns the bytes of a file with these tensors, header included.
pub fn file_bytes(tensors: &[TensorSpec], metadata: &BTreeMap<String, String>) -> u64 {
    8 + header(tensors, metadata).len() as u64 + tensors.iter().map(TensorSpec::bytes).sum::<u64>()
}

/// The header's JSON text, padded with blanks to a multiple of 8 bytes.
pub(crate) fn header(tensors: &[TensorSpec], metadata: &BTreeMap<String, String>) -> String {
    let mut object = serde_json::Map::new();
    if !metadata.is_empty() {
        object.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes();
        let dtype =
            serde_json::to_value(tensor.dtype).unwrap_or_else(|_| Value::String(tensor.dtype.to_string()));
        let info = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]});
        object.insert(tensor.name.clone(), info);
        offset = end;
    }
    let mut text = Value::Object(object).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    text
}

/// Returns the metadata that every Hugging Face reader expects: `format` = `pt`.
pub fn pt_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_string(), "pt".to_string())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::TensorStore;

    fn specs() -> Vec<TensorSpec> {
        vec![
            TensorSpec::new("codes", Dtype::U8, [3, 1]),
            TensorSpec::new("none", Dtype::F32, [0, 4]),
            TensorSpec::new("w", Dtype::F32, [2]),
            TensorSpec::new("h", Dtype::BF16, [2, 2]),
        ]
    }

    #[test]
    fn what_is_written_in_parts_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let mut tensors = specs();
        standard_order(&mut tensors);
        assert_eq!(tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["none", "w", "h", "codes"]);
        let mut writer = SafetensorsWriter::new(&path, tensors, &pt_metadata()).unwrap();
        writer.write("w", &[1, 0, 0]).unwrap();
        writer.write("w", &[0, 2, 0, 0, 0]).unwrap();
        writer.write("h", &[7; 8]).unwrap();
        assert!(!path.exists());
        writer.write("codes", &[1, 2, 3]).unwrap();
        writer.finish().unwrap();
        let store = TensorStore::open_file(&path).unwrap();
        assert_eq!(store.len(), 4);
        assert_eq!(store.require("w").unwrap().data, [1, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(store.require("codes").unwrap().shape, [3, 1]);
        assert!(store.require("none").unwrap().is_empty());
        assert_eq!(store.metadata()["format"], "pt");
    }

    #[test]
    fn wrong_order_length_and_end_leave_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let start = || SafetensorsWriter::new(&path, specs(), &BTreeMap::new()).unwrap();
        assert!(start().write("w", &[0; 8]).is_err());
        assert!(start().write("codes", &[0; 4]).is_err());
        let mut writer = start();
        writer.write("codes", &[0; 3]).unwrap();
        assert!(writer.finish().is_err());
        assert!(!path.exists());
    }
}
