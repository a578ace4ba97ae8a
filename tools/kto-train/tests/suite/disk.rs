//! Checkpoints on a disk that is full or fails. `ulimit -f` makes every write beyond a size fail, as a full disk does.

use crate::cli::{Bench, stderr};
use std::process::{Command, Output, Stdio};

/// Runs kto-train under a limit of `kib` on the size of a file.
fn limited(b: &Bench, kib: &str, flags: &[&str]) -> Output {
    let script = "ulimit -f \"$0\"; exec \"$@\"";
    Command::new("bash")
        .args(["-c", script, kib, env!("CARGO_BIN_EXE_kto-train"), "--batch", "4", "--model"])
        .arg(&b.model)
        .arg("--data")
        .arg(&b.data)
        .arg("--out")
        .arg(b.out())
        .args(flags)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Everything in the run directory, hidden names too.
fn names(b: &Bench, folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(b.out().join(folder)).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

const FLAGS: [&str; 4] = ["--max-steps", "10", "--lr", "1e-3"];

/// The state is three times the adapter: a limit between the two.
fn between(b: &Bench) -> String {
    let adapter = std::fs::metadata(b.out().join("adapter/adapter_model.safetensors")).unwrap().len();
    (adapter * 2 / 1024).to_string()
}

#[test]
fn a_checkpoint_that_cannot_be_written_is_a_warning_and_the_old_one_stays() {
    let (truth, b) = (Bench::new(), Bench::new());
    assert!(truth.train(&[&FLAGS[..], &["-q"]].concat()).status.success());
    let paused = b.train(&[&FLAGS[..], &["-q", "--checkpoint-every", "1", "--max-time", "0.001s"]].concat());
    assert!(paused.status.success(), "{}", stderr(&paused));
    let resumed = [&FLAGS[..], &["--checkpoint-every", "1", "--resume"]].concat();
    let output = limited(&b, &between(&truth), &resumed);
    let err = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{err}");
    let warnings: Vec<&str> = err.lines().filter(|l| l.contains("no checkpoint of step")).collect();
    assert_eq!(warnings.len(), 1, "{err}");
    assert!(
        warnings[0].contains("no checkpoint of step 2: ") && warnings[0].contains("training goes on"),
        "{err}"
    );
    assert_eq!(names(&b, "checkpoints"), ["step-00000001"], "the old one, and no temporary part");
    assert!(names(&b, "").iter().all(|n| !n.ends_with(".kto-tmp")));
    for name in ["adapter/adapter_model.safetensors", "metrics.jsonl"] {
        let read = |b: &Bench| std::fs::read(b.out().join(name)).unwrap();
        assert!(read(&b) == read(&truth), "{name}");
    }
}

#[test]
fn a_last_write_that_fails_is_74() {
    let (truth, b) = (Bench::new(), Bench::new());
    assert!(truth.train(&[&FLAGS[..], &["-q"]].concat()).status.success());
    // The adapter.
    let output = limited(&b, "16", &[&FLAGS[..], &["-q"]].concat());
    assert_eq!(output.status.code(), Some(74), "{}", stderr(&output));
    assert!(!b.out().join("adapter").exists() && names(&b, "").iter().all(|n| !n.ends_with(".kto-tmp")));
    // The checkpoint of a pause.
    let flags = [&FLAGS[..], &["-q", "--resume", "--max-time", "0.001s"]].concat();
    let output = limited(&b, &between(&truth), &flags);
    assert_eq!(output.status.code(), Some(74), "{}", stderr(&output));
    assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    assert_eq!(names(&b, "checkpoints"), [""; 0]);
    let output = b.train(&[&FLAGS[..], &["-q", "--resume"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let read = |b: &Bench| std::fs::read(b.out().join("adapter/adapter_model.safetensors")).unwrap();
    assert!(read(&b) == read(&truth));
}
