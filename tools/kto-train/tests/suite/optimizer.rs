//! `--optimizer`: what is stored, what a resumed run is asked for, and that an interrupted run with 8-bit moments ends with the same bytes.

use crate::cli::{Bench, kto_train, stderr};
use kto_cli::hash::sha256_hex;
use kto_formats::tensors::TensorStore;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// Rank 80 makes matrices of 5120 to 8960 numbers, and of 2560 (B of k and v), which stay in f32.
const FLAGS: [&str; 14] = [
    "-q",
    "--optimizer",
    "adamw-8bit",
    "--lora-r",
    "80",
    "--epochs",
    "12.5",
    "--lr",
    "1e-3",
    "--lora-dropout",
    "0.1",
    "--schedule",
    "cosine",
    "--checkpoint-every=1",
];

/// Hashes of the adapter and of the metrics.
fn result(out: &Path) -> [String; 2] {
    ["adapter/adapter_model.safetensors", "metrics.jsonl"]
        .map(|name| sha256_hex(&std::fs::read(out.join(name)).unwrap()))
}

/// Runs in another directory than the bench's.
fn resume(b: &Bench, out: &Path) -> Output {
    let shown = |path: &Path| path.display().to_string();
    let (model, data, out) = (shown(&b.model), shown(&b.data), shown(out));
    let inputs = ["--model", &model, "--data", &data, "--out", &out, "--batch", "4", "--resume"];
    kto_train(&[&inputs[..], &FLAGS[..]].concat())
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// Returns the complete checkpoints, oldest first.
fn checkpoints(out: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(out.join("checkpoints")).into_iter().flatten();
    let whole = |p: &PathBuf| p.file_name().unwrap().to_str().unwrap().starts_with("step-");
    let mut found: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(whole).collect();
    found.sort();
    found
}

#[test]
fn an_interrupted_run_ends_with_the_bytes_of_one_that_was_not() {
    let whole = Bench::new();
    let output = whole.train(&FLAGS);
    assert!(output.status.success(), "{}", stderr(&output));
    let truth = result(&whole.out());

    let b = Bench::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kto-train"));
    command.arg("--model").arg(&b.model).arg("--data").arg(&b.data).arg("--out").arg(b.out());
    command
        .args(["--batch", "4"])
        .args(FLAGS)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let began = Instant::now();
    while checkpoints(&b.out()).len() < 2 && began.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(1));
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
    assert!(!b.out().join("adapter").exists());

    // A copy of the directory goes on as the directory itself does, and so does the checkpoint before the last.
    let (second, third) = (b.dir.path().join("second"), b.dir.path().join("third"));
    copy(&b.out(), &second);
    copy(&b.out(), &third);
    std::fs::remove_dir_all(checkpoints(&third).pop().unwrap()).unwrap();
    for out in [&b.out(), &second, &third] {
        let output = resume(&b, out);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(result(out), truth);
    }
}

#[test]
fn a_checkpoint_holds_codes_and_scales_as_they_are() {
    let b = Bench::new();
    let output = b.train(&FLAGS);
    assert!(output.status.success(), "{}", stderr(&output));
    let state = checkpoints(&b.out()).pop().unwrap().join("state.safetensors");
    let store = TensorStore::open_file(&state).unwrap();
    let (mut small, mut large) = (0, 0);
    for view in store.views() {
        let Some(name) = view.name.strip_prefix("adapter/") else { continue };
        let n: usize = view.shape.iter().product();
        for moment in ["m", "v"] {
            let (codes, absmax) = (format!("{moment}.codes/{name}"), format!("{moment}.absmax/{name}"));
            if n < 4096 {
                assert_eq!(store.require(&format!("{moment}/{name}")).unwrap().dtype, Dtype::F32);
                assert!(!store.contains(&codes) && !store.contains(&absmax));
                small += 1;
                continue;
            }
            let (codes, absmax) = (store.require(&codes).unwrap(), store.require(&absmax).unwrap());
            assert_eq!((codes.dtype, codes.shape), (Dtype::U8, view.shape));
            assert_eq!((absmax.dtype, absmax.shape), (Dtype::F32, &[n.div_ceil(256)][..]));
            assert!(absmax.to_f32().unwrap().iter().all(|a| *a > 0.0), "{name}");
            large += 1;
        }
    }
    // Two blocks of 14 matrices, two moments.
    assert_eq!((small, large), (2 * 2 * 2, 2 * 12 * 2));
}

#[test]
fn eight_bits_train_almost_as_f32_does() {
    let loss = |optimizer: &str| {
        let b = Bench::new();
        let flags = ["-q", "--lora-r", "80", "--epochs", "8", "--lr", "1e-3", "--loss", "sft"];
        let output = b.train(&[&flags[..], &["--optim", optimizer]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let metrics = std::fs::read_to_string(b.out().join("metrics.jsonl")).unwrap();
        let losses: Vec<f64> = metrics
            .lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64().unwrap())
            .collect();
        losses[35..].iter().sum::<f64>() / 5.0
    };
    let (f32, bits8) = (loss("adamw_torch"), loss("paged_adamw_8bit"));
    println!("mean loss of the last steps: {f32} in f32, {bits8} in 8 bits");
    assert!(f32 != bits8 && (f32 - bits8).abs() < 0.02 * f32, "{f32} {bits8}");
}

#[test]
fn names_of_transformers_are_known_and_bad_values_refused() {
    let b = Bench::new();
    for (name, ours) in [
        ("adamw", "adamw"),
        ("adamw_torch", "adamw"),
        ("adamw-8bit", "adamw-8bit"),
        ("adamw_8bit", "adamw-8bit"),
        ("adamw_bnb_8bit", "adamw-8bit"),
        ("paged_adamw_8bit", "adamw-8bit"),
    ] {
        let output = b.train(&["--dry-run", "--optim", name, "--adam_beta2", "0.99", "--lora-r", "80"]);
        let text = String::from_utf8(output.stdout).unwrap();
        let line = format!("{ours}, betas 0.9 and 0.99, epsilon 0.00000001, weight decay 0, gradient norm 1");
        assert!(text.contains(&line), "{text}");
        assert_eq!(text.contains("memory: AdamW moments in 8 bits "), ours == "adamw-8bit", "{text}");
    }
    for (flag, value) in
        [("--optimizer", "sgd"), ("--adam-beta1", "1"), ("--adam-beta2", "-0.1"), ("--adam-epsilon", "0")]
    {
        let output = b.train(&[&format!("{flag}={value}")]);
        assert_eq!(output.status.code(), Some(2), "{flag}");
        assert!(stderr(&output).contains(flag), "{}", stderr(&output));
    }
}

#[test]
fn an_update_out_of_range_ends_the_run_before_it_is_written() {
    let b = Bench::new();
    let output = b.train(&[&FLAGS[..5], &["--lr", "1e308", "--checkpoint-every", "1"]].concat());
    let err = stderr(&output);
    assert_eq!(output.status.code(), Some(65), "{err}");
    assert!(
        err.contains("step 1: ") && err.contains(".lora_A: adamw8_step: element 0 would not be finite"),
        "{err}"
    );
    assert!(err.contains("hint: a lower --lr"), "{err}");
    assert!(!b.out().join("checkpoints").exists());
}

/// The step that is named is the run's, not the optimizer's own count, in which skipped steps are none.
#[test]
fn after_a_skipped_step_an_update_out_of_range_names_the_step_of_the_run() {
    let mut b = Bench::new();
    crate::nonfinite::poison(&mut b);
    // In the order of the file the first eight rows have the one that overflows.
    let order = ["--preset", "trl", "--on-nonfinite", "skip"];
    let output = b.train_in_batches("8", &[&FLAGS[..5], &order, &["--lr", "1e308"]].concat());
    let err = stderr(&output);
    assert_eq!(output.status.code(), Some(65), "{err}");
    let listed = std::fs::read_to_string(b.out().join("nonfinite.jsonl")).unwrap();
    assert!(listed.contains("\"step\":1,") && listed.lines().count() == 1, "{listed}");
    assert!(err.contains("kto-train: step 2: ") && err.contains("adamw8_step: element 0"), "{err}");
}

#[test]
fn the_optimizer_is_a_part_of_the_plan() {
    let b = Bench::new();
    let flags = ["-q", "--max-steps", "2", "--checkpoint-every", "1"];
    assert!(b.train(&flags).status.success());
    std::fs::remove_dir_all(b.out().join("adapter")).unwrap();
    for (flag, value, text) in [
        ("--optimizer", "adamw-8bit", "optimizer was \"adamw\", is \"adamw-8bit\""),
        ("--adam-beta1", "0.8", "adam_beta1 was 0.9, is 0.8"),
        ("--adam-beta2", "0.99", "adam_beta2 was 0.999, is 0.99"),
        ("--adam-epsilon", "1e-6", "adam_epsilon was 1e-8, is 1e-6"),
    ] {
        let output = b.train(&[&flags[..], &["--resume", flag, value]].concat());
        assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
        assert!(stderr(&output).contains(text), "{}", stderr(&output));
    }
}

#[test]
fn a_run_of_before_these_flags_goes_on_with_the_defaults() {
    let b = Bench::new();
    let flags = ["-q", "--max-steps", "4", "--checkpoint-every", "2"];
    assert!(b.train(&flags).status.success());
    let truth = result(&b.out());
    std::fs::remove_dir_all(b.out().join("adapter")).unwrap();
    std::fs::remove_dir_all(checkpoints(&b.out()).pop().unwrap()).unwrap();
    let path = b.out().join("run.json");
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let plan = manifest["plan"].as_object_mut().unwrap();
    for field in ["base_weights", "optimizer", "adam_beta1", "adam_beta2", "adam_epsilon"] {
        assert!(plan.shift_remove(field).is_some(), "{field}");
    }
    assert!(manifest.as_object_mut().unwrap().shift_remove("base_files").is_some());
    manifest["state"] = json!("running");
    std::fs::write(&path, manifest.to_string()).unwrap();
    let other = b.train(&[&flags[..], &["--resume", "--optimizer", "adamw-8bit"]].concat());
    assert_eq!(other.status.code(), Some(78), "{}", stderr(&other));
    let output = b.train(&[&flags[..], &["--resume"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(result(&b.out()), truth);
}
