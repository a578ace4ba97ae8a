//! Affine quantization against all golden cases of MLX: packed codes, scales, biases and decoded values, bit for bit.

use super::*;
use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};
use std::{collections::HashMap, path::Path};

fn golden() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/mlx/digests.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn dtype(name: &str) -> Dense {
    match name {
        "f32" => Dense::F32,
        "f16" => Dense::F16,
        "bf16" => Dense::Bf16,
        other => panic!("{other}"),
    }
}

#[test]
fn all_162_cases_are_equal_bit_for_bit() {
    let golden = golden();
    let mut cases = 0;
    for (name, sums) in &golden {
        // sha256.affine.INPUT.DTYPE.bBITS.gGROUP
        let Some(case) = name.strip_prefix("sha256.affine.") else { continue };
        let parts: Vec<&str> = case.split('.').collect();
        let [input, kind, bits, group] = parts[..] else { panic!("{case}") };
        let codec = Affine {
            bits: bits[1..].parse().unwrap(),
            group: group[1..].parse().unwrap(),
            dtype: dtype(kind),
        };
        let input = golden[&format!("in.{input}.{kind}")].to_dtype(DType::F32).unwrap();
        let values: Vec<f32> = input.flatten_all().unwrap().to_vec1().unwrap();
        let [mut packed, mut scales, mut biases] = codec.planes(values.len()).map(|n| vec![0; n]);
        codec.encode(&values, [&mut packed, &mut scales, &mut biases]);
        let mut decoded = vec![0.0; values.len()];
        codec.decode([&packed, &scales, &biases], &mut decoded);
        let mut stored = vec![0; values.len() * codec.dtype.size()];
        for (v, bytes) in decoded.iter().zip(stored.chunks_mut(codec.dtype.size())) {
            codec.dtype.store(*v, bytes);
        }
        let sums: Vec<Vec<u8>> = sums.to_vec2().unwrap();
        let ours = [("packed", packed), ("scales", scales), ("biases", biases), ("decoded", stored)];
        for ((what, bytes), sum) in ours.iter().zip(sums) {
            assert!(Sha256::digest(bytes)[..] == sum[..], "{case}: {what}");
        }
        cases += 1;
    }
    assert_eq!(cases, 162);
}

#[test]
fn a_scale_that_f16_cannot_hold_is_told() {
    let values: Vec<f32> = (0..32).map(|i| if i == 3 { 1e6 } else { -1e6 }).collect();
    let encode = |dtype| {
        let codec = Affine { bits: 2, group: 32, dtype };
        let [mut packed, mut scales, mut biases] = codec.planes(32).map(|n| vec![0; n]);
        codec.encode(&values, [&mut packed, &mut scales, &mut biases])
    };
    assert!(!encode(Dense::F16));
    assert!(encode(Dense::Bf16) && encode(Dense::F32));
}
