//! Every family in every form through the tools: quantized, scored, trained, merged; each step against the same in floats.

use crate::{cli::write, pipeline::tool};
use kto_formats::{
    tensors::TensorStore,
    tokens::{TokenMeta, TokenRow, TokenSet, prompt_hash},
};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::Command,
};

const FAMILIES: [&str; 9] =
    ["llama3", "mistral-window", "qwen2", "qwen3", "phi3", "phi3-longrope", "gemma2", "gemma3", "stablelm"];
/// Names, and flags of kto-quantize.
const FORMS: [(&str, &[&str]); 4] = [
    ("nf4", &["--form", "nf4"]),
    ("fp4", &["--form", "fp4", "--no-double-quant"]),
    ("int8", &["--form", "int8"]),
    ("mlx", &["--form", "mlx", "--group-size", "32"]),
];

/// Runs a tool and returns what it wrote to standard output.
pub fn done(name: &str, args: &[&str]) -> Vec<u8> {
    let output = Command::new(tool(name)).args(args).output().unwrap();
    assert!(output.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The rows of a golden step.
pub fn tokens(family: &Path) -> TokenSet {
    let golden = TensorStore::open_file(&family.join("golden.safetensors")).unwrap();
    let ids = |name: String| -> Vec<u32> {
        let bytes = golden.require(&name).unwrap().data;
        bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let mut set = TokenSet::new(TokenMeta { vocab_size: 48, max_length: 64, ..Default::default() });
    for i in 0..2 {
        let (prompt_ids, completion_ids) = (&ids(format!("{i}.prompt")), &ids(format!("{i}.completion")));
        let prompt_hash = prompt_hash(prompt_ids);
        set.push(TokenRow { prompt_ids, completion_ids, label: i == 0, prompt_hash });
    }
    set
}

/// Log-probabilities of all rows.
pub fn scores(model: &Path, adapter: Option<&Path>, data: &Path) -> Vec<f64> {
    let text = |path: &Path| path.display().to_string();
    let mut args = vec!["score".into(), "--no-kl".into(), "-q".into(), "--model".into(), text(model)];
    args.extend(adapter.iter().flat_map(|path| ["--adapter".into(), text(path)]));
    args.push(text(data));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let lines = String::from_utf8(done("kto-eval", &args)).unwrap();
    let row = |line: &str| serde_json::from_str::<Value>(line).unwrap()["logps"].as_f64().unwrap();
    lines.lines().map(row).collect()
}

pub fn close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() < tolerance * b.abs(), "{what}: {a} {b}");
    }
}

#[test]
fn every_family_goes_through_the_tools_in_every_form() {
    for family in FAMILIES {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/families").join(family);
        let top = tempfile::tempdir().unwrap();
        let path = |name: &str| -> PathBuf { top.path().join(name) };
        let text = |path: &Path| path.display().to_string();
        let data = path("data.kto.arrow");
        write(&tokens(&source), &data);
        for (form, flags) in FORMS {
            let what = format!("{family} {form}");
            let (model, wide) = (path(form), path(&format!("{form}-wide")));
            let run = |name: &str, args: &[&str]| drop(done(name, args));
            run("kto-quantize", &[&[text(&source).as_str(), "-q", "-o", &text(&model)], flags].concat());
            run("kto-quantize", &[&text(&model), "-q", "-o", &text(&wide), "--dequantize", "--dtype", "f32"]);
            // What is read piece by piece is what was decoded at once.
            close(&what, &scores(&model, None, &data), &scores(&wide, None, &data), 1e-6);
            let out = path(&format!("{form}-run"));
            let (model_name, data_name, out_name) = (text(&model), text(&data), text(&out));
            let train = ["--model", &model_name, "--data", &data_name, "--out", &out_name, "-q"];
            run("kto-train", &[&train[..], &["--batch", "2", "--max-steps", "2", "--lr", "0.05"]].concat());
            let (adapter, merged) = (out.join("adapter"), path(&format!("{form}-merged")));
            let adapter_name = text(&adapter);
            let merge = ["--base", &model_name, "--adapter", &adapter_name, "-q", "--dtype", "f32", "-o"];
            run("kto-merge", &[&merge[..], &[&text(&merged)]].concat());
            let adapted = scores(&model, Some(&adapter), &data);
            close(&what, &scores(&merged, None, &data), &adapted, 1e-5);
            // Trained on, the desirable row has become more likely.
            assert!(adapted[0] > scores(&model, None, &data)[0] + 1e-3, "{what}: {adapted:?}");
        }
    }
}
