//! Every family and rope scaling against transformers and PEFT: logits, log-probabilities and the LoRA gradients of one KTO step, on
//! the processor and on an emulated GPU (testdata/families).
#![allow(clippy::unwrap_used)]

mod kto_step;

use candle_core::{DType, Device as HostDevice, Tensor};
use kto_formats::{model_dir::ModelDir, tensors::TensorStore};
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
    lora::{Lora, LoraSpec},
    rows::Packing,
};
use kto_step::{POSITIONS, distance, floats, ids, step};
use std::path::{Path, PathBuf};

const WORKS: [&str; 17] = [
    "gemma2",
    "gemma3",
    "gemma3-images",
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
fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/families").join(name)
}

fn golden(name: &str) -> TensorStore {
    TensorStore::open_file(&folder(name).join("golden.safetensors")).unwrap()
}

fn base(name: &str, positions: usize, device: Option<&Device>) -> BaseModel {
    let mut base = BaseModel::load(ModelDir::open(&folder(name)).unwrap(), DType::F32, positions).unwrap();
    if let Some(device) = device {
        base.place(device, Placement::default(), |_| {}).unwrap();
    }
    base
}

/// What a decoder does not compute with is named; a head beside the embedding that it shall be counts, as in transformers.
#[test]
fn further_tensors_are_told() {
    let top = tempfile::tempdir().unwrap();
    let with = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let dir = top.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::copy(folder("llama-biases").join("model.safetensors"), dir.join("model.safetensors"))
            .unwrap();
        let text = std::fs::read(folder("llama-biases").join("config.json")).unwrap();
        let mut config = serde_json::from_slice(&text).unwrap();
        change(&mut config);
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        ModelDir::open(&dir).unwrap()
    };
    let unused = |model: &ModelDir| {
        let architecture = Architecture::from_config(&model.config).unwrap();
        kto_model::weights::check(&architecture, model).unwrap();
        kto_model::weights::unused(&architecture, model)
    };
    assert_eq!(unused(&with("whole", &|_| {})), None);
    let less = with("less", &|config| config["attention_bias"] = false.into());
    let said = unused(&less).unwrap();
    assert!(said.starts_with("tensor \"model.layers.0.self_attn.k_proj.bias\" and 7 others"), "{said}");
    let tied = with("tied", &|config| config["tie_word_embeddings"] = true.into());
    assert!(tied.config["tie_word_embeddings"] == false && tied.notes[0].contains("another head"));
    assert_eq!(unused(&tied), None);
}

fn gpu() -> Option<Device> {
    Some(Device::Gpu(Gpu::new(emulated_gpu(1 << 30, Stream::Copy)?, 1 << 30), Dense::F32))
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

fn check_step(name: &str, base: &BaseModel, packing: Packing, kept_layers: usize) {
    let store = golden(name);
    let found = step(&store, base, &adapter(&store, &base.architecture), packing, kept_layers);
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
            let golden = golden(name);
            step(&golden, base, &adapter(&golden, &base.architecture), Packing::Shared(4096), 1)
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
