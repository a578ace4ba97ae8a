//! What a run says about its speed: to the terminal, to a log, and in timing.jsonl.

use crate::cli::{Bench, stderr};
use serde_json::Value;

fn lines(b: &Bench, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(b.out().join(name)).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn steps(lines: &[Value]) -> Vec<u64> {
    lines.iter().map(|l| l["step"].as_u64().unwrap()).collect()
}

#[test]
fn a_log_shows_the_beginning_and_the_end() {
    let b = Bench::new();
    let output = b.train(&["--max-steps", "3"]);
    let err = stderr(&output);
    assert!(output.status.success(), "{err}");
    let lines: Vec<&str> = err.lines().filter(|l| !l.contains("warning")).collect();
    assert_eq!(lines.len(), 3, "{err}");
    assert!(lines[0].contains("rows (") && lines[0].ends_with(", 3 steps"), "{err}");
    assert!(lines[1].starts_with("kto-train: reference pass: 24 completions, "), "{err}");
    assert!(
        lines[2].starts_with("kto-train: 3 steps, 12 rows, ") && lines[2].contains(" tokens/s, "),
        "{err}"
    );
    let memory = lines[2].contains(", peak memory ");
    assert!(memory == cfg!(target_os = "linux") && lines[2].contains("; adapter in "), "{err}");
    assert_eq!(stderr(&b.train(&["-q", "--force", "--max-steps", "1"])), "");
}

#[test]
fn timing_has_the_reference_pass_and_every_step() {
    let b = Bench::new();
    assert!(b.train(&["-q", "--max-steps", "3"]).status.success());
    let (timing, metrics) = (lines(&b, "timing.jsonl"), lines(&b, "metrics.jsonl"));
    assert_eq!(steps(&timing), [0, 1, 2, 3]);
    assert_eq!(timing[0]["rows"], 24);
    let tokens: u64 = timing[1..].iter().map(|l| l["tokens"].as_u64().unwrap()).sum();
    assert_eq!(Some(tokens), metrics[2]["num_tokens"].as_u64());
    for line in &timing {
        for key in ["seconds", "tokens_per_second"] {
            assert!(line[key].as_f64().unwrap() >= 0.0, "{line}");
        }
        assert_eq!(line.get("peak_memory").is_some(), cfg!(target_os = "linux"), "{line}");
    }
}

#[test]
fn a_resumed_run_appends() {
    let b = Bench::new();
    let flags = ["-q", "--max-steps", "4", "--checkpoint-every", "3"];
    assert!(b.train(&flags).status.success());
    std::fs::remove_dir_all(b.out().join("adapter")).unwrap();
    let path = b.out().join("timing.jsonl");
    let mut text = std::fs::read_to_string(&path).unwrap();
    text += "{\"step\":5,\"ro";
    std::fs::write(&path, text).unwrap();
    let output = b.train(&[&flags[1..], &["--resume"]].concat());
    assert!(stderr(&output).contains("kto-train: 1 step, 4 rows, "), "{}", stderr(&output));
    assert_eq!(steps(&lines(&b, "timing.jsonl")), [0, 1, 2, 3, 4, 4]);
    assert!(b.train(&[&flags[..], &["--force"]].concat()).status.success());
    assert_eq!(steps(&lines(&b, "timing.jsonl")), [0, 1, 2, 3, 4]);
}

#[test]
fn losses_without_a_reference_have_no_step_0() {
    let b = Bench::new();
    assert!(b.train(&["-q", "--max-steps", "1", "--loss", "sft"]).status.success());
    assert_eq!(steps(&lines(&b, "timing.jsonl")), [1]);
}
