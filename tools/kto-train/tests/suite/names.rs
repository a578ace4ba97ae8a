//! Options of TRL, Unsloth and mlx-lm that have no counterpart: what is said about them is true, for every tool.

use crate::{
    cli::{kto_train, stderr},
    pipeline::tool,
};
use std::{collections::BTreeMap, process::Command};

const TOOLS: [&str; 6] =
    ["kto-train", "kto-tokenize", "kto-convert", "kto-quantize", "kto-eval", "kto-merge"];

fn help(name: &str) -> String {
    let of = |args: &[&str]| {
        let output = Command::new(tool(name)).args(args).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    match name {
        "kto-eval" => ["score", "generate"].map(|sub| of(&[sub, "--help"])).concat(),
        _ => of(&["--help"]),
    }
}

#[test]
fn a_hint_names_flags_that_there_are() {
    let help: BTreeMap<&str, String> = TOOLS.map(|name| (name, help(name))).into();
    let is_there = |name: &str, flag: &str| {
        let words = help[name].split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
        words.into_iter().any(|word| word == flag)
    };
    let mut checked = 0;
    for name in TOOLS {
        for (foreign, hint) in kto_cli::foreign::names(name) {
            assert!(!is_there(name, &format!("--{foreign}")), "{name} has --{foreign} itself");
            let mut of = name;
            for word in hint.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')) {
                of = TOOLS.into_iter().find(|t| *t == word).unwrap_or(of);
                // What follows "then" is for the tool that was called.
                of = if word == "then" { name } else { of };
                if word.starts_with("--") {
                    assert!(is_there(of, word), "{name} --{foreign}: {of} has no {word}");
                    checked += 1;
                }
            }
        }
    }
    assert!(checked > 60, "{checked}");
}

#[test]
fn a_name_of_trl_without_a_counterpart_is_answered_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    for (name, hint) in kto_cli::foreign::names("kto-train") {
        let name = name.replace('-', "_");
        let output = kto_train(&[&format!("--{name}"), "1"]);
        let expected = format!("kto-train: unexpected argument '--{name}' found\nhint: {hint}\n");
        assert_eq!((output.status.code(), stderr(&output)), (Some(2), expected));
        std::fs::write(&file, format!("[kto-train]\n{name} = 1\n")).unwrap();
        let output = kto_train(&["--config", file.to_str().unwrap()]);
        let said = stderr(&output);
        let expected = format!("c.toml:2: unknown key \"{name}\"\nhint: {hint}\n");
        assert!(output.status.code() == Some(78) && said.ends_with(&expected), "{said}");
    }
    let output = kto_train(&["--use_peft=true", "--learnin_rate", "1"]);
    assert!(stderr(&output).contains("hint: leave it out: kto-train always"), "{}", stderr(&output));
}

#[test]
fn a_printed_configuration_names_the_defaults_that_are_found_later() {
    let output = kto_train(&["--print-config"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let line =
        |key: &str| text.lines().find(|line| line.starts_with(&format!("# {key} is not set"))).unwrap();
    assert!(line("lora-r").ends_with("# default: 16"), "{}", line("lora-r"));
    assert!(line("threads").ends_with("# default: all cores"), "{}", line("threads"));
    assert_eq!(line("init-adapter"), "# init-adapter is not set");
}
