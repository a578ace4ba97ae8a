//! Models in quantized forms: the same logits as of their widened values in an f32 model.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Tensor};
use kto_formats::{
    bnb::Int8Tensor,
    model_dir::ModelDir,
    safetensors_out::{SafetensorsWriter, TensorSpec},
    tensors::{TensorView, push_floats},
};
use kto_model::{base::BaseModel, generate::Generator};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

fn write_model(dir: &Path, config: &Value, tensors: &Tensors) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let specs: Vec<_> =
        tensors.iter().map(|(name, (d, s, _))| TensorSpec::new(name.clone(), *d, s.clone())).collect();
    let mut writer =
        SafetensorsWriter::new(&dir.join("model.safetensors"), specs, &Default::default()).unwrap();
    for (name, (_, _, bytes)) in tensors {
        writer.write(name, bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn floats(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_floats(dtype, values, &mut bytes).unwrap();
    bytes
}

fn logits(dir: &Path) -> Vec<f32> {
    let base = BaseModel::load(ModelDir::open(dir).unwrap(), DType::F32, 40).unwrap();
    let ids: Vec<u32> = (0..40).map(|i| i * 5 % 256).collect();
    let out: Tensor = Generator::new(&base, None, 40).unwrap().feed(&ids, true).unwrap();
    out.flatten_all().unwrap().to_vec1().unwrap()
}

fn same(quantized: &Path, config: &Value, widened: &Tensors) {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), config, widened);
    let (found, expected) = (logits(quantized), logits(dir.path()));
    assert_eq!(found.len(), 40 * 256);
    let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found), bits(&expected));
}

#[test]
fn int8_of_bitsandbytes() {
    let dir = testdata("bnb/tiny_llama_int8");
    let model = ModelDir::open(&dir).unwrap();
    let mut widened = Tensors::new();
    for view in model.tensors.views() {
        if view.name.ends_with("SCB") || view.name.ends_with("weight_format") {
            continue;
        }
        let values = match Int8Tensor::find(&model.tensors, view.name).unwrap() {
            None => view.to_f32().unwrap(),
            Some(coded) => {
                let (scales, columns) = (coded.scales.to_f32().unwrap(), view.shape[1]);
                let value = |(i, c): (usize, &u8)| f32::from(*c as i8) * scales[i / columns] * (1.0 / 127.0);
                view.data.iter().enumerate().map(value).collect()
            }
        };
        widened.insert(view.name.into(), (Dtype::F32, view.shape.to_vec(), floats(Dtype::F32, &values)));
    }
    same(&dir, &model.config, &widened);
}

/// A weight (rows, columns) in affine form, and its values. Scales and biases are any that do not lose too much.
fn affine(
    values: &[f32],
    columns: usize,
    bits: usize,
    group: usize,
    dtype: Dtype,
) -> ([Vec<u8>; 3], Vec<f32>) {
    let round = |v: f32| {
        let view = TensorView { name: "", dtype, shape: &[1], data: &floats(dtype, &[v]) };
        view.to_f32().unwrap()[0]
    };
    let (mut packed, mut scales, mut biases, mut widened) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let most = (1u32 << bits) - 1;
    for row in values.chunks(columns) {
        let mut stream = vec![0u8; columns * bits / 8];
        for (g, part) in row.chunks(group).enumerate() {
            let low = part.iter().fold(f32::MAX, |m, v| m.min(*v));
            let high = part.iter().fold(f32::MIN, |m, v| m.max(*v));
            let (scale, bias) = (round((high - low).max(1e-7) / most as f32), round(low));
            for (i, v) in part.iter().enumerate() {
                let code = (((v - bias) / scale).round().max(0.0) as u32).min(most);
                for bit in 0..bits {
                    let at = (g * group + i) * bits + bit;
                    stream[at / 8] |= ((code >> bit & 1) as u8) << (at % 8);
                }
                widened.push(round(round(code as f32 * scale) + bias));
            }
            scales.push(scale);
            biases.push(bias);
        }
        packed.extend(stream);
    }
    ([packed, floats(dtype, &scales), floats(dtype, &biases)], widened)
}

#[test]
fn affine_of_mlx_with_settings_of_single_layers() {
    let source = ModelDir::open(&testdata("bnb/tiny_llama_bf16")).unwrap();
    for (bits, group, dtype) in [(4, 32, Dtype::BF16), (3, 32, Dtype::F16), (8, 64, Dtype::F32)] {
        let (mut quantized, mut widened) = (Tensors::new(), Tensors::new());
        let mut settings = json!({"group_size": group, "bits": bits, "mode": "affine"});
        let mut overrides = [6, 5, 2].into_iter();
        for view in source.tensors.views() {
            let (values, shape) = (view.to_f32().unwrap(), view.shape.to_vec());
            let path = view.name.strip_suffix(".weight").unwrap();
            // As mlx-lm does it, the embedding and the head are quantized, norms are not. 160 columns fit groups of 32 only.
            let (rows, columns) = match shape[..] {
                [rows, columns] if columns % group == 0 => (rows, columns),
                _ => {
                    quantized.insert(view.name.into(), (dtype, shape.clone(), floats(dtype, &values)));
                    let kept = floats(dtype, &values);
                    widened.insert(view.name.into(), (dtype, shape, kept));
                    continue;
                }
            };
            let own = if path.ends_with("v_proj") { overrides.next().unwrap_or(bits) } else { bits };
            if own != bits {
                settings[path] = json!({"group_size": group, "bits": own});
            }
            let ([packed, scales, biases], values) = affine(&values, columns, own, group, dtype);
            let groups = vec![rows, columns / group];
            quantized.insert(view.name.into(), (Dtype::U32, vec![rows, columns * own / 32], packed));
            quantized.insert(format!("{path}.scales"), (dtype, groups.clone(), scales));
            quantized.insert(format!("{path}.biases"), (dtype, groups, biases));
            widened.insert(view.name.into(), (Dtype::F32, shape, floats(Dtype::F32, &values)));
        }
        let mut config = source.config.clone();
        config["quantization"] = settings;
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &config, &quantized);
        same(dir.path(), &source.config, &widened);

        config["quantization"]["bits"] = json!(6);
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let error = BaseModel::load(ModelDir::open(dir.path()).unwrap(), DType::F32, 8).err().unwrap();
        assert!(error.to_string().contains("do not fit 6 bits in groups of"), "{error}");
    }
}

/// Codes and scales of small floats that give about `values`, and what they are.
fn micro(values: &[f32], mode: &str) -> ([Vec<u8>; 2], Vec<f32>) {
    let four = [0.0f32, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    // E4M3 without its last code, which is no number.
    let eight: Vec<f32> = (0..127u32)
        .map(|c| match c >> 3 {
            0 => (c & 7) as f32 * 2f32.powi(-9),
            e => (8 + (c & 7)) as f32 * 2f32.powi(e as i32 - 10),
        })
        .collect();
    let (table, group) = match mode {
        "mxfp8" => (&eight[..], 32),
        "nvfp4" => (&four[..], 16),
        _ => (&four[..], 32),
    };
    let nearest = |table: &[f32], v: f32| {
        let off = |i: &usize| (table[*i] - v.abs()).abs();
        (0..table.len()).min_by(|a, b| off(a).total_cmp(&off(b))).unwrap()
    };
    let (mut codes, mut scales, mut widened) = (Vec::new(), Vec::new(), Vec::new());
    for part in values.chunks(group) {
        let wanted = part.iter().fold(0.0f32, |m, v| m.max(v.abs())) / table[table.len() - 1];
        let (code, scale) = match mode {
            "nvfp4" => {
                let code = nearest(&eight, wanted);
                (code as u8, eight[code])
            }
            _ => {
                let power = wanted.max(1e-30).log2().ceil();
                ((power + 127.0) as u8, power.exp2())
            }
        };
        scales.push(code);
        for v in part {
            let at = if scale > 0.0 { nearest(table, v / scale) } else { 0 };
            let sign = u8::from(*v < 0.0);
            codes.push(at as u8 | sign << if mode == "mxfp8" { 7 } else { 3 });
            widened.push(table[at] * scale * if sign == 1 { -1.0 } else { 1.0 });
        }
    }
    let packed = match mode {
        "mxfp8" => codes,
        _ => codes.chunks(2).map(|c| c[0] | c[1] << 4).collect(),
    };
    ([packed, scales], widened)
}

#[test]
fn small_floats_of_mlx() {
    let source = ModelDir::open(&testdata("bnb/tiny_llama_bf16")).unwrap();
    for (mode, bits, group) in [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)] {
        let (mut quantized, mut widened) = (Tensors::new(), Tensors::new());
        for view in source.tensors.views() {
            let (values, shape) = (view.to_f32().unwrap(), view.shape.to_vec());
            let [rows, columns] = shape[..] else {
                let kept = (Dtype::F32, shape, floats(Dtype::F32, &values));
                quantized.insert(view.name.into(), kept.clone());
                widened.insert(view.name.into(), kept);
                continue;
            };
            let ([packed, scales], values) = micro(&values, mode);
            let layer = view.name.strip_suffix(".weight").unwrap();
            quantized.insert(view.name.into(), (Dtype::U32, vec![rows, columns * bits / 32], packed));
            quantized.insert(format!("{layer}.scales"), (Dtype::U8, vec![rows, columns / group], scales));
            widened.insert(view.name.into(), (Dtype::F32, shape, floats(Dtype::F32, &values)));
        }
        let mut config = source.config.clone();
        config["quantization"] = json!({"group_size": group, "bits": bits, "mode": mode});
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &config, &quantized);
        same(dir.path(), &source.config, &widened);
    }
}
