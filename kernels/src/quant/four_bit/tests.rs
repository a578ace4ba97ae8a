//! NF4 and FP4 in every block size, and 8-bit rows, against bitsandbytes. More of NF4 is in `nf4/tests.rs`.

use super::*;
use crate::quant::Int8;
use candle_core::{DType, Device, Tensor};
use half::bf16;
use sha2::{Digest, Sha256};
use std::{collections::HashMap, path::Path};

fn golden() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/bnb/blocks.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_kind_and_block_size_is_equal_bit_for_bit() {
    let golden = golden();
    let input = floats(&golden["input"]);
    for (kind, name) in [(Kind::Nf4, "nf4"), (Kind::Fp4, "fp4")] {
        assert_eq!(kind.values().to_vec(), floats(&golden[&format!("{name}.values")]));
        for block in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
            let codec = FourBit { kind, block };
            let [mut packed, mut scales, _] = codec.planes(input.len()).map(|n| vec![0; n]);
            assert!(codec.encode(&input, [&mut packed, &mut scales, &mut []]));
            let mut values = vec![0.0; input.len()];
            codec.decode([&packed, &scales, &[]], &mut values);
            let values: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            let sums: Vec<Vec<u8>> = golden[&format!("{name}.{block}")].to_vec2().unwrap();
            let ours = [("codes", packed), ("scales", scales), ("values", values)];
            for ((what, bytes), sum) in ours.iter().zip(sums) {
                assert!(Sha256::digest(bytes)[..] == sum[..], "{name} in blocks of {block}: {what}");
            }
        }
    }
}

#[test]
fn rows_of_8_bits_are_equal_bit_for_bit() {
    let golden = golden();
    let codec = Int8 { columns: 512 };
    let input = &floats(&golden["input"])[..8 * 512];
    let [mut codes, mut scales, _] = codec.planes(input.len()).map(|n| vec![0; n]);
    assert!(codec.encode(input, [&mut codes, &mut scales, &mut []]));
    let expected: Vec<f32> = golden["int8.scales"].to_vec1().unwrap();
    assert_eq!(scales, expected.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
    let expected = floats(&golden["int8.codes"]);
    assert!(codes.iter().zip(expected).all(|(c, e)| f32::from(*c) == e));
    assert!(!codec.encode(&[70000.0; 512], [&mut codes, &mut scales, &mut []]), "f16 ends at 65504");
    assert!(codec.encode(&[0.0; 512], [&mut codes[..512], &mut scales[..4], &mut []]));
    assert!(codes[..512].iter().all(|c| *c == 0));
}

#[test]
fn odd_lengths_and_pieces_give_the_same_bytes() {
    let values: Vec<f32> = (0..1001).map(|i| (i as f32 * 0.7).sin()).collect();
    for kind in [Kind::Nf4, Kind::Fp4] {
        let codec = FourBit { kind, block: 128 };
        let [mut packed, mut scales, _] = codec.planes(1001).map(|n| vec![0; n]);
        codec.encode(&values, [&mut packed, &mut scales, &mut []]);
        let (p, s) = (&mut vec![0; packed.len()][..], &mut vec![0; scales.len()][..]);
        codec.encode(&values[..256], [&mut p[..128], &mut s[..8], &mut []]);
        codec.encode(&values[256..], [&mut p[128..], &mut s[8..], &mut []]);
        assert!(packed == p && scales == s);
        assert_eq!(packed[500] & 15, kind.zero());
    }
}
