//! 4-bit weights in the form that transformers and bitsandbytes store them: NF4 or FP4, with or without double quantization.
//!
//! Read by the loaders of kto-train and kto-eval and by kto-merge, written by kto-quantize. Whether a weight is 4-bit is
//! decided per tensor by the presence of its quant_state, never by config.json: mixed checkpoints exist.
//! For a weight `X` of shape (out, in) the file holds `X` (packed codes), `X.absmax`, `X.quant_map`,
//! `X.quant_state.bitsandbytes__nf4` and, with double quantization, `X.nested_absmax`, `X.nested_quant_map`.
//! 8-bit weights are [`Int8Tensor`]. Deliberately absent: the search for codes (see `kto-kernels`).

pub mod int8;
mod quant_state;

pub use int8::Int8Tensor;
pub use quant_state::{BLOCK, FourBitKind, NESTED_BLOCK, QuantState, torch_name};

use crate::{
    safetensors_out::TensorSpec,
    tensors::{TensorStore, TensorView, check_finite},
};
use half::{bf16, f16};
use kto_cli::{Context, Error, Result, escape};
use safetensors::Dtype;
use serde_json::{Value, json};

/// Suffixes of all tensors that belong to a 4-bit weight, beside the weight itself.
const PARTS: [&str; 6] = [
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
];

/// Returns the weight that a tensor is a part of, if it is a part of a quantized weight of bitsandbytes.
pub fn part_of(store: &TensorStore, name: &str) -> Option<String> {
    let stored =
        |weight: &str| FourBitKind::ALL.iter().any(|k| store.contains(&format!("{weight}{}", k.suffix())));
    let four = PARTS.iter().find_map(|part| name.strip_suffix(part).filter(|weight| stored(weight)));
    let eight = || {
        let layer = [".SCB", ".weight_format"].iter().find_map(|part| name.strip_suffix(part))?;
        store.contains(&format!("{layer}.SCB")).then(|| format!("{layer}.weight"))
    };
    four.map(str::to_string).or_else(eight)
}

/// A 4-bit weight, still packed.
pub struct Nf4Tensor<'a> {
    /// Dtype, shape, block sizes.
    pub state: QuantState,
    /// Two codes a byte, the earlier in the high half.
    pub packed: &'a [u8],
    /// The 16 values.
    pub map: [f32; 16],
    /// One scale for each block.
    pub scales: Scales<'a>,
}

/// The scales of a 4-bit weight, as stored.
pub enum Scales<'a> {
    /// Floats.
    Plain(TensorView<'a>),
    /// Double quantization: `map[codes[i]] · absmax[i / block] + offset`.
    Nested {
        /// One code a scale.
        codes: &'a [u8],
        /// The 256 values.
        map: Box<[f32; 256]>,
        /// One scale for each `block` scales.
        absmax: Vec<f32>,
        /// Scales that share a scale.
        block: usize,
        /// Mean of the scales.
        offset: f32,
    },
}

impl<'a> Nf4Tensor<'a> {
    /// Returns the weight `name` if it is stored in 4 bits, `None` if it is not. Errors (65) name the part that is
    /// missing or does not fit.
    pub fn find(store: &'a TensorStore, name: &str) -> Result<Option<Self>> {
        let state = FourBitKind::ALL.iter().find_map(|kind| store.get(&format!("{name}{}", kind.suffix())));
        let Some(state) = state else {
            if store.contains(&format!("{name}.absmax")) {
                return Err(Error::data(format!(
                    "tensor \"{}\": quantized, but not as NF4 or FP4 of bitsandbytes",
                    escape(name)
                )));
            }
            return Ok(None);
        };
        Self::read(store, name, &state).at(format_args!("tensor \"{}\"", escape(name))).map(Some)
    }

    fn read(store: &'a TensorStore, name: &str, state: &TensorView) -> Result<Self> {
        let state = QuantState::parse(state.data)?;
        let part = |suffix: &str| store.require(&format!("{name}{suffix}"));
        let values = state.values();
        // The codes may be stored as any dtype (FSDP wants bf16); only the bytes count.
        let packed = store.require(name)?.data;
        expect("packed bytes", packed.len(), values.div_ceil(2))?;
        let blocks = values.div_ceil(state.block);
        let absmax = part(".absmax")?;
        expect("scales", absmax.len(), blocks)?;
        let scales = match state.nested {
            None => Scales::Plain(absmax),
            Some((block, offset)) => {
                expect("bytes of scales", absmax.data.len(), blocks)?;
                let nested = finite(&part(".nested_absmax")?, blocks.div_ceil(block))?;
                let map = finite(&part(".nested_quant_map")?, 256)?;
                let map = map.try_into().map_err(|_| Error::internal("256 values make an array of 256"))?;
                Scales::Nested { codes: absmax.data, map, absmax: nested, block, offset }
            }
        };
        let map = finite(&part(".quant_map")?, 16)?;
        let map = map.try_into().map_err(|_| Error::internal("16 values make an array of 16"))?;
        Ok(Self { state, packed, map, scales })
    }

    /// Returns the number of values.
    pub fn len(&self) -> usize {
        self.state.values()
    }

    /// Returns whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes all values into `out` (f32, rounded to the declared dtype first).
    pub fn dequantize_into(&self, out: &mut [f32]) -> Result<()> {
        expect("values", out.len(), self.len())?;
        self.dequantize_range(0, out)
    }

    /// Writes the values from `start` on into `out`; pieces may be decoded on several threads.
    /// Formula: `round(map[code] · absmax)` of the block, one rounding to f32 and one to the declared dtype.
    pub fn dequantize_range(&self, start: usize, out: &mut [f32]) -> Result<()> {
        let mut at = start;
        let mut rest = out;
        while !rest.is_empty() {
            let block = at / self.state.block;
            let here = (self.state.block - at % self.state.block).min(rest.len());
            let (now, later) = rest.split_at_mut(here);
            let values = self.block_values(self.scale(block)?);
            if at.is_multiple_of(2) {
                for (pair, &byte) in now.chunks_mut(2).zip(&self.packed[at / 2..]) {
                    pair[0] = values[usize::from(byte >> 4)];
                    if let Some(second) = pair.get_mut(1) {
                        *second = values[usize::from(byte & 15)];
                    }
                }
            } else {
                for (i, v) in now.iter_mut().enumerate() {
                    let byte = self.packed[(at + i) / 2];
                    let code = if (at + i).is_multiple_of(2) { byte >> 4 } else { byte & 15 };
                    *v = values[usize::from(code)];
                }
            }
            at += here;
            rest = later;
        }
        Ok(())
    }

    /// Returns the scales, decoded.
    pub fn absmax(&self) -> Result<Vec<f32>> {
        (0..self.len().div_ceil(self.state.block)).map(|b| self.scale(b)).collect()
    }

    fn scale(&self, block: usize) -> Result<f32> {
        match &self.scales {
            Scales::Plain(view) => {
                let mut value = [0.0];
                view.read_f32(block, &mut value)?;
                Ok(value[0])
            }
            Scales::Nested { codes, map, absmax, block: size, offset } => {
                Ok(map[usize::from(codes[block])] * absmax[block / size] + offset)
            }
        }
    }

    /// The 16 values that a block with this scale can hold.
    fn block_values(&self, scale: f32) -> [f32; 16] {
        let product = self.map.map(|v| v * scale);
        match self.state.dtype {
            Dtype::BF16 => product.map(|v| bf16::from_f32(v).to_f32()),
            Dtype::F16 => product.map(|v| f16::from_f32(v).to_f32()),
            _ => product,
        }
    }
}

fn expect(what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::data(format!("{found} {what}, expected {expected}")))
}

fn finite(view: &TensorView, expected: usize) -> Result<Vec<f32>> {
    expect("values in the table or the nested scales", view.len(), expected)?;
    let values = view.to_f32()?;
    check_finite(view.name, 0, &values)?;
    Ok(values)
}

/// Returns whether any weight of the store is quantized by a method that these tools know of.
pub fn is_quantized(store: &TensorStore) -> bool {
    let last = [".SCB", ".qweight", ".scales"];
    store
        .names()
        .any(|n| n.contains(".quant_state.bitsandbytes__") || last.iter().any(|end| n.ends_with(end)))
}

/// What a part of a 4-bit weight holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Codes of the values.
    Codes,
    /// Scales, or with double quantization the codes of the scales.
    Scales,
    /// The 16 values.
    Map,
    /// Scales of the scales.
    NestedScales,
    /// The 256 values of the codes of scales.
    NestedMap,
    /// The JSON text; of at most [`QuantState::longest`] bytes, as the offset decides.
    State,
}

/// Describes the tensors that the weight `name` becomes in a file, the weight itself last. Of the state the longest text is
/// announced.
pub fn specs(name: &str, state: &QuantState) -> Vec<(TensorSpec, Part)> {
    let blocks = state.values().div_ceil(state.block);
    let nested = state.nested.map(|(block, _)| blocks.div_ceil(block));
    let scales = if nested.is_some() { Dtype::U8 } else { Dtype::F32 };
    let part = |suffix: &str, dtype, shape: usize| TensorSpec::new(format!("{name}{suffix}"), dtype, [shape]);
    let mut specs = vec![
        (part(".absmax", scales, blocks), Part::Scales),
        (part(".quant_map", Dtype::F32, 16), Part::Map),
        (part(state.kind.suffix(), Dtype::U8, state.longest()), Part::State),
    ];
    if let Some(nested) = nested {
        specs.push((part(".nested_absmax", Dtype::F32, nested), Part::NestedScales));
        specs.push((part(".nested_quant_map", Dtype::F32, 256), Part::NestedMap));
    }
    specs.push((TensorSpec::new(name, Dtype::U8, [state.values().div_ceil(2), 1]), Part::Codes));
    specs
}

/// What config.json says of a model in 4 or 8 bits.
#[derive(Clone, Copy, Debug)]
pub enum Setting {
    /// 4-bit layers; `compute` is the dtype of the products.
    FourBit {
        /// Which values.
        kind: FourBitKind,
        /// Whether the scales are in 8 bits.
        double_quant: bool,
        /// Dtype of the products.
        compute: Dtype,
    },
    /// LLM.int8().
    Int8,
}

/// Returns config.json's `quantization_config` as transformers writes it. `skip` lists the modules left as they were, `None` for the
/// default (the output head).
pub fn quantization_config(setting: Setting, skip: Option<&[String]>) -> Value {
    let four = matches!(setting, Setting::FourBit { .. });
    // The 4-bit entries of an 8-bit model are those of an untouched configuration.
    let (kind, double_quant, compute) = match setting {
        Setting::FourBit { kind, double_quant, compute } => (kind, double_quant, compute),
        Setting::Int8 => (FourBitKind::Fp4, false, Dtype::F32),
    };
    json!({
        "_load_in_4bit": four,
        "_load_in_8bit": !four,
        "bnb_4bit_compute_dtype": torch_name(compute),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind.name(),
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skip,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": !four,
        "quant_method": "bitsandbytes",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors_out::{SafetensorsWriter, pt_metadata, standard_order};
    use std::path::{Path, PathBuf};

    fn testdata(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/bnb").join(name)
    }

    #[test]
    fn a_transformers_checkpoint_is_found_and_decoded() {
        let store = TensorStore::open_file(&testdata("tiny_llama_bnb4/model.safetensors")).unwrap();
        let dense = TensorStore::open_file(&testdata("tiny_llama_bf16/model.safetensors")).unwrap();
        assert!(is_quantized(&store) && !is_quantized(&dense));
        assert!(Nf4Tensor::find(&store, "lm_head.weight").unwrap().is_none());
        let mut found = 0;
        for view in dense.views() {
            let Some(weight) = Nf4Tensor::find(&store, view.name).unwrap() else { continue };
            found += 1;
            assert_eq!((weight.state.shape.as_slice(), weight.state.dtype), (view.shape, Dtype::BF16));
            let (mut values, original) = (vec![0.0; weight.len()], view.to_f32().unwrap());
            weight.dequantize_into(&mut values).unwrap();
            let scales = weight.absmax().unwrap();
            for (i, (v, o)) in values.iter().zip(&original).enumerate() {
                assert!((v - o).abs() <= 0.16 * scales[i / 64], "{} {i}: {v} {o}", view.name);
                assert_eq!(bf16::from_f32(*v).to_f32(), *v);
            }
            let mut piece = vec![0.0; 131];
            weight.dequantize_range(65, &mut piece).unwrap();
            assert_eq!(piece, values[65..196]);
        }
        assert_eq!(found, 14);
    }

    #[test]
    fn golden_values_are_equal() {
        let golden = TensorStore::open_file(&testdata("golden.safetensors")).unwrap();
        let raw = |name: &str| golden.require(name).unwrap();
        let case = "bnbcpu/rand_bf16_32x96";
        let state = QuantState::nf4(Dtype::BF16, &[32, 96], None);
        let map: Vec<u8> = crate_map().iter().flat_map(|v| v.to_le_bytes()).collect();
        let parts = [
            ("w.weight", raw(&format!("{case}/packed")).data.to_vec()),
            ("w.weight.absmax", raw(&format!("{case}/absmax")).data.to_vec()),
            ("w.weight.quant_map", map),
            ("w.weight.quant_state.bitsandbytes__nf4", state.to_json().into_bytes()),
        ];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        write(&path, &state, &parts);
        let store = TensorStore::open_file(&path).unwrap();
        let weight = Nf4Tensor::find(&store, "w.weight").unwrap().unwrap();
        let mut values = vec![0.0; 32 * 96];
        weight.dequantize_into(&mut values).unwrap();
        assert_eq!(values, raw(&format!("{case}/dequant_bfloat16")).to_f32().unwrap());
        let mut cut = parts.clone();
        cut[3].1 = QuantState::nf4(Dtype::BF16, &[32, 97], None).to_json().into_bytes();
        write(&path, &state, &cut);
        let store = TensorStore::open_file(&path).unwrap();
        let error = Nf4Tensor::find(&store, "w.weight").err().unwrap().to_string();
        assert_eq!(error, "tensor \"w.weight\": 1536 packed bytes, expected 1552");
    }

    /// The table of the tiny checkpoint.
    fn crate_map() -> [f32; 16] {
        let store = TensorStore::open_file(&testdata("tiny_llama_bnb4/model.safetensors")).unwrap();
        Nf4Tensor::find(&store, "model.layers.0.mlp.up_proj.weight").unwrap().unwrap().map
    }

    fn write(path: &Path, state: &QuantState, parts: &[(&str, Vec<u8>)]) {
        let text = parts[3].1.len();
        let mut specs: Vec<_> = specs("w.weight", state).into_iter().map(|(spec, _)| spec).collect();
        specs.iter_mut().filter(|s| s.name.contains("quant_state")).for_each(|s| s.shape = vec![text]);
        standard_order(&mut specs);
        let mut writer = SafetensorsWriter::new(path, specs.clone(), &pt_metadata()).unwrap();
        for spec in specs {
            writer.write(&spec.name, &parts.iter().find(|p| p.0 == spec.name).unwrap().1).unwrap();
        }
        writer.finish().unwrap();
    }
}
