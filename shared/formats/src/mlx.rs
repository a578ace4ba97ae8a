//! Weights in the quantizations of MLX: affine, where groups of a row share a scale and a bias, and small floats with a scale.
//!
//! Read by the loaders of every tool, written by kto-quantize and kto-merge. For a layer `X` the file holds `X.weight` (codes packed into 32-bit words),
//! `X.scales` and `X.biases`; a layer's own bias stays `X.bias`. Whether a weight is quantized is decided by the presence of its
//! scales; bits and group size come from config.json's `quantization`, which may override them for single layers.
//! Formula: value = code · scale + bias, each step rounded to the dtype of the scales. Codes are a stream of `bits` each,
//! least significant first, from the beginning of a row.
//! The float modes (mxfp4, nvfp4, mxfp8) have no biases, and scales in 8 bits; they are read, not written.
//! Deliberately absent: the search for codes.

use crate::{
    json::short,
    model_dir::ModelDir,
    safetensors_out::TensorSpec,
    tensors::{TensorStore, TensorView, float_size},
};
use kto_cli::{Context, Error, Result, escape};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// What config.json calls a quantization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Codes times scale plus bias.
    Affine,
    /// Floats of 4 bits, powers of two as scales.
    Mxfp4,
    /// Floats of 4 bits, floats of 8 bits as scales.
    Nvfp4,
    /// Floats of 8 bits, powers of two as scales.
    Mxfp8,
}

/// A weight of small floats, still packed.
pub struct MicroTensor<'a> {
    /// 32-bit words, (rows, columns · bits / 32).
    pub packed: TensorView<'a>,
    /// Bytes, (rows, columns / group).
    pub scales: TensorView<'a>,
    /// Not affine.
    pub mode: Mode,
    /// Shape of the decoded weight.
    pub shape: [usize; 2],
}

impl<'a> MicroTensor<'a> {
    /// Returns the weight `name` if MLX made small floats of it, `None` if not. Errors (65) say what does not fit.
    pub fn find(directory: &'a ModelDir, name: &str) -> Result<Option<Self>> {
        let Some(layer) = name.strip_suffix(".weight") else { return Ok(None) };
        let store = &directory.tensors;
        let Some(scales) = store.get(&format!("{layer}.scales")) else { return Ok(None) };
        let (mode, bits, group) = settings(&directory.config, layer)?;
        if mode == Mode::Affine {
            return Ok(None);
        }
        let read = || Self::checked(store.require(name)?, scales, (mode, bits, group));
        read().at(format_args!("tensor \"{}\"", escape(name))).map(Some)
    }

    fn checked(
        packed: TensorView<'a>,
        scales: TensorView<'a>,
        (mode, bits, group): (Mode, usize, usize),
    ) -> Result<Self> {
        let text = || format!("shape {:?}, scales {:?}", packed.shape, scales.shape);
        let (&[rows, words], &[lines, groups]) = (packed.shape, scales.shape) else {
            return Err(Error::data(text()));
        };
        if packed.dtype != Dtype::U32 || scales.dtype != Dtype::U8 {
            let text = format!("dtype {} and {} scales, expected U32 and U8", packed.dtype, scales.dtype);
            return Err(Error::data(text));
        }
        let columns = groups.checked_mul(group).filter(|c| c.checked_mul(bits) == words.checked_mul(32));
        match columns.filter(|_| lines == rows) {
            Some(columns) => Ok(Self { packed, scales, mode, shape: [rows, columns] }),
            None => {
                let text = text();
                Err(Error::data(format!("{text} do not fit {bits} bits in groups of {group}")))
            }
        }
    }
}

/// A weight in affine quantization, still packed.
pub struct AffineTensor<'a> {
    /// 32-bit words, (rows, columns · bits / 32).
    pub packed: TensorView<'a>,
    /// Floats, (rows, columns / group).
    pub scales: TensorView<'a>,
    /// As the scales.
    pub biases: TensorView<'a>,
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: usize,
    /// Values that share a scale and a bias: 32, 64 or 128.
    pub group: usize,
    /// Shape of the decoded weight.
    pub shape: [usize; 2],
}

impl<'a> AffineTensor<'a> {
    /// Returns the weight `name` if it is in affine quantization, `None` if it is not. Errors (65) say what does not fit.
    pub fn find(directory: &'a ModelDir, name: &str) -> Result<Option<Self>> {
        let Some(layer) = name.strip_suffix(".weight") else { return Ok(None) };
        let Some(scales) = directory.tensors.get(&format!("{layer}.scales")) else { return Ok(None) };
        let (mode, bits, group) = settings(&directory.config, layer)?;
        if mode != Mode::Affine {
            return Ok(None);
        }
        let read = || {
            let store = &directory.tensors;
            let (packed, biases) = (store.require(name)?, store.require(&format!("{layer}.biases"))?);
            Self::checked(packed, scales, biases, bits, group)
        };
        read().at(format_args!("tensor \"{}\"", escape(name))).map(Some)
    }

    fn checked(
        packed: TensorView<'a>,
        scales: TensorView<'a>,
        biases: TensorView<'a>,
        bits: usize,
        group: usize,
    ) -> Result<Self> {
        let (&[rows, words], &[_, groups]) = (packed.shape, scales.shape) else {
            return Err(Error::data(format!("shape {:?}, scales {:?}", packed.shape, scales.shape)));
        };
        if packed.dtype != Dtype::U32 {
            return Err(Error::data(format!("dtype {}, expected U32", packed.dtype)));
        }
        if float_size(scales.dtype).is_none() || biases.dtype != scales.dtype {
            return Err(Error::data(format!("{} scales and {} biases", scales.dtype, biases.dtype)));
        }
        let columns = groups.checked_mul(group).filter(|c| c.checked_mul(bits) == words.checked_mul(32));
        let Some(columns) = columns.filter(|_| scales.shape[0] == rows && biases.shape == scales.shape)
        else {
            let text =
                format!("shape {:?}, scales {:?}, biases {:?}", packed.shape, scales.shape, biases.shape);
            return Err(Error::data(format!("{text} do not fit {bits} bits in groups of {group}")));
        };
        Ok(Self { packed, scales, biases, bits, group, shape: [rows, columns] })
    }
}

/// Returns the weight that a tensor is a part of, if it is a part of a quantized weight of MLX.
pub fn part_of(store: &TensorStore, name: &str) -> Option<String> {
    let layer = [".scales", ".biases"].iter().find_map(|part| name.strip_suffix(part))?;
    (store.contains(&format!("{layer}.scales")) && store.contains(&format!("{layer}.weight")))
        .then(|| format!("{layer}.weight"))
}

/// Describes the tensors that the weight `name` of shape (rows, columns) becomes: codes, scales, biases. `dtype` is that of the scales.
pub fn specs(name: &str, shape: [usize; 2], bits: usize, group: usize, dtype: Dtype) -> [TensorSpec; 3] {
    let layer = name.strip_suffix(".weight").unwrap_or(name);
    let [rows, columns] = shape;
    let lines = |part: &str| TensorSpec::new(format!("{layer}.{part}"), dtype, [rows, columns / group]);
    [TensorSpec::new(name, Dtype::U32, [rows, columns * bits / 32]), lines("scales"), lines("biases")]
}

/// Bits and group size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Bits of a code.
    pub bits: usize,
    /// Values that share a scale.
    pub group: usize,
}

impl Setting {
    fn value(self) -> Value {
        json!({"group_size": self.group, "bits": self.bits, "mode": "affine"})
    }
}

/// Returns config.json's `quantization` as mlx-lm writes it: the setting of most layers, and by layer what differs (`None`: as it was).
pub fn quantization(common: Setting, layers: &BTreeMap<String, Option<Setting>>) -> Value {
    let mut value = common.value();
    for (layer, setting) in layers.iter().filter(|(_, s)| **s != Some(common)) {
        value[layer] = setting.map_or(Value::Bool(false), Setting::value);
    }
    value
}

/// Returns whether a mixture of mlx-lm gives a module the higher number of bits: values and down projections of the first and last eighth of
/// the blocks and of every third between, and the head. For modules outside the blocks `block` is 0.
pub fn takes_more_bits(module: &str, block: usize, blocks: usize) -> bool {
    let eighth = blocks / 8;
    let chosen = block < eighth || block >= 7 * blocks / 8 || (block - eighth) % 3 == 2;
    module.contains("lm_head") || chosen && (module.contains("v_proj") || module.contains("down_proj"))
}

/// Returns mode, bits and group size of a layer.
fn settings(config: &Value, layer: &str) -> Result<(Mode, usize, usize)> {
    let all = ["quantization", "quantization_config"].iter().find_map(|key| config.get(key)?.as_object());
    let Some(all) = all else {
        return Err(Error::data(format!(
            "config.json: no \"quantization\", but \"{}.scales\"",
            escape(layer)
        )));
    };
    let own = all.get(layer).and_then(Value::as_object).unwrap_or(all);
    let bad = |key: &str| {
        let value = short(own.get(key).unwrap_or(&Value::Null));
        Error::data(format!(
            "config.json: quantization of \"{}\": {key} {value} is not supported",
            escape(layer)
        ))
    };
    let (mode, bits, groups): (_, &[u64], &[u64]) = match own.get("mode").map(Value::as_str) {
        None | Some(Some("affine")) => (Mode::Affine, &[4, 2, 3, 5, 6, 8], &[64, 32, 128]),
        Some(Some("mxfp4")) => (Mode::Mxfp4, &[4], &[32]),
        Some(Some("nvfp4")) => (Mode::Nvfp4, &[4], &[16]),
        Some(Some("mxfp8")) => (Mode::Mxfp8, &[8], &[32]),
        Some(_) => {
            return Err(bad("mode").with_hint("quantize to mode affine, or use the unquantized model"));
        }
    };
    // The first of the allowed values is the mode's default.
    let size = |key: &str, allowed: &[u64]| {
        let value = own.get(key).map_or(allowed.first().copied(), Value::as_u64);
        value.filter(|v| allowed.contains(v)).map(|v| v as usize).ok_or_else(|| bad(key))
    };
    Ok((mode, size("bits", bits)?, size("group_size", groups)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_may_have_its_own_settings() {
        let config = json!({"quantization": {"group_size": 32, "bits": 3, "mode": "affine",
            "model.layers.0.mlp.down_proj": {"group_size": 128, "bits": 6}, "lm_head": {"bits": 8}, "x": false,
            "fp": {"mode": "mxfp4", "bits": 4, "group_size": 32}, "seven": {"bits": 7}, "eight": {"mode": "mxfp8"},
            "sixteen": {"mode": "nvfp4", "group_size": 16}, "odd": {"mode": "nvfp4", "group_size": 32}, "x4": {"mode": "fp4"}}});
        let of = |layer: &str| settings(&config, layer);
        assert_eq!(of("model.layers.0.mlp.up_proj").unwrap(), (Mode::Affine, 3, 32));
        assert_eq!(of("model.layers.0.mlp.down_proj").unwrap(), (Mode::Affine, 6, 128));
        assert_eq!(of("lm_head").unwrap(), (Mode::Affine, 8, 64));
        assert_eq!(of("x").unwrap(), (Mode::Affine, 3, 32));
        assert_eq!(of("fp").unwrap(), (Mode::Mxfp4, 4, 32));
        assert_eq!(of("eight").unwrap(), (Mode::Mxfp8, 8, 32));
        assert_eq!(of("sixteen").unwrap(), (Mode::Nvfp4, 4, 16));
        assert!(of("odd").unwrap_err().to_string().contains("group_size 32 is not supported"));
        let error = of("x4").unwrap_err().to_string();
        assert!(error.starts_with("config.json: quantization of \"x4\": mode \"fp4\" is not supported"));
        assert!(of("seven").unwrap_err().to_string().contains("bits 7 is not"));
        let error = settings(&json!({}), "x").unwrap_err().to_string();
        assert_eq!(error, "config.json: no \"quantization\", but \"x.scales\"");
        let other = json!({"quantization_config": {"bits": 2, "group_size": 64}});
        assert_eq!(settings(&other, "x").unwrap(), (Mode::Affine, 2, 64));
    }

    #[test]
    fn shapes_must_fit_the_settings() {
        let view = |name, dtype, shape| TensorView { name, dtype, shape, data: &[] };
        let found = |words: &'static [usize], scales: &'static [usize], biases: &'static [usize]| {
            let (s, b) = (view("s", Dtype::F16, scales), view("b", Dtype::F16, biases));
            AffineTensor::checked(view("w", Dtype::U32, words), s, b, 3, 64).map(|t| t.shape)
        };
        assert_eq!(found(&[5, 12], &[5, 2], &[5, 2]).unwrap(), [5, 128]);
        for (words, scales, biases) in [
            (&[5, 16][..], &[5, 2][..], &[5, 2][..]),
            (&[5, 12], &[4, 2], &[4, 2]),
            (&[5, 12], &[5, 2], &[5, 3]),
            (&[5, usize::MAX], &[5, usize::MAX], &[5, usize::MAX]),
        ] {
            let error = found(words, scales, biases).unwrap_err().to_string();
            assert!(error.ends_with("do not fit 3 bits in groups of 64"), "{error}");
        }
        let error = found(&[60], &[5, 2], &[5, 2]).unwrap_err().to_string();
        assert_eq!(error, "shape [60], scales [5, 2]");
        let floats = view("s", Dtype::F32, &[5, 2]);
        let bytes = view("s", Dtype::U8, &[5, 2]);
        let of = |w, s, b| AffineTensor::checked(w, s, b, 3, 64).err().unwrap().to_string();
        let words = view("w", Dtype::U32, &[5, 12]);
        assert_eq!(of(view("w", Dtype::I32, &[5, 12]), floats, floats), "dtype I32, expected U32");
        assert_eq!(of(words, bytes, bytes), "U8 scales and U8 biases");
        assert_eq!(of(words, floats, view("b", Dtype::F16, &[5, 2])), "F32 scales and F16 biases");
    }
}
