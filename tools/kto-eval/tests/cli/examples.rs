//! The examples of every --help run as they stand. Tools other than kto-eval are stood in for by shell scripts.

use super::{TOOL, bytes, code, testdata, text, tool, trl_tokens};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

/// Makes a folder in which MODEL, run/adapter and the data files of the examples are.
fn surroundings(dir: &Path) {
    let link = |from: &str, to: &str| {
        std::os::unix::fs::symlink(testdata(from).canonicalize().unwrap(), dir.join(to))
    };
    link("trl/llama/model", "MODEL").unwrap();
    link("trl/llama/model", "merged").unwrap();
    fs::create_dir(dir.join("run")).unwrap();
    link("trl/llama/adapter_init", "run/adapter").unwrap();
    for name in ["heldout.kto.arrow", "data.kto.arrow"] {
        fs::write(dir.join(name), bytes(&trl_tokens())).unwrap();
    }
    link("trl/llama/data.jsonl", "heldout.jsonl").unwrap();
    link("demo/prompts.jsonl", "prompts.jsonl").unwrap();
    fs::create_dir(dir.join("bin")).unwrap();
    for (name, script) in
        [("kto-convert", "cat \"$1\""), ("kto-tokenize", "cat heldout.kto.arrow"), ("jq", "cat")]
    {
        let path = dir.join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    std::os::unix::fs::symlink(TOOL, dir.join("bin/kto-eval")).unwrap();
}

#[test]
fn every_example_of_the_help_works() {
    let dir = tempfile::tempdir().unwrap();
    surroundings(dir.path());
    let path = format!("{}:{}", dir.path().join("bin").display(), std::env::var("PATH").unwrap());
    let mut run = 0;
    for arguments in [&["--help"][..], &["score", "--help"], &["generate", "--help"]] {
        let help = text(&tool().args(arguments).output().unwrap().stdout);
        let (_, examples) = help.split_once("Examples:\n").unwrap();
        for example in examples.lines().map(str::trim).take_while(|l| !l.starts_with("Exit status")) {
            if !example.contains("kto-eval ") {
                continue;
            }
            let output = Command::new("sh")
                .args(["-c", example])
                .current_dir(dir.path())
                .env("PATH", &path)
                .output()
                .unwrap();
            let expected = i32::from(example.contains("--fail-if"));
            assert_eq!(code(&output), expected, "{example}\n{}", text(&output.stderr));
            run += 1;
        }
    }
    assert!(run >= 10, "{run} examples");
}

#[test]
fn help_is_complete() {
    let output = tool().args(["score", "--help"]).output().unwrap();
    let help = text(&output.stdout);
    for part in ["Exit status:", "rewards/accuracies", "run, else 0.1]", "--fail-if"] {
        assert!(help.contains(part), "{part}");
    }
    assert!(output.stderr.is_empty());
}
