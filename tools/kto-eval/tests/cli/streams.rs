//! Pipes and devices.

use super::{TOOL, bytes, code, data, text, trl_tokens};
use std::process::Command;

fn bash(script: &str) -> std::process::Output {
    Command::new("bash").args(["-c", script]).env("T", TOOL).output().unwrap()
}

fn commands(dir: &std::path::Path) -> [String; 2] {
    let tokens = dir.join("t.kto.arrow");
    std::fs::write(&tokens, bytes(&trl_tokens())).unwrap();
    [
        format!(
            "$T score --model {} --adapter {} {} -q",
            data("trl/llama/model"),
            data("trl/llama/adapter_init"),
            tokens.display()
        ),
        format!("$T generate --model {} {} -q", data("demo/model"), data("demo/prompts.jsonl")),
    ]
}

#[test]
fn a_reader_that_leaves_ends_us_quietly() {
    let dir = tempfile::tempdir().unwrap();
    for command in commands(dir.path()) {
        let output = bash(&format!("set -o pipefail; {command} | head -1"));
        assert_eq!((code(&output), text(&output.stderr)), (0, String::new()), "{command}");
        assert_eq!(text(&output.stdout).lines().count(), 1);
    }
}

#[test]
fn a_full_device_is_74_and_one_line() {
    let dir = tempfile::tempdir().unwrap();
    for command in commands(dir.path()) {
        let output = bash(&format!("{command} > /dev/full"));
        assert_eq!(code(&output), 74, "{command}");
        assert_eq!(text(&output.stderr), "kto-eval: standard output: no space left on device\n");
    }
}

#[test]
fn a_file_appears_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    for command in commands(dir.path()) {
        let file = dir.path().join("out.jsonl");
        let direct = bash(&command);
        let output = bash(&format!("{command} -o {}", file.display()));
        assert_eq!((code(&output), output.stdout.len()), (0, 0));
        assert_eq!(std::fs::read(&file).unwrap(), direct.stdout);
        std::fs::remove_file(&file).unwrap();
    }
    let file = dir.path().join("bad.jsonl");
    let script = format!(
        "printf '{{\"prompt\": \"a\"}}\\n{{' | $T generate --model {} -o {}",
        data("stories260k"),
        file.display()
    );
    assert_eq!(code(&bash(&script)), 65);
    assert!(!file.exists());
}

#[test]
fn answers_flow_while_the_input_is_open() {
    let script = format!(
        "coproc E {{ $T generate --model {} --batch 1 --text --max-new-tokens 4; }}; \
         for p in Once-upon The-dog; do echo $p >&${{E[1]}}; read -r -t 60 line <&${{E[0]}} || exit 9; echo \"$line\"; done",
        data("stories260k")
    );
    let output = bash(&script);
    assert_eq!((code(&output), text(&output.stdout).lines().count()), (0, 2), "{}", text(&output.stderr));
}
