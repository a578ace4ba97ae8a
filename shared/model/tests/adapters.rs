//! Adapters of every kind against PEFT: what one KTO step with each computes, and that it is written as PEFT has written it (testdata/adapters).
#![allow(clippy::unwrap_used)]

mod kto_step;

use candle_core::DType;
use kto_formats::{
    adapter::{Adapter, AdapterMeta},
    model_dir::ModelDir,
    tensors::TensorStore,
};
use kto_kernel_checks::emulated_gpu;
use kto_kernels::{
    Dense,
    device::Device,
    gpu::{Gpu, Stream},
};
use kto_model::{
    architecture::Architecture,
    base::{BaseModel, Placement},
    generate::Generator,
    lora::{Lora, LoraLayout, LoraSpec},
    rows::Packing,
};
use kto_step::{POSITIONS, distance, floats, ids, step};
use std::path::{Path, PathBuf};

/// The adapter, and the model of testdata/families that it is on.
const CASES: [(&str, &str); 18] = [
    ("bias-adapted", "llama-biases"),
    ("bias-all", "stablelm"),
    ("dora", "qwen2"),
    ("dora-biases", "llama-biases"),
    ("dora-fused", "phi3"),
    ("dora-layers", "llama-linear"),
    ("dora-norms", "gemma3"),
    ("patterns", "qwen3"),
    ("regex", "mistral-window"),
    ("whole-block", "qwen3"),
    ("whole-embedding", "qwen2"),
    ("whole-ends", "llama-biases"),
    ("whole-fused", "phi3"),
    ("whole-head", "qwen2"),
    ("whole-layers", "stablelm"),
    ("whole-mlp", "llama-biases"),
    ("whole-norms", "gemma3"),
    ("whole-tied", "gemma2"),
];

fn testdata(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(path)
}

fn base(name: &str) -> BaseModel {
    let directory = ModelDir::open(&testdata("families").join(name)).unwrap();
    BaseModel::load(directory, DType::F32, POSITIONS).unwrap()
}

fn check_step(name: &str, base: &BaseModel, lora: &Lora, packing: Packing, kept_layers: usize) {
    let store = TensorStore::open_file(&testdata("adapters").join(name).join("golden.safetensors")).unwrap();
    let found = step(&store, base, lora, packing, kept_layers);
    for (what, found) in &found.numbers {
        for (found, expected) in found.iter().zip(floats(&store, what)) {
            let off = (found - f64::from(expected)).abs() / f64::from(expected).abs().max(1.0);
            assert!(off < 1e-5, "{name} {what}: {found} {expected}");
        }
    }
    for (tensor, gradient) in &found.gradients {
        let end = if tensor.contains(".lora_A") || tensor.contains(".lora_B") { ".weight" } else { "" };
        let off = distance(gradient, &floats(&store, &format!("grad/{tensor}{end}")));
        assert!(off < 1e-4, "{name} {tensor}: {off:.1e}");
    }
    let compared = found.gradients.len();
    assert_eq!(compared, store.names().filter(|n| n.starts_with("grad/")).count(), "{name}");
}

#[test]
fn a_step_is_that_of_peft() {
    for (name, family) in CASES {
        let base = base(family);
        let adapter = Adapter::read(&testdata("adapters").join(name)).unwrap();
        let lora = Lora::from_adapter(&base.architecture, &adapter, DType::F32).unwrap();
        for (packing, kept) in [(Packing::Shared(4096), 0), (Packing::Shared(10), 1), (Packing::Single, 3)] {
            check_step(name, &base, &lora, packing, kept);
        }
    }
}

/// Generation goes through the same weights: log-probabilities from its logits, token by token and at once.
#[test]
fn generation_is_that_of_peft() {
    for (name, family) in CASES {
        let base = base(family);
        let adapter = Adapter::read(&testdata("adapters").join(name)).unwrap();
        let lora = Lora::from_adapter(&base.architecture, &adapter, DType::F32).unwrap();
        let store =
            TensorStore::open_file(&testdata("adapters").join(name).join("golden.safetensors")).unwrap();
        for (row, expected) in floats(&store, "logps").iter().enumerate() {
            let [prompt, completion] =
                ["prompt", "completion"].map(|part| ids(&store, &format!("{row}.{part}")));
            let all = [&prompt[..], &completion].concat();
            for single in [false, true] {
                let mut generator = Generator::new(&base, Some(&lora), all.len()).unwrap();
                let fed: Vec<_> = match single {
                    true => all.iter().map(|id| generator.feed(&[*id], true).unwrap()).collect(),
                    false => vec![generator.feed(&all, true).unwrap()],
                };
                let rows: Vec<Vec<f32>> = fed.iter().flat_map(|t| t.to_vec2().unwrap()).collect();
                let logp = |(i, id): (usize, &u32)| {
                    let row = &rows[prompt.len() + i - 1];
                    let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
                    f64::from(row[*id as usize]) - sum.ln()
                };
                let found: f64 = completion.iter().enumerate().map(logp).sum();
                let off = (found - f64::from(*expected)).abs() / f64::from(*expected).abs();
                assert!(off < 1e-5, "{name} row {row}: {found} {expected}");
            }
        }
    }
}

/// Ranks that differ from block to block share one buffer there too; what is trained whole is refused.
#[test]
fn a_gpu_computes_matrices_and_dora() {
    let Some(machine) = emulated_gpu(1 << 30, Stream::Copy) else { return };
    let device = Device::Gpu(Gpu::new(machine, 1 << 30), Dense::F32);
    let refused = [("whole-head", "modules_to_save"), ("bias-all", "bias")];
    let all =
        [("patterns", "qwen3"), ("regex", "mistral-window"), ("dora", "qwen2"), ("whole-head", "qwen2")];
    for (name, family) in all.into_iter().chain([("bias-all", "stablelm")]) {
        let mut base = base(family);
        base.place(&device, Placement::default(), |_| {}).unwrap();
        let adapter = Adapter::read(&testdata("adapters").join(name)).unwrap();
        let lora = Lora::from_adapter(&base.architecture, &adapter, DType::F32).unwrap();
        if let Some((_, text)) = refused.iter().find(|(refused, _)| *refused == name) {
            let error = Generator::new(&base, Some(&lora), 4).err().unwrap();
            assert_eq!((error.kind().code(), error.to_string().contains(text)), (69, true), "{error}");
        } else {
            check_step(name, &base, &lora, Packing::Shared(10), 1);
        }
    }
}

#[test]
fn it_is_written_as_peft_has_written_it() {
    for (name, family) in CASES {
        let (base, path) = (base(family), testdata("adapters").join(name));
        let adapter = Adapter::read(&path).unwrap();
        let lora = Lora::from_adapter(&base.architecture, &adapter, DType::F32).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let back = lora.to_adapter(adapter.config.clone()).unwrap();
        back.write(dir.path(), AdapterMeta::default()).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let (ours, peft) = (std::fs::read(dir.path().join(file)), std::fs::read(path.join(file)));
            assert!(ours.unwrap() == peft.unwrap(), "{name}: {file} differs");
        }
    }
}

/// The settings choose the modules, ranks and scales that PEFT has chosen.
#[test]
fn a_fresh_adapter_has_the_shape_of_peft() {
    for (name, family) in CASES {
        let base = base(family);
        let adapter = Adapter::read(&testdata("adapters").join(name)).unwrap();
        let layout = LoraLayout::of_config(&base.architecture, &adapter.config.peft().unwrap()).unwrap();
        let fresh = Lora::laid_out(&base.architecture, &layout, 1, DType::F32).unwrap();
        let given = Lora::from_adapter(&base.architecture, &adapter, DType::F32).unwrap();
        let shape = |lora: &Lora| -> Vec<_> {
            let factors = lora.named().map(|(n, f)| (n, f.a.dims().to_vec(), f.scale, f.magnitude.is_some()));
            let whole = lora.whole.iter().map(|(n, t)| (n.clone(), t.dims().to_vec(), 0.0, false));
            factors.chain(whole).collect()
        };
        assert_eq!(shape(&fresh), shape(&given), "{name}");
    }
}

/// Magnitudes begin as the lengths of the rows, so that nothing changes; token by token as at once.
#[test]
fn a_fresh_dora_is_the_base() {
    for family in ["qwen2", "gemma3", "phi3"] {
        let base = base(family);
        let spec = LoraSpec { rank: 2, alpha: 3.0, modules: base.architecture.modules().to_vec() };
        let layout = LoraLayout { dora: true, ..LoraLayout::uniform(&base.architecture, &spec) };
        let lora = Lora::laid_out(&base.architecture, &layout, 1, DType::F32).unwrap();
        lora.measure(&base).unwrap();
        let ids: Vec<u32> = (3..20).collect();
        let logits = |lora: Option<&Lora>, single: bool| -> Vec<f32> {
            let mut generator = Generator::new(&base, lora, ids.len()).unwrap();
            let all = match single {
                true => ids.iter().map(|id| generator.feed(&[*id], true).unwrap()).collect(),
                false => vec![generator.feed(&ids, true).unwrap()],
            };
            all.iter().flat_map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
        };
        let expected = logits(None, false);
        for single in [false, true] {
            let off = distance(&logits(Some(&lora), single), &expected);
            assert!(off < 1e-5, "{family}: {off:.1e}");
        }
    }
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let base = base("qwen2");
    let adapter = Adapter::read(&testdata("adapters/whole-head")).unwrap();
    let head = adapter.saved["lm_head.weight"].clone();
    let error = |change: &dyn Fn(&mut Adapter)| {
        let mut adapter = adapter.clone();
        change(&mut adapter);
        let error = Lora::from_adapter(&base.architecture, &adapter, DType::F32).unwrap_err();
        assert_eq!(error.kind().code(), 65);
        error.to_string()
    };
    let insert = |name: &str| {
        let (name, head) = (name.to_string(), head.clone());
        move |a: &mut Adapter| drop(a.saved.insert(name.clone(), head.clone()))
    };
    assert!(
        error(&insert("model.norm.weight"))
            .contains("\"model.norm.weight\" has the shape [48, 32], the model has [32]")
    );
    assert!(
        error(&insert("model.vision.weight"))
            .contains("\"model.vision.weight\" is no tensor of this qwen2 model")
    );
    assert!(
        error(&|a| a.saved.clear())
            .contains("\"lm_head.weight\" is trained whole (modules_to_save, bias), but the file")
    );
    let both = |a: &mut Adapter| {
        a.config.kept.insert("bias".into(), "all".into());
        a.config.kept.insert("modules_to_save".into(), serde_json::json!(["k_proj"]));
    };
    assert!(error(&both).contains("may have no bias where bias is \"all\""));
    // More than the settings say is used: PEFT saves an embedding that has got new tokens so.
    let mut more = adapter.clone();
    insert("model.embed_tokens.weight")(&mut more);
    assert_eq!(Lora::from_adapter(&base.architecture, &more, DType::F32).unwrap().whole.len(), 2);
}

#[test]
fn settings_that_adapt_nothing_are_refused() {
    let model = ModelDir::open(&testdata("families/qwen2")).unwrap();
    let architecture = Architecture::from_config(&model.config).unwrap();
    let mut config = Adapter::read(&testdata("adapters/dora")).unwrap().config;
    config.target_modules = ["w1"].into();
    let error = LoraLayout::of_config(&architecture, &config.peft().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "no linear layer of the model is adapted");
}
