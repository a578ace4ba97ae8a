//! kto-convert from outside: the case folders, the examples of --help, streams and kills.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "cli/cases.rs"]
mod cases;
#[path = "cli/containers.rs"]
mod containers;
#[path = "cli/examples.rs"]
mod examples;
#[path = "cli/faults.rs"]
mod faults;
#[path = "cli/orders.rs"]
mod orders;
#[path = "cli/splits.rs"]
mod splits;
#[path = "cli/streams.rs"]
mod streams;
#[path = "cli/whole.rs"]
mod whole;

use std::{
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
};

const TOOL: &str = env!("CARGO_BIN_EXE_kto-convert");

/// The tool, without the surroundings that change its manners.
fn tool() -> Command {
    let mut command = Command::new(TOOL);
    for name in ["NO_COLOR", "CLICOLOR_FORCE", "NO_PROGRESS", "RUST_BACKTRACE"] {
        command.env_remove(name);
    }
    command
}

/// Runs the tool with `input` going through a pipe.
fn run(args: &[&str], input: &[u8]) -> Output {
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

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A file of the project's `testdata` folder.
fn testdata(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(path)
}
