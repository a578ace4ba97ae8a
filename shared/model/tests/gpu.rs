//! The engine's GPU form on an emulated device, against the engine on the processor: scores, gradients, streams, memory.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Tensor};
use kto_formats::{
    model_dir::ModelDir,
    safetensors_out::{SafetensorsWriter, TensorSpec},
    tokens::{TokenMeta, TokenRow, TokenSet, prompt_hash},
};
use kto_kernel_checks::emulated_gpu;
use kto_kernels::{
    Dense, DropoutKey,
    device::Device,
    gpu::{Gpu, Stream},
    random,
};
use kto_model::{
    architecture::Module,
    base::{BaseModel, Placement},
    buffers::{Workspace, WorkspaceSpec},
    generate::Generator,
    lora::{Lora, LoraLayout, LoraSpec},
    rows::{Batch, Job, Packing},
    sweep::Sweep,
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

/// Shared prompts, one-token prompts and completions.
fn tokens(vocabulary: u64) -> TokenSet {
    let meta = TokenMeta { vocab_size: vocabulary as u32, max_length: 100, ..Default::default() };
    let mut set = TokenSet::new(meta);
    let ids = |stream: u64, n: u64| {
        (0..n).map(|i| random::below(stream, i, vocabulary) as u32).collect::<Vec<u32>>()
    };
    for (i, (prompt, completion)) in [(1, 1), (5, 7), (5, 3), (33, 9), (3, 21)].into_iter().enumerate() {
        let prompt = ids(if i == 2 { 1 } else { i as u64 }, prompt);
        set.push(TokenRow {
            prompt_ids: &prompt,
            completion_ids: &ids(100 + i as u64, completion),
            label: i % 2 == 0,
            prompt_hash: prompt_hash(&prompt),
        });
    }
    set
}

fn jobs() -> Vec<Job> {
    let main = (0..5).map(|i| Job { prompt: i, completion: i, gradient: true });
    let kl = (0..5).map(|i| Job { prompt: i, completion: (i + 3) % 5, gradient: false });
    main.chain(kl).collect()
}

const COEFFICIENTS: [f64; 5] = [0.7, -1.1, 0.3, 0.05, -0.02];

/// How a run is placed.
#[derive(Clone, Copy)]
struct Form {
    placement: Placement,
    spec: WorkspaceSpec,
    packing: Packing,
    dropout: Option<DropoutKey>,
    modules: &'static [Module],
    dora: bool,
}

const WHOLE: Form = Form {
    placement: Placement { streamed: false, share_widened: false, head_tile: None },
    spec: WorkspaceSpec { kept_layers: 1, head_rows: 13, head_in_tiles: false, offload_inputs: false },
    packing: Packing::Shared(4096),
    dropout: None,
    modules: &Module::ALL,
    dora: false,
};

/// Scores and gradients of two sweeps.
#[derive(Debug, PartialEq)]
struct Found {
    logps: Vec<f64>,
    entropies: Vec<f64>,
    gradients: Vec<Vec<f32>>,
}

fn open(model: &Path) -> BaseModel {
    BaseModel::load(ModelDir::open(model).unwrap(), DType::F32, 100).unwrap()
}

fn base(model: &str) -> BaseModel {
    open(&testdata(model))
}

fn run(model: &str, device: Option<&Device>, form: Form) -> Found {
    run_in(&testdata(model), device, form)
}

fn run_in(model: &Path, device: Option<&Device>, form: Form) -> Found {
    let mut base = open(model);
    if let Some(device) = device {
        base.place(device, form.placement, |_| {}).unwrap();
    }
    let spec = LoraSpec { rank: 3, alpha: 5.0, modules: form.modules.to_vec() };
    let layout = LoraLayout { dora: form.dora, ..LoraLayout::uniform(&base.architecture, &spec) };
    let lora = Lora::laid_out(&base.architecture, &layout, 7, DType::F32).unwrap();
    lora.measure(&base).unwrap();
    for (stream, t) in lora.tensors().enumerate() {
        let value = |i: usize| random::uniform(stream as u64 + 50, i as u64) as f32 * 0.2 - 0.1;
        // Lengths of rows stay near those that the rows have.
        let before = if t.dims().len() == 1 { t.to_vec1().unwrap() } else { vec![0.0; t.elem_count()] };
        let values: Vec<f32> = before.iter().enumerate().map(|(i, v)| v + value(i)).collect();
        t.slice_set(&Tensor::from_vec(values, t.shape(), t.device()).unwrap(), 0, 0).unwrap();
    }
    let tokens = tokens(base.architecture.vocab_size as u64);
    let batch = Batch::new(&tokens, base.architecture.limits(100), &jobs(), form.packing);
    let workspace = Workspace::new(&base.architecture, Some(&lora), form.spec, base.device());
    let sweep =
        Sweep { base: &base, lora: Some(&lora), dropout: form.dropout, workspace: &workspace, watch: None };
    let gradients = lora.zeros_like().unwrap();
    let mut found = Found { logps: Vec::new(), entropies: Vec::new(), gradients: Vec::new() };
    // Twice, so that what a sweep leaves behind meets the next one; gradients add up.
    for _ in 0..2 {
        let forward = sweep.forward(&batch.packs, true).unwrap();
        let scores = batch.by_job(&forward.branches);
        found.logps.extend(scores.iter().map(|s| s.logps));
        found.entropies.extend(scores.iter().map(|s| s.entropy));
        let weight = |b: &kto_model::sweep::BranchStats| if b.gradient { COEFFICIENTS[b.tag] } else { 0.0 };
        let coefficients: Vec<Vec<f64>> =
            forward.branches.iter().map(|p| p.iter().map(weight).collect()).collect();
        sweep.backward(&batch.packs, forward, &coefficients, &gradients).unwrap();
    }
    found.gradients = gradients.tensors().map(|t| t.flatten_all().unwrap().to_vec1().unwrap()).collect();
    found
}

/// Returns the largest relative difference of the scores, and of whole gradient tensors by their norm.
fn differences(a: &Found, b: &Found) -> (f64, f64) {
    let all = |f: &Found| f.logps.iter().chain(&f.entropies).copied().collect::<Vec<f64>>();
    let scores = all(a).iter().zip(all(b)).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f64::max);
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let of = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let size = norm(&mut b.iter().map(|b| f64::from(*b)));
        assert!(size > 0.0 && difference.is_finite());
        difference / size
    };
    (scores, a.gradients.iter().zip(&b.gradients).map(of).fold(0.0, f64::max))
}

fn device(element: Dense, lazy: Stream) -> Option<Device> {
    let machine = emulated_gpu(1 << 30, lazy)?;
    Some(Device::Gpu(Gpu::new(machine, 1 << 30), element))
}

const MODELS: [&str; 4] =
    ["bnb/tiny_llama_bf16", "bnb/tiny_llama_bnb4", "bnb/tiny_llama_int8", "trl/qwen2/model"];

#[test]
fn in_f32_it_computes_what_the_processor_computes() {
    let Some(gpu) = device(Dense::F32, Stream::Copy) else { return };
    for model in MODELS {
        for form in [
            WHOLE,
            Form {
                packing: Packing::Shared(20),
                spec: WorkspaceSpec { head_rows: 100, ..Default::default() },
                ..WHOLE
            },
            Form { packing: Packing::Single, dropout: Some(DropoutKey { p: 0.3, key: 99 }), ..WHOLE },
            Form { modules: &[Module::K, Module::Down], ..WHOLE },
        ] {
            let (found, expected) = (run(model, Some(&gpu), form), run(model, None, form));
            let (scores, gradients) = differences(&found, &expected);
            assert!(
                scores < 2e-6 && gradients < 2e-5,
                "{model}: scores {scores:.1e}, gradients {gradients:.1e}"
            );
        }
    }
}

/// Also with one A for the parts of a fused matrix, streamed, in places that weights share.
#[test]
fn dora_is_what_the_processor_computes() {
    let Some(gpu) = device(Dense::F32, Stream::Copy) else { return };
    let placed = Placement { streamed: true, share_widened: true, head_tile: None };
    for (model, placement) in [
        ("bnb/tiny_llama_bnb4", WHOLE.placement),
        ("bnb/tiny_llama_bnb4", placed),
        ("trl/qwen2/model", placed),
        ("families/gemma2", WHOLE.placement),
        ("families/phi3", WHOLE.placement),
    ] {
        let fused = &[Module::Qkv, Module::O, Module::GateUp, Module::Down][..];
        let modules = if model.ends_with("phi3") { fused } else { &Module::ALL };
        let form = Form { dora: true, placement, modules, ..WHOLE };
        let dropped =
            Form { packing: Packing::Single, dropout: Some(DropoutKey { p: 0.3, key: 99 }), ..form };
        for form in [form, dropped] {
            let (found, expected) = (run(model, Some(&gpu), form), run(model, None, form));
            let (scores, gradients) = differences(&found, &expected);
            assert!(
                scores < 4e-6 && gradients < 4e-5,
                "{model}: scores {scores:.1e}, gradients {gradients:.1e}"
            );
            let plain = run(model, None, Form { dora: false, ..form });
            assert!(found.gradients.len() == plain.gradients.len() / 2 * 3 && found.logps != plain.logps);
        }
    }
}

#[test]
fn in_16_bits_it_stays_within_their_rounding() {
    for (element, scores_bound, gradients_bound) in [(Dense::Bf16, 1e-2, 6e-2), (Dense::F16, 2e-3, 1e-2)] {
        let Some(gpu) = device(element, Stream::Copy) else { return };
        for model in MODELS {
            for dora in [false, true] {
                let form = Form { dora, ..WHOLE };
                let (scores, gradients) = differences(&run(model, Some(&gpu), form), &run(model, None, form));
                assert!(
                    scores < scores_bound && gradients < gradients_bound,
                    "{model} in {element:?}, DoRA {dora}: scores {scores:.1e}, gradients {gradients:.1e}"
                );
            }
        }
    }
}

/// Writes a model of five blocks from those of a model of two.
fn deeper(model: &str, dir: &Path) {
    let from = ModelDir::open(&testdata(model)).unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(testdata(model).join("config.json")).unwrap()).unwrap();
    config["num_hidden_layers"] = 5.into();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors = BTreeMap::new();
    for name in from.tensors.names() {
        let view = from.tensors.require(name).unwrap();
        let tensor = (view.dtype, view.shape.to_vec(), view.data.to_vec());
        match view.name.split_once("layers.").and_then(|(_, rest)| rest.split_once('.')) {
            Some((layer, _)) => {
                let layer: usize = layer.parse().unwrap();
                // Blocks that take the same place one after the other differ.
                for to in [[0, 3, 4].as_slice(), &[1, 2]][layer] {
                    let name = view.name.replace(&format!("layers.{layer}."), &format!("layers.{to}."));
                    tensors.insert(name, tensor.clone());
                }
            }
            None => drop(tensors.insert(view.name.to_string(), tensor)),
        }
    }
    let specs =
        tensors.iter().map(|(name, (d, s, _))| TensorSpec::new(name.clone(), *d, s.clone())).collect();
    let mut writer =
        SafetensorsWriter::new(&dir.join("model.safetensors"), specs, &Default::default()).unwrap();
    tensors.iter().for_each(|(name, (_, _, bytes))| writer.write(name, bytes).unwrap());
    writer.finish().unwrap();
}

/// What is streamed and offloaded is computed alike, in whatever order the streams run as far as marks allow.
#[test]
fn streams_change_no_bit() {
    let Some(gpu) = device(Dense::Bf16, Stream::Copy) else { return };
    for model in ["bnb/tiny_llama_bf16", "bnb/tiny_llama_bnb4"] {
        let dir = tempfile::tempdir().unwrap();
        deeper(model, dir.path());
        let plain = run_in(dir.path(), Some(&gpu), WHOLE);
        for lazy in [Stream::Copy, Stream::Compute] {
            let gpu = device(Dense::Bf16, lazy).unwrap();
            let forms = [(true, true, false), (true, false, true), (false, true, true), (false, true, false)];
            for (streamed, offload_inputs, share_widened) in forms {
                let spec = WorkspaceSpec { offload_inputs, ..WHOLE.spec };
                let placement = Placement { streamed, share_widened, head_tile: None };
                let found = run_in(dir.path(), Some(&gpu), Form { placement, spec, ..WHOLE });
                assert!(found == plain, "{model}, {lazy:?} lazy: {:?}", differences(&found, &plain));
            }
        }
    }
}

/// A head in tiles sums in another order. Chunks of 13 rows end within packs, those of 500 hold several packs.
#[test]
fn a_head_in_tiles_computes_the_same() {
    let Some(gpu) = device(Dense::F32, Stream::Copy) else { return };
    let gemma = testdata("families/gemma2");
    for (model, head_rows, packing) in [
        (testdata("bnb/tiny_llama_bnb4"), 13, Packing::Shared(20)),
        (testdata("bnb/tiny_llama_bnb4"), 500, Packing::Shared(20)),
        // A soft cap of the logits.
        (gemma, 500, Packing::Shared(4096)),
    ] {
        let whole = Form { packing, ..WHOLE };
        let placement = Placement { head_tile: Some(37), ..WHOLE.placement };
        let spec = WorkspaceSpec { head_in_tiles: true, head_rows, ..WHOLE.spec };
        let found = run_in(&model, Some(&gpu), Form { placement, spec, ..whole });
        let (scores, gradients) = differences(&found, &run_in(&model, Some(&gpu), whole));
        assert!(scores < 2e-7 && gradients < 1e-6, "scores {scores:.1e}, gradients {gradients:.1e}");
    }
}

#[test]
fn the_self_test_passes() {
    if let Some(machine) = emulated_gpu(1 << 30, Stream::Copy) {
        kto_kernels::device::self_test(machine).unwrap();
    }
}

/// Generation works on a GPU too, and what it does not fit into is said in MiB.
#[test]
fn it_generates_and_keeps_its_limit() {
    let Some(gpu) = device(Dense::F32, Stream::Copy) else { return };
    let mut there = base("bnb/tiny_llama_bnb4");
    there.place(&gpu, WHOLE.placement, |_| {}).unwrap();
    let here = base("bnb/tiny_llama_bnb4");
    let feed = |base: &BaseModel| {
        let mut generator = Generator::new(base, None, 20).unwrap();
        generator.feed(&[3, 9, 27, 81], false).unwrap();
        generator.feed(&[5], true).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    for (a, b) in feed(&there).iter().zip(feed(&here)) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    let small = Gpu::new(emulated_gpu(1 << 30, Stream::Copy).unwrap(), 100 << 10);
    let error =
        base("bnb/tiny_llama_bnb4").place(&Device::Gpu(small.clone(), Dense::Bf16), WHOLE.placement, |_| {});
    let error = error.unwrap_err();
    assert_eq!(error.kind().code(), 71);
    assert!(error.to_string().contains("over the limit of 1 MiB"), "{error}");
    assert!(small.used().1 <= 100 << 10);
}
