//! The examples of --help are run as they stand, in a shell, on files of the names they use.

use super::{TOOL, code, text, tool};
use std::{fs, path::Path, process::Command};

const PAIR: &str = r#"{"prompt": "Is it raining?", "chosen": " No.", "rejected": " Hm."}"#;
const DIALOGUES: &str = concat!(
    r#"{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Hm."}"#,
    "\n",
    r#"{"chosen": "\n\nHuman: Hi\n\nAssistant: ", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}"#,
    "\n"
);
const DIALOGUE: &str = r#"[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": true},
{"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "label": false}]"#;

#[test]
fn every_example_of_the_help_works() {
    let help = text(&tool().arg("--help").output().unwrap().stdout);
    let (_, examples) = help.split_once("Examples:\n").unwrap();
    let examples: Vec<&str> = examples.lines().take_while(|l| l.starts_with("  ")).map(str::trim).collect();
    assert!(examples.len() >= 6);
    let bin = Path::new(TOOL).parent().unwrap();
    let path = std::env::join_paths(
        std::iter::once(bin.to_path_buf()).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    for example in examples {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("prefs.jsonl"), PAIR).unwrap();
        fs::write(dir.path().join("hh.jsonl"), DIALOGUES).unwrap();
        fs::write(dir.path().join("kto_demo.json"), DIALOGUE).unwrap();
        fs::write(dir.path().join("ratings.csv"), "prompt,response,rating\np,good,5\np,bad,1\n").unwrap();
        let shell = |command: &str| {
            Command::new("sh")
                .args(["-c", command])
                .current_dir(dir.path())
                .env("PATH", path.as_ref().unwrap())
                .output()
        };
        assert!(shell("gzip hh.jsonl").unwrap().status.success(), "the examples use gzip");
        let output = shell(example).unwrap();
        assert_eq!(code(&output), 0, "{example}\n{}", text(&output.stderr));
        let written =
            fs::read_to_string(dir.path().join("kto.jsonl")).unwrap_or_else(|_| text(&output.stdout));
        assert!(written.lines().count() >= 2 && written.starts_with("{\"prompt\": "), "{example}\n{written}");
    }
}

#[test]
fn help_states_the_defaults_and_the_exit_codes() {
    let output = tool().arg("--help").output().unwrap();
    assert_eq!((code(&output), output.stderr.len()), (0, 0));
    let help = text(&output.stdout);
    for part in ["Exit status:", "65  bad input data", "[default: interleave]", "--on-error <ACTION>"] {
        assert!(help.contains(part), "{part}");
    }
}
