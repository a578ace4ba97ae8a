//! Control of a run: which checkpoints stay, from which one it goes on, when it pauses, who may use the directory.

use crate::cli::{Bench, kto_train, refused, stderr};
use serde_json::Value;
use std::{
    path::Path,
    process::{Command, Stdio},
    thread::{sleep, spawn},
    time::{Duration, Instant},
};

/// 20 steps with dropout and a schedule.
const FLAGS: [&str; 9] =
    ["-q", "--epochs", "4", "--lr", "1e-3", "--lora-dropout", "0.1", "--schedule", "cosine"];

/// Names in the run's folder of checkpoints.
fn checkpoints(b: &Bench) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(b.out().join("checkpoints"))
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn steps(numbers: &[u64]) -> Vec<String> {
    numbers.iter().map(|n| format!("step-{n:08}")).collect()
}

fn same_result(a: &Bench, b: &Bench) {
    for name in ["adapter/adapter_model.safetensors", "metrics.jsonl"] {
        let read = |b: &Bench| std::fs::read(b.out().join(name)).unwrap();
        assert!(read(a) == read(b), "{name}");
    }
}

fn state(b: &Bench) -> Value {
    serde_json::from_slice(&std::fs::read(b.out().join("run.json")).unwrap()).unwrap()
}

/// Runs to the end with `flags` more.
fn done(b: &Bench, flags: &[&str]) {
    let output = b.train(&[&FLAGS[..], flags].concat());
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn the_newest_checkpoints_and_the_multiples_stay() {
    for (flags, left) in [
        (&["--checkpoint-every", "1"][..], &[19, 20][..]),
        (&["--checkpoint-every", "3", "--keep-last", "1"], &[18]),
        (&["--checkpoint-every", "2", "--keep-last", "1", "--keep-every", "6"], &[6, 12, 18, 20]),
        (&["--checkpoint-every", "0.000001s"], &[19, 20]),
        (&["--checkpoint-every", "1d"], &[]),
    ] {
        let b = Bench::new();
        done(&b, flags);
        assert_eq!(checkpoints(&b), steps(left), "{flags:?}");
    }
}

#[test]
fn a_newer_damaged_checkpoint_does_not_push_out_the_good_one() {
    let (b, truth) = (Bench::new(), Bench::new());
    done(&truth, &[]);
    done(&b, &["--checkpoint-every", "5", "--keep-last", "3"]);
    std::fs::remove_dir_all(b.out().join("adapter")).unwrap();
    for damaged in ["step-00000015", "step-00000020"] {
        std::fs::remove_file(b.out().join("checkpoints").join(damaged).join("state.safetensors")).unwrap();
    }
    // From step 10 on; a save at 12 is the newest complete one, whatever lies behind it.
    let output =
        b.train(&[&FLAGS[..], &["--resume", "--checkpoint-every", "12", "--keep-last", "1"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(checkpoints(&b), steps(&[12]));
    same_result(&b, &truth);
}

#[test]
fn strict_refuses_a_damaged_or_missing_checkpoint() {
    let b = Bench::new();
    let strict = |b: &Bench| b.train(&[&FLAGS[..], &["--resume=strict"]].concat());
    refused(&strict(&b), 78, "no checkpoint to resume from");
    let b = Bench::new();
    done(&b, &["--checkpoint-every", "1"]);
    std::fs::remove_dir_all(b.out().join("adapter")).unwrap();
    let manifest = b.out().join("checkpoints/step-00000020/manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replacen("\"num_tokens\":", "\"num_tokens\":1", 1)).unwrap();
    refused(&strict(&b), 78, "manifest.json does not match its hash");
    assert!(!b.out().join("adapter").exists());
    std::fs::remove_dir_all(b.out().join("checkpoints/step-00000020")).unwrap();
    let output = strict(&b);
    assert!(output.status.success(), "{}", stderr(&output));
    let truth = Bench::new();
    done(&truth, &[]);
    same_result(&b, &truth);
}

#[test]
fn a_run_goes_back_to_a_checkpoint_of_its_own() {
    let (b, truth) = (Bench::new(), Bench::new());
    done(&truth, &[]);
    done(&b, &["--checkpoint-every", "4", "--keep-last", "9"]);
    let at = b.out().join("checkpoints/step-00000008").display().to_string();
    let output = b.train(&[&FLAGS[1..], &["--resume", &at, "--max-time", "0.001s"]].concat());
    assert!(output.status.success() && stderr(&output).contains("step 9 of 20"), "{}", stderr(&output));
    assert_eq!(checkpoints(&b), steps(&[8, 9]), "the later ones are gone, and old ones as --keep-last says");
    assert_eq!(std::fs::read_to_string(b.out().join("metrics.jsonl")).unwrap().lines().count(), 9);
    done(&b, &["--resume"]);
    same_result(&b, &truth);
}

#[test]
fn another_run_goes_on_from_a_checkpoint() {
    let (a, b, truth) = (Bench::new(), Bench::new(), Bench::new());
    done(&truth, &[]);
    done(&a, &["--checkpoint-every", "6", "--keep-last", "9"]);
    let at = a.out().join("checkpoints/step-00000006");
    let from = format!("--resume={}", at.display());
    let before = std::fs::read(a.out().join("metrics.jsonl")).unwrap();
    refused(&b.train(&[&FLAGS[..], &[&from, "--beta", "0.3"]].concat()), 78, "beta was 0.1, is 0.3");
    assert!(!b.out().exists(), "a refused run leaves nothing");
    done(&b, &[&from]);
    same_result(&b, &truth);
    assert!(
        checkpoints(&b) == steps(&[6]) && std::fs::read(a.out().join("metrics.jsonl")).unwrap() == before
    );
    // An --out with a run in it is not mixed with another one.
    refused(&b.train(&[&FLAGS[..], &[&from]].concat()), 73, "there is a run");
    done(&b, &[&from, "--force"]);
    same_result(&b, &truth);
    // Without its run, a checkpoint has no metrics to go on with.
    let alone = b.dir.path().join("alone");
    copy(&at, &alone);
    let output = b.train(&[&FLAGS[1..], &["--force", "--resume", &alone.display().to_string()]].concat());
    assert!(
        output.status.success() && stderr(&output).contains("metrics.jsonl has 0 bytes"),
        "{}",
        stderr(&output)
    );
    assert_eq!(std::fs::read_to_string(b.out().join("metrics.jsonl")).unwrap().lines().count(), 14);
    let state = alone.join("state.safetensors");
    std::fs::write(&state, &std::fs::read(&state).unwrap()[1..]).unwrap();
    let output = b.train(&[&FLAGS[..], &["--force", "--resume", &alone.display().to_string()]].concat());
    refused(&output, 78, "state.safetensors has ");
    assert!(b.out().join("adapter").exists(), "--force removes nothing for a checkpoint that is none");
    let nothing = b.dir.path().display().to_string();
    refused(&b.train(&[&FLAGS[..], &["--resume", &nothing]].concat()), 78, "not a checkpoint directory");
}

/// `scripts/kill-test` kills such a run at every one of its calls.
#[test]
fn a_run_that_was_killed_while_it_copied_its_checkpoint_begins_anew() {
    let (a, b, truth) = (Bench::new(), Bench::new(), Bench::new());
    done(&truth, &[]);
    done(&a, &["--checkpoint-every", "6", "--keep-last", "9"]);
    let from = format!("--resume={}", a.out().join("checkpoints/step-00000006").display());
    done(&b, &[&from]);
    // As it was found after a kill: the state that is written before anything is copied, and a part of the copies.
    std::fs::remove_dir_all(b.out().join("adapter")).unwrap();
    std::fs::remove_file(b.out().join("checkpoints/step-00000006/state.safetensors")).unwrap();
    std::fs::create_dir(b.out().join("checkpoints/.step-00000012.999999999.kto-tmp")).unwrap();
    let mut manifest = state(&b);
    manifest["state"] = "copying".into();
    manifest["result"] = serde_json::json!({ "from": &from["--resume=".len()..] });
    std::fs::write(b.out().join("run.json"), manifest.to_string()).unwrap();
    for how in ["--resume", "--resume=strict"] {
        let output = b.train(&[&FLAGS[..], &[how]].concat());
        refused(&output, 78, "killed before it had copied the checkpoint");
        assert!(stderr(&output).contains(&format!("hint: {from}")), "{}", stderr(&output));
    }
    done(&b, &[&from]);
    same_result(&b, &truth);
    assert_eq!(checkpoints(&b), steps(&[6]));
    // Any other run may begin there too: nothing of it was ever more than a copy.
    std::fs::write(b.out().join("run.json"), manifest.to_string()).unwrap();
    done(&b, &[]);
    same_result(&b, &truth);
    assert_eq!(checkpoints(&b), steps(&[]));
}

#[test]
fn force_does_not_remove_the_checkpoint_that_a_run_goes_on_from() {
    let b = Bench::new();
    done(&b, &["--checkpoint-every", "6", "--keep-last", "9"]);
    let inside = b.out().join("checkpoints/keep");
    std::fs::create_dir(&inside).unwrap();
    let moved = inside.join("step-00000006");
    std::fs::rename(b.out().join("checkpoints/step-00000006"), &moved).unwrap();
    let output = b.train(&[&FLAGS[..], &["--force", "--resume", &moved.display().to_string()]].concat());
    refused(&output, 2, "--force would remove the checkpoint of --resume");
    assert!(moved.join("state.safetensors").exists() && b.out().join("adapter").exists());
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_run_in_many_short_shifts_ends_with_the_same_bytes() {
    let (b, truth) = (Bench::new(), Bench::new());
    done(&truth, &[]);
    let flags = [&FLAGS[1..], &["--resume", "--max-time", "0.001s"]].concat();
    for shift in 1..20 {
        let output = b.train(&flags);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let said =
            format!("step {shift} of 20 is saved; --max-time is over, not finished: go on with --resume");
        assert!(stderr(&output).contains(&said), "{}", stderr(&output));
        assert!(output.stdout.is_empty() && !b.out().join("adapter").exists());
        assert_eq!(
            (&state(&b)["state"], &state(&b)["result"]["steps"]),
            (&Value::from("paused"), &Value::from(shift))
        );
    }
    let output = b.train(&flags);
    assert!(output.status.success() && !output.stdout.is_empty(), "{}", stderr(&output));
    assert_eq!(state(&b)["state"], "finished");
    same_result(&b, &truth);
}

#[test]
fn a_paused_run_is_silent_when_it_is_told_to_be() {
    let b = Bench::new();
    let output = b.train(&[&FLAGS[..], &["--max-time", "0.001s"]].concat());
    assert!(
        output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(),
        "{}",
        stderr(&output)
    );
}

#[test]
fn two_runs_on_one_directory_and_one_gets_75() {
    let b = Bench::new();
    let (model, data, out) =
        (b.model.display().to_string(), b.data.display().to_string(), b.out().display().to_string());
    let inputs = ["--model", &model, "--data", &data, "--out", &out, "--epochs", "3000", "--resume"];
    let first = Command::new(env!("CARGO_BIN_EXE_kto-train"))
        .args(inputs)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while !b.out().join("metrics.jsonl").exists() && began.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(5));
    }
    let second = kto_train(&inputs);
    refused(&second, 75, &format!("locked by pid {} on ", first.id()));
    let third = kto_train(&[&inputs[..], &["--wait", "0.3s"]].concat());
    assert_eq!(third.status.code(), Some(75), "{}", stderr(&third));
    assert!(
        stderr(&third).contains("waiting: ") && stderr(&third).contains("after a wait of"),
        "{}",
        stderr(&third)
    );
    let stopped = Command::new("kill").args(["-INT", &first.id().to_string()]).status().unwrap();
    let ended = first.wait_with_output().unwrap();
    assert!(stopped.success() && ended.status.code() == Some(130), "{:?}", ended.status);
}

#[test]
fn a_run_that_waits_gets_its_turn() {
    for wait in ["--wait", "--wait=60s"] {
        let b = Bench::new();
        std::fs::create_dir(b.out()).unwrap();
        let lock = kto_cli::lock::RunLock::acquire(&b.out()).unwrap();
        let holder = spawn(move || {
            sleep(Duration::from_millis(400));
            drop(lock);
        });
        let output = b.train(&["--max-steps", "1", wait]);
        holder.join().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(
            stderr(&output).contains("waiting: ") && b.out().join("adapter").exists(),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn values_that_are_none_are_usage() {
    let b = Bench::new();
    for flags in [
        &["--checkpoint-every", "0"][..],
        &["--checkpoint-every", "10x"],
        &["--keep-last", "0"],
        &["--keep-every", "0"],
        &["--max-time", "5"],
        &["--max-time", "0s"],
        &["--wait=soon"],
        &["--eval-every", "5"],
        &["--early-stop-patience", "2"],
        &["--load-best"],
        &["--on-nonfinite", "ignore"],
        &["--eval-data", "-"],
    ] {
        let output = b.train(flags);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("--"), "{}", stderr(&output));
    }
    assert!(!b.out().exists());
}
