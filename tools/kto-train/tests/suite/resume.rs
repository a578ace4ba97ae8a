//! A run that is interrupted and resumed ends with the bytes of one that was not.

use crate::cli::{Bench, refused, stderr};
use std::{
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const FLAGS: [&str; 9] =
    ["-q", "--epochs", "10", "--lr", "1e-3", "--lora-dropout", "0.1", "--schedule", "cosine"];

fn result(out: &Path) -> (Vec<u8>, Vec<u8>) {
    let read = |name: &str| std::fs::read(out.join(name)).unwrap();
    (read("adapter/adapter_model.safetensors"), read("metrics.jsonl"))
}

fn spawn(b: &Bench) -> std::process::Child {
    Command::new(env!("CARGO_BIN_EXE_kto-train"))
        .args(FLAGS)
        .args(["--batch", "4", "--checkpoint-every", "1", "--resume", "--model"])
        .arg(&b.model)
        .arg("--data")
        .arg(&b.data)
        .arg("--out")
        .arg(b.out())
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn killed_runs_resume_to_the_same_bytes() {
    let whole = Bench::new();
    let output = whole.train(&FLAGS);
    assert!(output.status.success(), "{}", stderr(&output));
    let truth = result(&whole.out());
    let b = Bench::new();
    let mut kills = 0;
    let began = Instant::now();
    loop {
        let mut child = spawn(&b);
        sleep(Duration::from_millis(60 + 41 * (kills % 5)));
        // After a while the run is left alone, so that the test ends on any machine.
        if kills < 8 && began.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            continue;
        }
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        break;
    }
    assert!(kills > 0, "the run had ended before the first kill");
    assert!(result(&b.out()) == truth, "after {kills} kills");
}

#[test]
fn a_signal_saves_and_names_itself() {
    let b = Bench::new();
    let child = spawn(&b);
    let metrics = b.out().join("metrics.jsonl");
    let began = Instant::now();
    while std::fs::metadata(&metrics).map_or(0, |m| m.len()) == 0 && began.elapsed() < Duration::from_secs(60)
    {
        sleep(Duration::from_millis(2));
    }
    let status = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
    assert!(stderr(&output).contains("is saved"), "{}", stderr(&output));
    assert!(!b.out().join("adapter").exists());
    let resumed = spawn(&b).wait_with_output().unwrap();
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    let whole = Bench::new();
    assert!(whole.train(&FLAGS).status.success());
    assert!(result(&b.out()) == result(&whole.out()));
}

#[test]
fn resume_with_other_flags_is_refused_by_name() {
    let b = Bench::new();
    assert!(b.train(&["-q", "--max-steps", "2"]).status.success());
    let output = b.train(&["--resume", "--max-steps", "2", "--beta", "0.2"]);
    assert_eq!(output.status.code(), Some(78));
    assert!(stderr(&output).contains("beta was 0.1, is 0.2"), "{}", stderr(&output));
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let b = Bench::new();
    let flags = [&FLAGS[..], &["--checkpoint-every", "1"]].concat();
    assert!(b.train(&flags).status.success());
    let truth = result(&b.out());
    std::fs::remove_dir_all(b.out().join("adapter")).unwrap();
    let state = b.out().join("checkpoints/step-00000050/state.safetensors");
    let mut bytes = std::fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&state, bytes).unwrap();
    let output = b.train(&[&FLAGS[1..], &["--resume"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("does not match its hash"), "{}", stderr(&output));
    assert!(result(&b.out()) == truth);
}

#[test]
fn damaged_references_are_noticed_and_made_again() {
    let b = Bench::new();
    let flags = [&FLAGS[1..], &["--checkpoint-every", "20"]].concat();
    assert!(b.train(&flags).status.success());
    let (truth, path) = (result(&b.out()), b.out().join("reference.safetensors"));
    let whole = std::fs::read(&path).unwrap();
    let resumed = || {
        std::fs::remove_dir_all(b.out().join("adapter")).unwrap();
        let output = b.train(&[&flags[..], &["--resume"]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(result(&b.out()) == truth);
        stderr(&output)
    };
    assert!(!resumed().contains("warning"));
    // A number, a key of the header, and a part that is missing.
    let numbers = whole.len() - 100;
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        bytes
    };
    for (bytes, said) in [
        (flipped(numbers), "damaged: its numbers are not those of its checksum"),
        (flipped(9), "reference.safetensors: "),
        (whole[..numbers].to_vec(), "reference.safetensors: "),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let err = resumed();
        let warnings: Vec<&str> = err.lines().filter(|l| l.contains("warning")).collect();
        assert_eq!(warnings.len(), 1, "{err}");
        assert!(warnings[0].contains(said), "{err}");
        assert!(warnings[0].ends_with("; the reference pass is made again"), "{err}");
        assert_eq!(std::fs::read(&path).unwrap(), whole, "to the same bytes");
    }
}

#[test]
fn a_finished_run_stays_as_it_is() {
    let b = Bench::new();
    assert!(b.train(&["-q", "--max-steps", "2"]).status.success());
    let before =
        std::fs::metadata(b.out().join("adapter/adapter_model.safetensors")).unwrap().modified().unwrap();
    let output = b.train(&["--max-steps", "2", "--resume"]);
    assert!(output.status.success() && stderr(&output).contains("is finished"), "{}", stderr(&output));
    let after =
        std::fs::metadata(b.out().join("adapter/adapter_model.safetensors")).unwrap().modified().unwrap();
    assert_eq!(before, after);
}

#[test]
fn checkpoints_of_an_unknown_plan_are_not_used() {
    for manifest in [None, Some("{\"plan\": 5}"), Some("{")] {
        let b = Bench::new();
        assert!(b.train(&["-q", "--max-steps", "2", "--checkpoint-every", "1"]).status.success());
        std::fs::remove_dir_all(b.out().join("adapter")).unwrap();
        let path = b.out().join("run.json");
        match manifest {
            None => std::fs::remove_file(path).unwrap(),
            Some(text) => std::fs::write(path, text).unwrap(),
        }
        let resumed = b.train(&["-q", "--max-steps", "2", "--lr", "0.5", "--resume"]);
        assert_eq!(resumed.status.code(), Some(78), "{}", stderr(&resumed));
        assert_eq!(b.train(&["-q", "--max-steps", "2"]).status.code(), Some(73));
        assert!(b.train(&["-q", "--max-steps", "2", "--force"]).status.success());
    }
}

/// A result that is gone, cut or another one is made again, and never called finished.
#[test]
fn damaged_results_are_made_again() {
    let b = Bench::new();
    let flags = [&FLAGS[..], &["--checkpoint-every", "10"]].concat();
    assert!(b.train(&flags).status.success());
    let truth = result(&b.out());
    for (name, bytes) in [
        ("adapter/adapter_model.safetensors", None),
        ("adapter/adapter_model.safetensors", Some(&truth.0[..100])),
        ("metrics.jsonl", Some(&truth.1[..700])),
        ("metrics.jsonl", None),
    ] {
        for more in [&["--resume"][..], &["--resume=strict"], &["--resume", "--if-changed", "--force"]] {
            let path = b.out().join(name);
            match bytes {
                None => std::fs::remove_file(&path).unwrap(),
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            }
            let output = b.train(&[&flags[..], more].concat());
            assert!(output.status.success(), "{}", stderr(&output));
            let again = result(&b.out());
            assert!(again.0 == truth.0, "{name}, {more:?}");
            // Steps before the checkpoint are not done again; what is left of their lines is whole.
            let text = String::from_utf8(again.1.clone()).unwrap();
            assert!(text.lines().all(|line| line.starts_with('{') && line.ends_with('}')), "{text}");
            std::fs::write(b.out().join("metrics.jsonl"), &truth.1).unwrap();
        }
    }
}

/// What goes back to an earlier step has no result until it ends again.
#[test]
fn an_earlier_checkpoint_takes_the_result_back() {
    let b = Bench::new();
    let flags = [&FLAGS[..], &["--checkpoint-every", "10", "--keep-last", "9"]].concat();
    assert!(b.train(&flags).status.success());
    let truth = result(&b.out());
    let from = format!("--resume={}", b.out().join("checkpoints/step-00000020").display());
    assert!(b.train(&[&flags[..], &[&from, "--max-time", "0.00001s"]].concat()).status.success());
    assert!(!b.out().join("adapter").exists());
    assert!(b.train(&[&flags[..], &["--resume"]].concat()).status.success());
    assert!(result(&b.out()) == truth);
}

#[test]
fn a_dry_run_is_refused_as_the_real_one() {
    let b = Bench::new();
    assert!(b.train(&["-q", "--max-steps", "2", "--checkpoint-every", "1"]).status.success());
    for dry in [&[][..], &["--dry-run"]] {
        let with = |more: &[&str]| b.train(&[more, dry].concat());
        refused(&with(&["--max-steps", "2"]), 73, "there is a run");
        refused(&with(&["--resume", "--max-steps", "2", "--beta", "0.2"]), 78, "beta was 0.1, is 0.2");
        let from = format!("--resume={}", b.out().join("checkpoints/step-00000001").display());
        refused(&with(&[&from, "--max-steps", "3"]), 78, "total_steps was 2, is 3");
    }
}

/// A directory that goes away under the run is not made anew with a checkpoint that nobody can use.
#[test]
fn a_run_that_was_moved_says_so() {
    let b = Bench::new();
    let mut child = spawn(&b);
    let checkpoint = b.out().join("checkpoints/step-00000002");
    let began = Instant::now();
    while !checkpoint.exists() && began.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(1));
    }
    assert!(Command::new("kill").args(["-STOP", &child.id().to_string()]).status().unwrap().success());
    assert!(child.try_wait().unwrap().is_none(), "it had ended before it was stopped");
    let moved = b.dir.path().join("moved");
    std::fs::rename(b.out(), &moved).unwrap();
    for signal in ["-TERM", "-CONT"] {
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(74), "{}", stderr(&output));
    assert!(stderr(&output).contains("removed or moved") && !b.out().exists(), "{}", stderr(&output));
}

/// Who waits for piped rows has nothing to save: the first signal ends it.
#[test]
fn a_signal_ends_the_wait_for_piped_rows() {
    let b = Bench::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_kto-train"))
        .args(["-q", "--model"])
        .arg(&b.model)
        .arg("--out")
        .arg(b.out())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    sleep(Duration::from_secs(1));
    assert!(child.try_wait().unwrap().is_none());
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let began = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if began.elapsed() > Duration::from_secs(20) => {
                child.kill().unwrap();
                panic!("it still waits");
            }
            None => sleep(Duration::from_millis(10)),
        }
    };
    assert_eq!(status.code(), Some(143));
}
