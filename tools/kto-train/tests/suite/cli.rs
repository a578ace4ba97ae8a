//! kto-train at the shell: what it refuses, with which line and code.

use crate::golden::Case;
use kto_formats::{
    adapter::{Adapter, AdapterMeta},
    model_dir::ModelDir,
    tokens::{TokenMeta, TokenRow, TokenSet, prompt_hash},
};
use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

pub fn kto_train(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kto-train")).args(args).stdin(Stdio::null()).output().unwrap()
}

/// A directory with the golden tokens and a way to run kto-train on them.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub model: PathBuf,
    pub data: PathBuf,
}

impl Bench {
    pub fn new() -> Self {
        let case = Case::open("llama");
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data.kto.arrow");
        write(&case.tokens(), &data);
        Self { model: case.file("model"), data, dir }
    }

    pub fn out(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Runs with the usual inputs and `more`.
    pub fn train(&self, more: &[&str]) -> Output {
        self.train_in_batches("4", more)
    }

    /// The same with steps of `batch` rows.
    pub fn train_in_batches(&self, batch: &str, more: &[&str]) -> Output {
        let (model, data, out) = (
            self.model.display().to_string(),
            self.data.display().to_string(),
            self.out().display().to_string(),
        );
        let mut args = vec!["--model", &model, "--data", &data, "--out", &out, "--batch", batch];
        args.extend(more);
        kto_train(&args)
    }
}

pub fn write(tokens: &TokenSet, path: &Path) {
    let mut file = std::fs::File::create(path).unwrap();
    tokens.write(&mut file).unwrap();
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Checks exit code and message, and that nothing panicked.
pub fn refused(output: &Output, code: i32, text: &str) {
    let err = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{err}");
    assert!(err.contains(text), "{err}");
    assert!(!err.contains("panicked"), "{err}");
    let lines = err
        .lines()
        .filter(|l| !["hint:", "rows (", "warning", "reference pass:"].iter().any(|known| l.contains(known)))
        .count();
    assert_eq!(lines, 1, "{err}");
}

#[test]
fn bad_inputs_are_refused() {
    let b = Bench::new();
    let out = b.out().display().to_string();
    let model = b.model.display().to_string();
    refused(&kto_train(&["--model", "/none", "--data", "x", "--out", &out]), 66, "/none");
    refused(&kto_train(&["--model", &model, "--data", "/none", "--out", &out]), 66, "/none");
    refused(&b.train(&["--batch", "0"]), 2, "--batch");
    refused(&b.train(&["--micro-batch", "2"]), 2, "--preset trl");
    refused(&b.train(&["--preset", "trl", "--micro-batch", "3"]), 2, "does not divide");
    refused(&b.train(&["--target-modules", "q_proj,lm_head"]), 2, "lm_head");
    refused(&b.train(&["--reference", "init-adapter"]), 2, "--init-adapter");
    refused(&b.train(&["--lr", "nan"]), 2, "--lr");
    refused(&b.train(&["--init-adapter", "/none"]), 66, "/none");
    assert!(!b.out().exists(), "a refused run leaves nothing");
}

/// A stack of a pebibyte cannot be had; `ulimit -u` does not hold for root.
#[test]
fn threads_that_cannot_be_started_are_71() {
    let b = Bench::new();
    for threads in [&[][..], &["--threads", "3"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_kto-train"))
            .args([
                Path::new("--model"),
                &b.model,
                Path::new("--data"),
                &b.data,
                Path::new("--out"),
                &b.out(),
            ])
            .args(threads)
            .env("RUST_MIN_STACK", (1u64 << 50).to_string())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        refused(&output, 71, "cannot start the worker threads: ");
        assert!(stderr(&output).contains("hint: a smaller --threads"), "{}", stderr(&output));
    }
}

/// It needs neither a model nor a run directory; whether there is a device is the machine's business.
#[test]
fn the_device_is_checked_without_inputs() {
    let output = kto_train(&["--check-device"]);
    assert!(matches!(output.status.code(), Some(0 | 69)), "{}", stderr(&output));
}

#[test]
fn an_initial_adapter_may_come_from_a_4_bit_form_of_the_base() {
    let b = Bench::new();
    let own = ModelDir::open(&b.model).unwrap().fingerprint();
    let adapter = Adapter::read(&Case::open("llama").file("adapter_init")).unwrap();
    let train = |trained_on: String| {
        let dir = b.dir.path().join("initial");
        adapter
            .write(&dir, AdapterMeta { base_fingerprint: Some(trained_on), ..AdapterMeta::default() })
            .unwrap();
        b.train(&["--dry-run", "--init-adapter", &dir.display().to_string()])
    };
    for trained_on in [own.clone(), format!("{}+{own}", "a".repeat(64))] {
        let output = train(trained_on);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    refused(&train("a".repeat(64)), 78, "trained on another base");
}

#[test]
fn bad_token_files_are_refused() {
    let b = Bench::new();
    let bytes = std::fs::read(&b.data).unwrap();
    std::fs::write(&b.data, &bytes[..bytes.len() / 2]).unwrap();
    refused(&b.train(&[]), 65, "data.kto.arrow");
    write(&rows(&[&[1, 383]], 400), &b.data);
    assert!(b.train(&["--dry-run", "--loss", "sft"]).status.success());
    write(&rows(&[&[1, 390]], 400), &b.data);
    refused(&b.train(&["--loss", "apo-zero"]), 65, "390");
    write(&rows(&[&[1, 5], &[1, 5]], 384), &b.data);
    refused(&b.train(&[]), 65, "same prompt");
    write(&rows(&[], 384), &b.data);
    refused(&b.train(&[]), 65, "no rows");
}

/// Rows with the given prompts and one completion token.
pub fn rows(prompts: &[&[u32]], vocab_size: u32) -> TokenSet {
    let mut set = TokenSet::new(TokenMeta { vocab_size, max_length: 96, ..Default::default() });
    for prompt in prompts {
        set.push(TokenRow {
            prompt_ids: prompt,
            completion_ids: &[7],
            label: true,
            prompt_hash: prompt_hash(prompt),
        });
    }
    set
}

#[test]
fn tokens_of_another_tokenizer_are_refused() {
    let b = Bench::new();
    let mut tokens = Case::open("llama").tokens();
    tokens.meta.tokenizer = "0".repeat(64);
    write(&tokens, &b.data);
    refused(&b.train(&[]), 78, "another tokenizer.json");
    assert!(b.train(&["--force-base", "--max-steps", "1"]).status.success());
}

#[test]
fn a_finished_run_is_not_overwritten() {
    let b = Bench::new();
    assert!(b.train(&["-q", "--max-steps", "2"]).status.success());
    let adapter = std::fs::read(b.out().join("adapter/adapter_model.safetensors")).unwrap();
    refused(&b.train(&[]), 73, "there is a run");
    assert_eq!(std::fs::read(b.out().join("adapter/adapter_model.safetensors")).unwrap(), adapter);
    assert!(b.train(&["-q", "--force", "--max-steps", "1"]).status.success());
    assert_eq!(std::fs::read_to_string(b.out().join("metrics.jsonl")).unwrap().lines().count(), 1);
}

#[test]
fn a_directory_in_use_is_refused() {
    let b = Bench::new();
    std::fs::create_dir(b.out()).unwrap();
    let _lock = kto_cli::lock::RunLock::acquire(&b.out()).unwrap();
    refused(&b.train(&[]), 75, "run");
}

#[test]
fn a_dry_run_prints_the_plan_and_writes_nothing() {
    let b = Bench::new();
    let output = b.train(&["--dry-run", "--epochs", "2"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("10 of 4 rows") && text.contains("memory"), "{text}");
    assert!(!b.out().exists());
}

#[test]
fn data_through_a_pipe_is_kept_in_the_run_directory() {
    let b = Bench::new();
    let piped = |data: &Path, more: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_kto-train"))
            .args(["-q", "--max-steps", "1", "--model"])
            .arg(&b.model)
            .arg("--out")
            .arg(b.out())
            .args(more)
            .stdin(std::fs::File::open(data).unwrap())
            .output()
            .unwrap()
    };
    let output = piped(&b.data, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(output.stderr.is_empty());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{}\n", b.out().display()));
    let read = |path: PathBuf| TokenSet::read("x", std::fs::File::open(path).unwrap()).unwrap();
    assert_eq!(read(b.out().join("data.kto.arrow")), read(b.data.clone()));

    // To go on, the same rows or none; others are another run.
    for data in [&b.data, Path::new("/dev/null")] {
        let output = piped(data, &["--resume"]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let other = b.dir.path().join("other.kto.arrow");
    let mut tokens = Case::open("llama").tokens();
    tokens.meta.max_length -= 1;
    write(&tokens, &other);
    refused(&piped(&other, &["--resume"]), 78, "max_length was 96, is 95");
    // A file of that name which is no run's copy is neither read nor lost.
    std::fs::remove_dir_all(b.out()).unwrap();
    std::fs::create_dir(b.out()).unwrap();
    let copy = b.out().join("data.kto.arrow");
    std::fs::copy(&other, &copy).unwrap();
    for more in [&[][..], &["--resume"]] {
        refused(&piped(&b.data, more), 73, "in the way");
    }
    assert_eq!(read(copy), read(other));
}

#[test]
fn losses_without_kl_train() {
    for (loss, start) in [("sft", 3.0), ("apo-zero", 0.4)] {
        let b = Bench::new();
        let output = b.train(&["-q", "--loss", loss, "--lr", "3e-3", "--epochs", "8"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let losses: Vec<f64> = std::fs::read_to_string(b.out().join("metrics.jsonl"))
            .unwrap()
            .lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64().unwrap())
            .collect();
        let mean = |l: &[f64]| l.iter().sum::<f64>() / l.len() as f64;
        assert!(losses[0] > start && mean(&losses[35..]) < mean(&losses[..5]) * 0.97, "{loss}: {losses:?}");
    }
}

#[test]
fn sizes_of_config_that_the_weights_do_not_have_cost_nothing() {
    let b = Bench::new();
    let copy = b.dir.path().join("model");
    std::fs::create_dir(&copy).unwrap();
    for name in ["model.safetensors", "tokenizer.json"] {
        std::fs::copy(b.model.join(name), copy.join(name)).unwrap();
    }
    let text = std::fs::read(b.model.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let huge = serde_json::json!(16_777_216);
    for (field, value, found) in [
        ("num_hidden_layers", huge.clone(), "layers.2."),
        ("num_hidden_layers", serde_json::json!(1), "config.json says 1 blocks"),
        ("hidden_size", huge.clone(), "embed_tokens"),
        ("intermediate_size", huge.clone(), "gate_proj"),
        ("head_dim", huge, "q_proj"),
        ("hidden_act", serde_json::json!(5), "hidden_act"),
        ("rope_scaling", serde_json::json!({"factor": 8.0}), "rope_scaling"),
        ("rope_parameters", serde_json::json!(5), "rope_parameters"),
        ("layer_types", serde_json::json!(["sliding_attention"]), "layer_types"),
    ] {
        let mut changed = config.clone();
        changed[field] = value;
        std::fs::write(copy.join("config.json"), changed.to_string()).unwrap();
        let (model, data) = (copy.display().to_string(), b.data.display().to_string());
        let out = b.out().display().to_string();
        refused(&kto_train(&["--model", &model, "--data", &data, "--out", &out]), 65, found);
    }
}

#[test]
fn numbers_out_of_range_end_a_run_before_they_are_saved() {
    let b = Bench::new();
    refused(&b.train(&["--epochs", "1e300"]), 2, "steps are more than");
    let output = b.train(&["--max-steps", "1", "--lr", "1e308", "--checkpoint-every", "1"]);
    refused(&output, 65, "no longer finite");
    assert!(!b.out().join("adapter").exists() && !b.out().join("checkpoints").exists());
}

#[test]
fn force_keeps_what_the_new_run_reads() {
    let b = Bench::new();
    assert!(b.train(&["-q", "--max-steps", "1"]).status.success());
    let adapter = b.out().join("adapter");
    refused(&b.train(&["--force", "--init-adapter", &adapter.display().to_string()]), 2, "--init-adapter");
    assert!(adapter.join("adapter_model.safetensors").exists());
}

#[test]
fn flags_of_a_fresh_adapter_do_not_fit_a_given_one() {
    let b = Bench::new();
    let adapter = Case::open("llama").file("adapter_init").display().to_string();
    refused(&b.train(&["--init-adapter", &adapter, "--lora-r", "4"]), 2, "--lora-r");
}

#[test]
fn a_directory_with_other_files_is_no_run_directory() {
    let b = Bench::new();
    std::fs::create_dir(b.out()).unwrap();
    std::fs::write(b.out().join("config.json"), "{}").unwrap();
    refused(&b.train(&["--force"]), 73, "not a run directory: there is \"config.json\"");
}

/// Without the feature, or with it where there is no GPU: one line, what to do, and 69.
#[test]
fn a_device_that_is_not_there_is_one_line() {
    if std::path::Path::new("/dev/nvidiactl").exists() {
        return;
    }
    let b = Bench::new();
    let found = if cfg!(feature = "cuda") { "NVIDIA driver" } else { "built without CUDA" };
    refused(&kto_train(&["--check-device"]), 69, found);
    refused(&b.train(&["--device", "cuda"]), 69, found);
    refused(&b.train(&["--device", "cuda:1"]), 69, found);
    assert!(!b.out().exists());
    assert!(b.train(&["-q", "--max-steps", "1", "--device", "auto"]).status.success());
}
