//! Evaluations on held-out rows: against TRL's numbers and kto-eval's, early stopping, the best adapter.

use crate::{
    cli::{Bench, refused, rows, stderr, write},
    golden::{CASES, Case},
};
use kto_formats::tokens::{TokenRow, TokenSet};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The rows `range` of a token set, with other labels if `flip`.
pub fn part(tokens: &TokenSet, range: std::ops::Range<usize>, flip: bool) -> TokenSet {
    let mut set = TokenSet::new(tokens.meta.clone());
    for i in range {
        let row = tokens.row(i);
        set.push(TokenRow { label: row.label != flip, ..row });
    }
    set
}

/// Writes a held-out file beside the run.
pub fn held_out(b: &Bench, tokens: &TokenSet) -> String {
    let path = b.dir.path().join("heldout.kto.arrow");
    write(tokens, &path);
    path.display().to_string()
}

fn lines(b: &Bench, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(b.out().join(name)).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn steps(b: &Bench) -> Vec<u64> {
    lines(b, "eval.jsonl").iter().map(|l| l["step"].as_u64().unwrap()).collect()
}

fn adapter(b: &Bench, name: &str) -> Vec<u8> {
    std::fs::read(b.out().join(name).join("adapter_model.safetensors")).unwrap()
}

fn done(b: &Bench, flags: &[&str]) {
    let output = b.train(&[&["-q"], flags].concat());
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn evaluations_come_every_n_steps_once_an_epoch_and_at_the_end() {
    for (steps_of_run, every, expected) in [
        ("10", &["--eval-every", "3"][..], &[3, 6, 9, 10][..]),
        ("12", &[], &[5, 10, 12]),
        ("2", &["--eval-every", "9"], &[2]),
    ] {
        let b = Bench::new();
        let eval = held_out(&b, &part(&Case::open("llama").tokens(), 0..7, false));
        done(&b, &[&["--max-steps", steps_of_run, "--eval-data", &eval], every].concat());
        assert_eq!(steps(&b), expected);
        let line = &lines(&b, "eval.jsonl")[0];
        for key in ["eval_loss", "eval_kl", "eval_entropy", "eval_rewards/chosen", "eval_rewards/rejected"] {
            assert!(line[key].is_f64(), "{key}: {line}");
        }
        for key in
            ["eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen", "eval_logits/rejected"]
        {
            assert!(line[key].is_f64(), "{key}: {line}");
        }
        let count = |key: &str| line[key].as_u64().unwrap();
        assert_eq!(count("eval_count/chosen") + count("eval_count/rejected"), 7);
        let plain = Bench::new();
        done(&plain, &["--max-steps", steps_of_run]);
        let read = |b: &Bench| std::fs::read(b.out().join("metrics.jsonl")).unwrap();
        assert!(read(&b) == read(&plain), "an evaluation changes nothing of the training");
        assert!(adapter(&b, "adapter") == adapter(&plain, "adapter"));
    }
}

/// TRL logs the scores of a step's rows before the step's update. So an evaluation of those rows after the step before gives what
/// TRL has logged for the step.
#[test]
fn an_evaluation_has_trls_numbers() {
    let mut compared = 0;
    for name in CASES {
        let case = Case::open(name);
        // One micro-batch a step: otherwise a step's logged loss is a mean of means.
        if case.batch() != case.micro() {
            continue;
        }
        let steps = case.lines("steps");
        let b = Bench::new();
        write(&case.tokens(), &b.data);
        let batch = case.batch();
        let eval = held_out(&b, &part(&case.tokens(), batch..2 * batch, false));
        crate::pipeline::train(&case, &b.data, &b.out(), &["--eval-data", &eval, "--eval-every", "1"]);
        let (ours, trl) = (&lines(&b, "eval.jsonl")[0], &steps[1]);
        for key in
            ["loss", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "entropy"]
        {
            let Some(truth) = trl[key].as_f64() else { continue };
            let tolerance = crate::pipeline::tolerance(key, truth).unwrap();
            let value =
                ours[format!("eval_{key}")].as_f64().unwrap_or_else(|| panic!("{name}: {key} in {ours}"));
            assert!((value - truth).abs() <= tolerance, "{name}: {key} is {value}, TRL has {truth}");
            compared += 1;
        }
    }
    assert!(compared >= 20, "only {compared} numbers compared");
}

/// Runs `kto-eval score --summary -` on the adapter of a run.
fn scored(b: &Bench, eval: &str, flags: &[&str]) -> (Value, String) {
    let mut command = Command::new(crate::pipeline::tool("kto-eval"));
    command.args(["score", "--summary", "-", "--model"]).arg(&b.model).arg("--adapter").arg(b.out());
    let output = command.arg(eval).args(flags).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    (serde_json::from_slice(&output.stdout).unwrap(), stderr(&output))
}

/// kto-eval scores the rows of a finished adapter: the last evaluation must agree with it, KL partners, seed and reference included.
#[test]
fn an_evaluation_agrees_with_kto_eval() {
    let initial = Case::open("llama_refadapter").file("adapter_init");
    for referenced in [false, true] {
        let b = Bench::new();
        let copy = b.dir.path().join("initial");
        std::fs::create_dir(&copy).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(initial.join(file), copy.join(file)).unwrap();
        }
        let eval = held_out(&b, &part(&Case::open("llama").tokens(), 3..14, false));
        let mut flags = vec!["--max-steps", "4", "--lr", "1e-3", "--eval-data", &eval, "--seed", "7"];
        let copy_text = copy.display().to_string();
        if referenced {
            flags.extend(["--init-adapter", &copy_text, "--reference", "init-adapter"]);
        }
        done(&b, &flags);
        let line = lines(&b, "eval.jsonl").pop().unwrap();
        let off = |summary: &Value, key: &str| {
            let of = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{key} in {value}"));
            (of(&summary[key]) - of(&line[format!("eval_{key}")])).abs()
        };
        let (summary, said) = scored(&b, &eval, &[]);
        for key in ["loss", "kl_raw", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"]
        {
            assert!(off(&summary, key) < 1e-9, "{referenced} {key}: {summary} {line}");
        }
        let note = "rewards are measured against the adapter that the run began with";
        assert_eq!(said.contains(note), referenced, "{said}");
        assert!(off(&scored(&b, &eval, &["--seed", "8"]).0, "kl_raw") > 1e-9);
        if referenced {
            assert!(off(&scored(&b, &eval, &["--reference", "base"]).0, "rewards/chosen") > 1e-6);
            // What is there is not what the run began with.
            let trained = b.out().join("adapter/adapter_model.safetensors");
            std::fs::copy(trained, copy.join("adapter_model.safetensors")).unwrap();
            let (summary, said) = scored(&b, &eval, &[]);
            assert!(said.contains("initial is another one now; --reference DIR names it"), "{said}");
            assert!(off(&summary, "rewards/chosen") > 1e-6);
            std::fs::remove_dir_all(&copy).unwrap();
            assert!(scored(&b, &eval, &[]).1.contains("initial is not there; --reference DIR"));
        }
    }
}

#[test]
fn kto_eval_says_that_trls_means_are_others() {
    let b = Bench::new();
    let eval = held_out(&b, &part(&Case::open("llama").tokens(), 3..14, false));
    done(&b, &["--max-steps", "1", "--preset", "trl", "--eval-data", &eval]);
    assert!(scored(&b, &eval, &[]).1.contains("TRL's means of micro-batches"));
    assert!(!scored(&b, &b.data.display().to_string(), &[]).1.contains("TRL's means"));
}

/// Labels turned round: what the training improves gets worse here, from the first evaluation on.
fn worsening(b: &Bench) -> String {
    held_out(b, &part(&Case::open("llama").tokens(), 0..20, true))
}

const WORSE: [&str; 8] = ["--lr", "3e-3", "--schedule", "constant", "--eval-every", "4", "--epochs", "8"];

#[test]
fn a_run_stops_when_evaluations_get_no_better() {
    let b = Bench::new();
    let eval = worsening(&b);
    let flags = [&WORSE[..], &["--eval-data", &eval, "--early-stop-patience", "2"]].concat();
    let output = b.train(&flags);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("stopped early: no better eval_loss in 2 evaluations"),
        "{}",
        stderr(&output)
    );
    assert_eq!(steps(&b), [4, 8, 12]);
    assert_eq!(lines(&b, "metrics.jsonl").len(), 12);
    let run: Value = serde_json::from_slice(&std::fs::read(b.out().join("run.json")).unwrap()).unwrap();
    let result = &run["result"];
    assert_eq!(
        (&run["state"], &result["steps"], &result["best_step"]),
        (&"finished".into(), &12.into(), &4.into())
    );
    assert_eq!((&result["early_stop"], &result["adapter"]), (&true.into(), &"last".into()));
    let loss = |i: usize| lines(&b, "eval.jsonl")[i]["eval_loss"].as_f64().unwrap();
    assert!(loss(0) < loss(1) && loss(0) < loss(2) && result["best_eval_loss"].as_f64() == Some(loss(0)));
}

#[test]
fn the_best_adapter_is_kept_and_given_out_when_asked_for() {
    let (best, last, short) = (Bench::new(), Bench::new(), Bench::new());
    let (eval, other) = (worsening(&best), worsening(&last));
    done(&best, &[&WORSE[..], &["--eval-data", &eval, "--early-stop-patience", "1", "--load-best"]].concat());
    done(&last, &[&WORSE[..], &["--eval-data", &other, "--early-stop-patience", "1"]].concat());
    done(&short, &["--lr", "3e-3", "--schedule", "constant", "--max-steps", "4"]);
    assert_eq!((steps(&best), steps(&last)), (vec![4, 8], vec![4, 8]));
    let truth = adapter(&short, "adapter");
    assert!(adapter(&best, "best") == truth && adapter(&best, "adapter") == truth);
    assert!(adapter(&last, "best") == truth && adapter(&last, "adapter") != truth);
    let files = |name: &str| -> Vec<PathBuf> {
        let mut names: Vec<PathBuf> = std::fs::read_dir(best.out().join(name))
            .unwrap()
            .map(|e| e.unwrap().file_name().into())
            .collect();
        names.sort();
        names
    };
    assert_eq!(files("best"), files("adapter"));
}

/// Training goes on without it as long as it can; what needs it in the end says what has happened.
#[test]
fn a_best_adapter_that_somebody_removes_is_one_line() {
    let b = Bench::new();
    let eval = worsening(&b);
    let child = Command::new(env!("CARGO_BIN_EXE_kto-train"))
        .args(["--batch", "4", "--epochs", "60", "--lr", "3e-3", "--eval-every", "4", "--load-best"])
        .args(["--checkpoint-every", "1", "--eval-data", &eval, "--model"])
        .args([&b.model, Path::new("--data"), &b.data, Path::new("--out"), &b.out()])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let signal = |name: &str| {
        assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
    };
    while std::fs::metadata(b.out().join("eval.jsonl")).map_or(0, |m| m.len()) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    signal("-STOP");
    std::fs::remove_dir_all(b.out().join("best")).unwrap();
    signal("-CONT");
    let output = child.wait_with_output().unwrap();
    let err = stderr(&output);
    assert_eq!(output.status.code(), Some(74), "{err}");
    let told = format!("{}/best: removed while the run was under way", b.out().display());
    let lines: Vec<&str> = err.lines().filter(|l| l.contains("/best: ")).collect();
    assert_eq!(lines.len(), 2, "{err}");
    assert!(lines[0].contains("warning: no checkpoint of step ") && lines[0].contains(&told), "{err}");
    assert!(lines[1].starts_with(&format!("kto-train: {told}")) && err.contains("hint: --resume"), "{err}");
}

#[test]
fn held_out_files_that_do_not_fit_are_refused() {
    let b = Bench::new();
    let try_with = |tokens: &TokenSet| {
        let eval = held_out(&b, tokens);
        b.train(&["--eval-data", &eval])
    };
    refused(&try_with(&rows(&[&[1, 5], &[1, 5]], 384)), 65, "same prompt");
    refused(&try_with(&rows(&[], 384)), 65, "heldout.kto.arrow: no rows");
    refused(&try_with(&rows(&[&[1, 390], &[2]], 400)), 65, "--eval-data: row 1");
    let mut tokens = Case::open("llama").tokens();
    tokens.meta.tokenizer = "0".repeat(64);
    refused(&try_with(&tokens), 78, "--eval-data: the tokens were made with another tokenizer.json");
    refused(&b.train(&["--eval-data", "/none"]), 66, "/none");
    assert!(!b.out().exists());
}

/// Rows of an evaluation that are far longer than the training rows: their buffers are in the plan.
#[test]
fn the_memory_plan_covers_the_evaluation() {
    let b = Bench::new();
    let mut long = rows(&[], 384);
    long.meta.max_length = 2048;
    for i in 0..40u32 {
        let prompt: Vec<u32> = (0..1500).map(|t| (t * 7 + i) % 380).collect();
        let hash = kto_formats::tokens::prompt_hash(&prompt);
        long.push(TokenRow {
            prompt_ids: &prompt,
            completion_ids: &[7; 400],
            label: i % 2 == 0,
            prompt_hash: hash,
        });
    }
    let eval = held_out(&b, &long);
    let peak = |flags: &[&str]| {
        let output = b.train(
            &[&["--dry-run", "--max-steps", "1", "--memory", "2GiB", "--threads", "1"], flags].concat(),
        );
        assert!(output.status.success(), "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find(|l| l.contains("predicted peak")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[words.len() - 1], "MiB", "{line}");
        words[words.len() - 2].parse::<f64>().unwrap()
    };
    let (without, with) = (peak(&[]), peak(&["--eval-data", &eval]));
    assert!(with > 2.0 * without, "{without} {with}");
    let output = b.train(&["--max-steps", "1", "--memory", "2GiB", "--threads", "1", "--eval-data", &eval]);
    assert!(output.status.success(), "{}", stderr(&output));
    if cfg!(target_os = "linux") {
        let text = std::fs::read_to_string(b.out().join("timing.jsonl")).unwrap();
        let line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(line["phase"], "evaluation");
        let measured = line["peak_memory"].as_f64().unwrap() / (1 << 20) as f64;
        // A model of no size: the program itself is a large and uncertain part.
        assert!(measured < 1.1 * with + 4.0, "measured {measured} MiB, predicted {with} MiB");
    }
}

#[test]
fn held_out_rows_that_are_the_trained_ones_are_a_warning() {
    let b = Bench::new();
    let copy = held_out(&b, &Case::open("llama").tokens());
    let said = |eval: &str| stderr(&b.train(&["--dry-run", "--eval-data", eval]));
    let warning = "--eval-data holds the rows of --data";
    assert!(said(&copy).contains(warning) && said(&b.data.display().to_string()).contains(warning));
    let other = held_out(&b, &part(&Case::open("llama").tokens(), 0..7, false));
    assert!(!said(&other).contains(warning));
}
