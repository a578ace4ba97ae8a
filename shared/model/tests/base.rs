//! The frozen base as stored: its values, its refusals, and which of its pages are in memory.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Tensor};
use kto_formats::{
    bnb::Nf4Tensor,
    model_dir::ModelDir,
    safetensors_out::{SafetensorsWriter, TensorSpec},
    tensors::push_floats,
};
use kto_kernels::{Weight, device::FrozenWeight};
use kto_model::{architecture::Module, base::BaseModel};
use safetensors::Dtype;
use std::path::{Path, PathBuf};

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

fn host(weight: &FrozenWeight) -> &Weight {
    match weight {
        FrozenWeight::Host(weight) => weight,
        FrozenWeight::Gpu(_) => panic!("on a GPU"),
    }
}

fn values(weight: &Weight) -> Vec<f32> {
    let dense: Tensor = weight.to_dense(DType::F32).unwrap();
    dense.flatten_all().unwrap().to_vec1().unwrap()
}

/// Layers of `LAYERS`, 64 wide with an MLP of 4096: 1.6 MB in 16 bits.
const LAYERS: usize = 6;

/// Writes a model in which every value is 0.5, but for what `change` says of (tensor, values).
fn write_model(dir: &Path, dtype: Dtype, tied: bool, change: impl Fn(&str, &mut Vec<f32>)) {
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": 999, "hidden_size": 64, "intermediate_size": 4096, "num_hidden_layers": {LAYERS},
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": {tied}}}"#
    );
    std::fs::write(dir.join("config.json"), config).unwrap();
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![999, 64]),
        ("model.norm.weight".into(), vec![64]),
    ];
    if !tied {
        shapes.push(("lm_head.weight".into(), vec![999, 64]));
    }
    let linears = [(64, 64), (32, 64), (32, 64), (64, 64), (4096, 64), (4096, 64), (64, 4096)];
    for layer in 0..LAYERS {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![64]));
        }
        for (module, (rows, columns)) in Module::ALL.into_iter().zip(linears) {
            shapes.push((format!("{}.weight", module.path(layer)), vec![rows, columns]));
        }
    }
    let specs: Vec<_> = shapes.iter().map(|(n, s)| TensorSpec::new(n.clone(), dtype, s.clone())).collect();
    let mut writer =
        SafetensorsWriter::new(&dir.join("model.safetensors"), specs, &Default::default()).unwrap();
    for (name, shape) in &shapes {
        let mut values = vec![0.5; shape.iter().product()];
        change(name, &mut values);
        let mut bytes = Vec::new();
        push_floats(dtype, &values, &mut bytes).unwrap();
        writer.write(name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn open(dir: &Path) -> BaseModel {
    BaseModel::load(ModelDir::open(dir).unwrap(), DType::F32, 8).unwrap()
}

#[test]
fn stored_values_are_those_of_the_reader() {
    for name in ["bnb/tiny_llama_bnb4", "bnb/tiny_llama_bf16", "stories260k"] {
        let directory = ModelDir::open(&testdata(name)).unwrap();
        let base = open(&testdata(name));
        for layer in 0..base.architecture.layers {
            let weights = base.layer(layer).unwrap();
            let mut bytes = 0;
            for module in Module::ALL {
                let name = format!("{}.weight", module.path(layer));
                let expected = match Nf4Tensor::find(&directory.tensors, &name).unwrap() {
                    Some(packed) => {
                        bytes += packed.packed.len() * 33 / 32;
                        let mut out = vec![0.0; packed.len()];
                        packed.dequantize_into(&mut out).unwrap();
                        out
                    }
                    None => {
                        bytes += directory.tensors.require(&name).unwrap().data.len();
                        directory.tensors.require(&name).unwrap().to_f32().unwrap()
                    }
                };
                let linear = &weights.linears[module as usize];
                assert!(matches!(host(&linear.weight), Weight::Stored(_)));
                assert_eq!(values(host(&linear.weight)), expected, "{name}");
            }
            // Beside the codes and their scales an NF4 matrix has its table and the scales of the scales.
            let more = base.bytes_stored(layer) - bytes;
            assert!(more < 7 * 1200, "{name}: {more}");
        }
        let tensor = |name: &str| directory.tensors.get(name).map(|t| t.to_f32().unwrap());
        let embedding = tensor("model.embed_tokens.weight").unwrap();
        assert_eq!(values(base.embedding().unwrap()), embedding);
        assert_eq!(values(host(base.head().unwrap())), tensor("lm_head.weight").unwrap_or(embedding));
        assert_eq!(base.bytes_head() == 0, base.architecture.tied);
    }
}

#[test]
fn a_model_in_f64_holds_the_same_values() {
    let path = testdata("bnb/tiny_llama_bnb4");
    let stored = open(&path);
    let wide = BaseModel::load(ModelDir::open(&path).unwrap(), DType::F64, 8).unwrap();
    for layer in 0..2 {
        let of = |base: &BaseModel, m: Module| base.layer(layer).unwrap().linears[m as usize].weight.clone();
        for module in Module::ALL {
            let wide = of(&wide, module);
            let Weight::Dense(tensor) = host(&wide) else { panic!("not dense") };
            assert_eq!(tensor.dtype(), DType::F64);
            let tensor = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            assert_eq!(tensor.to_vec1::<f32>().unwrap(), values(host(&of(&stored, module))));
        }
    }
    assert!(matches!(host(wide.head().unwrap()), Weight::Dense(_)));
    assert!(matches!(wide.embedding().unwrap(), Weight::Dense(_)));
}

#[test]
fn what_is_not_finite_is_refused_when_it_is_first_used() {
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), dtype, false, |name, values| match name {
            "model.layers.1.mlp.up_proj.weight" => values[100_001] = f32::NAN,
            "model.embed_tokens.weight" => values[7] = f32::INFINITY,
            _ => {}
        });
        let base = open(dir.path());
        let place = dir.path().display();
        base.layer(0).unwrap();
        base.head().unwrap();
        for _ in 0..2 {
            let says = format!("{place}: tensor \"model.layers.1.mlp.up_proj.weight\": NaN at index 100001");
            let error = base.layer(1).unwrap_err();
            assert_eq!((error.to_string(), error.kind()), (says, kto_cli::Kind::Data));
            let says = format!("{place}: tensor \"model.embed_tokens.weight\": infinity at index 7");
            assert_eq!(base.embedding().unwrap_err().to_string(), says);
        }
        // The caller of load knows the place.
        let error = BaseModel::load(ModelDir::open(dir.path()).unwrap(), DType::F64, 8).err().unwrap();
        let says = "tensor \"model.layers.1.mlp.up_proj.weight\": NaN at index 100001";
        assert_eq!(error.to_string(), says);
    }
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), Dtype::BF16, true, |name, values| {
        values[3] = if name == "model.norm.weight" { f32::NAN } else { 0.5 };
    });
    let error = BaseModel::load(ModelDir::open(dir.path()).unwrap(), DType::F32, 8).err().unwrap();
    assert_eq!(error.to_string(), "tensor \"model.norm.weight\": NaN at index 3");
}

/// Bytes of a mapped file that are in memory.
#[cfg(target_os = "linux")]
fn resident(file: &Path) -> usize {
    let (maps, file) = (std::fs::read_to_string("/proc/self/smaps").unwrap(), file.display().to_string());
    let mut lines = maps.lines().skip_while(|l| !l.ends_with(&file));
    let rss = lines.find_map(|l| l.strip_prefix("Rss:")).unwrap();
    rss.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

#[cfg(target_os = "linux")]
#[test]
fn when_streaming_one_block_is_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), Dtype::BF16, false, |_, _| {});
    let file = dir.path().join("model.safetensors");
    let mut base = open(dir.path());
    let block = base.bytes_stored(0);
    assert_eq!(block, 2 * (64 * 192 + 3 * 64 * 4096));
    // What the system maps around the pages that are touched.
    let slack = 512 << 10;
    base.set_streaming(true);
    assert!(resident(&file) < slack);
    for layer in (0..LAYERS).chain((0..LAYERS).rev()) {
        let weights = base.layer(layer).unwrap();
        let sum: f32 = weights.linears.iter().flat_map(|l| values(host(&l.weight))).sum();
        assert_eq!(sum, block as f32 / 4.0);
        let found = resident(&file);
        assert!((block..block + slack).contains(&found), "block {layer}: {found} bytes in memory");
        base.release(layer).unwrap();
        assert!(resident(&file) < slack, "block {layer}");
    }
    base.set_streaming(false);
    for layer in 0..LAYERS {
        base.layer(layer).unwrap().linears.iter().for_each(|l| drop(values(host(&l.weight))));
        base.release(layer).unwrap();
    }
    assert!(resident(&file) > LAYERS * block);
}
