//! Compiles the kernels as C++ for the emulator: all of them in one translation unit, once for each element type.
//!
//! Without a C++ compiler (`CXX`, else `c++`) nothing fails: the cfg `emulated` stays unset and the tests say that they were left
//! out. The compiled code needs no C++ library, so none is linked.

use std::{
    env,
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo's environment and folders"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo's environment and folders"));
    let gpu = root.join("../gpu");
    say("cargo:rustc-check-cfg=cfg(emulated)");
    say("cargo:rerun-if-env-changed=CXX");
    for watched in [&gpu, &root.join("host")] {
        say(&format!("cargo:rerun-if-changed={}", watched.display()));
    }
    let mut files: Vec<PathBuf> = fs::read_dir(&gpu)
        .expect("cargo's environment and folders")
        .map(|e| e.expect("cargo's environment and folders").path())
        .collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "kernel"));
    files.sort();
    files.push(root.join("host/broken.kernel"));
    let source = out.join("kernels.cpp");
    fs::write(&source, translation_unit(&files)).expect("cargo's environment and folders");
    let include = [root.join("host"), gpu];
    match compile(&source, &include, &out) {
        Ok(()) => {
            say(&format!("cargo:rustc-link-search=native={}", out.display()));
            say("cargo:rustc-link-lib=static=kto_emulated");
            say("cargo:rustc-cfg=emulated");
        }
        Err(Failure::NoCompiler(name)) => {
            say(&format!("cargo:warning=no C++ compiler ({name}): the GPU kernels are not emulated"));
        }
        Err(Failure::Broken(text)) => {
            panic!("the kernels do not compile as C++:\n{text}");
        }
    }
}

/// Returns the text: the dialect, the kernels in a namespace for each type, and a table of their names.
fn translation_unit(files: &[PathBuf]) -> String {
    let mut text = String::from("#include \"dialect.h\"\n#include \"emulator.h\"\n");
    let mut table = String::new();
    for element in ["f32", "bf16", "f16"] {
        let _ = writeln!(text, "namespace of_{element} {{\n#define T {element}");
        for file in files {
            let _ = writeln!(text, "#include \"{}\"", file.display());
            for name in names(&fs::read_to_string(file).expect("cargo's environment and folders")) {
                let _ = writeln!(table, "    ENTRY(\"{name}_{element}\", of_{element}::{name}_{element}),");
            }
        }
        text += "#undef T\n}\n";
    }
    let _ = writeln!(text, "static const Entry ENTRIES[] = {{\n{table}}};");
    text += r#"
extern "C" const char *kto_emulate(
    const char *name, u32 blocks, u32 threads, u32 schedule, void **args, size_t arguments, size_t params) {
  for (const Entry &entry : ENTRIES) {
    if (strcmp(entry.name, name) == 0) {
      if (entry.signature.arguments != arguments || entry.signature.params != params) {
        return "the kernel has other arguments, or parameters of another size";
      }
      return emulate(entry, blocks, threads, schedule, args);
    }
  }
  return "there is no such kernel";
}
"#;
    text
}

/// The names that a file defines.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.strip_prefix("KERNEL(")?.split(')').next())
}

enum Failure {
    NoCompiler(String),
    Broken(String),
}

fn compile(source: &Path, include: &[PathBuf], out: &Path) -> Result<(), Failure> {
    let compiler = env::var("CXX").ok().filter(|c| !c.is_empty()).unwrap_or_else(|| "c++".into());
    let object = out.join("kernels.o");
    let mut command = Command::new(&compiler);
    command.args(["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]);
    command.args(["-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]);
    command.args(["-Wno-unused-parameter", "-Wno-unknown-pragmas"]);
    // Checked jumps refuse to change stacks, which is what the emulator's are for.
    command.args(["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0"]);
    // Undefined behaviour (shifts, overflow, bounds) stops the test; this form needs no library. Alignment has its own check.
    command.args(["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=alignment"]);
    include.iter().for_each(|dir| {
        command.arg("-I").arg(dir);
    });
    command.arg("-c").arg(source).arg("-o").arg(&object);
    run(&mut command, &compiler)?;
    let library = out.join("libkto_emulated.a");
    let _ = fs::remove_file(&library);
    run(Command::new("ar").arg("crs").arg(&library).arg(&object), "ar")
}

fn run(command: &mut Command, name: &str) -> Result<(), Failure> {
    match command.output() {
        Err(_) => Err(Failure::NoCompiler(name.into())),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(Failure::Broken(String::from_utf8_lossy(&output.stderr).into_owned())),
    }
}

fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").expect("cargo reads the build script's output");
}
