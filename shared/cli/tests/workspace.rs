//! Rules of the workspace that no compiler checks: who may depend on whom, how long a file may be, what it may say.

#![allow(clippy::unwrap_used)] // a test may

use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Lines above which a source file must be split, unless it carries [`EXEMPT`].
const LINES: usize = 600;
/// The mark of a table or a generated file, in its first ten lines.
const EXEMPT: &str = "size-exempt:";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_path_buf()
}

/// The crates of the workspace and, for each crate of the whole build, the names it depends on (without dev ones).
struct Graph {
    members: BTreeSet<String>,
    edges: BTreeMap<String, BTreeSet<String>>,
}

fn graph() -> Graph {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let out = Command::new(cargo)
        .args([
            "metadata",
            "--format-version",
            "1",
            "--offline",
            "--locked",
            "--filter-platform",
            env!("KTO_TARGET"),
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_string();
    let names: BTreeMap<String, String> =
        metadata["packages"].as_array().unwrap().iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect();
    let ids = metadata["workspace_members"].as_array().unwrap();
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in metadata["resolve"]["nodes"].as_array().unwrap() {
        let targets = node["deps"].as_array().unwrap().iter().filter(|d| {
            // A kind of null is an ordinary dependency; "dev" does not reach the binaries.
            d["dep_kinds"].as_array().unwrap().iter().any(|k| k["kind"] != "dev")
        });
        let to = targets.map(|d| names[d["pkg"].as_str().unwrap()].clone());
        edges.entry(names[node["id"].as_str().unwrap()].clone()).or_default().extend(to);
    }
    Graph { members: ids.iter().map(|id| names[id.as_str().unwrap()].clone()).collect(), edges }
}

fn reachable<'a>(edges: &'a BTreeMap<String, BTreeSet<String>>, from: &'a str) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(name) = open.pop() {
        if seen.insert(name) {
            open.extend(edges.get(name).into_iter().flatten().map(String::as_str));
        }
    }
    seen
}

#[test]
fn crates_depend_only_downwards() {
    let graph = graph();
    let allowed = |from: &str| -> &[&str] {
        match from {
            "kto-kernels" | "kto-cli" => &[],
            "kto-kernel-checks" => &["kto-kernels"],
            "kto-formats" => &["kto-cli"],
            "kto-hub" => &["kto-cli", "kto-formats"],
            "kto-weights" => &["kto-cli", "kto-formats", "kto-kernels"],
            "kto-model" => &["kto-cli", "kto-formats", "kto-kernels", "kto-weights"],
            _ => &["kto-cli", "kto-formats", "kto-hub", "kto-model", "kto-kernels", "kto-weights"],
        }
    };
    for from in &graph.members {
        for to in graph.edges[from].intersection(&graph.members) {
            assert!(allowed(from).contains(&to.as_str()), "{from} must not depend on {to}");
        }
    }
}

#[test]
fn the_data_tools_know_no_device() {
    let graph = graph();
    for from in ["kto-convert", "kto-tokenize", "kto-formats", "kto-hub", "kto-cli"] {
        for to in reachable(&graph.edges, from) {
            let device = to.starts_with("candle") || ["kto-kernels", "kto-model", "gemm"].contains(&to);
            assert!(!device, "{from} must not link {to}");
        }
    }
}

#[test]
fn no_source_file_is_too_long() {
    let mut long = Vec::new();
    for path in files("rs") {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().count();
        if lines > LINES && !text.lines().take(10).any(|l| l.contains(EXEMPT)) {
            long.push(format!("{}: {lines} lines", path.display()));
        }
    }
    assert!(long.is_empty(), "split these, or mark a table with `// {EXEMPT} why`:\n{}", long.join("\n"));
}

#[test]
fn main_files_only_call_their_library() {
    for path in files("rs").into_iter().filter(|p| p.ends_with("src/main.rs")) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 20, "{}: {lines} lines", path.display());
    }
}

#[test]
fn every_source_file_says_what_it_is_for() {
    for path in files("rs").into_iter().filter(|p| p.components().any(|c| c.as_os_str() == "src")) {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//!"), "{}: begins without a module header (//!)", path.display());
    }
}

/// The files of modules that are declared `#[cfg(test)] mod name;`.
fn test_modules(all: &[PathBuf]) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for path in all {
        let text = fs::read_to_string(path).unwrap();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for pair in lines.windows(2).filter(|pair| pair[0] == "#[cfg(test)]") {
            if let Some(name) = pair[1].strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';')) {
                found.insert(path.with_file_name(format!("{name}.rs")));
                found.insert(path.with_extension("").join(format!("{name}.rs")));
            }
        }
    }
    found
}

/// Every file of the project with this extension.
fn files(extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> =
        ["kernels", "shared", "tools", "scripts"].iter().map(|d| root().join(d)).collect();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Bytes come and go through `kto_cli`, which adds names, caps and atomicity; test code may do as it likes.
#[test]
fn only_the_manners_open_files_and_read_the_environment() {
    const CALLS: [&str; 8] = [
        "File::open(",
        "File::create(",
        "File::create_new(",
        "fs::read(",
        "fs::read_to_string(",
        "fs::write(",
        "fs::rename(",
        "env::var",
    ];
    let mut found = Vec::new();
    let all = files("rs");
    let tests = test_modules(&all);
    let library = |path: &&PathBuf| {
        !path.starts_with(root().join("shared/cli"))
            && path.iter().any(|c| c == "src")
            && !tests.contains(*path)
    };
    for path in all.iter().filter(library) {
        let text = fs::read_to_string(path).unwrap();
        for (at, line) in text.lines().enumerate().take_while(|(_, line)| !line.contains("#[cfg(test)]")) {
            let code = line.trim_start();
            let called = CALLS.iter().find(|call| code.contains(**call) && !code.starts_with("//"));
            if let Some(call) = called.filter(|call| !code.contains(&format!("Atomic{call}"))) {
                found.push(format!("{}:{}: {call}", path.display(), at + 1));
            }
        }
    }
    assert!(found.is_empty(), "use kto_cli::{{input, output, atomic}} instead:\n{}", found.join("\n"));
}

#[test]
fn configuration_files_know_every_tool() {
    let known = fs::read_to_string(root().join("shared/cli/src/config/layers.rs")).unwrap();
    let (_, list) = known.split_once("const TOOLS").unwrap();
    let list = &list[..list.find("];").unwrap()];
    let folders =
        fs::read_dir(root().join("tools")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let tools: Vec<String> = folders.filter(|name| name.starts_with("kto-")).collect();
    assert!(tools.len() >= 6);
    assert!(tools.iter().all(|tool| list.contains(&format!("\"{tool}\""))), "{tools:?} in {list}");
}
