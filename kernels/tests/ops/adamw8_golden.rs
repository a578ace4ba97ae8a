//! The 8-bit update against bitsandbytes: its maps and codes exactly, its parameters as near as its CPU back end is to itself.

use crate::support::*;
use candle_core::{Device, Tensor};
use kto_kernels::{
    AdamW, adamw_step,
    adamw8::{BLOCK, Moments8, adamw8_step},
    quant::dynamic_map::{Codec, signed, unsigned},
    random::mix,
};
use std::{collections::HashMap, path::Path};

struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/bnb/adamw8.safetensors");
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }
    fn floats(&self, name: &str) -> Vec<f32> {
        self.0[name].flatten_all().unwrap().to_vec1().unwrap()
    }
    fn bytes(&self, name: &str) -> Vec<u8> {
        self.0[name].flatten_all().unwrap().to_vec1().unwrap()
    }
    fn gradient(&self, case: &str, step: usize) -> Tensor {
        self.0[&format!("{case}/grads")].get(step).unwrap().copy().unwrap()
    }
}

fn options(step: u64) -> AdamW {
    AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step, gradient_scale: 1.0 }
}

fn floats(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Returns (largest, root of the mean square) of the differences.
fn difference(a: &[f32], b: &[f32]) -> (f64, f64) {
    assert_eq!(a.len(), b.len());
    let d: Vec<f64> = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).collect();
    let mean = d.iter().map(|x| x * x).sum::<f64>() / d.len() as f64;
    (d.iter().fold(0.0, |m, x| x.max(m)), mean.sqrt())
}

#[test]
fn the_unsigned_map_is_equal_bit_for_bit() {
    let bits = |map: &[f32]| map.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(unsigned()), bits(&Golden::open().floats("dynamic_map_unsigned")));
}

#[test]
fn codes_are_those_of_the_cuda_search() {
    let golden = Golden::open();
    let input = golden.floats("q8/input");
    let mut codes = vec![0; input.len()];
    for (codes, values) in codes.chunks_mut(BLOCK).zip(input.chunks(BLOCK)) {
        Codec::unsigned().encode(values, codes);
    }
    assert_eq!(codes, golden.bytes("q8/cuda_codes"));
}
