//! Manifests, rules for make, outputs that are left alone.

use super::{bash, names, probe, text};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    process::Command,
    time::{Duration, SystemTime},
};

fn run(dir: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let out = probe(arguments).current_dir(dir).output().unwrap();
    (out.status.code(), text(&out.stderr).into())
}

fn done(dir: &Path, arguments: &[&str]) {
    assert_eq!(run(dir, arguments), (Some(0), String::new()), "{arguments:?}");
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Sets a time of change long ago and returns it with the inode.
fn age(path: &Path) -> (SystemTime, u64) {
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
    stamp(path)
}

fn stamp(path: &Path) -> (SystemTime, u64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.modified().unwrap(), metadata.ino())
}

#[test]
fn a_manifest_says_what_was_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), "one\n").unwrap();
    done(dir.path(), &["copy", "a", "-o", "out", "--lr=1e-5", "--tags=x,y", "--how", "fast", "-q"]);
    let manifest = read(&dir.path().join("out.manifest.json"));
    // printf 'one\n' | sha256sum
    let sum = "2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806";
    let file = |name: &str| json!([{"path": name, "size": 4, "sha256": sum}]);
    assert_eq!((&manifest["inputs"], &manifest["outputs"]), (&file("a"), &file("out")));
    let configuration = json!({
        "job": "copy", "files": ["a"], "out": "out", "lr": 1e-5, "tags": ["x", "y"], "how": "fast",
        "usual": "fast", "slow": false, "keep": false, "drop": false
    });
    assert_eq!(manifest["configuration"], configuration);
    assert_eq!((&manifest["tool"], &manifest["format"]), (&json!("probe"), &json!(1)));
    for key in ["started", "finished", "host", "system"] {
        assert!(manifest["environment"][key].is_string(), "{key}");
    }
    let environment =
        probe(&["copy", "a", "-o", "out"]).current_dir(dir.path()).env("SOURCE_DATE_EPOCH", "0").output();
    assert!(environment.unwrap().status.success());
    assert_eq!(
        read(&dir.path().join("out.manifest.json"))["environment"]["finished"],
        "1970-01-01T00:00:00Z"
    );
}

#[test]
fn a_manifest_goes_where_it_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), "one\n").unwrap();
    done(dir.path(), &["copy", "a", "-o", "out", "--manifest", "none"]);
    assert_eq!(names(&dir), ["a", "out"]);
    done(dir.path(), &["copy", "a", "-o", "out", "--manifest", "m.json"]);
    assert_eq!(names(&dir), ["a", "m.json", "out"]);
    done(dir.path(), &["copy", "a"]);
    done(dir.path(), &["copy", "a", "-o", "/dev/null"]);
    let pipe = bash(dir.path(), "$P copy <(echo two) -o >(cat); echo three | $P copy - -o p; sleep 0.2");
    assert_eq!((text(&pipe.stdout), text(&pipe.stderr)), ("two\n", ""));
    assert_eq!(names(&dir), ["a", "m.json", "out", "p", "p.manifest.json"]);
    assert_eq!(read(&dir.path().join("p.manifest.json"))["inputs"], json!([{"path": "-"}]));
    done(dir.path(), &["dir", "a", "-o", "made"]);
    let manifest = read(&dir.path().join("made/manifest.json"));
    let listed: Vec<_> = manifest["outputs"].as_array().unwrap().iter().map(|o| o["path"].clone()).collect();
    assert_eq!(listed, ["made/config.json", "made/data"]);
}

#[test]
fn a_run_is_repeated_from_its_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let in_dir = |arguments: &[&str], variable: &str| {
        let out = probe(arguments).current_dir(dir.path()).env(variable, "9").output().unwrap();
        assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), ""));
        text(&out.stdout).to_string()
    };
    fs::write(dir.path().join("a"), "one\n").unwrap();
    done(dir.path(), &["copy", "a", "-o", "out", "--rank", "7", "--note", "12", "--keep"]);
    let printed = in_dir(&["--from-manifest", "out.manifest.json", "--print-config"], "KTO_LR");
    for line in ["rank = 7", "note = \"12\"", "keep = true", "lr = 0.5", "files = [\"a\"]"] {
        assert!(printed.lines().any(|l| l.starts_with(line)), "{line} in\n{printed}");
    }
    assert!(printed.contains("# out.manifest.json"), "{printed}");
    let told = in_dir(&["tell", "--from-manifest", "out.manifest.json", "--rank=8"], "KTO_RANK");
    assert!(told.starts_with("lr=0.5 rank=Some(8) ") && told.contains("note=Some(\"12\")"), "{told}");
    fs::remove_file(dir.path().join("out")).unwrap();
    done(dir.path(), &["--from-manifest", "out.manifest.json"]);
    assert_eq!(fs::read(dir.path().join("out")).unwrap(), b"one\n");
    let other =
        fs::read_to_string(dir.path().join("out.manifest.json")).unwrap().replace("\"probe\"", "\"kto-x\"");
    fs::write(dir.path().join("x.json"), other).unwrap();
    let (code, said) = run(dir.path(), &["--from-manifest", "x.json"]);
    assert_eq!((code, said.as_str()), (Some(78), "probe: x.json: a manifest of kto-x, not of probe\n"));
    let (code, said) = run(dir.path(), &["--from-manifest", "a"]);
    assert!(code == Some(78) && said.starts_with("probe: a: not a manifest: "), "{said}");
}

#[test]
fn equal_outputs_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("a"), "one\n").unwrap();
    let copy = ["copy", "a", "-o", "out", "--if-changed", "--depfile", "out.d"];
    done(dir.path(), &copy);
    let before = ["out", "out.manifest.json", "out.d"].map(|n| age(&path(n)));
    done(dir.path(), &copy);
    assert_eq!(["out", "out.manifest.json", "out.d"].map(|n| stamp(&path(n))), before);
    done(dir.path(), &["copy", "a", "-o", "out"]);
    assert_ne!(stamp(&path("out")), before[0], "without the flag it is written anew");
    age(&path("out"));
    fs::write(path("a"), "two\n").unwrap();
    done(dir.path(), &copy);
    assert_ne!(stamp(&path("out")).0, before[0].0);
    assert_eq!(fs::read(path("out")).unwrap(), b"two\n");
    assert!(names(&dir).iter().all(|n| !n.ends_with(".kto-tmp")));
}

#[test]
fn equal_directories_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("a"), "one\n").unwrap();
    fs::write(path("b"), "two\n").unwrap();
    done(dir.path(), &["dir", "a", "-o", "made"]);
    let before = ["made/data", "made/config.json", "made/manifest.json"].map(|n| age(&path(n)));
    let now = || ["made/data", "made/config.json", "made/manifest.json"].map(|n| stamp(&path(n)));
    done(dir.path(), &["dir", "a", "-o", "made", "--if-changed"]);
    assert_eq!(now(), before);
    // Another directory is replaced when that is allowed; its equal files keep their times.
    let (code, said) = run(dir.path(), &["dir", "b", "-o", "made", "--if-changed"]);
    assert_eq!((code, said.as_str()), (Some(73), "probe: made: already exists\nhint: --force replaces it\n"));
    assert_eq!(now(), before);
    done(dir.path(), &["dir", "b", "-o", "made", "--if-changed", "--keep"]);
    assert_eq!(fs::read(path("made/data")).unwrap(), b"two\n");
    assert_eq!(now().map(|s| s.0 == before[0].0), [false, true, false]);
    assert!(names(&dir).iter().all(|n| !n.ends_with(".kto-tmp")));
}

#[test]
fn make_reads_the_rule() {
    let dir = tempfile::tempdir().unwrap();
    let odd = ["a b", "c$d", "e#f", "g:h", "i\\j", "k\\ l", "m%n", "o*p"];
    odd.iter().for_each(|name| fs::write(dir.path().join(name), name).unwrap());
    fs::write(dir.path().join("p.toml"), "lr = 1\n").unwrap();
    let out = "o $u:t#1%";
    done(
        dir.path(),
        &[&["copy"], &odd[..], &["-o", out, "--depfile", "rule.d", "--config", "p.toml"]].concat(),
    );
    let rule = fs::read_to_string(dir.path().join("rule.d")).unwrap();
    fs::write(dir.path().join("Makefile"), rule.replacen("\n\n", "\n\t@echo made\n\n", 1)).unwrap();
    let make = || {
        let mut make = Command::new("make");
        make.args(["--question", "--no-builtin-rules", out])
            .current_dir(dir.path())
            .output()
            .unwrap()
            .status
            .code()
    };
    assert_eq!(make(), Some(0), "all is up to date:\n{rule}");
    let late = SystemTime::now() + Duration::from_secs(100);
    for name in odd.iter().chain(&["p.toml"]) {
        let file = fs::File::options().write(true).open(dir.path().join(name)).unwrap();
        let before = file.metadata().unwrap().modified().unwrap();
        file.set_modified(late).unwrap();
        assert_eq!(make(), Some(1), "{name} is newer");
        file.set_modified(before).unwrap();
    }
    assert_eq!(make(), Some(0));
    fs::remove_file(dir.path().join("a b")).unwrap();
    assert_eq!(make(), Some(1), "an input that is gone is no error of make");
    let (code, said) = run(dir.path(), &["copy", "p.toml", "--depfile", "rule.d"]);
    assert_eq!((code, said.lines().next()), (Some(2), Some("probe: --depfile needs an output with a name")));
}
