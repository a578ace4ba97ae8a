//! kto-eval from outside, and the engine's generation against golden numbers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "cli/adapters.rs"]
mod adapters;
#[path = "cli/cached.rs"]
mod cached;
#[path = "cli/configuration.rs"]
mod configuration;
#[path = "cli/examples.rs"]
mod examples;
#[path = "cli/faults.rs"]
mod faults;
#[path = "cli/generation.rs"]
mod generation;
#[path = "cli/golden.rs"]
mod golden;
#[path = "cli/scores.rs"]
mod scores;
#[path = "cli/streams.rs"]
mod streams;

use kto_formats::tokens::{TokenMeta, TokenRow, TokenSet, prompt_hash};
use serde_json::Value;
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

const TOOL: &str = env!("CARGO_BIN_EXE_kto-eval");

/// The tool, without the surroundings that change its manners.
fn tool() -> Command {
    let mut command = Command::new(TOOL);
    for name in ["NO_COLOR", "CLICOLOR_FORCE", "NO_PROGRESS", "RUST_BACKTRACE"] {
        command.env_remove(name);
    }
    command
}

/// Runs the tool with `input` going through a pipe.
fn run<S: AsRef<std::ffi::OsStr>>(args: &[S], input: &[u8]) -> Output {
    let mut child = tool()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // The tool may stop before it has read everything.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

/// Runs the tool, expects success and returns the JSON Lines of its output.
fn rows<S: AsRef<std::ffi::OsStr>>(args: &[S], input: &[u8]) -> Vec<Value> {
    let output = run(args, input);
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    text(&output.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Words of a command line, split at blanks.
fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_string).collect()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A file of the project's `testdata` folder.
fn testdata(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(path)
}

/// The same as text for a command line.
fn data(path: &str) -> String {
    testdata(path).display().to_string()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// A token set of (prompt, completion, label) rows.
fn token_set(rows: &[(Vec<u32>, Vec<u32>, bool)], vocab_size: u32, max_length: u32) -> TokenSet {
    let mut set = TokenSet::new(TokenMeta { vocab_size, max_length, ..Default::default() });
    for (prompt, completion, label) in rows {
        set.push(TokenRow {
            prompt_ids: prompt,
            completion_ids: completion,
            label: *label,
            prompt_hash: prompt_hash(prompt),
        });
    }
    set
}

fn bytes(set: &TokenSet) -> Vec<u8> {
    let mut out = Vec::new();
    set.write(&mut out).unwrap();
    out
}

/// What TRL made of the golden case's rows.
fn trl_tokens() -> TokenSet {
    let lines = std::fs::read_to_string(testdata("trl/llama/tokenized.jsonl")).unwrap();
    let row = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        (ids(&row["prompt_ids"]), ids(&row["completion_ids"]), row["label"].as_bool().unwrap())
    };
    token_set(&lines.lines().map(row).collect::<Vec<_>>(), 384, 96)
}
