//! The memory plan of a GPU against what the engine takes of an emulated one: never more, and not much less.
#![allow(clippy::unwrap_used)]

use candle_core::DType;
use kto_formats::{
    model_dir::ModelDir,
    safetensors_out::{SafetensorsWriter, TensorSpec},
    tensors::push_floats,
    tokens::{TokenMeta, TokenRow, TokenSet, prompt_hash},
};
use kto_kernel_checks::emulated_gpu;
use kto_kernels::{
    Dense,
    device::Device,
    gpu::{Gpu, Stream},
    random,
};
use kto_model::{
    architecture::{Architecture, Module},
    base::{BaseModel, Placement},
    buffers::{Workspace, WorkspaceSpec},
    lora::{Lora, LoraLayout, LoraSpec},
    memory::{
        AdapterSize, BatchShape, Batches, Demand, GpuDemand, GpuWeights, MemoryPlan, Moments, WeightSize,
        plan_on_gpu,
    },
    rows::{Batch, Job, Limits, Packing},
    sweep::Sweep,
};
use safetensors::Dtype;
use std::path::Path;

const LAYERS: usize = 4;
const VOCABULARY: usize = 1500;
const LONGEST: usize = 100;

/// Writes a random model in bf16: 192 wide with an MLP of 512.
fn write_model(dir: &Path) {
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCABULARY}, "hidden_size": 192, "intermediate_size": 512,
        "num_hidden_layers": {LAYERS}, "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false}}"#
    );
    std::fs::write(dir.join("config.json"), config).unwrap();
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCABULARY, 192]),
        ("model.norm.weight".into(), vec![192]),
        ("lm_head.weight".into(), vec![VOCABULARY, 192]),
    ];
    for layer in 0..LAYERS {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![192]));
        }
        let linears = [(192, 192), (64, 192), (64, 192), (192, 192), (512, 192), (512, 192), (192, 512)];
        for (module, (rows, columns)) in Module::ALL.into_iter().zip(linears) {
            shapes.push((format!("{}.weight", module.path(layer)), vec![rows, columns]));
        }
    }
    let specs = shapes.iter().map(|(n, s)| TensorSpec::new(n.clone(), Dtype::BF16, s.clone())).collect();
    let mut writer =
        SafetensorsWriter::new(&dir.join("model.safetensors"), specs, &Default::default()).unwrap();
    for (stream, (name, shape)) in shapes.iter().enumerate() {
        let value = |i: usize| (random::uniform(stream as u64, i as u64) as f32 - 0.5) * 0.1;
        let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
        let mut bytes = Vec::new();
        push_floats(Dtype::BF16, &values, &mut bytes).unwrap();
        writer.write(name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn tokens() -> TokenSet {
    let meta = TokenMeta { vocab_size: VOCABULARY as u32, max_length: 100, ..Default::default() };
    let mut set = TokenSet::new(meta);
    for (i, (prompt, completion)) in [(60, 30), (60, 12), (5, 40), (33, 9)].into_iter().enumerate() {
        let ids = |stream: u64, n: u64| -> Vec<u32> {
            (0..n).map(|i| random::below(stream, i, VOCABULARY as u64) as u32).collect()
        };
        // The first two rows share their prompt.
        let prompt = ids(i.saturating_sub(1) as u64, prompt);
        set.push(TokenRow {
            prompt_ids: &prompt,
            completion_ids: &ids(100 + i as u64, completion),
            label: i % 2 == 0,
            prompt_hash: prompt_hash(&prompt),
        });
    }
    set
}

struct One(TokenSet);

impl One {
    fn jobs() -> Vec<Job> {
        let main = (0..4).map(|i| Job { prompt: i, completion: i, gradient: true });
        main.chain((0..4).map(|i| Job { prompt: i, completion: (i + 2) % 4, gradient: false })).collect()
    }
    fn batch(&self, pack_rows: usize) -> Batch {
        Batch::new(
            &self.0,
            Limits { max_length: 100, original: None },
            &Self::jobs(),
            Packing::Shared(pack_rows),
        )
    }
}

impl Batches for One {
    fn steps(&self, pack_rows: usize) -> BatchShape {
        BatchShape::of_packs(&self.batch(pack_rows).packs)
    }
    fn reference(&self, _: usize, _: usize) -> BatchShape {
        BatchShape::default()
    }
}

/// Runs a step as planned and returns the most that was taken.
fn measured(dir: &Path, plan: &MemoryPlan, batches: &One, limit: usize, dora: bool) -> usize {
    let gpu = Gpu::new(emulated_gpu(1 << 30, Stream::Copy).unwrap(), limit);
    let device = Device::Gpu(gpu.clone(), Dense::Bf16);
    let mut base = BaseModel::load(ModelDir::open(dir).unwrap(), DType::F32, LONGEST).unwrap();
    let on_gpu = plan.on_gpu.as_ref().unwrap();
    base.place(&device, on_gpu.placement, |_| {}).unwrap();
    let lora = Lora::laid_out(&base.architecture, &layout(&base.architecture, dora), 7, DType::F32).unwrap();
    let MemoryPlan { kept_layers, head_rows, .. } = *plan;
    let (head_in_tiles, offload_inputs) = (on_gpu.placement.head_tile.is_some(), on_gpu.offload_inputs);
    let spec = WorkspaceSpec { kept_layers, head_rows, head_in_tiles, offload_inputs };
    let workspace = Workspace::new(&base.architecture, Some(&lora), spec, base.device());
    workspace.reserve_shape(&plan.steps, true).unwrap();
    let sweep = Sweep { base: &base, lora: Some(&lora), dropout: None, workspace: &workspace, watch: None };
    let batch = batches.batch(plan.pack_rows);
    let forward = sweep.forward(&batch.packs, true).unwrap();
    let ones: Vec<Vec<f64>> = forward.branches.iter().map(|p| vec![1.0; p.len()]).collect();
    sweep.backward(&batch.packs, forward, &ones, &lora.zeros_like().unwrap()).unwrap();
    gpu.used().1
}

fn layout(architecture: &Architecture, dora: bool) -> LoraLayout {
    let spec = LoraSpec { rank: 8, alpha: 8.0, modules: Module::ALL.to_vec() };
    LoraLayout { dora, ..LoraLayout::uniform(architecture, &spec) }
}

#[test]
fn a_step_takes_what_the_plan_says() {
    if emulated_gpu(1, Stream::Copy).is_none() {
        return;
    }
    [false, true].into_iter().for_each(takes_what_the_plan_says);
}

fn takes_what_the_plan_says(dora: bool) {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path());
    let model = ModelDir::open(dir.path()).unwrap();
    let architecture = Architecture::from_config(&model.config).unwrap();
    let batches = One(tokens());
    let demand = Demand {
        architecture: &architecture,
        weights: WeightSize::of(&architecture, &model, 0..VOCABULARY as u32),
        adapter: AdapterSize::fresh(&architecture, &layout(&architecture, dora)),
        moments: Moments::F32,
        adapter_copy: false,
        positions: LONGEST,
        threads: 1,
        token_bytes: 0,
        pack_rows: None,
        batches: &batches,
    };
    let weights = GpuWeights::of(&architecture, &model, Dense::Bf16);
    let plan = |limit: u64| {
        plan_on_gpu(
            &demand,
            &GpuDemand { element: Dense::Bf16, weights, dropout: false, longest: LONGEST, held: 0, limit },
        )
    };
    let peak = |plan: &MemoryPlan| plan.on_gpu.as_ref().unwrap().peak;
    let mut seen = Vec::new();
    let roomy = peak(&plan(u64::MAX).unwrap());
    let least = peak(&plan(0).unwrap_err());
    for limit in [roomy, roomy * 6 / 10, least] {
        let plan = plan(limit).unwrap();
        let (predicted, found) =
            (peak(&plan) as f64, measured(dir.path(), &plan, &batches, limit as usize, dora) as f64);
        let on_gpu = plan.on_gpu.as_ref().unwrap();
        assert!(
            found <= predicted && found > 0.85 * predicted,
            "{limit}, DoRA {dora}: predicted {predicted}, found {found}"
        );
        seen.push(on_gpu.placement);
    }
    let streamed = |p: &Placement| p.streamed && p.head_tile.is_some();
    assert!(seen.contains(&Placement::default()) && seen.iter().any(streamed), "{seen:?}");
}
