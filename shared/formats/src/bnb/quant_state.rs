//! The small JSON object that bitsandbytes stores as a tensor beside every 4-bit weight.

use crate::python_json;
use kto_cli::{Error, Result, escape};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

/// Values that share one scale when nothing else is asked for.
pub const BLOCK: usize = 64;
/// Scales that share one scale in the files written here.
pub const NESTED_BLOCK: usize = 256;
/// Longest object that is read, in bytes.
const MAX_TEXT: usize = 64 << 10;

/// Which 16 values the codes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitKind {
    /// NormalFloat.
    Nf4,
    /// A float of four bits.
    Fp4,
}

impl FourBitKind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// Returns the name in files and settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// Returns what follows a weight's name in the name of its quant_state.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Nf4 => ".quant_state.bitsandbytes__nf4",
            Self::Fp4 => ".quant_state.bitsandbytes__fp4",
        }
    }
}

/// What `….quant_state.bitsandbytes__nf4` says.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantState {
    /// Which values.
    pub kind: FourBitKind,
    /// Dtype that values are rounded to when decoded.
    pub dtype: Dtype,
    /// Shape of the decoded weight.
    pub shape: Vec<usize>,
    /// Values per scale.
    pub block: usize,
    /// For double quantization: values per scale of the scales, and their mean.
    pub nested: Option<(usize, f32)>,
}

impl QuantState {
    /// Returns the state of a weight quantized in blocks of 64, with double quantization if there is an offset.
    pub fn nf4(dtype: Dtype, shape: &[usize], nested_offset: Option<f32>) -> Self {
        let nested = nested_offset.map(|offset| (NESTED_BLOCK, offset));
        Self { kind: FourBitKind::Nf4, dtype, shape: shape.to_vec(), block: BLOCK, nested }
    }

    /// Returns the most bytes that [`QuantState::to_json`] has, whatever the offset.
    pub fn longest(&self) -> usize {
        // An f32 that is printed as an f64 has at most 17 digits, a point, two signs and an exponent of four characters.
        self.to_json().len() + if self.nested.is_some() { 24 } else { 0 }
    }

    /// Returns the number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the JSON text in bitsandbytes' order and spelling.
    pub fn to_json(&self) -> String {
        let mut object = Map::new();
        let mut put = |key: &str, value: Value| drop(object.insert(key.into(), value));
        put("quant_type", json!(self.kind.name()));
        put("blocksize", json!(self.block));
        put("dtype", json!(torch_name(self.dtype)));
        put("shape", json!(self.shape));
        if let Some((block, offset)) = self.nested {
            put("nested_blocksize", json!(block));
            put("nested_dtype", json!("float32"));
            put("nested_offset", json!(f64::from(offset)));
        }
        python_json::one_line(&Value::Object(object))
    }

    /// Reads the JSON text. Errors (65) name the entry.
    pub fn parse(text: &[u8]) -> Result<Self> {
        if text.len() > MAX_TEXT {
            return Err(Error::data(format!("quant_state of {} bytes", text.len())));
        }
        let object: Map<String, Value> = serde_json::from_slice(text)
            .map_err(|e| Error::data(format!("quant_state is not JSON: {}", escape(&e.to_string()))))?;
        let get =
            |key: &str| object.get(key).ok_or_else(|| Error::data(format!("quant_state without \"{key}\"")));
        let bad = |key: &str| {
            Error::data(format!("quant_state: bad \"{key}\": {}", escape(&object[key].to_string())))
        };
        let kind =
            get("quant_type")?.as_str().and_then(|t| FourBitKind::ALL.into_iter().find(|k| k.name() == t));
        let kind = kind.ok_or_else(|| bad("quant_type"))?;
        let size = |key: &str| -> Result<usize> {
            let value = get(key)?.as_u64().filter(|v| (2..=1 << 20).contains(v) && v.is_power_of_two());
            value.map(|v| v as usize).ok_or_else(|| bad(key))
        };
        let dtype = get("dtype")?.as_str().and_then(from_torch_name).ok_or_else(|| bad("dtype"))?;
        let shape: Option<Vec<usize>> =
            get("shape")?.as_array().and_then(|a| a.iter().map(|d| Some(d.as_u64()? as usize)).collect());
        let shape = shape.ok_or_else(|| bad("shape"))?;
        if shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).is_none_or(|n| n > isize::MAX as usize / 4)
        {
            return Err(bad("shape"));
        }
        let nested = match object.get("nested_offset") {
            None => None,
            Some(offset) => {
                let offset = offset.as_f64().map(|v| v as f32).filter(|v| v.is_finite());
                Some((size("nested_blocksize")?, offset.ok_or_else(|| bad("nested_offset"))?))
            }
        };
        Ok(Self { kind, dtype, shape, block: size("blocksize")?, nested })
    }
}

/// Returns torch's name of a float dtype.
pub fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}

fn from_torch_name(name: &str) -> Option<Dtype> {
    match name {
        "bfloat16" => Some(Dtype::BF16),
        "float16" => Some(Dtype::F16),
        "float32" => Some(Dtype::F32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 128], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1308441162109375}"#;

    #[test]
    fn text_is_that_of_bitsandbytes() {
        let state = QuantState::nf4(Dtype::BF16, &[96, 128], Some(0.130_844_12));
        assert_eq!(state.to_json(), GOLDEN);
        assert_eq!(QuantState::parse(GOLDEN.as_bytes()).unwrap(), state);
        let plain = QuantState::nf4(Dtype::F32, &[2, 3], None);
        assert_eq!(QuantState::parse(plain.to_json().as_bytes()).unwrap(), plain);
    }

    #[test]
    fn bad_entries_are_named() {
        for (from, to, says) in [
            ("\"nf4\"", "\"af4\"", "quant_type"),
            ("64", "0", "blocksize"),
            ("64", "63", "blocksize"),
            ("\"bfloat16\"", "\"int8\"", "dtype"),
            ("[96, 128]", "[96, -1]", "shape"),
            ("[96, 128]", "[4294967296, 4294967296]", "shape"),
            ("0.1308441162109375", "1e300", "nested_offset"),
            ("0.1308441162109375", "null", "nested_offset"),
            ("\"nested_blocksize\"", "\"x\"", "nested_blocksize"),
            ("}", "", "not JSON"),
        ] {
            let error = QuantState::parse(GOLDEN.replacen(from, to, 1).as_bytes()).unwrap_err().to_string();
            assert!(error.contains(says), "{to}: {error}");
        }
    }
}
