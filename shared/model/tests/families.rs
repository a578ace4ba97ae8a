//! Every family and rope scaling against transformers and PEFT: logits, log-probabilities and the LoRA gradients of one KTO step, on
//! the processor and on an emulated GPU (testdata/families).
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device as HostDevice, Tensor};
use kto_formats::{
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
    lora::{Lora, LoraSpec},
    rows::{Batch, Job, Packing},
    sweep::{BranchStats, Sweep},
};
use std::path::{Path, PathBuf};

const WORKS: [&str; 16] = [
    "gemma2",
    "gemma3",
    "llama-biases",
    "llama-linear",
    "llama-yarn",
    "llama3",
    "mistral-window",
    "phi3",
    "phi3-longrope",
    "phi3-partial",
    "phi4-mini",
    "qwen2",
    "qwen2-yarn",
    "qwen3",
    "stablelm",
    "stablelm-plain",
];
/// Longest sequence.
const POSITIONS: usize = 28;
const BETA: f64 = 0.3;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/families").join(name)
}

fn golden(name: &str) -> TensorStore {
    TensorStore::open_file(&folder(name).join("golden.safetensors")).unwrap()
}

fn ids(store: &TensorStore, name: &str) -> Vec<u32> {
    let view = store.require(name).unwrap();
    view.data.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn floats(store: &TensorStore, name: &str) -> Vec<f32> {
    store.require(name).unwrap().to_f32().unwrap()
}

fn base(name: &str, positions: usize, device: Option<&Device>) -> BaseModel {
    let mut base = BaseModel::load(ModelDir::open(&folder(name)).unwrap(), DType::F32, positions).unwrap();
    if let Some(device) = device {
        base.place(device, Placement::default(), |_| {}).unwrap();
    }
    base
}

fn gpu() -> Option<Device> {
    Some(Device::Gpu(Gpu::new(emulated_gpu(1 << 30, Stream::Copy)?, 1 << 30), Dense::F32))
}

/// Returns |a − b| / |b| of whole tensors.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut b.iter().map(|b| f64::from(*b)))
}

fn check_logits(name: &str, length: &str, base: &BaseModel) {
    let store = golden(name);
    let ids = ids(&store, &format!("ids.{length}"));
    let expected = floats(&store, &format!("logits.{length}"));
    let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    // At once, and a token at a time from the cache.
    let whole = flat(Generator::new(base, None, ids.len()).unwrap().feed(&ids, true).unwrap());
    let mut generator = Generator::new(base, None, ids.len()).unwrap();
    let single: Vec<f32> = ids.iter().flat_map(|id| flat(generator.feed(&[*id], true).unwrap())).collect();
    // What was said of a short text is not said again when it has grown long and turns otherwise.
    let grown = base.architecture.original_length().filter(|length| ids.len() > *length).unwrap_or(0);
    let grown = grown * base.architecture.vocab_size;
    for (how, found, from) in [("at once", whole, 0), ("one by one", single, grown)] {
        let found = distance(&found[from..], &expected[from..]);
        assert!(found < 1e-5, "{name} {length} {how}: {found:.1e}");
    }
}

/// The trained rows of a golden step as tokens.
fn tokens(store: &TensorStore, vocabulary: usize) -> TokenSet {
    let meta =
        TokenMeta { vocab_size: vocabulary as u32, max_length: POSITIONS as u32, ..Default::default() };
    let mut set = TokenSet::new(meta);
    for i in 0..2 {
        let [prompt, completion] = ["prompt", "completion"].map(|part| ids(store, &format!("{i}.{part}")));
        set.push(TokenRow {
            prompt_ids: &prompt,
            completion_ids: &completion,
            label: i == 0,
            prompt_hash: prompt_hash(&prompt),
        });
    }
    set
}

fn adapter(store: &TensorStore, architecture: &Architecture) -> Lora {
    let spec = LoraSpec { rank: 2, alpha: 3.0, modules: architecture.modules().to_vec() };
    let lora = Lora::fresh(architecture, &spec, 1, DType::F32).unwrap();
    for (name, tensor) in lora.named_tensors() {
        let values = floats(store, &format!("lora/{name}.weight"));
        let values = Tensor::from_vec(values, tensor.shape(), &HostDevice::Cpu).unwrap();
        tensor.slice_set(&values, 0, 0).unwrap();
    }
    lora
}

/// What one step says.
struct Step {
    /// By the name of a number: of the loss, or of the two rows.
    numbers: Vec<(&'static str, Vec<f64>)>,
    /// Of A and B of every matrix.
    gradients: Vec<(String, Vec<f32>)>,
}

/// One step of TRL's KTO over two rows, the first desirable. The KL completion of a row is the other row's.
fn step(name: &str, base: &BaseModel, packing: Packing, kept_layers: usize) -> Step {
    let store = golden(name);
    let tokens = tokens(&store, base.architecture.vocab_size);
    let lora = adapter(&store, &base.architecture);
    let spec = WorkspaceSpec { kept_layers, head_rows: 5, ..Default::default() };
    let workspace = Workspace::new(&base.architecture, Some(&lora), spec, base.device());
    let job = |prompt, completion, gradient| Job { prompt, completion, gradient };
    let jobs = [job(0, 0, true), job(1, 1, true), job(0, 1, false), job(1, 0, false)];
    let batch = Batch::new(&tokens, base.architecture.limits(POSITIONS), &jobs, packing);
    let sweep = Sweep { base, lora: None, dropout: None, workspace: &workspace, watch: None };
    let reference = batch.by_job(&sweep.forward(&batch.packs, false).unwrap().branches);
    let sweep = Sweep { lora: Some(&lora), ..sweep };
    let forward = sweep.forward(&batch.packs, true).unwrap();
    let policy = batch.by_job(&forward.branches);
    let rewards: Vec<f64> = policy.iter().zip(&reference).map(|(p, r)| p.logps - r.logps).collect();
    let kl = ((rewards[2] + rewards[3]) / 2.0).max(0.0);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let arguments = [BETA * (rewards[0] - kl), BETA * (kl - rewards[1])];
    let loss = arguments.iter().map(|x| 1.0 - sigmoid(*x)).sum::<f64>() / 2.0;
    let slopes = arguments.map(|x| BETA / 2.0 * sigmoid(x) * (1.0 - sigmoid(x)));
    let weights = [-slopes[0], slopes[1]];
    let weight = |b: &BranchStats| if b.gradient { weights[b.tag] } else { 0.0 };
    let coefficients: Vec<Vec<f64>> =
        forward.branches.iter().map(|p| p.iter().map(weight).collect()).collect();
    let gradients = lora.zeros_like().unwrap();
    sweep.backward(&batch.packs, forward, &coefficients, &gradients).unwrap();
    let rows = |stats: &[BranchStats]| stats[..2].iter().map(|s| s.logps).collect();
    Step {
        numbers: vec![
            ("kl", vec![kl]),
            ("loss", vec![loss]),
            ("logps", rows(&policy)),
            ("reference_logps", rows(&reference)),
        ],
        gradients: gradients
            .named_tensors()
            .map(|(name, tensor)| (name, tensor.flatten_all().unwrap().to_vec1().unwrap()))
            .collect(),
    }
}

fn check_step(name: &str, base: &BaseModel, packing: Packing, kept_layers: usize) {
    let (store, found) = (golden(name), step(name, base, packing, kept_layers));
    for (what, found) in &found.numbers {
        for (found, expected) in found.iter().zip(floats(&store, what)) {
            let off = (found - f64::from(expected)).abs() / f64::from(expected).abs().max(1.0);
            assert!(off < 1e-5, "{name} {what}: {found} {expected}");
        }
    }
    for (tensor, gradient) in &found.gradients {
        let off = distance(gradient, &floats(&store, &format!("grad/{tensor}.weight")));
        assert!(off < 1e-4, "{name} {tensor}: {off:.1e}");
    }
}

#[test]
fn logits_are_those_of_transformers() {
    for name in WORKS {
        let base = base(name, POSITIONS, None);
        check_logits(name, "short", &base);
        check_logits(name, "long", &base);
    }
}

#[test]
fn a_step_is_that_of_trl_and_peft() {
    for name in WORKS {
        let base = base(name, POSITIONS, None);
        for (packing, kept) in [(Packing::Shared(4096), 0), (Packing::Shared(10), 1), (Packing::Single, 3)] {
            check_step(name, &base, packing, kept);
        }
    }
}

#[test]
fn a_gpu_computes_every_family() {
    let Some(gpu) = gpu() else { return };
    for name in WORKS {
        let base = base(name, POSITIONS, Some(&gpu));
        check_logits(name, "long", &base);
        check_step(name, &base, Packing::Shared(4096), 1);
    }
}

/// Fused matrices as bitsandbytes stores them: the parts of one lie in the middle of its codes and scales.
#[test]
fn quantized_families_compute_with_what_is_decoded() {
    for name in ["phi3-longrope", "stablelm"] {
        let folder = folder("../families-nf4").join(name);
        let store = TensorStore::open_file(&folder.join("golden.safetensors")).unwrap();
        let ids = ids(&golden(name), "ids.long");
        let open = || BaseModel::load(ModelDir::open(&folder).unwrap(), DType::F32, POSITIONS).unwrap();
        let check = |base: &BaseModel, what: &str| {
            let found = Generator::new(base, None, ids.len()).unwrap().feed(&ids, true).unwrap();
            let found = found.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let off = distance(&found, &floats(&store, "logits.long"));
            assert!(off < 1e-5, "{name} {what}: {off:.1e}");
            step(name, base, Packing::Shared(4096), 1)
        };
        let expected = check(&open(), "on the processor");
        for (device, share_widened) in [(gpu(), false), (gpu(), true)] {
            let Some(device) = device else { return };
            let mut base = open();
            base.place(&device, Placement { share_widened, ..Default::default() }, |_| {}).unwrap();
            let found = check(&base, if share_widened { "in one place" } else { "on a GPU" });
            for ((tensor, found), (_, expected)) in found.gradients.iter().zip(&expected.gradients) {
                let off = distance(found, expected);
                assert!(off < 2e-5, "{name} {tensor}: {off:.1e}");
            }
        }
    }
}

/// Sequences that are made together pass the length from which on they turn otherwise at different steps.
#[test]
fn sequences_grow_long_one_by_one() {
    let base = base("phi3-longrope", POSITIONS, None);
    let flat = |t: Tensor| t.to_vec2::<f32>().unwrap();
    let ids: Vec<u32> = (0..40).map(|i| 3 + i * 7 % 45).collect();
    let texts = [&ids[..22], &ids[22..]];
    let mut generator = Generator::batch(&base, None, &[22, 18]).unwrap();
    generator.feed_batch(&[(0, &texts[0][..14]), (1, &texts[1][..10])], false).unwrap();
    for i in 0..8 {
        let parts = [(0, &texts[0][14 + i..15 + i]), (1, &texts[1][10 + i..11 + i])];
        let found = flat(generator.feed_batch(&parts, false).unwrap());
        for (row, end) in [14 + i, 10 + i].into_iter().enumerate() {
            let mut alone = Generator::new(&base, None, end + 1).unwrap();
            let expected = flat(alone.feed(&texts[row][..=end], false).unwrap());
            assert!(distance(&found[row], &expected[0]) < 1e-5, "{row} at {end}");
        }
    }
}

/// A rotation that is another one for each length is computed up to the original length, and refused beyond.
#[test]
fn dynamic_scaling_ends_at_the_original_length() {
    check_logits("llama-dynamic", "short", &base("llama-dynamic", 16, None));
    let model = ModelDir::open(&folder("llama-dynamic")).unwrap();
    let error = BaseModel::load(model, DType::F32, 17).err().unwrap();
    assert_eq!(error.kind().code(), 65);
    assert!(error.to_string().contains("beyond 16"), "{error}");
}
