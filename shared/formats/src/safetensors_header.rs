//! The header of a safetensors file, read strictly.
//!
//! The `safetensors` crate checks the arithmetic (shapes, offsets without holes or overlap); this module adds what
//! it lets pass or reports without a name: duplicate tensor names, unknown dtypes by tensor, bytes after the last
//! tensor, and files that are something else under a `.safetensors` name. Called by [`crate::tensors`].

use crate::gguf;
use kto_cli::{Error, Result, escape};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor},
};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
};

/// Longest header that is read, in bytes (the format's own limit).
const MAX_HEADER: u64 = 100_000_000;

/// A checked header: every range lies inside the file.
pub(crate) struct Header {
    /// `__metadata__`, empty when absent.
    pub metadata: BTreeMap<String, String>,
    /// Name, dtype, shape, and byte range from the start of the file.
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Reads the header of the file `bytes`. Errors (65) carry no path; the caller adds it.
pub(crate) fn read(bytes: &[u8]) -> Result<Header> {
    refuse_other_formats(bytes)?;
    let (text, start) = header_text(bytes)?;
    let raw: RawHeader = serde_json::from_str(text)
        .map_err(|e| Error::data(format!("bad safetensors header: {}", escape(&e.to_string()))))?;
    let mut tensors = BTreeMap::new();
    for (name, info) in raw.tensors {
        let dtype: Dtype =
            serde_json::from_value(serde_json::Value::String(info.dtype.clone())).map_err(|_| {
                Error::data(format!(
                    "tensor \"{}\": unknown dtype \"{}\"",
                    escape(&name),
                    escape(&info.dtype)
                ))
            })?;
        tensors.insert(name, TensorInfo { dtype, shape: info.shape, data_offsets: info.data_offsets });
    }
    check_ranges(&tensors, (bytes.len() - start) as u64)?;
    for info in tensors.values_mut() {
        info.data_offsets = (info.data_offsets.0 + start, info.data_offsets.1 + start);
    }
    Ok(Header { metadata: raw.metadata, tensors })
}

/// Returns the header's JSON text and the offset of the first data byte.
fn header_text(bytes: &[u8]) -> Result<(&str, usize)> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(Error::data(format!("not a safetensors file: only {} bytes", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(Error::data(format!(
            "not a safetensors file: header of {length} bytes, at most {MAX_HEADER}"
        )));
    }
    let Some(header) = rest.get(..length as usize) else {
        return Err(Error::data(format!("cut short: header of {length} bytes in a file of {}", bytes.len())));
    };
    let text = std::str::from_utf8(header).map_err(|e| {
        Error::data(format!("bad safetensors header: not UTF-8 at byte {}", 8 + e.valid_up_to()))
    })?;
    if !text.starts_with('{') {
        return Err(Error::data("not a safetensors file: the header does not begin with \"{\""));
    }
    Ok((text, 8 + length as usize))
}

/// Sizes, holes and overlap by the crate; then that the tensors end where the file ends.
fn check_ranges(tensors: &BTreeMap<String, TensorInfo>, data: u64) -> Result<()> {
    let mut sorted: Vec<(String, TensorInfo)> = tensors.iter().map(|(n, t)| (n.clone(), t.clone())).collect();
    sorted.sort_by_key(|(_, info)| info.data_offsets);
    for (name, info) in &sorted {
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, &d| n.checked_mul(d));
        let (begin, end) = info.data_offsets;
        let found = end.checked_sub(begin);
        if found.is_none() || bits.is_none_or(|b| found.map(|f| f as u128 * 8) != Some(b as u128)) {
            return Err(Error::data(format!(
                "tensor \"{}\": shape {:?} of {} does not fit the bytes {begin}..{end}",
                escape(name),
                info.shape,
                info.dtype
            )));
        }
        if end as u64 > data {
            return Err(Error::data(format!(
                "cut short: tensor \"{}\" ends at data byte {end}, the file has {data}",
                escape(name)
            )));
        }
    }
    let end = Metadata::new(None, sorted)
        .map_err(|e| Error::data(format!("bad safetensors header: {}", escape(&e.to_string()))))?
        .data_len() as u64;
    if end != data {
        return Err(Error::data(format!("{} bytes after the last tensor", data - end)));
    }
    Ok(())
}

/// Names files that are renamed pickles, GGUF files or git-LFS pointers.
pub(crate) fn refuse_other_formats(bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(Error::data("a git-lfs pointer, not the file itself").with_hint("git lfs pull"));
    }
    if bytes.starts_with(b"GGUF") {
        return Err(Error::data("a GGUF file; only safetensors weights are read").with_hint(gguf::HINT));
    }
    if bytes.starts_with(b"PK\x03\x04")
        || matches!(bytes, [0x80, 2..=5, b'}' | b'c' | b'(' | b'\x8a' | b'\x95', ..])
    {
        return Err(Error::data(
            "a PyTorch pickle, which can run code when loaded; only safetensors weights are read",
        ));
    }
    Ok(())
}

#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// The header object with every name exactly once.
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, RawInfo>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { metadata: BTreeMap::new(), tensors: BTreeMap::new() };
                let mut seen_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut seen_metadata, true) {
                            return Err(de::Error::custom("\"__metadata__\" twice"));
                        }
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                        continue;
                    }
                    match header.tensors.entry(name) {
                        Entry::Occupied(e) => {
                            return Err(de::Error::custom(format_args!("tensor \"{}\" twice", e.key())));
                        }
                        Entry::Vacant(e) => {
                            e.insert(map.next_value()?);
                        }
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn refused(bytes: &[u8]) -> String {
        let error = read(bytes).err().expect("must be refused");
        assert_eq!(error.kind(), kto_cli::Kind::Data);
        error.to_string()
    }

    const GOOD: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    #[test]
    fn a_good_header_gives_ranges_in_the_file() {
        let header = read(&file(&format!("{GOOD}  "), 8)).unwrap();
        assert_eq!(header.tensors["a"].data_offsets, (GOOD.len() + 10, GOOD.len() + 18));
        assert!(read(&file(r#"{"__metadata__":null}"#, 0)).unwrap().tensors.is_empty());
        assert_eq!(read(&file(r#"{"__metadata__":{"format":"pt"}}"#, 0)).unwrap().metadata["format"], "pt");
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = file(GOOD, 8);
        for length in 0..bytes.len() {
            refused(&bytes[..length]);
        }
    }

    #[test]
    fn lengths_that_lie() {
        for n in [u64::MAX, MAX_HEADER + 1, 55, 1 << 40] {
            let mut bytes = file(GOOD, 8);
            bytes[..8].copy_from_slice(&n.to_le_bytes());
            refused(&bytes);
        }
        assert!(refused(&file(GOOD, 9)).contains("1 bytes after the last tensor"));
    }

    #[test]
    fn headers_that_are_wrong() {
        let t = |s: &str| format!(r#"{{"a":{s}}}"#);
        for (header, data, says) in [
            ("[]".to_string(), 0, "begin with"),
            ("{".to_string(), 0, "bad safetensors header"),
            (r#"{"a":1}"#.to_string(), 0, "bad safetensors header"),
            (r#"{"__metadata__":{"x":1}}"#.to_string(), 0, "bad safetensors header"),
            (
                t(r#"{"dtype":"F33","shape":[2],"data_offsets":[0,8]}"#),
                8,
                "tensor \"a\": unknown dtype \"F33\"",
            ),
            (t(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), 8, "does not fit"),
            (t(r#"{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}"#), 8, "bad safetensors header"),
            (t(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#), 8, "does not fit"),
            (
                t(r#"{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}"#),
                8,
                "does not fit",
            ),
            (t(r#"{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#), 12, "invalid offset"),
            (format!("{},{}", &GOOD[..GOOD.len() - 1], &GOOD[1..]), 8, "tensor \"a\" twice"),
            (
                format!("{},{}", &GOOD[..GOOD.len() - 1], GOOD[1..].replace("\"a\"", "\"b\"")),
                8,
                "invalid offset",
            ),
            (format!("{}{}", "{\"a\":".repeat(500), "}".repeat(500)), 0, "bad safetensors header"),
        ] {
            let message = refused(&file(&header, data));
            assert!(message.contains(says), "{header}: {message}");
        }
    }

    #[test]
    fn other_formats_are_named() {
        assert!(refused(b"version https://git-lfs.github.com/spec/v1\n").contains("git-lfs"));
        assert!(refused(b"GGUF\x03\0\0\0\0\0\0\0").contains("GGUF"));
        assert!(refused(b"PK\x03\x04aaaaaaaa").contains("pickle"));
        assert!(refused(b"\x80\x02}q\x01aaaaaaa").contains("pickle"));
    }

    #[test]
    fn control_characters_of_names_are_escaped() {
        let header = r#"{"a\u001b[31m":{"dtype":"F99","shape":[],"data_offsets":[0,0]}}"#;
        assert!(!refused(&file(header, 0)).contains('\u{1b}'));
    }
}
