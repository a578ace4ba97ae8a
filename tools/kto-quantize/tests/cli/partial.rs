//! Runs that were killed, and what becomes of what they have left.

use crate::{larger, made, run, text};
use kto_formats::{bnb::Nf4Tensor, model_dir::ModelDir};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

/// Several files.
const SHARDS: [&str; 2] = ["--max-shard-size", "600kB"];

fn start(model: &Path, out: &Path) -> std::process::Child {
    Command::new(env!("CARGO_BIN_EXE_kto-quantize"))
        .args([text(model), "-q", "-o", text(out), "--threads", "1"])
        .args(SHARDS)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The files of weights in a directory, by name.
fn shards(folder: &Path) -> Vec<PathBuf> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let mut found: Vec<_> =
        names.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("model-"))).collect();
    found.sort();
    found
}

/// Kills a run by this signal when two files are whole; returns what it said.
fn stopped(model: &Path, out: &Path, signal: &str) -> String {
    let partial = out.with_extension("partial");
    for _ in 0..50 {
        let child = start(model, out);
        while shards(&partial).len() < 2 && !out.exists() {
            std::thread::sleep(Duration::from_micros(300));
        }
        let pid = child.id().to_string();
        Command::new("kill").args(["-s", signal, &pid]).status().unwrap();
        let output = child.wait_with_output().unwrap();
        if !out.exists() {
            assert!(shards(&partial).len() >= 2);
            return String::from_utf8(output.stderr).unwrap();
        }
        fs::remove_dir_all(out).unwrap();
    }
    panic!("every run was faster");
}

/// Every file of a directory but the manifest, which tells of times.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap());
    let named = entries.map(|e| {
        assert!(e.file_type().unwrap().is_file(), "{:?}", e.path());
        (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())
    });
    named.filter(|(name, _)| name != "manifest.json").collect()
}

/// Kills a run, tampers with what is left, gives the command again; returns what that said. The result must be that of `expected`, a
/// run of the model as it is then.
fn tampered(tamper: &dyn Fn(&Path, &Path)) -> String {
    let top = tempfile::tempdir().unwrap();
    let (model, whole, out) = (larger(top.path()), top.path().join("whole"), top.path().join("out"));
    fs::write(top.path().join("outside"), "outside").unwrap();
    stopped(&model, &out, "KILL");
    tamper(&model, &top.path().join("out.partial"));
    let output = run(&[&[text(&model), "-o", text(&out)], &SHARDS[..]].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    made(&model, &whole, &SHARDS);
    assert!(content(&out) == content(&whole), "{said}");
    assert_eq!(fs::read_to_string(top.path().join("outside")).unwrap(), "outside", "{said}");
    assert!(!top.path().join("out.partial").exists());
    said
}

/// What the disk does not take is the output's matter: the line names it, not the file that the values are of.
#[test]
fn a_full_disk_is_of_the_output() {
    let top = tempfile::tempdir().unwrap();
    let model = larger(top.path());
    // Of a directory without tables the first tensor that does not fit is one that is copied.
    for form in [&["--form", "nf4"][..], &["--dequantize", "--dtype", "f32"], &["--form", "gguf"]] {
        let out = top.path().join(if form.contains(&"gguf") { "out.gguf" } else { "out" });
        let script = "ulimit -f 60; exec \"$0\" \"$@\"";
        let output = Command::new("bash")
            .args(["-c", script, env!("CARGO_BIN_EXE_kto-quantize"), text(&model), "-q", "-o", text(&out)])
            .args(form)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(74), "{form:?}: {said}");
        assert!(said.starts_with(&format!("kto-quantize: {}", text(&out))), "{form:?}: {said}");
        assert!(!said.contains(text(&model)) && said.lines().count() == 1, "{form:?}: {said}");
    }
}

#[test]
fn what_was_finished_is_used_only_as_it_was_finished() {
    let said = tampered(&|_, _| {});
    assert!(said.contains(" files were there from an earlier run"), "{said}");
    assert!(!said.contains("removed") && !said.contains("made again"), "{said}");
    let said = tampered(&|_, partial| {
        let first = &shards(partial)[0];
        let mut bytes = fs::read(first).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        fs::write(first, bytes).unwrap();
    });
    assert!(
        said.contains("out.partial: not what an earlier run finished, made again: model-00001-"),
        "{said}"
    );
}

#[test]
fn links_and_what_no_run_has_made_do_not_reach_the_result() {
    let said = tampered(&|_, partial| {
        let last = shards(partial)[0].to_string_lossy().replace("model-00001-", "model-00003-");
        let _ = fs::remove_file(&last);
        symlink("../outside", last).unwrap();
        symlink("../outside", partial.join("config.json")).unwrap();
        symlink("../outside", partial.join("model.safetensors.index.json")).unwrap();
        fs::write(partial.join("tokenizer.json"), "{}").unwrap();
        fs::write(partial.join("notes"), "mine").unwrap();
        fs::create_dir(partial.join("additional_chat_templates")).unwrap();
        symlink("../../outside", partial.join("additional_chat_templates/x.jinja")).unwrap();
    });
    assert!(
        said.contains("not finished by an earlier run, removed: additional_chat_templates, config.json"),
        "{said}"
    );
}

/// Values in the middle of a tensor, which no sample holds; size and time of the file as before.
#[test]
fn a_source_that_has_changed_is_not_mixed_with_what_it_was() {
    let said = tampered(&|model, _| {
        let path = model.join("model.safetensors");
        let before = fs::metadata(&path).unwrap().modified().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle..middle + 400].iter_mut().for_each(|b| *b = b.wrapping_add(1) & 0x3f);
        fs::write(&path, bytes).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_modified(before).unwrap();
    });
    assert!(said.contains("its inputs have changed since; begun anew"), "{said}");
    // A copy in its place.
    let said = tampered(&|model, _| {
        let (path, copy) = (model.join("model.safetensors"), model.join("copy"));
        fs::copy(&path, &copy).unwrap();
        fs::rename(copy, path).unwrap();
    });
    assert!(said.contains("begun anew"), "{said}");
}

/// Somebody writes to the source while a run is on: of no state of it the result would be.
#[test]
fn a_source_that_changes_meanwhile_gives_no_result() {
    let top = tempfile::tempdir().unwrap();
    let (model, out) = (larger(top.path()), top.path().join("out"));
    let signal = |child: &std::process::Child, name: &str| {
        Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
    };
    for _ in 0..50 {
        let mut child = start(&model, &out);
        while shards(&top.path().join("out.partial")).is_empty() && !out.exists() {
            std::thread::sleep(Duration::from_micros(300));
        }
        signal(&child, "STOP");
        let at_work =
            shards(&top.path().join("out.partial")).len() < 5 && child.try_wait().unwrap().is_none();
        if at_work {
            let source = model.join("model.safetensors");
            let bytes = fs::read(&source).unwrap();
            fs::write(&source, bytes).unwrap();
        }
        signal(&child, "CONT");
        let output = child.wait_with_output().unwrap();
        if at_work {
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(65), "{said}");
            assert!(
                said.contains("model.safetensors: changed while it was read\nhint: the same command again"),
                "{said}"
            );
            assert_eq!(fs::read_dir(top.path()).unwrap().count(), 1, "the model alone");
            return;
        }
        fs::remove_dir_all(&out).unwrap();
    }
    panic!("every run was faster");
}

#[test]
fn who_stops_a_run_is_told_how_it_goes_on() {
    let top = tempfile::tempdir().unwrap();
    let (model, out) = (larger(top.path()), top.path().join("out"));
    let said = stopped(&model, &out, "TERM");
    let partial = top.path().join("out.partial");
    let expected = format!(
        "kto-quantize: {}: stopped by SIGTERM\nhint: the same command again goes on with {}\n",
        out.display(),
        partial.display()
    );
    assert_eq!(said, expected);
}

/// Kills a run whenever a further file is whole; what the next runs find must be gone on with, and no reader may take the directory
/// that grows for a model.
#[test]
fn a_killed_run_is_gone_on_with_file_by_file() {
    let top = tempfile::tempdir().unwrap();
    let (model, whole, out) = (larger(top.path()), top.path().join("whole"), top.path().join("out"));
    let flags = SHARDS;
    made(&model, &whole, &flags);
    let partial = top.path().join("out.partial");
    let count = |folder: &Path| {
        fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with("model-"))
            .count()
    };
    let (files, all) = (|| count(&partial), count(&whole));
    let (mut kills, mut most) = (0, 0);
    for _ in 0..40 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kto-quantize"))
            .args([text(&model), "-q", "-o", text(&out), "--threads", "1"])
            .args(flags)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while files() <= most && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(300));
        }
        if child.try_wait().unwrap().is_some() {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!out.exists() || ModelDir::open(&out).is_ok());
        if partial.exists() {
            kills += 1;
            assert!(files() >= most, "a later run began anew");
            most = most.max(files());
            // A kill right before the end leaves all of it.
            let whole = partial.join("config.json").exists();
            assert!(ModelDir::open(&partial).is_ok() == whole && (!whole || files() == all));
        }
    }
    assert!(kills > 0 && most > 0, "{kills} kills, {most} files");
    if !out.exists() {
        let output = run(&[&[text(&model), "-o", text(&out)], &flags[..]].concat());
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("were there from an earlier run"));
    }
    for entry in fs::read_dir(&whole).unwrap() {
        let name = entry.unwrap().file_name();
        if name != "manifest.json" {
            assert!(fs::read(whole.join(&name)).unwrap() == fs::read(out.join(&name)).unwrap(), "{name:?}");
        }
    }
    assert!(!partial.exists());
    // Another job does not go on with it.
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join(".kto-job"), "another").unwrap();
    fs::write(partial.join("model-00001-of-00009.safetensors"), "x").unwrap();
    made(&model, &out, &["--force"]);
    assert!(!partial.exists());
}

#[test]
fn kill_leaves_the_old_directory_or_the_new_one() {
    let top = tempfile::tempdir().unwrap();
    let (model, out) = (larger(top.path()), top.path().join("out"));
    let mut finished = 0;
    for round in 0..12 {
        fs::remove_dir_all(&out).ok();
        fs::create_dir(&out).unwrap();
        fs::write(out.join("old"), "x").unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_kto-quantize"))
            .args([text(&model), "-q", "--force", "-o", text(&out)])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(12 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        if out.join("old").exists() {
            assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
        } else {
            let made = ModelDir::open(&out).unwrap();
            assert!(Nf4Tensor::find(&made.tensors, "model.layers.0.mlp.up_proj.weight").unwrap().is_some());
            finished += 1;
        }
    }
    assert!(run(&[text(&model), "-q", "--force", "-o", text(&out)]).status.success());
    // The last run went on with what the killed ones left: only the model and the result are there.
    assert_eq!(fs::read_dir(top.path()).unwrap().count(), 2, "{finished} of 12 came to their end");
}
