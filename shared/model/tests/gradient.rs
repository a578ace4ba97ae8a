//! The whole decoder's gradient against finite differences in f64, on odd sizes, with shared prompts, KL branches and dropout.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Tensor};
use kto_formats::{
    adapter::AdapterConfig,
    model_dir::ModelDir,
    safetensors_out::{SafetensorsWriter, TensorSpec},
    tokens::{TokenMeta, TokenRow, TokenSet, prompt_hash},
};
use kto_kernels::{DropoutKey, random};
use kto_model::{
    architecture::Module,
    base::BaseModel,
    buffers::{Workspace, WorkspaceSpec},
    lora::{Lora, LoraLayout, LoraSpec},
    pack::Pack,
    rows::{Batch, Job, Packing},
    sweep::Sweep,
};
use safetensors::Dtype;
use serde_json::json;
use std::path::Path;

const VOCAB: u64 = 41;

/// Writes a random two-block Qwen2-form model with odd sizes: 3 query heads of 6 on one key-value head, width 10, MLP 13.
fn write_model(dir: &Path) {
    let config = r#"{"model_type": "qwen2", "vocab_size": 41, "hidden_size": 10, "intermediate_size": 13, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
        "tie_word_embeddings": false}"#;
    std::fs::write(dir.join("config.json"), config).unwrap();
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![41, 10]),
        ("model.norm.weight".to_string(), vec![10]),
        ("lm_head.weight".to_string(), vec![41, 10]),
    ];
    for layer in 0..2 {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![10]));
        }
        let linears = [(18, 10), (6, 10), (6, 10), (10, 18), (13, 10), (13, 10), (10, 13)];
        for (module, (rows, columns)) in Module::ALL.into_iter().zip(linears) {
            shapes.push((format!("{}.weight", module.path(layer)), vec![rows, columns]));
            if module <= Module::V {
                shapes.push((format!("{}.bias", module.path(layer)), vec![rows]));
            }
        }
    }
    let specs: Vec<TensorSpec> =
        shapes.iter().map(|(n, s)| TensorSpec::new(n.clone(), Dtype::F32, s.clone())).collect();
    let mut writer =
        SafetensorsWriter::new(&dir.join("model.safetensors"), specs, &Default::default()).unwrap();
    for (stream, (name, shape)) in shapes.iter().enumerate() {
        let n: usize = shape.iter().product();
        let value = |i: usize| {
            (random::uniform(random::mix(stream as u64), i as u64) as f32 - 0.5) * 1.2
                + if shape.len() == 1 { 1.0 } else { 0.0 }
        };
        writer.write(name, &(0..n).flat_map(|i| value(i).to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    }
    writer.finish().unwrap();
}

/// Rows that reach the corners: one-token prompts and completions, a segment past one attention block, shared prompts.
fn tokens() -> TokenSet {
    let mut set =
        TokenSet::new(TokenMeta { vocab_size: VOCAB as u32, max_length: 100, ..Default::default() });
    let ids =
        |stream: u64, n: u64| (0..n).map(|i| random::below(stream, i, VOCAB) as u32).collect::<Vec<u32>>();
    for (i, (prompt, completion)) in [(1, 1), (5, 7), (5, 1), (70, 9), (3, 80)].into_iter().enumerate() {
        // Rows 1 and 2 share their prompt.
        let prompt = ids(if i == 2 { 1 } else { i as u64 }, prompt);
        let row = TokenRow {
            prompt_ids: &prompt,
            completion_ids: &ids(100 + i as u64, completion),
            label: i % 2 == 0,
            prompt_hash: prompt_hash(&prompt),
        };
        set.push(row);
    }
    set
}

fn jobs() -> Vec<Job> {
    let main = (0..5).map(|i| Job { prompt: i, completion: i, gradient: true });
    let kl = (0..5).map(|i| Job { prompt: i, completion: (i + 3) % 5, gradient: false });
    main.chain(kl).collect()
}

const COEFFICIENTS: [f64; 5] = [0.7, -1.1, 0.3, 0.05, -0.02];

fn objective(sweep: &Sweep, packs: &[Pack]) -> f64 {
    let out = sweep.forward(packs, false).unwrap();
    out.branches.iter().flatten().filter(|b| b.gradient).map(|b| COEFFICIENTS[b.tag] * b.logps).sum()
}

fn check(packing: Packing, dropout: Option<DropoutKey>, modules: &[Module], kept_layers: usize) {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path());
    check_model(dir.path(), (packing, dropout), Some(modules), kept_layers);
}

/// Adapts `modules`, or all that the model has.
fn check_model(
    dir: &Path,
    form: (Packing, Option<DropoutKey>),
    modules: Option<&[Module]>,
    kept_layers: usize,
) {
    let base = BaseModel::load(ModelDir::open(dir).unwrap(), DType::F64, 100).unwrap();
    let modules = modules.unwrap_or(base.architecture.modules());
    let spec = LoraSpec { rank: 3, alpha: 5.0, modules: modules.to_vec() };
    let lora = Lora::fresh(&base.architecture, &spec, 7, DType::F64).unwrap();
    check_lora(&base, &lora, form, kept_layers);
}

/// Checks every trained tensor at three places, all of them away from where they begin.
fn check_lora(
    base: &BaseModel,
    lora: &Lora,
    (packing, dropout): (Packing, Option<DropoutKey>),
    kept_layers: usize,
) {
    for (stream, t) in lora.tensors().enumerate() {
        let values: Vec<f64> =
            (0..t.elem_count()).map(|i| random::uniform(stream as u64 + 50, i as u64) - 0.5).collect();
        // What is trained whole stays near its weights.
        let start: Vec<f64> = t.flatten_all().unwrap().to_vec1().unwrap();
        let whole = lora.whole.values().any(|own| own.id() == t.id());
        let values: Vec<f64> =
            values.iter().zip(start).map(|(v, s)| if whole { s + 0.2 * v } else { *v }).collect();
        t.slice_set(&Tensor::from_vec(values, t.shape(), t.device()).unwrap(), 0, 0).unwrap();
    }
    let tokens = tokens();
    let packs = Batch::new(&tokens, base.architecture.limits(100), &jobs(), packing).packs;
    let spec = WorkspaceSpec { kept_layers, head_rows: 17, ..Default::default() };
    let workspace = Workspace::new(&base.architecture, Some(lora), spec, base.device());
    let sweep = Sweep { base, lora: Some(lora), dropout, workspace: &workspace, watch: None };
    let gradients = lora.zeros_like().unwrap();
    let forward = sweep.forward(&packs, true).unwrap();
    let weight = |b: &kto_model::sweep::BranchStats| if b.gradient { COEFFICIENTS[b.tag] } else { 0.0 };
    let coefficients: Vec<Vec<f64>> =
        forward.branches.iter().map(|p| p.iter().map(weight).collect()).collect();
    sweep.backward(&packs, forward, &coefficients, &gradients).unwrap();
    for (p, g) in lora.tensors().zip(gradients.tensors()) {
        let values: Vec<f64> = p.flatten_all().unwrap().to_vec1().unwrap();
        let gradient: Vec<f64> = g.flatten_all().unwrap().to_vec1().unwrap();
        let size = gradient.iter().fold(0.0f64, |m, g| m.max(g.abs()));
        assert!(size > 0.0);
        for i in [0, values.len() / 2, values.len() - 1] {
            let at = |delta: f64| {
                let mut moved = values.clone();
                moved[i] += delta;
                p.slice_set(&Tensor::from_vec(moved, p.shape(), p.device()).unwrap(), 0, 0).unwrap();
                objective(&sweep, &packs)
            };
            let h = 1e-5;
            let numeric = (at(h) - at(-h)) / (2.0 * h);
            at(0.0);
            assert!(
                (numeric - gradient[i]).abs() < 1e-6 * size.max(1.0),
                "{:?}[{i}]: {numeric} {}",
                p.shape(),
                gradient[i]
            );
        }
    }
}

#[test]
fn shared_prompts_in_one_pack() {
    check(Packing::Shared(4096), None, &Module::ALL, 2);
}

#[test]
fn shared_prompts_in_small_packs() {
    check(Packing::Shared(20), None, &Module::ALL, 1);
}

#[test]
fn single_rows_with_dropout() {
    check(Packing::Single, Some(DropoutKey { p: 0.3, key: 99 }), &Module::ALL, 0);
}

#[test]
fn few_adapted_modules() {
    check(Packing::Shared(4096), None, &[Module::K, Module::Down], 1);
}

/// Fused matrices, a rotation that changes with the length, and norms with biases.
#[test]
fn families_of_another_form() {
    for name in ["phi3-longrope", "stablelm"] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/families").join(name);
        let dropout = Some(DropoutKey { p: 0.3, key: 99 });
        check_model(&dir, (Packing::Shared(4096), None), None, 1);
        check_model(&dir, (Packing::Single, dropout), None, 1);
    }
}

/// Ends, norms, linear layers and biases that are trained whole, beside matrices on one layer of one block.
#[test]
fn what_is_trained_whole() {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/families");
    let odd = tempfile::tempdir().unwrap();
    write_model(odd.path());
    let (odd, family) = (odd.path().to_path_buf(), |name: &str| families.join(name));
    for (dir, target, whole, bias) in [
        (
            odd.clone(),
            "q_proj",
            &["embed_tokens", "lm_head", "norm", "down_proj", "o_proj", "up_proj"][..],
            "lora_only",
        ),
        (odd, "v_proj", &["lm_head"], "all"),
        (family("gemma2"), "q_proj", &["embed_tokens"], "none"),
        (family("gemma3"), "up_proj", &["norm", "lm_head", "k_proj"], "none"),
        (family("phi3"), "o_proj", &["qkv_proj", "gate_up_proj"], "none"),
        (family("stablelm"), "q_proj", &["embed_tokens", "gate_proj"], "all"),
    ] {
        let base = BaseModel::load(ModelDir::open(&dir).unwrap(), DType::F64, 100).unwrap();
        let kept =
            [("modules_to_save", json!(whole)), ("bias", json!(bias)), ("layers_to_transform", json!([1]))];
        let config = AdapterConfig {
            r: 3,
            lora_alpha: 5.0,
            target_modules: [target].into(),
            kept: kept.into_iter().map(|(field, value)| (field.to_string(), value)).collect(),
            ..Default::default()
        };
        let layout = LoraLayout::of_config(&base.architecture, &config.peft().unwrap()).unwrap();
        let lora = Lora::laid_out(&base.architecture, &layout, 7, DType::F64).unwrap();
        lora.fill(&base).unwrap();
        assert!(!lora.whole.is_empty());
        let dropout = Some(DropoutKey { p: 0.3, key: 99 });
        check_lora(&base, &lora, (Packing::Shared(4096), None), 1);
        check_lora(&base, &lora, (Packing::Shared(20), None), 3);
        check_lora(&base, &lora, (Packing::Single, dropout), 0);
    }
}

/// KL rows and their prompts are scored as the trained rows are.
#[test]
fn packing_does_not_change_scores() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path());
    let base = BaseModel::load(ModelDir::open(dir.path()).unwrap(), DType::F64, 100).unwrap();
    let tokens = tokens();
    let spec = WorkspaceSpec { head_rows: 64, ..Default::default() };
    let workspace = Workspace::new(&base.architecture, None, spec, base.device());
    let sweep = Sweep { base: &base, lora: None, dropout: None, workspace: &workspace, watch: None };
    let scores = |packing| {
        let batch = Batch::new(&tokens, base.architecture.limits(100), &jobs(), packing);
        batch.by_job(&sweep.forward(&batch.packs, false).unwrap().branches)
    };
    let single = scores(Packing::Single);
    assert_eq!(single.len(), 10);
    for packing in [Packing::Shared(1), Packing::Shared(90), Packing::Shared(4096)] {
        for (a, b) in scores(packing).iter().zip(&single) {
            assert!(a.tokens == b.tokens && (a.logps - b.logps).abs() < 1e-10, "{a:?} {b:?}");
        }
    }
}
