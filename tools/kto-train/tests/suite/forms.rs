//! Bases in the forms that files hold: they train, and what is wrong in them is said when it is met.

use crate::cli::{Bench, kto_train, rows, stderr, write};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

/// Trains two steps of a model with 256 tokens.
fn train(model: &Path, b: &Bench, more: &[&str]) -> std::process::Output {
    write(&rows(&[&[1, 2, 3], &[4, 5], &[200, 31, 7, 8], &[9]], 256), &b.data);
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
