//! SIGKILL at many moments of a run with every flag that keeps state: the end is that of a run that was left alone, byte for byte.

use crate::{
    cli::{Bench, rows, stderr},
    evaluation::{held_out, part},
    nonfinite::{POISON, poison},
};
use kto_cli::hash::sha256_hex;
use kto_formats::tokens::{TokenRow, prompt_hash};
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

/// Everything that must be equal, and the rest of the run's own results.
const RESULTS: [&str; 5] = [
    "adapter/adapter_model.safetensors",
    "best/adapter_model.safetensors",
    "metrics.jsonl",
    "eval.jsonl",
    "nonfinite.jsonl",
];

fn hashes(b: &Bench) -> Vec<String> {
    RESULTS.iter().map(|name| sha256_hex(&std::fs::read(b.out().join(name)).expect(name))).collect()
}

struct Killed {
    bench: Bench,
    eval: String,
}

impl Killed {
    /// With `worsening`, the labels of the held-out rows are turned round, so that the run stops early.
    fn new(worsening: bool) -> Self {
        let mut bench = Bench::new();
        poison(&mut bench);
        let tokens = crate::golden::Case::open("llama").tokens();
        let eval = held_out(&bench, &part(&tokens, 2..13, worsening));
        Self { bench, eval }
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kto-train"));
        command
            .args(["-q", "--batch", "4", "--epochs", "6.4", "--lr", "1e-3", "--lora-dropout", "0.1"])
            .args(["--schedule", "cosine", "--on-nonfinite", "skip", "--eval-every", "3", "--load-best"])
            .args(["--early-stop-patience", "7", "--eval-data", &self.eval])
            .arg("--model")
            .arg(&self.bench.model)
            .arg("--data")
            .arg(&self.bench.data)
            .arg("--out")
            .arg(self.bench.out())
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn finish(&self, more: &[&str]) {
        let output = self.command(more).spawn().unwrap().wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    }
}

/// Kills `child` when metrics.jsonl has `lines` lines, unless it ends before. Returns whether it was killed.
fn kill_at(mut child: Child, metrics: &Path, lines: usize) -> bool {
    let count = || std::fs::read(metrics).map_or(0, |text| text.iter().filter(|b| **b == b'\n').count());
    while count() < lines {
        if child.try_wait().unwrap().is_some() {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            return false;
        }
        sleep(Duration::from_micros(300));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

/// Steps after which the run is killed, or as soon as that is seen: in an evaluation, in a checkpoint, in the next step. Where the run
/// has got further than the next one before it died, the next process dies while it starts.
const KILLS: [usize; 11] = [1, 3, 4, 7, 9, 12, 16, 17, 22, 27, 31];

#[test]
fn a_run_that_is_killed_again_and_again_ends_with_the_same_bytes() {
    let whole = Killed::new(false);
    whole.finish(&[]);
    let truth = hashes(&whole.bench);
    let mut kills = 0;
    for saving in [
        ["--checkpoint-every", "1", "--keep-last", "1"],
        ["--checkpoint-every", "4", "--keep-every", "8"],
        ["--checkpoint-every", "0.01s", "--keep-last", "3"],
    ] {
        let b = Killed::new(false);
        let metrics = b.bench.out().join("metrics.jsonl");
        for (i, lines) in KILLS.into_iter().enumerate() {
            let threads = if i.is_multiple_of(2) { "1" } else { "2" };
            let mut command = b.command(&[&saving[..], &["--resume", "--threads", threads]].concat());
            if !kill_at(command.spawn().unwrap(), &metrics, lines) {
                break;
            }
            kills += 1;
        }
        b.finish(&[&saving[..], &["--resume"]].concat());
        assert_eq!(hashes(&b.bench), truth, "{saving:?} after {kills} kills");
    }
    println!("{kills} kills");
    assert!(kills >= 5, "{kills} kills prove little");
}

/// A kill at every step boundary, in effect: a run that is paused after every step loads every checkpoint once.
#[test]
fn a_run_that_pauses_after_every_step_ends_with_the_same_bytes() {
    let (whole, b) = (Killed::new(true), Killed::new(true));
    whole.finish(&[]);
    let adapter = b.bench.out().join("adapter");
    let mut shifts = 0;
    while !adapter.exists() {
        b.finish(&["--resume=auto", "--max-time", "0.0001s"]);
        shifts += 1;
        assert!(shifts <= 40);
    }
    assert!(shifts >= 20, "{shifts}");
    assert_eq!(hashes(&b.bench), hashes(&whole.bench));
}

/// Another run goes on from every checkpoint of the first, with its logs and its best adapter.
#[test]
fn every_checkpoint_leads_another_run_to_the_same_bytes() {
    let whole = Killed::new(false);
    whole.finish(&["--checkpoint-every", "5", "--keep-last", "99"]);
    let truth = hashes(&whole.bench);
    let checkpoints: Vec<_> = std::fs::read_dir(whole.bench.out().join("checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert!(checkpoints.len() >= 4, "{checkpoints:?}");
    let b = Killed::new(false);
    for from in checkpoints {
        b.finish(&["--force", "--resume", &from.display().to_string()]);
        assert_eq!(hashes(&b.bench), truth, "{}", from.display());
        assert!(!b.bench.out().join("checkpoints").join("step-00000099").exists());
    }
}

/// A signal in the middle of an evaluation: the step is saved without it, and it is made anew.
#[test]
fn an_evaluation_that_a_signal_ends_is_made_anew() {
    let mut long = rows(&[], 384);
    long.meta.max_length = 1024;
    for i in 0..8u32 {
        let prompt: Vec<u32> = (0..500).map(|t| POISON + 1 + (t * 7 + i) % 350).collect();
        let row =
            TokenRow { prompt_ids: &prompt, completion_ids: &[7; 300], label: i % 2 == 0, prompt_hash: 0 };
        long.push(TokenRow { prompt_hash: prompt_hash(&prompt), ..row });
    }
    let (whole, mut b) = (Killed::new(false), Killed::new(false));
    let flags = ["--checkpoint-every", "1d", "--resume"];
    for killed in [&whole, &b] {
        held_out(&killed.bench, &long);
    }
    b.eval.clone_from(&whole.eval);
    whole.finish(&[]);
    let child = b.command(&flags).spawn().unwrap();
    // The evaluation after step 3 has begun when the step's line is there.
    let metrics = b.bench.out().join("metrics.jsonl");
    let lines = || std::fs::read(&metrics).map_or(0, |text| text.iter().filter(|b| **b == b'\n').count());
    for _ in 0..200_000 {
        if lines() >= 3 {
            break;
        }
        sleep(Duration::from_micros(300));
    }
    let sent = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(sent.success() && output.status.code() == Some(143), "{}", stderr(&output));
    assert!(stderr(&output).contains("which is saved"), "{}", stderr(&output));
    assert!(!b.bench.out().join("adapter").exists());
    b.finish(&flags);
    assert_eq!(hashes(&b.bench), hashes(&whole.bench));
}
