//! What make, cron and whoever repeats a run see: --if-changed, run.json as manifest, --depfile, --config.

use crate::cli::{Bench, kto_train, stderr};
use serde_json::{Value, json};
use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

fn manifest(b: &Bench) -> Value {
    serde_json::from_slice(&fs::read(b.out().join("run.json")).unwrap()).unwrap()
}

/// Makes every file of the run old and returns a picture of the directory.
fn age(b: &Bench) -> Vec<(String, SystemTime)> {
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    for path in files(&b.out()) {
        fs::File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
    }
    picture(b)
}

fn picture(b: &Bench) -> Vec<(String, SystemTime)> {
    let seen = |path: &std::path::PathBuf| {
        (path.display().to_string(), fs::metadata(path).unwrap().modified().unwrap())
    };
    files(&b.out()).iter().filter(|p| !p.ends_with(".lock")).map(seen).collect()
}

fn files(path: &Path) -> Vec<std::path::PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(path).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() { all.extend(files(&entry)) } else { all.push(entry) }
    }
    all.sort();
    all
}

#[test]
fn an_equal_finished_run_is_not_touched() {
    let b = Bench::new();
    assert!(
        b.train(&["-q", "--max-steps", "2", "--if-changed"]).status.success(),
        "nothing there: a first run"
    );
    let before = age(&b);
    for more in [&["--if-changed"][..], &["--if-changed", "--threads", "1"], &["--if-changed", "--force"]] {
        let output = b.train(&[&["-q", "--max-steps", "2"], more].concat());
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
        assert_eq!(output.stdout, format!("{}\n", b.out().display()).into_bytes());
        assert_eq!(picture(&b), before, "{more:?}");
    }
    let output = b.train(&["-q", "--max-steps", "2", "--lr", "0.5", "--seed", "7", "--if-changed"]);
    assert_eq!(output.status.code(), Some(78));
    let said = stderr(&output);
    assert!(
        said.contains("another run") && said.contains("lr was 5e-6, is 0.5; seed was 42, is 7"),
        "{said}"
    );
    assert_eq!(picture(&b), before);
    for more in [&["--force"][..], &["--force", "--resume"]] {
        let output = b.train(&[&["-q", "--max-steps", "2", "--lr", "0.5", "--if-changed"], more].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(manifest(&b)["plan"]["lr"], 0.5);
    }
}

#[test]
fn if_changed_does_not_remove_what_the_new_run_begins_from() {
    let b = Bench::new();
    assert!(b.train(&["-q", "--max-steps", "2"]).status.success());
    let adapter = b.out().join("adapter").display().to_string();
    for more in [&["--force"][..], &["--force", "--resume"]] {
        let output = b
            .train(&[&["-q", "--max-steps", "2", "--if-changed", "--init-adapter", &adapter], more].concat());
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains("--force would remove --init-adapter"));
        assert!(b.out().join("adapter").exists());
    }
}

#[test]
fn rule_and_copy_of_the_manifest_may_lie_beside_the_run() {
    let b = Bench::new();
    std::fs::create_dir_all(b.out()).unwrap();
    let (rule, copy) = (b.out().join("run.d"), b.out().join("manifest.json"));
    let (rule, copy) = (rule.display().to_string(), copy.display().to_string());
    for more in [&[][..], &["--if-changed"], &["--resume"], &["--force"]] {
        let flags = ["-q", "--max-steps", "2", "--depfile", &rule, "--manifest", &copy];
        let output = b.train(&[&flags[..], more].concat());
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""), "{more:?}");
    }
}

#[test]
fn an_unfinished_run_is_not_taken_for_a_finished_one() {
    let b = Bench::new();
    assert!(b.train(&["-q", "--max-steps", "2", "--checkpoint-every", "1"]).status.success());
    let adapter = b.out().join("adapter/adapter_model.safetensors");
    let bytes = fs::read(&adapter).unwrap();
    fs::remove_dir_all(b.out().join("adapter")).unwrap();
    assert_eq!(b.train(&["-q", "--max-steps", "2", "--if-changed"]).status.code(), Some(73));
    let output = b.train(&["-q", "--max-steps", "2", "--if-changed", "--force", "--resume"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(fs::read(&adapter).unwrap(), bytes);
}

#[test]
fn run_json_is_a_manifest_and_repeats_the_run() {
    let b = Bench::new();
    let first =
        b.train(&["-q", "--max-steps", "2", "--lr", "1e-3", "--lora-r", "4", "--checkpoint-every", "1"]);
    assert!(first.status.success(), "{}", stderr(&first));
    let found = manifest(&b);
    let configuration = &found["configuration"];
    assert_eq!((&configuration["lr"], &configuration["lora-r"]), (&json!(1e-3), &json!(4)));
    assert!(configuration.get("force").is_none() && configuration.get("quiet").is_none());
    let inputs = found["inputs"].as_array().unwrap();
    assert_eq!(inputs[0]["fingerprint"], found["plan"]["base"]);
    let sum = |path: &Path| kto_cli::hash::sha256_hex(&fs::read(path).unwrap());
    assert_eq!(inputs[1]["sha256"], sum(&b.data));
    let outputs = found["outputs"].as_array().unwrap();
    assert_eq!(outputs[0]["sha256"], sum(&b.out().join("adapter/adapter_model.safetensors")));
    assert!(found["environment"]["host"].is_string());

    let (run_json, again) = (b.out().join("run.json"), b.dir.path().join("again"));
    let [from, out] = [&run_json, &again].map(|p| p.display().to_string());
    let output = kto_train(&["-q", "--from-manifest", &from, "--out", &out]);
    assert!(output.status.success(), "{}", stderr(&output));
    for name in ["adapter/adapter_model.safetensors", "metrics.jsonl"] {
        assert_eq!(fs::read(again.join(name)).unwrap(), fs::read(b.out().join(name)).unwrap(), "{name}");
    }
    let second: Value = serde_json::from_slice(&fs::read(again.join("run.json")).unwrap()).unwrap();
    for key in ["plan", "inputs", "revision", "result"] {
        assert_eq!(second.get(key), found.get(key), "{key}");
    }
}

#[test]
fn the_rule_names_the_adapter_and_what_it_was_made_from() {
    let b = Bench::new();
    let config = b.dir.path().join("train.toml");
    fs::write(&config, "[kto-train]\nmax-steps = 1\n").unwrap();
    let rule = b.dir.path().join("rule.d");
    let [config, rule_name] = [&config, &rule].map(|p| p.display().to_string());
    let output = b.train(&["-q", "--config", &config, "--depfile", &rule_name]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(fs::read_to_string(b.out().join("metrics.jsonl")).unwrap().lines().count(), 1);
    let text = fs::read_to_string(&rule).unwrap();
    let first = text.split("\n\n").next().unwrap().replace("\\\n", "");
    let words: Vec<&str> = first.split_whitespace().collect();
    assert_eq!(words[0], format!("{}:", b.out().join("adapter/adapter_model.safetensors").display()));
    let model = |name: &str| b.model.join(name).display().to_string();
    for needed in [model("config.json"), model("model.safetensors"), b.data.display().to_string(), config] {
        assert!(words.contains(&needed.as_str()), "{needed} in {text}");
    }
}

#[test]
fn a_required_option_may_come_from_the_file() {
    let b = Bench::new();
    let config = b.dir.path().join("all.toml");
    let text = format!(
        "max-steps = 1\nbatch = 4\nquiet = true\n[kto-train]\nmodel = {:?}\ndata = {:?}\nout = {:?}\nlora-r = 4\n",
        b.model,
        b.data,
        b.out()
    );
    fs::write(&config, text).unwrap();
    let name = config.display().to_string();
    let output = kto_train(&["--config", &name]);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
    assert_eq!(manifest(&b)["plan"]["lora_r"], 4);
    // What contradicts it is refused as on the command line.
    let output = kto_train(&["--config", &name, "--force", "--init-adapter", "x"]);
    assert_eq!(output.status.code(), Some(78));
    assert!(stderr(&output).contains("all.toml:8: the argument"), "{}", stderr(&output));
}
