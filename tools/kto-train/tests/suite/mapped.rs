//! A model file that somebody cuts while it is mapped: one line, 74, and no dead process.
#![cfg(target_os = "linux")]

use crate::cli::{Bench, stderr};
use std::{
    fs::{self, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// A copy of the bench's model.
fn copy(b: &Bench) -> PathBuf {
    let to = b.dir.path().join("model");
    fs::create_dir(&to).unwrap();
    for entry in fs::read_dir(&b.model).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    to
}

/// Waits until the process has mapped `file`.
fn wait_for_map(child: &Child, file: &Path) {
    let began = Instant::now();
    let maps = format!("/proc/{}/maps", child.id());
    while !fs::read_to_string(&maps).unwrap_or_default().contains(file.to_str().unwrap()) {
        assert!(began.elapsed() < Duration::from_secs(60), "{} was not mapped", file.display());
        sleep(Duration::from_millis(2));
    }
}

/// Cuts the model when the tool has mapped it and waits for its `input`; returns the end of the tool.
fn cut_while_mapped(b: &Bench, tool: &Path, args: &[&str], input: &[u8]) -> std::process::Output {
    let model = copy(b);
    let weights = model.join("model.safetensors");
    let mut child = Command::new(tool)
        .args(args)
        .arg("--model")
        .arg(&model)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_map(&child, &weights);
    OpenOptions::new().write(true).open(&weights).unwrap().set_len(4096).unwrap();
    // The tool may be gone before it has read all.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn check(output: &std::process::Output, tool: &str) {
    let err = stderr(output);
    assert_eq!(output.status.code(), Some(74), "{err}");
    let line = err.lines().last().unwrap();
    assert!(line.starts_with(&format!("{tool}: ")), "{err}");
    assert!(
        line.ends_with("model.safetensors: the file was cut, or its disk failed, while it was in use"),
        "{err}"
    );
    assert_eq!(err.lines().filter(|l| l.contains("was cut")).count(), 1);
}

#[test]
fn training_names_the_file_that_was_cut() {
    let b = Bench::new();
    let out = b.out().display().to_string();
    let tool = Path::new(env!("CARGO_BIN_EXE_kto-train"));
    let args = ["--batch", "4", "--data", "-", "--out", &out];
    check(&cut_while_mapped(&b, tool, &args, &fs::read(&b.data).unwrap()), "kto-train");
    assert!(!b.out().join("adapter").exists());
}

#[test]
fn kto_eval_names_the_file_that_was_cut() {
    let b = Bench::new();
    let tool = Path::new(env!("CARGO_BIN_EXE_kto-train")).with_file_name("kto-eval");
    assert!(tool.exists(), "{} is missing: build the workspace first (make build)", tool.display());
    check(&cut_while_mapped(&b, &tool, &["generate"], b"{\"prompt\": \"once\"}\n"), "kto-eval");
}

#[test]
fn the_last_checkpoint_outlives_the_loss_of_the_model() {
    let (b, truth) = (Bench::new(), Bench::new());
    let whole = copy(&b);
    let broken = b.dir.path().join("broken");
    fs::create_dir(&broken).unwrap();
    for entry in fs::read_dir(&whole).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), broken.join(entry.file_name())).unwrap();
    }
    let flags = ["-q", "--batch", "4", "--epochs", "40", "--checkpoint-every", "1", "--resume"];
    let run = |model: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kto-train"));
        command.args(flags).arg("--model").arg(model).arg("--data").arg(&b.data).arg("--out").arg(b.out());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let child = run(&broken);
    let began = Instant::now();
    while fs::read_dir(b.out().join("checkpoints")).map_or(0, |d| d.count()) == 0
        && began.elapsed() < Duration::from_secs(60)
    {
        sleep(Duration::from_millis(2));
    }
    OpenOptions::new().write(true).open(broken.join("model.safetensors")).unwrap().set_len(4096).unwrap();
    let output = child.wait_with_output().unwrap();
    check(&output, "kto-train");
    let output = run(&whole).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(truth.train(&["-q", "--epochs", "40"]).status.success());
    for name in ["adapter/adapter_model.safetensors", "metrics.jsonl"] {
        assert!(fs::read(b.out().join(name)).unwrap() == fs::read(truth.out().join(name)).unwrap(), "{name}");
    }
}
