//! Bases in the forms that files hold: they train, and what is wrong in them is said when it is met.

use crate::cli::{Bench, kto_train, rows, stderr, write};
use kto_formats::adapter::{Adapter, Targets};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

/// Trains two steps of a model with 256 tokens.
fn train(model: &Path, b: &Bench, more: &[&str]) -> std::process::Output {
    train_on(model, b, (&[&[1, 2, 3], &[4, 5], &[200, 31, 7, 8], &[9]], 256), more)
}

fn train_on(model: &Path, b: &Bench, of: (&[&[u32]], u32), more: &[&str]) -> std::process::Output {
    write(&rows(of.0, of.1), &b.data);
    let path = |p: &Path| p.display().to_string();
    let (model, data, out) = (path(model), path(&b.data), path(&b.out()));
    let args = ["--model", &model, "--data", &data, "--out", &out, "--batch", "2", "--max-steps", "2", "-q"];
    kto_train(&[&args[..], more].concat())
}

#[test]
fn stored_forms_train() {
    for name in ["tiny_llama_bf16", "tiny_llama_bnb4", "tiny_llama_int8"] {
        let b = Bench::new();
        let output = train(&testdata("bnb").join(name), &b, &[]);
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        assert!(b.out().join("adapter/adapter_model.safetensors").exists());
    }
}

/// Fused matrices get one pair of factors each, as PEFT has them; rows may be longer than what LongRoPE began with.
#[test]
fn families_of_another_form_train() {
    let long: Vec<u32> = (0..30).map(|i| 3 + i % 40).collect();
    let of: (&[&[u32]], u32) = (&[&[1, 2, 3], &[4, 5], &long, &[9]], 48);
    for (name, fused) in [
        ("families/phi3", true),
        ("families/phi4-mini", true),
        ("families-nf4/phi3-longrope", true),
        ("families/stablelm", false),
    ] {
        let b = Bench::new();
        let output = train_on(&testdata(name), &b, of, &[]);
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        let adapter = Adapter::read(&b.out().join("adapter")).unwrap();
        let Targets::Names(modules) = &adapter.config.target_modules else { panic!("{name}") };
        assert_eq!(modules.iter().any(|m| m == "qkv_proj"), fused, "{name}");
        assert_eq!(adapter.tensors.len(), 2 * modules.len(), "{name}");
        let moved = |module: &str| {
            adapter.tensors.iter().any(|(n, pair)| n.ends_with(module) && pair.b.iter().any(|v| *v != 0.0))
        };
        assert!(modules.iter().all(|m| moved(m)), "{name}");
        // And as the start of another run.
        let begin = b.out().join("adapter").display().to_string();
        let output = train_on(&testdata(name), &Bench::new(), of, &["--init-adapter", &begin]);
        assert!(output.status.success(), "{name}: {}", stderr(&output));
    }
    let b = Bench::new();
    let output = train_on(&testdata("families/phi3"), &b, of, &["--target-modules", "o_proj,q_proj"]);
    assert_eq!(output.status.code(), Some(2));
    let hint = "whole paths, or a list of qkv_proj, o_proj, gate_up_proj, down_proj\n";
    assert!(stderr(&output).ends_with(hint), "{}", stderr(&output));
}

#[test]
fn a_weight_that_is_not_finite_ends_the_run() {
    let b = Bench::new();
    let model = b.dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let source = testdata("bnb/tiny_llama_bf16");
    fs::copy(source.join("config.json"), model.join("config.json")).unwrap();
    let mut bytes = fs::read(source.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let start = header["model.layers.1.mlp.down_proj.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + length + start + 10..][..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    fs::write(model.join("model.safetensors"), bytes).unwrap();
    let output = train(&model, &b, &[]);
    let says = "tensor \"model.layers.1.mlp.down_proj.weight\": NaN at index 5\n";
    assert_eq!(output.status.code(), Some(65));
    assert_eq!(stderr(&output), format!("kto-train: {}: {says}", model.display()));
}
