//! With the feature `cuda`: compiles the GPU kernels to PTX, one module for each element type. Otherwise does nothing.
//!
//! Embedding PTX spares the program NVRTC at run time.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

/// The version of PTX that the modules are declared in, that of CUDA 12.0: a driver refuses one that is newer than itself, and nvcc
/// declares its own, whatever the text uses. `scripts/gpu-kernels` assembles the text as this version.
const PTX_VERSION: &str = ".version 8.0";

fn main() {
    // Without this line every change in the crate would run the script again.
    say("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    say("cargo:rerun-if-changed=gpu");
    say("cargo:rerun-if-env-changed=NVCC");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = env::var("NVCC").unwrap_or_else(|_| "nvcc".into());
    for element in ["f32", "bf16", "f16"] {
        let source = out.join(format!("{element}.cu"));
        fs::write(&source, module(element)).expect("OUT_DIR is writable");
        let ptx = source.with_extension("ptx");
        let mut command = Command::new(&nvcc);
        command.args([
            "--ptx",
            "-arch=compute_75",
            "--fmad=false",
            "-std=c++17",
            "--diag-suppress=177",
            "-o",
        ]);
        match command.arg(&ptx).arg(&source).output() {
            Err(e) => {
                panic!("feature cuda needs nvcc ({nvcc}): {e}; try: eval \"$(scripts/cuda-toolkit build)\"")
            }
            Ok(done) => assert!(done.status.success(), "nvcc: {}", String::from_utf8_lossy(&done.stderr)),
        }
        let text = fs::read_to_string(&ptx).expect("what nvcc has written");
        let declared =
            |line: &str| if line.starts_with(".version ") { PTX_VERSION.into() } else { line.to_string() };
        let lines: Vec<String> = text.lines().map(declared).collect();
        assert!(lines.iter().any(|l| l == PTX_VERSION), "nvcc's PTX has no version");
        fs::write(&ptx, lines.join("\n") + "\n").expect("OUT_DIR is writable");
    }
}

/// The text that `gpu::module` makes.
fn module(element: &str) -> String {
    let mut files: Vec<PathBuf> =
        fs::read_dir("gpu").expect("the folder gpu").filter_map(|e| Some(e.ok()?.path())).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "kernel"));
    files.sort();
    let read = |path: &Path| fs::read_to_string(path).expect("a kernel's file");
    let mut text = format!("{}\n#define T {element}\n", read(Path::new("gpu/dialect.h")));
    files.iter().for_each(|file| text += &read(file));
    text
}

fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").expect("cargo reads the build script's output");
}
