//! Records the git revision for `--version`.
//!
//! `KTO_REVISION` wins (`make dist` and `make install` set it); otherwise git is asked, and outside a clone the answer
//! is "unknown". A development build is not rebuilt at every commit: it shows the revision at which this crate was
//! last compiled.

use std::process::Command;

fn main() {
    let revision = std::env::var("KTO_REVISION")
        .ok()
        .filter(|text| !text.is_empty())
        .or_else(|| git(&["rev-parse", "--short=12", "HEAD"]))
        .unwrap_or_else(|| "unknown".into());
    let mut lines =
        format!("cargo:rustc-env=KTO_REVISION={revision}\ncargo:rerun-if-env-changed=KTO_REVISION\n");
    lines += "cargo:rerun-if-changed=build.rs\n";
    if let Some(head) = git(&["rev-parse", "--git-path", "HEAD"]) {
        lines += &format!("cargo:rerun-if-changed={head}\n");
    }
    let target = std::env::var("TARGET").unwrap_or_default();
    lines += &format!("cargo:rustc-env=KTO_TARGET={target}\n");
    let written = std::io::Write::write_all(&mut std::io::stdout(), lines.as_bytes());
    assert!(written.is_ok(), "cargo does not read the build script's output");
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_string())
}
