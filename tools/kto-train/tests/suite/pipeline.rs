//! The golden runs of TRL through the shell's eyes: kto-convert | kto-tokenize | kto-train --preset trl.

use crate::golden::{CASES, Case};
use kto_formats::{adapter::Adapter, tokens::TokenSet};
use serde_json::Value;
use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A tool of the workspace, built beside kto-train.
pub fn tool(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_kto-train")).with_file_name(name);
    assert!(path.exists(), "{} is missing: build the workspace first (make build)", path.display());
    path
}

/// Runs `kto-convert | kto-tokenize` and returns the token file.
fn tokenize(case: &Case, dir: &Path) -> PathBuf {
    let out = dir.join("data.kto.arrow");
    let order = if case.name == "llama_paired" { "trl" } else { "interleave" };
    let mut convert = Command::new(tool("kto-convert"))
        .args(["-q", "--order", order])
        .arg(case.file("data"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let status = Command::new(tool("kto-tokenize"))
        .args(["-q", "--max-length", "96", "--model"])
        .arg(case.file("model"))
        .stdin(convert.stdout.take().unwrap())
        .stdout(File::create(&out).unwrap())
        .status()
        .unwrap();
    assert!(status.success() && convert.wait().unwrap().success(), "{}", case.name);
    out
}

/// Trains as TRL has trained for a golden run, with `more` flags.
pub fn train(case: &Case, data: &Path, out: &Path, more: &[&str]) {
    let text = |key: &str| case.meta[key].to_string().replace('"', "");
    let status = Command::new(tool("kto-train"))
        .args(["-q", "--preset", "trl", "--threads", "2", "--model"])
        .arg(case.file("model"))
        .arg("--data")
        .arg(data)
        .arg("--out")
        .arg(out)
        .arg("--init-adapter")
        .arg(case.file("adapter_init"))
        .args(["--reference", if case.reference_is_adapter() { "init-adapter" } else { "base" }])
        .args(["--loss", &text("loss"), "--beta", &text("beta")])
        .args(["--desirable-weight", &text("dw"), "--undesirable-weight", &text("uw")])
        .args(["--lr", &text("lr"), "--schedule", &text("sched"), "--warmup-steps", &text("warmup")])
        .args(["--weight-decay", &text("wd"), "--max-grad-norm", &text("clip"), "--epochs", &text("epochs")])
        .args(["--batch", &case.batch().to_string(), "--micro-batch", &case.micro().to_string()])
        .args(more)
        .status()
        .unwrap();
    assert!(status.success(), "{}", case.name);
}

/// Tolerance of a key of steps.jsonl: absolute, with its reason.
pub fn tolerance(key: &str, truth: f64) -> Option<f64> {
    Some(match key {
        // TRL's float32 loss and its printing.
        "loss" => 1e-6,
        // Mean differences of log-probabilities summed over up to 40 tokens: 1.7e-5 in TRL's own run.
        "kl" => 5e-5,
        // beta times such differences, beta up to 0.5.
        "rewards/chosen" | "rewards/rejected" | "rewards/margins" => 3e-5,
        // Sums near -200 in float32: one unit in the last place is 1.5e-5.
        "logps/chosen" | "logps/rejected" => 2e-4,
        "grad_norm" => 8e-6 * truth.abs(),
        "learning_rate" => 1e-12,
        "entropy" => 1e-5,
        "logits/chosen" | "logits/rejected" => 1e-6,
        "num_tokens" => 0.0,
        "epoch" => 1e-9,
        _ => return None,
    })
}

#[test]
fn the_pipeline_gives_trls_tokens_steps_and_adapter() {
    let mut worst: std::collections::BTreeMap<String, f64> = Default::default();
    for name in CASES {
        let case = Case::open(name);
        let dir = tempfile::tempdir().unwrap();
        let data = tokenize(&case, dir.path());
        let tokens = TokenSet::read("data", File::open(&data).unwrap()).unwrap();
        let golden = case.tokens();
        assert_eq!(tokens.len(), golden.len(), "{name}");
        for (i, (ours, trl)) in tokens.rows().zip(golden.rows()).enumerate() {
            assert_eq!(ours, trl, "{name} row {i}");
        }
        let run = dir.path().join("run");
        train(&case, &data, &run, &[]);
        let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let ours: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let steps = case.lines("steps");
        assert_eq!(ours.len(), steps.len(), "{name}");
        for (ours, truth) in ours.iter().zip(&steps) {
            compare_step(name, ours, truth, &mut worst);
        }
        compare_adapter(&case, &run.join("adapter"));
    }
    println!("largest differences to TRL: {worst:?}");
}

fn compare_step(
    name: &str,
    ours: &Value,
    truth: &Value,
    worst: &mut std::collections::BTreeMap<String, f64>,
) {
    let mut compared = 0;
    for (key, truth) in truth.as_object().unwrap() {
        let Some(truth) = truth.as_f64() else { continue };
        let Some(tolerance) = tolerance(key, truth) else { continue };
        let value = ours[key].as_f64().unwrap_or_else(|| panic!("{name}: no {key} in {ours}"));
        let off = (value - truth).abs();
        let largest = worst.entry(key.clone()).or_default();
        *largest = largest.max(off);
        assert!(off <= tolerance, "{name} step {}: {key} is {value}, TRL has {truth}", ours["step"]);
        compared += 1;
    }
    assert!(compared >= 8, "{name}: only {compared} numbers compared");
}

fn compare_adapter(case: &Case, ours: &Path) {
    let (ours, golden) = (Adapter::read(ours).unwrap(), Adapter::read(&case.file("adapter_final")).unwrap());
    assert_eq!(ours.config.scale(), golden.config.scale());
    assert!(ours.tensors.keys().eq(golden.tensors.keys()));
    let tolerance = if case.name == "llama_paired" { 3e-5 } else { 6e-6 };
    for (module, golden) in &golden.tensors {
        let ours = &ours.tensors[module];
        for (a, b) in ours.a.iter().chain(&ours.b).zip(golden.a.iter().chain(&golden.b)) {
            assert!((a - b).abs() < tolerance, "{} {module}: {a} {b}", case.name);
        }
    }
}
