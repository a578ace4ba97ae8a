//! `--verify`: every family merged, beside base and adapter in our engine; and what cannot be compared.

use super::*;
use kto_formats::{lora::LoraModule, tensors::TensorStore};
use std::collections::BTreeMap;

/// What stands between two phrases of the message of `--verify`.
fn number(message: &str, before: &str, after: &str) -> f64 {
    let rest = message.split_once(before).unwrap_or_else(|| panic!("{message}")).1;
    rest.split_once(after).unwrap().0.parse().unwrap()
}

/// The adapter that `golden.safetensors` of a family holds: rank 2, alpha 3.
fn family_adapter(family: &Path, dir: &Path) -> PathBuf {
    let golden = TensorStore::open_file(&family.join("golden.safetensors")).unwrap();
    let mut tensors = BTreeMap::new();
    for name in golden.names().filter(|n| n.starts_with("lora/") && n.ends_with(".lora_A.weight")) {
        let (a, b) =
            (golden.require(name).unwrap(), golden.require(&name.replace("lora_A", "lora_B")).unwrap());
        let module = name.strip_prefix("lora/").unwrap().strip_suffix(".lora_A.weight").unwrap();
        let (r, in_features, out_features) = (a.shape[0], a.shape[1], b.shape[0]);
        let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
        tensors.insert(
            module.to_string(),
            LoraModule { a, b, r, in_features, out_features, scale: 1.5, magnitude: None },
        );
    }
    let mut adapter = Adapter::read(&llama().1).unwrap();
    (adapter.config.r, adapter.config.lora_alpha, adapter.tensors) = (2, 3.0, tensors);
    adapter.write(dir, AdapterMeta::default()).unwrap();
    dir.to_path_buf()
}

#[test]
fn every_family_merged_is_base_plus_adapter() {
    let top = tempfile::tempdir().unwrap();
    let mut families = 0;
    for entry in fs::read_dir(testdata("families")).unwrap() {
        let family = entry.unwrap().path();
        let name = family.file_name().unwrap().to_str().unwrap().to_string();
        let known = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"];
        if !family.is_dir() || !known.iter().any(|k| name.starts_with(k)) {
            continue;
        }
        families += 1;
        let adapter = family_adapter(&family, &top.path().join(format!("{name}-adapter")));
        // Rounding of f32 and of the weights to bf16, f16 (8 and 11 bits), through 2 or 3 blocks of random weights.
        for (dtype, limit) in [("f32", 1e-5), ("f16", 1e-2), ("bf16", 8e-2)] {
            let out = top.path().join(format!("{name}-{dtype}"));
            let output = run(&family, &adapter, &out, &["--dtype", dtype, "--verify"]);
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.success(), "{name}: {said}");
            let off = number(&said, "by at most ", ", the largest");
            let largest = number(&said, "the largest is ", ";");
            assert!(off > 0.0 && off <= limit * largest, "{name} {dtype}: {said}");
        }
    }
    assert_eq!(families, 11);
}

/// The adapter of `llama()` with other numbers.
fn other_adapter(dir: &Path) -> PathBuf {
    let mut other = Adapter::read(&llama().1).unwrap();
    other.tensors.values_mut().for_each(|pair| pair.b.reverse());
    other.write(dir, AdapterMeta::default()).unwrap();
    dir.to_path_buf()
}

/// Factors, layers and weights of several adapters are those of the merge.
#[test]
fn factors_layers_and_mixtures_are_compared_too() {
    let top = tempfile::tempdir().unwrap();
    let (base, adapter) = llama();
    let out = top.path().join("out");
    let ok = run(&base, &adapter, &out, &["--scale", "0.5", "--dtype", "f32", "--verify"]);
    let said = String::from_utf8(ok.stderr).unwrap();
    assert!(number(&said, "by at most ", ", the largest") < 1e-4, "{said}");
    let other = other_adapter(&top.path().join("other"));
    let two = ["--adapter", text(&other), "--weight", "0.75", "--weight", "-0.5", "--layers", "1"];
    let more = [&two[..], &["--dtype", "f32", "--verify"]].concat();
    let output = run(&base, &adapter, &top.path().join("two"), &more);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && number(&said, "by at most ", ", the largest") < 1e-4, "{said}");
}

#[test]
fn what_exists_only_merged_is_refused_before_anything_is_written() {
    let (base, adapter) = llama();
    let top = tempfile::tempdir().unwrap();
    let other = other_adapter(&top.path().join("other"));
    for (more, what) in [
        (&["--form", "gguf"][..], "no model directory"),
        (&["--adapter", text(&other), "--method", "ties"], "not linear"),
    ] {
        let (code, message) = refused(&base, &adapter, &[&["--verify"], more].concat());
        assert!(code == 2 && message.contains(what), "{message}");
    }
}
