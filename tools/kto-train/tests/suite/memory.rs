//! `--memory`: the table, the refusal, and what a run keeps of its plan.

use crate::cli::{Bench, stderr};
use serde_json::Value;

/// Returns the smallest `--memory` that the refusal offers.
fn smallest(b: &Bench) -> String {
    let err = stderr(&b.train(&["--memory", "1MiB"]));
    let after = err.split("hint: --memory ").nth(1).unwrap_or_else(|| panic!("{err}"));
    after.split(' ').next().unwrap().to_string()
}

fn manifest(b: &Bench) -> Value {
    serde_json::from_slice(&std::fs::read(b.out().join("run.json")).unwrap()).unwrap()
}

#[test]
fn a_run_that_does_not_fit_is_refused_with_the_numbers() {
    let b = Bench::new();
    for more in [&[][..], &["--dry-run"]] {
        let output = b.train(&[&["--memory", "4MiB"], more].concat());
        let err = stderr(&output);
        assert_eq!(output.status.code(), Some(71), "{err}");
        let line = err.lines().find(|l| l.contains("needs at least")).unwrap();
        assert!(line.contains("it may take 4.00 MiB (--memory); largest: "), "{err}");
        let hint = err.lines().last().unwrap();
        assert!(hint.starts_with("hint: --memory ") && hint.contains("--batch"), "{err}");
        assert!(
            hint.contains("--max-length") && hint.contains("--lora-r, or a base from kto-quantize"),
            "{err}"
        );
        assert_eq!(output.stdout.is_empty(), more.is_empty());
    }
    assert!(!b.out().exists());
    // What the hint offers is enough.
    assert!(b.train(&["-q", "--memory", &smallest(&b), "--max-steps", "1"]).status.success());
}

#[test]
fn a_huge_adapter_is_refused_before_it_exists() {
    let b = Bench::new();
    let output = b.train(&["--lora-r", "4096", "--memory", "100MiB"]);
    assert_eq!(output.status.code(), Some(71), "{}", stderr(&output));
    assert!(stderr(&output).contains("AdamW moments"), "{}", stderr(&output));
}

#[test]
fn sizes_that_are_none_are_usage() {
    let b = Bench::new();
    for size in ["8", "lots", "0%", "-1GiB"] {
        let output = b.train(&[format!("--memory={size}").as_str()]);
        assert_eq!(output.status.code(), Some(2), "{size}: {}", stderr(&output));
        assert!(stderr(&output).contains("--memory"), "{}", stderr(&output));
    }
}

#[test]
fn the_table_adds_up() {
    let b = Bench::new();
    let output = b.train(&["--dry-run", "--memory", "8GiB"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let mut sum = 0.0;
    let mut peak = 0.0;
    for line in text.lines().filter_map(|l| l.strip_prefix("memory: ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let unit = match words[words.len() - 1] {
            "B" => 1.0,
            "KiB" => 1024.0,
            "MiB" => 1_048_576.0,
            _ => continue,
        };
        let Ok(number) = words[words.len() - 2].parse::<f64>() else { continue };
        let bytes = number * unit;
        if line.starts_with("predicted peak") { peak = bytes } else { sum += bytes }
    }
    assert!(peak > 0.0 && (sum - peak).abs() < 0.02 * peak, "{text}");
    assert!(text.contains("limit") && text.contains("8.00 GiB (--memory)"), "{text}");
    assert!(text.contains("2 of 2 blocks keep activations, packs of "), "{text}");
    assert!(text.trim_end().ends_with("weights resident"), "{text}");
}

#[test]
fn a_resumed_run_keeps_its_packs() {
    let b = Bench::new();
    let memory = smallest(&b);
    let flags = ["--max-steps", "4", "--checkpoint-every", "2", "--memory"];
    let tight = b.train(&[&flags[..], &[&memory]].concat());
    assert!(tight.status.success(), "{}", stderr(&tight));
    assert!(stderr(&tight).contains("memory: "), "what is given up is said: {}", stderr(&tight));
    let truth = std::fs::read(b.out().join("adapter/adapter_model.safetensors")).unwrap();
    let rows = manifest(&b)["memory"]["pack_rows"].as_u64().unwrap();
    assert!(rows < 1024, "{rows}");
    std::fs::remove_dir_all(b.out().join("adapter")).unwrap();
    std::fs::remove_dir_all(b.out().join("checkpoints/step-00000004")).unwrap();
    let roomy = b.train(&[&flags[..], &["8GiB", "--resume"]].concat());
    assert!(roomy.status.success(), "{}", stderr(&roomy));
    let kept = manifest(&b);
    assert_eq!(kept["memory"]["pack_rows"].as_u64(), Some(rows));
    assert!(kept["memory"]["kept_layers"].as_u64() > Some(0));
    assert!(std::fs::read(b.out().join("adapter/adapter_model.safetensors")).unwrap() == truth);
}
