//! Records the git revision for `--version`.
//!
//! `KTO_REVISION` wins (`make dist` and `make install` set it); otherwise git is asked, or its files are read where it
//! refuses (another owner, not installed); outside a clone the answer is "unknown". A development build is not rebuilt
//! at every commit: it shows the revision at which this crate was last compiled, with a + because the rest may be newer.

use std::{fs, io::Write, path::Path, process::Command};

fn main() {
    let git = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.git");
    let revision = std::env::var("KTO_REVISION")
        .ok()
        .filter(|text| !text.is_empty())
        .or_else(|| ask_git().or_else(|| read_files(&git)).map(|commit| commit + "+"))
        .unwrap_or_else(|| "unknown".into());
    let target = std::env::var("TARGET").unwrap_or_default();
    let mut lines = format!("cargo:rustc-env=KTO_REVISION={revision}\ncargo:rustc-env=KTO_TARGET={target}\n");
    lines += "cargo:rerun-if-env-changed=KTO_REVISION\ncargo:rerun-if-changed=build.rs\n";
    if git.join("HEAD").exists() {
        lines += "cargo:rerun-if-changed=../../.git/HEAD\n";
    }
    let written = std::io::stdout().write_all(lines.as_bytes());
    assert!(written.is_ok(), "cargo does not read the build script's output");
}

fn ask_git() -> Option<String> {
    let output = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_string())
}

fn read_files(git: &Path) -> Option<String> {
    let head = fs::read_to_string(git.join("HEAD")).ok()?;
    let hash = match head.trim().strip_prefix("ref: ") {
        None => head,
        Some(name) => fs::read_to_string(git.join(name)).ok().or_else(|| {
            let packed = fs::read_to_string(git.join("packed-refs")).ok()?;
            packed.lines().find_map(|line| line.strip_suffix(name).map(str::to_string))
        })?,
    };
    hash.get(..12).map(str::to_string)
}
