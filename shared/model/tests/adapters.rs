//! Adapters of every kind against PEFT: what one KTO step with each computes, and that it is written as PEFT has written it (testdata/adapters).
#![allow(clippy::unwrap_used)]

use candle_core::DType;
use kto_formats::{
    adapter::{Adapter, AdapterMeta},
    model_dir::ModelDir,
    tensors::TensorStore,
    tokens::{TokenMeta, TokenRow, TokenSet, prompt_hash},
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
    buffers::{Workspace, WorkspaceSpec},
    generate::Generator,
    lora::{Lora, LoraLayout, LoraSpec},
    rows::{Batch, Job, Packing},
    sweep::{BranchStats, Sweep},
};
use std::path::{Path, PathBuf};

/// The adapter, and the model of testdata/families that it is on.
const CASES: [(&str, &str); 7] = [
    ("dora", "qwen2"),
    ("dora-biases", "llama-biases"),
    ("dora-fused", "phi3"),
    ("dora-layers", "llama-linear"),
    ("dora-norms", "gemma3"),
    ("patterns", "qwen3"),
    ("regex", "mistral-window"),
];
const POSITIONS: usize = 28;
const BETA: f64 = 0.3;

fn testdata(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(path)
}

fn base(name: &str) -> BaseModel {
    let directory = ModelDir::open(&testdata("families").join(name)).unwrap();
    BaseModel::load(directory, DType::F32, POSITIONS).unwrap()
}

fn ids(store: &TensorStore, name: &str) -> Vec<u32> {
    let view = store.require(name).unwrap();
    view.data.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn floats(store: &TensorStore, name: &str) -> Vec<f32> {
    store.require(name).unwrap().to_f32().unwrap()
}

/// Returns |a − b| / |b| of whole tensors.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut b.iter().map(|b| f64::from(*b)))
}

fn tokens(store: &TensorStore, vocabulary: usize) -> TokenSet {
    let meta =
        TokenMeta { vocab_size: vocabulary as u32, max_length: POSITIONS as u32, ..Default::default() };
    let mut set = TokenSet::new(meta);
    for i in 0..2 {
        let [prompt, completion] = ["prompt", "completion"].map(|part| ids(store, &format!("{i}.{part}")));
        let prompt_hash = prompt_hash(&prompt);
        set.push(TokenRow { prompt_ids: &prompt, completion_ids: &completion, label: i == 0, prompt_hash });
    }
    set
}

/// One step of TRL's KTO over two rows, the first desirable; the KL completion of a row is the other row's.
fn check_step(name: &str, base: &BaseModel, lora: &Lora, packing: Packing, kept_layers: usize) {
    let store = TensorStore::open_file(&testdata("adapters").join(name).join("golden.safetensors")).unwrap();
    let tokens = tokens(&store, base.architecture.vocab_size);
    let spec = WorkspaceSpec { kept_layers, head_rows: 5, ..Default::default() };
    let workspace = Workspace::new(&base.architecture, Some(lora), spec, base.device());
    let job = |prompt, completion, gradient| Job { prompt, completion, gradient };
    let jobs = [job(0, 0, true), job(1, 1, true), job(0, 1, false), job(1, 0, false)];
    let batch = Batch::new(&tokens, base.architecture.limits(POSITIONS), &jobs, packing);
    let sweep = Sweep { base, lora: None, dropout: None, workspace: &workspace, watch: None };
    let reference = batch.by_job(&sweep.forward(&batch.packs, false).unwrap().branches);
    let sweep = Sweep { lora: Some(lora), ..sweep };
    let forward = sweep.forward(&batch.packs, true).unwrap();
    let policy = batch.by_job(&forward.branches);
    let rewards: Vec<f64> = policy.iter().zip(&reference).map(|(p, r)| p.logps - r.logps).collect();
    let kl = ((rewards[2] + rewards[3]) / 2.0).max(0.0);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let arguments = [BETA * (rewards[0] - kl), BETA * (kl - rewards[1])];
    let close = |what: &str, found: f64, expected: f32| {
        let off = (found - f64::from(expected)).abs() / f64::from(expected).abs().max(1.0);
        assert!(off < 1e-5, "{name} {what}: {found} {expected}");
    };
    close("kl", kl, floats(&store, "kl")[0]);
    for i in 0..2 {
        close("logps", policy[i].logps, floats(&store, "logps")[i]);
        close("reference_logps", reference[i].logps, floats(&store, "reference_logps")[i]);
    }
    let slopes = arguments.map(|x| BETA / 2.0 * sigmoid(x) * (1.0 - sigmoid(x)));
    let weights = [-slopes[0], slopes[1]];
    let weight = |b: &BranchStats| if b.gradient { weights[b.tag] } else { 0.0 };
    let coefficients: Vec<Vec<f64>> =
        forward.branches.iter().map(|p| p.iter().map(weight).collect()).collect();
    let gradients = lora.zeros_like().unwrap();
    sweep.backward(&batch.packs, forward, &coefficients, &gradients).unwrap();
    let mut compared = 0;
    for (tensor, gradient) in gradients.named_tensors() {
        let found: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
        let end = if tensor.ends_with("vector") { "" } else { ".weight" };
        let off = distance(&found, &floats(&store, &format!("grad/{tensor}{end}")));
        assert!(off < 1e-4, "{name} {tensor}: {off:.1e}");
        compared += 1;
    }
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

/// Ranks that differ from block to block share one buffer there too; DoRA is refused.
#[test]
fn a_gpu_computes_all_but_dora() {
    let Some(machine) = emulated_gpu(1 << 30, Stream::Copy) else { return };
    let device = Device::Gpu(Gpu::new(machine, 1 << 30), Dense::F32);
    for (name, family) in [("patterns", "qwen3"), ("regex", "mistral-window"), ("dora", "qwen2")] {
        let mut base = base(family);
        base.place(&device, Placement::default(), |_| {}).unwrap();
        let adapter = Adapter::read(&testdata("adapters").join(name)).unwrap();
        let lora = Lora::from_adapter(&base.architecture, &adapter, DType::F32).unwrap();
        if name == "dora" {
            let error = Generator::new(&base, Some(&lora), 4).err().unwrap();
            assert_eq!((error.kind().code(), error.to_string().contains("DoRA")), (69, true), "{error}");
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
            factors.collect()
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
fn settings_that_adapt_nothing_are_refused() {
    let model = ModelDir::open(&testdata("families/qwen2")).unwrap();
    let architecture = Architecture::from_config(&model.config).unwrap();
    let mut config = Adapter::read(&testdata("adapters/dora")).unwrap().config;
    config.target_modules = ["w1"].into();
    let error = LoraLayout::of_config(&architecture, &config.peft().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "no linear layer of the model is adapted");
}
