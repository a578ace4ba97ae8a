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
        if !family.is_dir() {
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
    assert_eq!(families, 18);
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

/// The adapter of `llama()` with rows of lengths of their own.
fn dora_adapter(dir: &Path) -> PathBuf {
    let mut dora = Adapter::read(&llama().1).unwrap();
    dora.config.use_dora = true;
    for module in dora.tensors.values_mut() {
        module.magnitude = Some((0..module.out_features).map(|i| 0.5 + (i % 7) as f32 / 10.0).collect());
    }
    dora.write(dir, AdapterMeta::default()).unwrap();
    dir.to_path_buf()
}

#[test]
fn rows_with_trained_lengths_are_compared() {
    let top = tempfile::tempdir().unwrap();
    let dora = dora_adapter(&top.path().join("dora"));
    let output = run(&llama().0, &dora, &top.path().join("out"), &["--dtype", "f32", "--verify"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && number(&said, "by at most ", ", the largest") < 1e-4, "{said}");
    let (code, message) = refused(&llama().0, &dora, &["--verify", "--scale", "0.5"]);
    assert!(code == 2 && message.contains("exists only merged"), "{message}");
}

/// Of testdata/adapters those that hold more than matrices; the settings say on which family.
#[test]
fn what_was_trained_whole_is_compared() {
    let top = tempfile::tempdir().unwrap();
    for (name, family) in
        [("whole-ends", "llama-biases"), ("whole-norms", "gemma3"), ("bias-all", "stablelm")]
    {
        let adapter = testdata("adapters").join(name);
        let base = testdata("families").join(family);
        let output = run(&base, &adapter, &top.path().join(name), &["--dtype", "f32", "--verify"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{name}: {said}");
        assert!(number(&said, "by at most ", ", the largest") < 1e-4, "{name}: {said}");
    }
}

/// Weights that the dtype holds, but of which the model makes no numbers.
#[test]
fn a_result_that_fails_gets_no_name() {
    let top = tempfile::tempdir().unwrap();
    let mut huge = Adapter::read(&llama().1).unwrap();
    huge.tensors.values_mut().for_each(|pair| pair.b.fill(1e30));
    huge.write(&top.path().join("huge"), AdapterMeta::default()).unwrap();
    let (code, message) = refused(&llama().0, &top.path().join("huge"), &["--verify", "--dtype", "f32"]);
    assert!(code == 65 && message.contains("not finite"), "{message}");
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
