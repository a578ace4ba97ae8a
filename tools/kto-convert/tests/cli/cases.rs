//! Runs every folder of `tests/cases`: `cmd` (arguments and exit code), `in.*`, `out`, `err`.
//!
//! Each input is given as a file, as redirected standard input, and through a pipe; output and messages must be the
//! same but for the name of the input, which the expected texts write as IN. `KTO_BLESS=1` rewrites the expectations.

use super::{code, run, text, tool};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

struct Case {
    folder: PathBuf,
    input: String,
    args: Vec<String>,
    exit: i32,
}

impl Case {
    fn read(folder: PathBuf) -> Self {
        let cmd = fs::read_to_string(folder.join("cmd")).unwrap();
        let (line, exit) = cmd.trim_end().split_once("\nexit ").unwrap();
        let words = line.strip_prefix("kto-convert").unwrap().strip_suffix("IN").unwrap().trim();
        let input = fs::read_dir(&folder).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap());
        let input = input.into_iter().find(|name| name.starts_with("in.")).unwrap();
        Self { folder, input, args: split(words), exit: exit.parse().unwrap() }
    }

    /// The arguments for standard input, which has no name to tell a table by.
    fn stdin_args(&self) -> Vec<&str> {
        let mut args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let plain = self.input.strip_suffix(".gz").unwrap_or(&self.input);
        if let Some((_, format @ ("csv" | "tsv"))) = plain.rsplit_once('.') {
            args.extend(["--in-format", format]);
        }
        args
    }

    fn check(&self) -> Result<(), String> {
        let file = tool().current_dir(&self.folder).args(&self.args).arg(&self.input).output().unwrap();
        let handle = fs::File::open(self.folder.join(&self.input)).unwrap();
        let redirected = tool().args(self.stdin_args()).stdin(Stdio::from(handle)).output().unwrap();
        let piped = run(&self.stdin_args(), &fs::read(self.folder.join(&self.input)).unwrap());
        for (way, output) in [("file", file), ("redirected", redirected), ("piped", piped)] {
            for (name, bytes) in [("out", &output.stdout), ("err", &output.stderr)] {
                self.compare(name, &text(bytes).replace(&self.input, "IN").replace("<stdin>", "IN"), way)?;
            }
            if code(&output) != self.exit {
                return Err(format!("{way}: exit {} instead of {}", code(&output), self.exit));
            }
        }
        Ok(())
    }

    fn compare(&self, name: &str, found: &str, way: &str) -> Result<(), String> {
        let path = self.folder.join(name);
        if std::env::var_os("KTO_BLESS").is_some() && way == "file" {
            fs::write(&path, found).unwrap();
        }
        let expected = fs::read_to_string(&path).unwrap_or_default();
        if found == expected {
            Ok(())
        } else {
            Err(format!("{way}: {name} is\n{found}\ninstead of\n{expected}"))
        }
    }
}

/// Splits words at blanks; single quotes hold a word together.
fn split(words: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (i, piece) in words.split('\'').enumerate() {
        if i % 2 == 1 {
            out.push(piece.to_owned());
        } else {
            out.extend(piece.split_whitespace().map(str::to_owned));
        }
    }
    out
}

#[test]
fn every_case_folder() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut folders: Vec<PathBuf> = fs::read_dir(root).unwrap().map(|f| f.unwrap().path()).collect();
    folders.retain(|f| f.is_dir());
    folders.sort();
    assert!(folders.len() > 100, "the cases are there");
    let failed: Vec<String> = folders
        .into_iter()
        .filter_map(|f| Case::read(f.clone()).check().err().map(|e| format!("{}: {e}", f.display())))
        .collect();
    assert!(failed.is_empty(), "{} cases failed\n{}", failed.len(), failed.join("\n\n"));
}
