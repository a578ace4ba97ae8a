//! Both forms of widening against a plain formula, at odd sizes, offsets and alignments.

use super::*;
use crate::{
    Factor, Onto, Product, Weight, multiply,
    quant::{
        dynamic_map,
        nf4::{CODE, quantize_nf4},
    },
    random,
};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use std::{collections::HashMap, path::Path, sync::Arc};

const TYPES: [Dense; 3] = [Dense::F32, Dense::F16, Dense::Bf16];
/// Sizes with blocks that cross rows, odd rows, and a short last block.
const SIZES: [(usize, usize); 6] = [(1, 1), (1, 63), (7, 65), (5, 257), (3, 64), (33, 130)];

/// The bytes behind `offset` others, so that they are not aligned.
fn bytes(content: Vec<u8>, offset: usize) -> Bytes {
    let all = [vec![0xee; offset], content].concat();
    let range = offset..all.len();
    Bytes::new(Arc::new(all), range).unwrap()
}

fn noise(n: usize, salt: u64) -> Vec<u64> {
    (0..n as u64).map(|i| random::key(&[salt, i])).collect()
}

fn floats(n: usize, salt: u64) -> Vec<f32> {
    noise(n, salt).iter().map(|k| (*k as i64 >> 40) as f32 * 1e-5).collect()
}

fn encode(dtype: Dense, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dense::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dense::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Dense::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    }
}

fn rounded(dtype: Dense, v: f32) -> f32 {
    match dtype {
        Dense::F32 => v,
        Dense::F16 => f16::from_f32(v).to_f32(),
        Dense::Bf16 => bf16::from_f32(v).to_f32(),
    }
}

/// Compares every piece length at many places, and the many-rows form, in the portable and the fast form.
fn check(stored: Stored, expected: &[f32], what: &str) {
    let (rows, columns) = (stored.rows(), stored.columns());
    for stored in [stored.clone(), stored.portable()] {
        let what = format!("{what} {stored:?} wide {}", stored.wide);
        let mut all = vec![f32::NAN; rows * columns];
        stored.widen_flat(0, &mut all);
        assert_eq!(bits(&all), bits(expected), "{what}");
        for length in [1, 2, 3, 7, 8, 16, 17, 63, 64, 65, 100, columns] {
            for (row, column) in (0..rows).zip((0..columns).step_by(5).cycle()) {
                let length = length.min(columns - column);
                let mut out = vec![f32::NAN; length];
                stored.widen(row, column, &mut out);
                let at = row * columns + column;
                assert_eq!(bits(&out), bits(&expected[at..at + length]), "{what} {row} {column} {length}");
            }
        }
        let (first, column, width) = (rows / 3, columns / 4, columns.div_ceil(3));
        let mut out = vec![f32::NAN; (rows - first) * width];
        stored.widen_rows(first, column, width, &mut out);
        for (row, out) in (first..).zip(out.chunks(width)) {
            let at = row * columns + column;
            assert_eq!(bits(out), bits(&expected[at..at + width]), "{what} row {row} of many");
        }
        assert_eq!(stored.first_non_finite(), None, "{what}");
        // A window, and a window of it.
        let window = stored.window(first..rows).unwrap();
        let mut out = vec![f32::NAN; window.rows() * columns];
        window.widen_flat(0, &mut out);
        assert_eq!(bits(&out), bits(&expected[first * columns..]), "{what} from row {first} on");
        let last = window.window(window.rows() - 1..window.rows()).unwrap();
        out.truncate(columns);
        last.widen(0, 0, &mut out);
        assert_eq!(bits(&out), bits(&expected[(rows - 1) * columns..]), "{what} last row");
        assert!(last.first_non_finite().is_none() && last.window(0..2).is_none(), "{what}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn floats_widen_exactly() {
    for dtype in TYPES {
        for (salt, (rows, columns)) in SIZES.into_iter().enumerate() {
            let values: Vec<f32> =
                floats(rows * columns, salt as u64).iter().map(|v| rounded(dtype, *v)).collect();
            let stored = Stored::dense(dtype, bytes(encode(dtype, &values), 1), rows, columns).unwrap();
            assert_eq!(stored.bytes(), rows * columns * dtype.size());
            check(stored, &values, "floats");
        }
    }
}

#[test]
fn every_half_is_widened_as_the_half_crate_does() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for dtype in [Dense::F16, Dense::Bf16] {
        let stored = Stored::dense(dtype, bytes(all.clone(), 3), 256, 256).unwrap();
        for stored in [stored.clone(), stored.portable()] {
            let mut out = vec![0.0; 1 << 16];
            stored.widen_flat(0, &mut out);
            for (i, v) in (0..=u16::MAX).zip(&out) {
                let expected = if dtype == Dense::F16 {
                    f16::from_bits(i).to_f32()
                } else {
                    bf16::from_bits(i).to_f32()
                };
                assert!(v.to_bits() == expected.to_bits() || v.is_nan() && expected.is_nan(), "{i:04x}");
            }
            let (index, value) = stored.first_non_finite().unwrap();
            assert_eq!((index, value), (if dtype == Dense::F16 { 0x7c00 } else { 0x7f80 }, f32::INFINITY));
        }
    }
}

#[test]
fn nf4_widens_as_the_formula_says() {
    for (salt, (rows, columns)) in SIZES.into_iter().enumerate() {
        let n = rows * columns;
        for block in [2, 32, 64, 128, 4096] {
            let packed: Vec<u8> = noise(n.div_ceil(2), 9).iter().map(|k| (k >> 20) as u8).collect();
            let blocks = n.div_ceil(block);
            let (codes, map) =
                (noise(blocks, 5).iter().map(|k| *k as u8).collect::<Vec<_>>(), dynamic_map::signed());
            let absmax = floats(blocks.div_ceil(16), 6);
            let nested: Vec<f32> = codes
                .iter()
                .enumerate()
                .map(|(i, c)| map[usize::from(*c)] * absmax[i / 16] + 0.131)
                .collect();
            let plain = floats(blocks, salt as u64 + 7);
            for round in TYPES {
                let of = |scales: &[f32]| -> Vec<f32> {
                    let code = |i: usize| usize::from(packed[i / 2] >> (4 - 4 * (i % 2)) & 15);
                    (0..n).map(|i| rounded(round, CODE[code(i)] * scales[i / block])).collect()
                };
                let form = |scales| {
                    let packed = bytes(packed.clone(), 1);
                    Stored::nf4(Nf4Parts { packed, code: CODE, scales, block, round }, rows, columns).unwrap()
                };
                let plain_scales = Nf4Scales::Plain(Dense::F32, bytes(encode(Dense::F32, &plain), 1));
                check(form(plain_scales), &of(&plain), &format!("plain {block} {round:?}"));
                let half: Vec<f32> = plain.iter().map(|v| rounded(Dense::F16, *v)).collect();
                let half_scales = Nf4Scales::Plain(Dense::F16, bytes(encode(Dense::F16, &half), 1));
                check(form(half_scales), &of(&half), &format!("half {block} {round:?}"));
                let (codes, map, absmax) = (bytes(codes.clone(), 1), Box::new(*map), absmax.clone());
                let scales = Nf4Scales::Nested { codes, map, absmax, block: 16, offset: 0.131 };
                check(form(scales), &of(&nested), &format!("nested {block} {round:?}"));
            }
        }
    }
}

#[test]
fn nf4_equals_the_codec() {
    let values = floats(33 * 130, 1);
    let made = quantize_nf4(&values);
    let mut expected = vec![0.0; values.len()];
    crate::quant::nf4::dequantize(&made.packed, &made.absmax, &mut expected);
    let scales = Nf4Scales::Plain(Dense::F32, encode(Dense::F32, &made.absmax).into());
    let parts = Nf4Parts { packed: made.packed.into(), code: CODE, scales, block: 64, round: Dense::F32 };
    check(Stored::nf4(parts, 33, 130).unwrap(), &expected, "codec");
}

#[test]
fn the_first_non_finite_value_is_found() {
    let mut values = vec![1.0f32; 70_000];
    values[66_001] = f32::NAN;
    values[66_000] = f32::NEG_INFINITY;
    for dtype in TYPES {
        let stored = Stored::dense(dtype, encode(dtype, &values).into(), 7, 10_000).unwrap();
        assert_eq!(stored.first_non_finite(), Some((66_000, f32::NEG_INFINITY)));
    }
    let nf4 = |scale: f32, round, code: u8| {
        let mut scales = vec![1.0; 1024];
        scales[1000] = scale;
        let scales = Nf4Scales::Plain(Dense::F32, encode(Dense::F32, &scales).into());
        let mut packed = vec![0x77; 32 * 1024];
        packed[32 * 1000 + 3] = code;
        let parts = Nf4Parts { packed: packed.into(), code: CODE, scales, block: 64, round };
        Stored::nf4(parts, 256, 256).unwrap().first_non_finite()
    };
    // Infinity times the value 0 is not a number.
    assert!(nf4(f32::INFINITY, Dense::F32, 0x7f).is_some_and(|(i, v)| i == 64_000 && v.is_nan()));
    assert!(nf4(f32::NAN, Dense::Bf16, 0x77).is_some_and(|(i, v)| i == 64_000 && v.is_nan()));
    // 70000 is more than an f16 can hold, but only where the code is a large one.
    assert_eq!(nf4(70_000.0, Dense::F16, 0x78), None);
    assert_eq!(nf4(70_000.0, Dense::F16, 0x7f), Some((64_007, f32::INFINITY)));
    assert_eq!(nf4(70_000.0, Dense::Bf16, 0x7f), None);
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let refused =
        |rows, columns, n| Stored::dense(Dense::Bf16, vec![0; n].into(), rows, columns).unwrap_err();
    assert!(refused(2, 3, 11).to_string().starts_with("11 bytes, expected 12"));
    assert!(refused(usize::MAX, 2, 12).to_string().contains("too large"));
    let parts = |packed, scales: usize, block| Nf4Parts {
        packed: vec![0; packed].into(),
        code: CODE,
        scales: Nf4Scales::Plain(Dense::F32, vec![0; 4 * scales].into()),
        block,
        round: Dense::F32,
    };
    for (packed, scales, block, says) in [
        (64, 2, 64, "64 packed bytes, expected 65"),
        (65, 2, 64, "8 bytes of scales, expected 12"),
        (65, 3, 63, "not a power of two"),
    ] {
        let error = Stored::nf4(parts(packed, scales, block), 1, 129).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    assert!(Bytes::new(Arc::new(vec![1, 2, 3]), 1..4).is_none());
    assert_eq!(&*Bytes::new(Arc::new(vec![1, 2, 3]), 1..3).unwrap(), [2, 3]);
}

fn golden(name: &str) -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata").join(name);
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn int8_widens_as_bitsandbytes_decodes() {
    let golden = golden("bnb/int8.safetensors");
    let (values, scales) = (flat(&golden["values"]), flat(&golden["scales"]));
    let codes: Vec<u8> = golden["codes"].flatten_all().unwrap().to_vec1().unwrap();
    let scales = |dtype| bytes(encode(dtype, &scales), 1);
    let wrap = |rows, columns| {
        Stored::int8(
            bytes(codes[..rows * columns].to_vec(), 1),
            Dense::F32,
            scales(Dense::F32),
            rows,
            columns,
        )
    };
    let stored = wrap(64, 160).unwrap();
    assert_eq!(stored.bytes(), 64 * 161 + 64 * 3);
    check(stored, &values, "int8");
    assert!(wrap(64, 160).is_ok() && wrap(63, 160).is_err());
    let short = Stored::int8(codes.clone().into(), Dense::F32, scales(Dense::F16), 64, 160);
    assert!(short.unwrap_err().to_string().starts_with("128 bytes of scales, expected 256"));
}

#[test]
fn int8_of_odd_shapes() {
    for (rows, columns) in SIZES {
        let codes: Vec<u8> = noise(rows * columns, 3).iter().map(|k| (k >> 9) as u8).collect();
        for dtype in TYPES {
            let scales: Vec<f32> = floats(rows, 4).iter().map(|v| rounded(dtype, *v)).collect();
            let value = |(i, c): (usize, &u8)| {
                f32::from(*c as i8) * scales[i / columns] * (7.874_015_718_698_502e-3f64 as f32)
            };
            let expected: Vec<f32> = codes.iter().enumerate().map(value).collect();
            let (codes, scales) = (bytes(codes.clone(), 3), bytes(encode(dtype, &scales), 1));
            check(Stored::int8(codes, dtype, scales, rows, columns).unwrap(), &expected, "int8");
        }
    }
}

#[test]
fn affine_widens_as_mlx_decodes() {
    let golden = golden("mlx/affine.safetensors");
    let mut cases: Vec<&str> = golden.keys().filter_map(|k| k.strip_suffix(".packed")).collect();
    cases.sort_unstable();
    assert_eq!(cases.len(), 24);
    for case in cases {
        let of = |part: &str| &golden[&format!("{case}.{part}")];
        let (bits, group) = case.rsplit_once(".g").unwrap();
        let (bits, group) = (bits[bits.len() - 1..].parse().unwrap(), group.parse().unwrap());
        let dtype = match of("scales").dtype() {
            DType::F16 => Dense::F16,
            DType::BF16 => Dense::Bf16,
            _ => Dense::F32,
        };
        let words: Vec<u32> = of("packed").flatten_all().unwrap().to_vec1().unwrap();
        let parts = AffineParts {
            packed: bytes(words.iter().flat_map(|w| w.to_le_bytes()).collect(), 1),
            dtype,
            scales: bytes(encode(dtype, &flat(of("scales"))), 1),
            biases: bytes(encode(dtype, &flat(of("biases"))), 1),
            bits,
            group,
        };
        let (rows, columns) = of("dq").dims2().unwrap();
        let stored = Stored::affine(parts, rows, columns).unwrap();
        assert_eq!(stored.bytes(), rows * columns * bits / 8 + 2 * (rows * columns / group) * dtype.size());
        check(stored, &flat(of("dq")), case);
    }
}

#[test]
fn affine_parts_that_do_not_fit_are_refused() {
    let wrap = |packed, scales, biases, bits, group| {
        let zeros = |n: usize| Bytes::from(vec![0; n]);
        let (packed, scales, biases) = (zeros(packed), zeros(scales), zeros(biases));
        Stored::affine(AffineParts { packed, dtype: Dense::F16, scales, biases, bits, group }, 3, 64)
    };
    assert!(wrap(72, 12, 12, 3, 32).is_ok());
    for (packed, scales, biases, bits, group) in [
        (71, 12, 12, 3, 32),
        (72, 11, 12, 3, 32),
        (72, 12, 13, 3, 32),
        (168, 12, 12, 7, 32),
        (72, 3, 3, 3, 128),
        (72, 24, 24, 3, 16),
    ] {
        assert!(
            wrap(packed, scales, biases, bits, group).is_err(),
            "{packed} {scales} {biases} {bits} {group}"
        );
    }
    let scales = encode(Dense::F16, &[1.0, 1.0, 60_000.0, 1.0, 1.0, 1.0]);
    let of = |code: u8| {
        let mut packed = vec![0; 3 * 64];
        packed[70] = code;
        let (packed, scales, biases) = (packed.into(), scales.clone().into(), vec![0; 12].into());
        Stored::affine(AffineParts { packed, dtype: Dense::F16, scales, biases, bits: 8, group: 32 }, 3, 64)
            .unwrap()
    };
    assert_eq!(of(1).first_non_finite(), None);
    assert_eq!(of(2).first_non_finite(), Some((70, f32::INFINITY)));
    let scales = encode(Dense::F32, &[1.0, f32::NAN]).into();
    let (index, value) =
        Stored::int8(vec![1; 6].into(), Dense::F32, scales, 2, 3).unwrap().first_non_finite().unwrap();
    assert!(index == 3 && value.is_nan());
}

#[test]
fn products_read_a_stored_weight_as_its_dense_values() {
    for offset in [0, 1] {
        for dtype in TYPES {
            products(dtype, offset);
        }
    }
}

fn products(form: Dense, offset: usize) {
    for (n, k) in [(1, 1), (7, 65), (33, 130), (64, 700), (130, 33)] {
        let values: Vec<f32> = floats(n * k, 2).iter().map(|v| rounded(form, *v)).collect();
        let stored = Stored::dense(form, bytes(encode(form, &values), offset), n, k).unwrap();
        let Form::Dense(_, at) = &stored.form else { unreachable!() };
        assert_eq!(stored.floats().is_some(), form == Dense::F32 && at.as_ptr().addr().is_multiple_of(4));
        let dense = Tensor::from_vec(values, (n, k), &Device::Cpu).unwrap();
        for dtype in [DType::F32, DType::F64] {
            let forms =
                [Weight::Stored(Arc::new(stored.clone())), Weight::Dense(dense.to_dtype(dtype).unwrap())];
            for m in [1, 5, 40] {
                let of =
                    |columns: usize| Tensor::from_vec(floats(m * columns, 8), (m, columns), &Device::Cpu);
                let (x, dy) =
                    (of(k).unwrap().to_dtype(dtype).unwrap(), of(n).unwrap().to_dtype(dtype).unwrap());
                let product = |a: &Tensor, b: Factor, n: usize| {
                    let out = Tensor::zeros((m, n), dtype, &Device::Cpu).unwrap();
                    multiply(&out, Onto::Zero, &[Product::new(a, b)]).unwrap();
                    out.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap()
                };
                let [found, expected] = forms
                    .each_ref()
                    .map(|w| (product(&x, Factor::Linear(w), n), product(&dy, Factor::Weight(w), k)));
                assert_eq!(found, expected, "({n}, {k}) {m} {dtype:?}");
            }
        }
    }
}

/// MLX's own values of mxfp4, nvfp4 and mxfp8, which are exact in bf16.
#[test]
fn small_floats_widen_as_mlx_decodes_them() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/mlx/float_modes.safetensors");
    let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let mut cases = 0;
    for (name, packed) in &golden {
        let Some(case) = name.strip_suffix(".packed") else { continue };
        let kind = match case.split('.').next().unwrap() {
            "mxfp4" => MicroFloat::Mxfp4,
            "nvfp4" => MicroFloat::Nvfp4,
            _ => MicroFloat::Mxfp8,
        };
        let words: Vec<u32> = packed.flatten_all().unwrap().to_vec1().unwrap();
        let packed: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let scales: Vec<u8> = golden[&format!("{case}.scales")].flatten_all().unwrap().to_vec1().unwrap();
        let dq = golden[&format!("{case}.dq")].to_dtype(DType::F32).unwrap();
        let (rows, columns) = dq.dims2().unwrap();
        let expected: Vec<f32> = dq.flatten_all().unwrap().to_vec1().unwrap();
        let stored = Stored::micro(kind, bytes(packed, 1), bytes(scales, 3), rows, columns).unwrap();
        check(stored, &expected, case);
        cases += 1;
    }
    assert_eq!(cases, 9);
}

#[test]
fn small_floats_that_are_none_are_found() {
    // 0x7f is no number of E4M3; 255 is infinite as a power of two, and 252 makes 448 so.
    for (kind, code, scale, expected) in [
        (MicroFloat::Mxfp8, 0xff, 127, f32::NAN),
        (MicroFloat::Nvfp4, 0x20, 0x7f, f32::NAN),
        (MicroFloat::Mxfp4, 0x22, 255, f32::INFINITY),
        (MicroFloat::Mxfp8, 0x7e, 252, f32::INFINITY),
    ] {
        let (group, mut packed) = (kind.group(), vec![0x11; 64 * kind.bits() / 8]);
        packed[32 * kind.bits() / 8] = code;
        let mut scales = vec![if kind == MicroFloat::Nvfp4 { 0x38 } else { 127 }; 64 / group];
        scales[32 / group] = scale;
        let stored = Stored::micro(kind, bytes(packed, 0), bytes(scales, 0), 2, 32).unwrap();
        let (index, value) = stored.first_non_finite().unwrap();
        assert!(
            index == 32 && (value == expected || value.is_nan() && expected.is_nan()),
            "{kind:?} {index}"
        );
    }
    for (columns, packed, scales) in [(32, 15, 1), (32, 16, 2), (48, 24, 1)] {
        let of = |n: usize| bytes(vec![0; n], 0);
        assert!(Stored::micro(MicroFloat::Mxfp4, of(packed), of(scales), 1, columns).is_err());
    }
}
