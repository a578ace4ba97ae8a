//! The beginning of a GGUF file: what llama.cpp reads before the weights; written here, read in `gguf/read.rs`.
//!
//! Called by kto-weights, which decides keys and tensors and writes the data behind. Layout (version 3, little-endian): magic `GGUF`,
//! version, counts of tensors and keys; keys with typed values; for each tensor name, dimensions (innermost first), type and offset of its
//! data from the first multiple of [`ALIGNMENT`] behind this.

mod kinds;
mod read;

pub use kinds::{GgufKind, kind};
pub use read::{GgufEntry, GgufReader, is_gguf};

/// What to do with a GGUF file where a model directory is wanted.
pub const HINT: &str = "kto-quantize FILE.gguf --dequantize -o DIR makes a model directory of it";

/// What every tensor's data begins at a multiple of.
pub const ALIGNMENT: u64 = 32;

/// A value of a key. Read, whole numbers of every width are 32-bit ones, and truths in arrays are 0 and 1.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// A 32-bit count.
    U32(u32),
    /// A 32-bit float.
    F32(f32),
    /// Yes or no.
    Bool(bool),
    /// Text.
    String(String),
    /// Texts.
    Strings(Vec<String>),
    /// Floats.
    Floats(Vec<f32>),
    /// Signed numbers.
    Ints(Vec<i32>),
}

/// A tensor as the header announces it.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// Its name.
    pub name: String,
    /// Dimensions, outermost first as everywhere here.
    pub shape: Vec<usize>,
    /// ggml's number of the type.
    pub kind: u32,
    /// Bytes of its data.
    pub bytes: u64,
}

/// The header, and where each tensor's data begins in the file.
pub struct GgufHeader {
    /// The bytes before the data, padded.
    pub bytes: Vec<u8>,
    /// One for each tensor.
    pub offsets: Vec<u64>,
    /// Bytes of the whole file.
    pub size: u64,
}

/// Lays out a file.
pub fn header(keys: &[(String, GgufValue)], tensors: &[GgufTensor]) -> GgufHeader {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        string(&mut out, key);
        put(&mut out, value);
    }
    let mut at = 0u64;
    let mut offsets = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        string(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for d in tensor.shape.iter().rev() {
            out.extend((*d as u64).to_le_bytes());
        }
        out.extend(tensor.kind.to_le_bytes());
        out.extend(at.to_le_bytes());
        offsets.push(at);
        at = (at + tensor.bytes).next_multiple_of(ALIGNMENT);
    }
    let start = (out.len() as u64).next_multiple_of(ALIGNMENT);
    out.resize(start as usize, 0);
    offsets.iter_mut().for_each(|offset| *offset += start);
    GgufHeader { bytes: out, offsets, size: start + at }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Writes the number of the type, then the value.
fn put(out: &mut Vec<u8>, value: &GgufValue) {
    let array = |out: &mut Vec<u8>, kind: u32, n: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((n as u64).to_le_bytes());
    };
    match value {
        GgufValue::U32(v) => {
            out.extend(4u32.to_le_bytes());
            out.extend(v.to_le_bytes());
        }
        GgufValue::F32(v) => {
            out.extend(6u32.to_le_bytes());
            out.extend(v.to_le_bytes());
        }
        GgufValue::Bool(v) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*v));
        }
        GgufValue::String(text) => {
            out.extend(8u32.to_le_bytes());
            string(out, text);
        }
        GgufValue::Strings(all) => {
            array(out, 8, all.len());
            all.iter().for_each(|text| string(out, text));
        }
        GgufValue::Floats(all) => {
            array(out, 6, all.len());
            all.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        GgufValue::Ints(all) => {
            array(out, 5, all.len());
            all.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_header_is_laid_out_as_documented() {
        let keys =
            vec![("a".to_string(), GgufValue::U32(7)), ("b".into(), GgufValue::Strings(vec!["x".into()]))];
        let tensor = |name: &str, shape: &[usize], bytes| GgufTensor {
            name: name.into(),
            shape: shape.to_vec(),
            kind: 2,
            bytes,
        };
        let made = header(&keys, &[tensor("t", &[2, 32], 36), tensor("u", &[32], 18)]);
        let mut expected = b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0".to_vec();
        expected.extend(b"\x01\0\0\0\0\0\0\0a\x04\0\0\0\x07\0\0\0");
        expected.extend(b"\x01\0\0\0\0\0\0\0b\x09\0\0\0\x08\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0x");
        expected.extend(
            b"\x01\0\0\0\0\0\0\0t\x02\0\0\0\x20\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0",
        );
        expected.extend(b"\x01\0\0\0\0\0\0\0u\x01\0\0\0\x20\0\0\0\0\0\0\0\x02\0\0\0\x40\0\0\0\0\0\0\0");
        assert_eq!(made.bytes[..expected.len()], expected);
        assert!(made.bytes.len().is_multiple_of(32) && made.bytes[expected.len()..].iter().all(|b| *b == 0));
        let start = made.bytes.len() as u64;
        assert_eq!((made.offsets, made.size), (vec![start, start + 64], start + 64 + 32));
    }
}
