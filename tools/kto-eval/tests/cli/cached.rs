//! Models by name: found in a cache, listed by `kto-eval models`.

use super::{code, text, tool};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Output,
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A cache with the tiny Llama as `org/tiny`, its files linked as blobs.
fn cache() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/trl/llama/model");
    let folder = dir.path().join("models--org--tiny");
    let snapshot = folder.join("snapshots").join(COMMIT);
    for path in [&snapshot, &folder.join("blobs"), &folder.join("refs")] {
        fs::create_dir_all(path).unwrap();
    }
    for (i, entry) in fs::read_dir(model).unwrap().enumerate() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(format!("blobs/{i}"))).unwrap();
        symlink(format!("../../blobs/{i}"), snapshot.join(entry.file_name())).unwrap();
    }
    fs::write(folder.join("refs/main"), COMMIT).unwrap();
    (dir, snapshot)
}

fn offline(cache: &Path, args: &[&str]) -> Output {
    tool().args(args).env("HF_HUB_CACHE", cache).env("HF_HUB_OFFLINE", "1").output().unwrap()
}

#[test]
fn a_model_is_found_by_its_name() {
    let (cache, snapshot) = cache();
    let prompts = cache.path().join("p.jsonl");
    fs::write(&prompts, "{\"prompt\": \"hello\"}\n").unwrap();
    let answer = |model: &str| {
        let args = ["generate", "-q", "--max-new-tokens", "4", "--model", model, prompts.to_str().unwrap()];
        offline(cache.path(), &args)
    };
    let by_path = answer(snapshot.to_str().unwrap());
    assert_eq!(code(&by_path), 0, "{}", text(&by_path.stderr));
    for name in ["org/tiny", "org/tiny@main", &format!("org/tiny@{COMMIT}")] {
        let by_name = answer(name);
        assert_eq!((code(&by_name), &by_name.stdout), (0, &by_path.stdout), "{}", text(&by_name.stderr));
    }
    for (name, said) in [
        (
            "org/other",
            "org/other: no such directory, the Hugging Face cache does not hold it, and HF_HUB_OFFLINE",
        ),
        ("org/tiny@v2", "org/tiny@v2: no such directory"),
    ] {
        let refused = answer(name);
        let message = text(&refused.stderr);
        assert!(code(&refused) == 66 && message.contains(said), "{message}");
        assert_eq!(message.lines().count(), 2, "{message}");
    }
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    let message = text(&answer("org/tiny").stderr);
    assert!(message.contains("the Hugging Face cache lacks its model.safetensors"), "{message}");
}

#[test]
fn the_cache_is_listed() {
    let (cache, snapshot) = cache();
    let table = offline(cache.path(), &["models"]);
    let lines: Vec<String> = text(&table.stdout).lines().map(str::to_string).collect();
    assert!(lines[0].starts_with("MODEL") && lines[1].starts_with("org/tiny "), "{lines:?}");
    assert!(lines[1].contains(" f32 ") && lines[1].ends_with(" complete"), "{lines:?}");
    assert!(text(&table.stderr).contains("1 models, "), "{}", text(&table.stderr));
    fs::write(snapshot.join("modeling_tiny.py"), "").unwrap();
    fs::remove_file(snapshot.join("config.json")).unwrap();
    let output = offline(cache.path(), &["models", "-q", "--json"]);
    assert!(output.stderr.is_empty());
    let model: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&model["name"], &model["complete"]), (&"org/tiny".into(), &false.into()));
    assert_eq!(model["remote_code"], serde_json::json!(["modeling_tiny.py"]));
    assert!(model["fault"].as_str().unwrap().contains("config.json"), "{model}");
    let line = text(&offline(cache.path(), &["models"]).stdout);
    assert!(line.contains("incomplete: ") && line.contains("; remote code (modeling_tiny.py)"), "{line}");
    let nothing = tempfile::tempdir().unwrap();
    let empty = offline(&nothing.path().join("none"), &["models"]);
    assert_eq!((code(&empty), empty.stdout.len()), (0, 0));
    let homeless = tool().arg("models").env_clear().output().unwrap();
    assert_eq!(code(&homeless), 78, "{}", text(&homeless.stderr));
}
