//! Tensors of one or several safetensors files, memory-mapped.
//!
//! [`TensorStore`] answers by tensor name and does not care about shards. Called by [`crate::model_dir`],
//! [`crate::adapter`] and the tools. Invariant: every view lies inside its file and its length is shape × dtype.
//! Nothing is copied until [`TensorView::to_f32`].

pub use crate::mmap::{Access, FileStamp, Map};

use crate::safetensors_header;
use half::{bf16, f16};
use kto_cli::{Context, Error, Result, escape};
use safetensors::Dtype;
use std::{collections::BTreeMap, ops::Range, path::Path, sync::Arc};

/// The tensors of a model or adapter, by name.
pub struct TensorStore {
    files: Vec<Arc<Map>>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    /// What messages call the store: its file, or its directory.
    place: String,
}

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// A tensor as it lies in the file: little-endian, row-major.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Bytes, shape × dtype of them. No alignment is promised.
    pub data: &'a [u8],
}

impl TensorStore {
    /// Opens a single safetensors file.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut store = Self::empty(crate::mmap::shown(path));
        store.add(path)?;
        Ok(store)
    }

    /// Returns a store without tensors that messages call `place`.
    pub(crate) fn empty(place: String) -> Self {
        Self { files: Vec::new(), entries: BTreeMap::new(), metadata: BTreeMap::new(), place }
    }

    /// Adds every tensor of `path`. A name that an earlier file had is an error (65). Returns how many came in.
    pub(crate) fn add(&mut self, path: &Path) -> Result<usize> {
        let map = Map::open(path)?;
        let shown = crate::mmap::shown(path);
        let header = safetensors_header::read(&map).at(&shown)?;
        let count = header.tensors.len();
        for (name, info) in header.tensors {
            if let Some(other) = self.entries.get(&name) {
                let other = crate::mmap::shown(self.files[other.file].path());
                return Err(Error::data(format!("{shown}: tensor \"{}\" is in {other} too", escape(&name))));
            }
            let range = info.data_offsets.0..info.data_offsets.1;
            let entry = Entry { file: self.files.len(), dtype: info.dtype, shape: info.shape, range };
            self.entries.insert(name, entry);
        }
        for (key, value) in header.metadata {
            self.metadata.entry(key).or_insert(value);
        }
        self.files.push(Arc::new(map));
        Ok(count)
    }

    /// Gives every tensor the name that `of` returns for its own, and leaves out those without one. Returns how many were left out. Error
    /// (65): two get the same.
    pub(crate) fn rename(&mut self, of: impl Fn(&str) -> Option<String>) -> Result<usize> {
        let before = std::mem::take(&mut self.entries);
        let mut out = 0;
        for (name, entry) in before {
            match of(&name) {
                None => out += 1,
                Some(new) if self.entries.contains_key(&new) => {
                    return Err(Error::data(format!(
                        "{}: tensor \"{}\" is there twice",
                        self.place,
                        escape(&new)
                    )));
                }
                Some(new) => drop(self.entries.insert(new, entry)),
            }
        }
        Ok(out)
    }

    /// Returns the names in byte order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Returns the tensor `name`.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.entries.get_key_value(name)?;
        let data = &self.files[entry.file][entry.range.clone()];
        Some(TensorView { name, dtype: entry.dtype, shape: &entry.shape, data })
    }

    /// Returns the tensor `name`, or an error (65) that names it.
    pub fn require(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).ok_or_else(|| Error::data(format!("{}: no tensor \"{}\"", self.place, escape(name))))
    }

    /// Returns the views in byte order of the names.
    pub fn views(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.names().filter_map(|name| self.get(name))
    }

    /// Returns the safetensors `__metadata__` of all files; the first file wins where they differ.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Returns the file that holds `name`, and where in it: for users that keep the map alive longer than the store.
    pub fn bytes(&self, name: &str) -> Option<(Arc<Map>, Range<usize>)> {
        self.entries.get(name).map(|e| (self.files[e.file].clone(), e.range.clone()))
    }

    /// Tells the system how a tensor's pages are about to be used.
    pub fn advise(&self, name: &str, access: Access) {
        if let Some(entry) = self.entries.get(name) {
            self.files[entry.file].advise(entry.range.clone(), access);
        }
    }

    /// Gives the memory pages of a tensor back to the system; a later access reads the file again.
    pub fn release(&self, name: &str) {
        if let Some(entry) = self.entries.get(name) {
            self.files[entry.file].release(entry.range.clone());
        }
    }

    /// As [`TensorStore::release`], for a part of the tensor's bytes.
    pub fn release_part(&self, name: &str, bytes: Range<usize>) {
        if let Some(entry) = self.entries.get(name) {
            let start = entry.range.start;
            self.files[entry.file].release(start + bytes.start..(start + bytes.end).min(entry.range.end));
        }
    }

    /// Returns the bytes before the first tensor of a store of one file.
    pub(crate) fn header(&self) -> &[u8] {
        let first = self.entries.values().map(|entry| entry.range.start).min();
        self.files.first().map_or(&[], |file| &file[..first.unwrap_or(file.len())])
    }

    /// Fails (65) when somebody has written to a file since it was opened: what was read of it then belongs to no one state of it.
    pub fn check_unchanged(&self) -> Result<()> {
        match self.files.iter().find(|file| !file.is_unchanged()) {
            None => Ok(()),
            Some(file) => {
                let place = crate::mmap::shown(file.path());
                Err(Error::data(format!("{place}: changed while it was read"))
                    .with_hint("the same command again"))
            }
        }
    }

    /// Returns what the system said of each file when it was opened.
    pub fn stamps(&self) -> impl Iterator<Item = FileStamp> {
        self.files.iter().map(|file| file.stamp())
    }

    /// Returns the file that holds `name`, for messages.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        self.entries.get(name).map(|e| self.files[e.file].path())
    }

    /// Returns the file that holds `name`, or else the store's own place, for the beginning of a message.
    pub fn place_of(&self, name: &str) -> String {
        self.file_of(name).map_or_else(|| self.place.clone(), crate::mmap::shown)
    }
}

impl<'a> TensorView<'a> {
    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns whether the tensor has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the elements as f32 (exact for f32, f16 and bf16). Other dtypes: error 65 that names the tensor.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.len()];
        self.read_f32(0, &mut out)?;
        Ok(out)
    }

    /// Writes the elements from `start` on into `out` as f32. Panics when they are fewer than `out` wants.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
        let size = float_size(self.dtype).ok_or_else(|| {
            Error::data(format!(
                "tensor \"{}\": dtype {} where a float (F32, F16, BF16) is needed",
                escape(self.name),
                self.dtype
            ))
        })?;
        let bytes = &self.data[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            Dtype::BF16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = bf16::from_le_bytes(*b).to_f32();
                }
            }
            _ => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = f16::from_le_bytes(*b).to_f32();
                }
            }
        }
        Ok(())
    }

    /// Returns an error (65) that names the tensor unless its shape is `expected`.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        let name = escape(self.name);
        Err(Error::data(format!("tensor \"{name}\": shape {:?}, expected {expected:?}", self.shape)))
    }
}

/// Returns the bytes per element of a float dtype that the tools compute with.
pub fn float_size(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

/// Rounds f32 values to `dtype` (nearest, ties to even) and appends their little-endian bytes.
/// F32, F16 and BF16 only; any other dtype is an internal error.
pub fn push_floats(dtype: Dtype, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    match dtype {
        Dtype::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        Dtype::BF16 => out.extend(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes())),
        Dtype::F16 => out.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes())),
        other => return Err(Error::internal(format!("cannot write floats as {other}"))),
    }
    Ok(())
}

/// Returns an error (65) with tensor name and flat index at the first NaN or infinity. `start` is the index of
/// the first value in its tensor.
pub fn check_finite(name: &str, start: usize, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(non_finite(name, start + i, values[i])),
    }
}

/// As [`check_finite`], for stored values of `view` from the index `start` on; of other dtypes than the floats' nothing is said.
pub fn check_finite_bytes(view: &TensorView, start: usize, bytes: &[u8]) -> Result<()> {
    // All bits of an exponent are set in infinities and NaN, and nowhere else.
    let any = |exponent: u16| {
        let set = |b: &[u8; 2]| u16::from_le_bytes(*b) & exponent == exponent;
        bytes.as_chunks::<2>().0.iter().fold(false, |any, b| any | set(b))
    };
    let found = match view.dtype {
        Dtype::BF16 => any(0x7f80),
        Dtype::F16 => any(0x7c00),
        Dtype::F32 => {
            let set = |b: &[u8; 4]| u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000;
            bytes.as_chunks::<4>().0.iter().fold(false, |any, b| any | set(b))
        }
        _ => false,
    };
    if !found {
        return Ok(());
    }
    let mut values = vec![0.0; bytes.len() / view.dtype.bitsize().div_ceil(8).max(1)];
    view.read_f32(start, &mut values)?;
    check_finite(view.name, start, &values)
}

/// Returns the error (65) for a tensor whose element `index` is not finite.
pub fn non_finite(name: &str, index: usize, value: f32) -> Error {
    let what = if value.is_nan() { "NaN" } else { "infinity" };
    Error::data(format!("tensor \"{}\": {what} at index {index}", escape(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_values_that_are_not_finite_are_named() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for (bad, what) in
                [(f32::NAN, "NaN"), (f32::INFINITY, "infinity"), (f32::NEG_INFINITY, "infinity")]
            {
                let mut data = Vec::new();
                push_floats(dtype, &[1.0, 0.0, -65504.0, bad, 2.0, 0.5], &mut data).unwrap();
                let view = TensorView { name: "x", dtype, shape: &[6], data: &data };
                let size = data.len() / 6;
                assert!(check_finite_bytes(&view, 0, &data[..3 * size]).is_ok());
                let error = check_finite_bytes(&view, 2, &data[2 * size..]).unwrap_err();
                assert_eq!(error.to_string(), format!("tensor \"x\": {what} at index 3"));
            }
        }
        let view = TensorView { name: "x", dtype: Dtype::U8, shape: &[4], data: &[0xff; 4] };
        assert!(check_finite_bytes(&view, 0, view.data).is_ok());
    }

    #[test]
    fn floats_round_trip_and_other_dtypes_are_named() {
        let values = [0.0f32, -0.0, 1.0, -2.5, 65504.0, 0.099_975_586];
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let mut data = Vec::new();
            push_floats(dtype, &values, &mut data).unwrap();
            let view = TensorView { name: "x", dtype, shape: &[2, 3], data: &data };
            let back = view.to_f32().unwrap();
            for (a, b) in values.iter().zip(&back) {
                assert!((a - b).abs() <= a.abs() / 256.0, "{dtype}: {a} {b}");
            }
            let mut middle = [0.0; 2];
            view.read_f32(3, &mut middle).unwrap();
            assert_eq!(middle, back[3..5]);
        }
        let view = TensorView { name: "ids", dtype: Dtype::I64, shape: &[1], data: &[0; 8] };
        assert_eq!(
            view.to_f32().unwrap_err().to_string(),
            "tensor \"ids\": dtype I64 where a float (F32, F16, BF16) is needed"
        );
    }

    #[test]
    fn a_file_that_is_written_to_meanwhile_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let specs = vec![crate::safetensors_out::TensorSpec::new("x", Dtype::U8, [3])];
        let mut writer =
            crate::safetensors_out::SafetensorsWriter::new(&path, specs, &BTreeMap::new()).unwrap();
        writer.write("x", b"abc").unwrap();
        writer.finish().unwrap();
        let store = TensorStore::open_file(&path).unwrap();
        store.check_unchanged().unwrap();
        // Another name, a copy in its place: the map has the bytes that it had.
        let moved = dir.path().join("y");
        std::fs::rename(&path, &moved).unwrap();
        store.check_unchanged().unwrap();
        std::fs::copy(&moved, &path).unwrap();
        store.check_unchanged().unwrap();
        std::fs::rename(&moved, &path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, bytes).unwrap();
        let error = store.check_unchanged().unwrap_err().to_string();
        assert!(error.ends_with("x.safetensors: changed while it was read"), "{error}");
    }

    #[test]
    fn first_non_finite_is_named() {
        assert!(check_finite("w", 0, &[1.0, f32::MAX]).is_ok());
        let e = check_finite("w", 10, &[1.0, f32::NAN, f32::INFINITY]).unwrap_err();
        assert_eq!(e.to_string(), "tensor \"w\": NaN at index 11");
    }
}
