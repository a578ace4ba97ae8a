//! Modules trained whole and biases, from the flags to the files: written as PEFT has them, read back, gone on with after an interruption.

use crate::{
    adapters::{settings, trained, weights},
    cli::{Bench, refused, stderr, write},
    families::{close, done, scores, tokens},
    golden::Case,
};
use kto_formats::{adapter::Adapter, tensors::TensorStore};
use serde_json::{Value, json};
use std::path::Path;

/// Values of the base that the bench trains on.
fn base(name: &str) -> Vec<f32> {
    let store = TensorStore::open_file(&Case::open("llama").file("model").join("model.safetensors")).unwrap();
    store.require(name).unwrap().to_f32().unwrap()
}

const ENDS: [&str; 6] =
    ["--modules-to-save", "embed_tokens,lm_head", "--target-modules", "q_proj,v_proj", "--lora-r", "3"];
const NORMS: [&str; 4] = ["--modules-to-save", "norm,down_proj", "--target-modules", "q_proj"];

#[test]
fn what_is_asked_for_is_written_as_peft_has_it() {
    let b = Bench::new();
    trained(&b, &ENDS);
    let settings = settings(&b.out());
    assert_eq!(
        (&settings["modules_to_save"], &settings["bias"]),
        (&json!(["embed_tokens", "lm_head"]), &json!("none"))
    );
    let store = TensorStore::open_file(&b.out().join("adapter/adapter_model.safetensors")).unwrap();
    let names: Vec<&str> = store.names().filter(|name| !name.contains("lora_")).collect();
    assert_eq!(names, ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]);
    for name in names {
        let view = store.require(name).unwrap();
        let before = base(name.trim_start_matches("base_model.model."));
        let moved = view.to_f32().unwrap().iter().zip(&before).filter(|(a, b)| a != b).count();
        let off = view.to_f32().unwrap().iter().zip(&before).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        // Three steps of AdamW; of the embedding only the rows of the data.
        assert!(moved > 0 && off < 4e-3, "{name}: {moved} {off}");
        assert!(name.contains("embed") == (moved < before.len()), "{name}: {moved} of {}", before.len());
    }
    let plan: Value = serde_json::from_slice(&std::fs::read(b.out().join("run.json")).unwrap()).unwrap();
    assert_eq!(plan["plan"]["modules_to_save"], json!(["embed_tokens", "lm_head"]));
    assert_eq!(plan["plan"]["bias"], json!(null));
}

#[test]
fn it_goes_on_as_if_it_had_not_been_interrupted() {
    for flags in [&ENDS[..], &[&ENDS[..], &["--optimizer", "adamw-8bit"]].concat(), &NORMS] {
        let (whole, b) = (Bench::new(), Bench::new());
        trained(&whole, &[flags, &["--threads", "1"]].concat());
        let first = b.train(
            &[&["-q", "--max-steps", "3", "--lr", "1e-3", "--max-time", "0.001s", "--threads", "3"], flags]
                .concat(),
        );
        assert!(first.status.success() && !b.out().join("adapter").exists(), "{}", stderr(&first));
        trained(&b, &[flags, &["--resume=strict", "--threads", "3"]].concat());
        assert!(weights(&whole.out()) == weights(&b.out()), "{flags:?}");
        let other = [&["-q", "--max-steps", "3", "--lr", "1e-3", "--resume"], &flags[2..]].concat();
        refused(&b.train(&other), 78, "modules_to_save was [");
    }
}

#[test]
fn a_result_is_a_start() {
    let b = Bench::new();
    trained(&b, &ENDS);
    let first = b.out().display().to_string();
    let next = Bench::new();
    let flags = ["--init-adapter", &first, "--reference", "init-adapter"];
    let output = next.train(&[&["-q", "--max-steps", "1", "--lr", "0"], &flags[..]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(weights(&next.out()) == weights(&b.out()));
    assert_eq!(settings(&next.out()), settings(&b.out()));
    refused(&next.train(&["--force", "--init-adapter", &first, "--bias", "all"]), 2, "--bias");
    // Another adapter, though its matrices are the same.
    let mut other = Adapter::read(&b.out()).unwrap();
    other.saved.get_mut("lm_head.weight").unwrap().values[0] += 1.0;
    let path = b.out().join("adapter");
    other.write(&path, other.meta.clone()).unwrap();
    let again = next.train(&[&["-q", "--max-steps", "1", "--lr", "0", "--resume"], &flags[..]].concat());
    refused(&again, 78, "init_adapter was");
    // What the file holds and the settings do not name would be used and not trained, and the other way round.
    other.config.kept.insert("modules_to_save".into(), json!(["lm_head"]));
    other.write(&path, other.meta.clone()).unwrap();
    let refuse = |text: &str| refused(&next.train(&["--force", "--init-adapter", &first]), 65, text);
    refuse("\"model.embed_tokens.weight\" is in the file, but neither modules_to_save nor bias");
    other.config.kept.insert("modules_to_save".into(), json!(["lm_head", "embed_tokens", "norm"]));
    other.write(&path, other.meta.clone()).unwrap();
    refuse("_layernorm.weight\" is trained whole (modules_to_save, bias), but the file does not hold it");
}

/// As in transformers' Trainer.
#[test]
fn weight_decay_leaves_norms_and_biases_alone() {
    let b = Bench::new();
    let flags = [
        "--weight-decay",
        "0.5",
        "--lr",
        "1e-3",
        "--max-grad-norm",
        "1e-30",
        "--adam-epsilon",
        "1",
        "--max-steps",
        "1",
    ];
    let output = b.train(&[&["-q"], &flags[..], &NORMS].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    for (name, saved) in Adapter::read(&b.out()).unwrap().saved {
        let factor = if name.contains("norm") { 1.0 } else { 1.0 - 0.5e-3 };
        for (found, before) in saved.values.iter().zip(base(&name)) {
            assert!((found - before * factor).abs() < 1e-6, "{name}: {found} {before}");
        }
    }
}

#[test]
fn the_plan_counts_it() {
    let b = Bench::new();
    let table = |more: &[&str]| {
        let output = b.train(&[&["--dry-run", "--memory", "8GiB"], more].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = table(&ENDS);
    let n = 4.0 * base("lm_head.weight").len() as f64 * 2.0 / 1024.0;
    assert!(text.contains("memory: modules trained whole") && text.contains(&format!("{n:.0}")), "{text}");
    assert!(text.contains("\nwhole: lm_head.weight") && text.contains("adapter: modules_to_save"), "{text}");
    let norms = table(&NORMS);
    for part in ["model.layers.*.mlp.down_proj.weight", "2 of [64, 112]", "whole: model.norm.weight", " [64]"]
    {
        assert!(norms.contains(part), "{part}: {norms}");
    }
    // The module around them stands for its layers.
    let around = table(&["--modules-to-save", "mlp", "--target-modules", "q_proj"]);
    for part in ["gate_proj", "up_proj", "down_proj"] {
        assert!(around.contains(&format!("model.layers.*.mlp.{part}.weight")), "{part}: {around}");
    }
    assert!(!table(&[]).contains("whole"));
    let huge = b.train(&[&ENDS[..], &["--memory", "4MiB"]].concat());
    refused(&huge, 71, "needs at least");
    assert!(stderr(&huge).contains("fewer --modules-to-save"), "{}", stderr(&huge));
}

#[test]
fn what_cannot_be_trained_is_refused_by_name() {
    let b = Bench::new();
    for (flags, text) in [
        (&["--modules-to-save", "embed_tokens,heed"][..], "no module of the model ends with \"heed\""),
        (&["--modules-to-save", ""], "an empty name"),
        (&["--modules-to-save", "model"], "no linear layer of the model is adapted"),
        (
            &["--modules-to-save", "proj", "--target-modules", "q_proj"],
            "\"model.layers.0.self_attn.q_proj\" is trained whole",
        ),
        (
            &["--modules-to-save", "q_proj", "--target-modules", "q_proj"],
            "no linear layer of the model is adapted",
        ),
        (&["--bias", "some"], "--bias"),
    ] {
        let output = b.train(flags);
        let err = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {err}");
        assert!(err.contains(text), "{flags:?}: {err}");
    }
    let on_gpu = ["--dry-run", "--device", "cuda", "--memory", "8GiB", "--modules-to-save", "lm_head"];
    refused(
        &b.train(&on_gpu),
        69,
        "modules trained whole (modules_to_save, bias) are not computed on a GPU yet",
    );
    assert!(!b.out().exists());
}

/// A head that is the embedding becomes a matrix of its own, and the user hears of it.
#[test]
fn a_tied_head_is_taken_apart_with_a_warning() {
    let b = on(&families().join("qwen2"));
    let flags = ["--max-steps", "2", "--lr", "1e-3", "--target-modules", "q_proj", "--modules-to-save"];
    let output = b.train_in_batches("2", &[&flags[..], &["lm_head"]].concat());
    let err = stderr(&output);
    assert!(output.status.success() && err.contains("the model's head is its embedding"), "{err}");
    let adapter = Adapter::read(&b.out()).unwrap();
    assert_eq!(adapter.saved.keys().collect::<Vec<_>>(), ["lm_head.weight"]);
    let embedding = on(&families().join("qwen2"));
    let output = embedding.train_in_batches("2", &[&flags[..], &["embed_tokens"]].concat());
    assert!(output.status.success() && stderr(&output).contains("is its embedding"), "{}", stderr(&output));
    // Merged they stay two, whichever was trained.
    for (b, dtype) in [(&b, "f32"), (&embedding, "f32"), (&embedding, "bf16")] {
        let merged = b.dir.path().join(format!("merged-{dtype}"));
        let paths = [b.model.clone(), b.out(), merged.clone()].map(|p| p.display().to_string());
        done(
            "kto-merge",
            &[
                "-q",
                "--base",
                &paths[0],
                "--adapter",
                &paths[1],
                "--dtype",
                dtype,
                "-o",
                &paths[2],
                "--verify",
            ],
        );
        let text = std::fs::read_to_string(merged.join("config.json")).unwrap();
        assert!(text.contains("\"tie_word_embeddings\": false"), "{text}");
        let adapted = scores(&b.model, Some(&b.out()), &b.data);
        close("merged", &scores(&merged, None, &b.data), &adapted, if dtype == "f32" { 1e-5 } else { 2e-2 });
    }
    let path = b.out().join("adapter/adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"ensure_weight_tying\": false", "\"ensure_weight_tying\": true"))
        .unwrap();
    let next = on(&families().join("qwen2"));
    let output = next.train_in_batches("2", &["--init-adapter", &b.out().display().to_string()]);
    refused(
        &output,
        65,
        "--init-adapter: its \"ensure_weight_tying\" has embedding and head trained as one matrix",
    );
}

#[test]
fn biases_of_adapted_layers() {
    let b = on(&families().join("qwen2"));
    let flags =
        ["-q", "--max-steps", "2", "--lr", "1e-3", "--target-modules", "q_proj", "--bias", "lora_only"];
    let output = b.train_in_batches("2", &flags);
    assert!(output.status.success(), "{}", stderr(&output));
    let store = TensorStore::open_file(&b.out().join("adapter/adapter_model.safetensors")).unwrap();
    let names: Vec<&str> = store.names().filter(|name| !name.contains("lora_")).collect();
    let name =
        |layer: usize| format!("base_model.model.model.layers.{layer}.self_attn.q_proj.base_layer.bias");
    assert_eq!(names, [name(0), name(1)]);
    assert_eq!(settings(&b.out())["bias"], json!("lora_only"));
}

/// A quantized head and embedding begin as what they decode to; base and adapter are the model that kto-merge makes of them.
#[test]
fn it_begins_with_the_values_of_a_quantized_base() {
    let top = tempfile::tempdir().unwrap();
    let path = |name: &str| top.path().join(name);
    let text = |path: &Path| path.display().to_string();
    let source = families().join("llama-biases");
    let (model, wide) = (path("mlx"), path("wide"));
    done("kto-quantize", &[&text(&source), "-q", "-o", &text(&model), "--form", "mlx", "--group-size", "32"]);
    done("kto-quantize", &[&text(&model), "-q", "-o", &text(&wide), "--dequantize", "--dtype", "f32"]);
    let flags = ["-q", "--target-modules", "q_proj", "--modules-to-save", "lm_head,embed_tokens,o_proj,norm"];
    let b = Bench { model: model.clone(), ..on(&source) };
    let still = b.train_in_batches("2", &[&flags[..], &["--max-steps", "1", "--lr", "0"]].concat());
    assert!(still.status.success(), "{}", stderr(&still));
    let decoded = TensorStore::open_file(&wide.join("model.safetensors")).unwrap();
    let saved = Adapter::read(&b.out()).unwrap().saved;
    assert_eq!(saved.len(), 2 + 2 * 2 + 2 * 2 + 1);
    for (name, saved) in saved {
        assert!(saved.values == decoded.require(&name).unwrap().to_f32().unwrap(), "{name}");
    }
    let moved =
        b.train_in_batches("2", &[&flags[..], &["--force", "--max-steps", "2", "--lr", "0.05"]].concat());
    assert!(moved.status.success(), "{}", stderr(&moved));
    let (adapter, merged) = (b.out().join("adapter"), path("merged"));
    let merge =
        ["-q", "--dtype", "f32", "--base", &text(&model), "--adapter", &text(&adapter), "-o", &text(&merged)];
    done("kto-merge", &merge);
    let adapted = scores(&model, Some(&adapter), &b.data);
    close("merged", &scores(&merged, None, &b.data), &adapted, 1e-5);
    assert!(adapted[0] > scores(&model, None, &b.data)[0] + 1e-3, "{adapted:?}");
}

pub fn families() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/families")
}

/// A bench on a tiny model of a family.
pub fn on(model: &Path) -> Bench {
    let b = Bench::new();
    write(&tokens(model), &b.data);
    Bench { model: model.into(), ..b }
}

#[test]
fn biases_that_are_not_there_are_a_warning() {
    let b = Bench::new();
    for (bias, said) in [
        ("all", "warning: --bias: the model has no biases, so none are trained"),
        ("lora-only", "warning: --bias: the adapted layers have no biases, so none are trained"),
    ] {
        let output = b.train(&["--dry-run", "--bias", bias]);
        assert!(output.status.success() && stderr(&output).contains(said), "{}", stderr(&output));
    }
    assert!(!stderr(&b.train(&["--dry-run"])).contains("biases"));
}
