//! NF4 against the golden vectors of bitsandbytes.

use super::*;
use candle_core::{DType, Device, Tensor};
use std::{collections::HashMap, path::Path};

/// Blocks in which bitsandbytes loses zeros or subnormals: only its decoded values or nothing can be compared.
const DEGENERATE: [&str; 5] =
    ["zeros_2blk", "zero_block_between", "neg_zero_block", "len_130_zero_tail", "f32_subnormal_block"];

struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/bnb/golden.safetensors");
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }
    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let tensor = self.0.get(name)?.to_dtype(DType::F32).unwrap();
        Some(tensor.flatten_all().unwrap().to_vec1().unwrap())
    }
    fn bytes(&self, name: &str) -> Vec<u8> {
        self.0[name].flatten_all().unwrap().to_vec1().unwrap()
    }
    fn cases(&self) -> Vec<String> {
        let mut cases: Vec<_> =
            self.0.keys().filter_map(|k| k.strip_suffix("/input")).map(str::to_string).collect();
        cases.sort();
        assert_eq!(cases.len(), 22);
        cases
    }
}

#[test]
fn the_dynamic_map_is_equal_bit_for_bit() {
    let golden = Golden::open().floats("dynamic_map_signed").unwrap();
    let ours: Vec<u32> = dynamic_map::signed().iter().map(|v| v.to_bits()).collect();
    assert_eq!(ours, golden.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
}

#[test]
fn codes_and_scales_are_equal_bit_for_bit() {
    let golden = Golden::open();
    for case in golden.cases().iter().filter(|c| !DEGENERATE.contains(&c.as_str())) {
        let ours = quantize_nf4(&golden.floats(&format!("{case}/input")).unwrap());
        for back_end in ["bnbcpu", "cuda"] {
            assert_eq!(ours.packed, golden.bytes(&format!("{back_end}/{case}/packed")), "{back_end} {case}");
            assert_eq!(
                ours.absmax,
                golden.floats(&format!("{back_end}/{case}/absmax")).unwrap(),
                "{back_end} {case}"
            );
        }
    }
}

#[test]
fn values_decode_as_in_bitsandbytes() {
    let golden = Golden::open();
    for case in golden.cases().iter().filter(|c| *c != "f32_subnormal_block") {
        let input = golden.floats(&format!("{case}/input")).unwrap();
        let ours = quantize_nf4(&input);
        let mut values = vec![0.0; input.len()];
        dequantize(&ours.packed, &ours.absmax, &mut values);
        if let Some(expected) = golden.floats(&format!("bnbcpu/{case}/dequant_float32")) {
            assert_eq!(values, expected, "{case}");
        }
        if let Some(expected) = golden.floats(&format!("bnbcpu/{case}/dequant_bfloat16")) {
            let rounded: Vec<f32> = values.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect();
            assert_eq!(rounded, expected, "{case}");
        }
    }
}

#[test]
fn double_quantization_is_the_cuda_search() {
    let golden = Golden::open();
    for case in golden.cases() {
        let absmax = golden.floats(&format!("cuda/{case}/absmax")).unwrap();
        let ours = double_quantize(&absmax);
        let mean = absmax.iter().map(|&v| f64::from(v)).sum::<f64>() / absmax.len() as f64;
        assert!((f64::from(ours.offset) - mean).abs() <= mean * 1e-7, "{case}");
        let scales = ours.dequantize();
        let codes = golden.bytes(&format!("cuda/{case}/nested_absmax_u8"));
        let nested = golden.floats(&format!("cuda/{case}/nested_absmax_f32")).unwrap();
        // One scale, or all equal: nothing is left after the offset, and every code means the same.
        if ours.absmax.iter().any(|&m| m > 0.0) && nested == ours.absmax {
            assert_eq!(ours.codes, codes, "{case}");
        }
        let spread = ours.absmax.iter().fold(0.0f32, |m, v| m.max(*v));
        for (scale, expected) in scales.iter().zip(&absmax) {
            assert!((scale - expected).abs() <= 0.01 * spread, "{case}: {scale} {expected}");
        }
        let theirs = golden.floats(&format!("bnbcpu/{case}/absmax_after_double_quant")).unwrap();
        for (scale, expected) in scales.iter().zip(&theirs) {
            assert!(
                (scale - expected).abs() <= 0.01 * spread + expected * 1e-6,
                "{case}: {scale} {expected}"
            );
        }
    }
}

#[test]
fn degenerate_blocks_keep_their_zeros() {
    let mut values = vec![0.0f32; 200];
    values[70] = -3e-40;
    values[71] = 1e-40;
    let ours = quantize_nf4(&values);
    assert!(ours.packed[..32].iter().all(|&b| b == 0x77));
    assert_eq!((ours.absmax[0], ours.absmax[1], ours.absmax[3]), (0.0, 3e-40, 0.0));
    let mut back = vec![1.0; 200];
    dequantize(&ours.packed, &ours.absmax, &mut back);
    assert!(values.iter().zip(&back).all(|(v, b)| *v != 0.0 || b.to_bits() == 0));
    assert_eq!(back[70], -3e-40);
}

#[test]
fn pieces_give_the_same_as_the_whole() {
    let values: Vec<f32> = (0..64 * 3000 + 65).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect();
    let whole = quantize_nf4(&values);
    let mut pieces = Nf4 { packed: Vec::new(), absmax: Vec::new() };
    for piece in values.chunks(64 * 1001) {
        let part = quantize_nf4(piece);
        pieces.packed.extend(part.packed);
        pieces.absmax.extend(part.absmax);
    }
    assert_eq!(whole, pieces);
    assert_eq!(whole.packed.last().map(|b| b & 15), Some(ZERO));
}
