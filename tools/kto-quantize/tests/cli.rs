//! kto-quantize from outside: the golden checkpoint, streams, kills, and models that are refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use kto_formats::{
    bnb::Nf4Tensor,
    model_dir::ModelDir,
    safetensors_out::{SafetensorsWriter, TensorSpec, pt_metadata},
    tensors::TensorStore,
};
use safetensors::Dtype;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

/// Edits the tensors of a model under construction.
type Edit<'a> = &'a dyn Fn(&mut Vec<(TensorSpec, Vec<u8>)>);

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kto-quantize")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/bnb").join(name)
}

/// Runs the tool on `model`, expects failure, returns code and message.
fn refused(model: &Path, more: &[&str]) -> (i32, String) {
    let top = tempfile::tempdir().unwrap();
    let out = top.path().join("out");
    let output = run(&[&[text(model), "-o", text(&out)], more].concat());
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(output.stdout.is_empty());
    assert!(message.lines().filter(|l| !l.starts_with("hint: ")).count() == 1, "{message}");
    assert_eq!(fs::read_dir(top.path()).unwrap().count(), 0, "{message}");
    (output.status.code().unwrap(), message)
}

/// A copy of the golden model with edited tensors and config.json.
fn edited(dir: &Path, edit: Edit, config: impl Fn(String) -> String) -> PathBuf {
    let source = golden("tiny_llama_bf16");
    let model = dir.join("model");
    fs::create_dir(&model).unwrap();
    let text = fs::read_to_string(source.join("config.json")).unwrap();
    fs::write(model.join("config.json"), config(text)).unwrap();
    let store = TensorStore::open_file(&source.join("model.safetensors")).unwrap();
    let mut tensors: Vec<_> =
        store.views().map(|v| (TensorSpec::new(v.name, v.dtype, v.shape), v.data.to_vec())).collect();
    edit(&mut tensors);
    let specs = tensors.iter().map(|t| t.0.clone()).collect();
    let mut writer = SafetensorsWriter::new(&model.join("model.safetensors"), specs, &pt_metadata()).unwrap();
    for (spec, data) in &tensors {
        writer.write(&spec.name, data).unwrap();
    }
    writer.finish().unwrap();
    model
}

fn find<'a>(tensors: &'a mut [(TensorSpec, Vec<u8>)], name: &str) -> &'a mut (TensorSpec, Vec<u8>) {
    tensors.iter_mut().find(|t| t.0.name == name).unwrap()
}

#[test]
fn the_result_is_what_transformers_and_bitsandbytes_saved() {
    let top = tempfile::tempdir().unwrap();
    let out = top.path().join("out");
    let output = run(&[text(&golden("tiny_llama_bf16")), "-o", text(&out), "-q"]);
    assert!(output.status.success() && output.stderr.is_empty());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{}\n", out.display()));
    for file in ["config.json", "generation_config.json"] {
        assert_eq!(
            fs::read(out.join(file)).unwrap(),
            fs::read(golden("tiny_llama_bnb4").join(file)).unwrap()
        );
    }
    let ours = TensorStore::open_file(&out.join("model.safetensors")).unwrap();
    let theirs = TensorStore::open_file(&golden("tiny_llama_bnb4/model.safetensors")).unwrap();
    assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>());
    for view in theirs.views() {
        let own = ours.require(view.name).unwrap();
        assert_eq!((own.dtype, own.shape), (view.dtype, view.shape), "{}", view.name);
        assert!(own.data == view.data, "{}", view.name);
    }
}

#[test]
fn shards_threads_and_one_file_hold_the_same() {
    let top = tempfile::tempdir().unwrap();
    let model = golden("tiny_llama_bf16");
    let make = |name: &str, more: &[&str]| {
        let out = top.path().join(name);
        let output = run(&[&[text(&model), "-o", text(&out)], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        out
    };
    let (one, many) = (make("one", &["--threads", "1"]), make("many", &["--max-shard-size", "30kB"]));
    assert!(many.join("model.safetensors.index.json").exists());
    let (a, b) = (ModelDir::open(&one).unwrap(), ModelDir::open(&many).unwrap());
    assert!(b.notes.is_empty());
    assert_eq!(a.fingerprint(), b.fingerprint());
    assert!(a.fingerprint().ends_with(&format!("+{}", ModelDir::open(&model).unwrap().fingerprint())));
    let two = make("two", &["--threads", "2"]);
    assert!(
        fs::read(one.join("model.safetensors")).unwrap() == fs::read(two.join("model.safetensors")).unwrap()
    );
}

#[test]
fn skipped_layers_and_single_scales_are_stored_as_asked() {
    let top = tempfile::tempdir().unwrap();
    let out = top.path().join("out");
    let model = golden("tiny_llama_bf16");
    let output = run(&[text(&model), "-o", text(&out), "--skip", "layers.0,down_proj", "--no-double-quant"]);
    assert!(output.status.success());
    let made = ModelDir::open(&out).unwrap();
    let quantized = |name: &str| Nf4Tensor::find(&made.tensors, name).unwrap();
    assert!(quantized("model.layers.0.mlp.up_proj.weight").is_none());
    assert!(quantized("model.layers.1.mlp.down_proj.weight").is_none());
    let weight = quantized("model.layers.1.mlp.up_proj.weight").unwrap();
    assert!(weight.state.nested.is_none());
    let skipped = made.config["quantization_config"]["llm_int8_skip_modules"].as_array().unwrap().clone();
    assert_eq!((skipped.len(), &skipped[0]), (9, &serde_json::json!("lm_head")));
    assert_eq!(made.config["quantization_config"]["bnb_4bit_use_double_quant"], false);
    let (code, message) = refused(&model, &["--skip", "gate"]);
    assert!(code == 2 && message.contains("--skip gate: no linear layer"), "{message}");
    assert_eq!(refused(&model, &["--skip", "model"]).0, 2);
}

#[test]
fn existing_outputs_dry_runs_and_outputs_inside_the_model() {
    let top = tempfile::tempdir().unwrap();
    let (model, out) = (golden("tiny_llama_bf16"), top.path().join("out"));
    let output = run(&[text(&model), "-o", text(&out), "--dry-run"]);
    assert!(output.status.success() && !out.exists());
    assert!(String::from_utf8(output.stdout).unwrap().contains("change 14 of 21 weights, 86016 values\n"));
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine"), "x").unwrap();
    assert_eq!(run(&[text(&model), "-o", text(&out)]).status.code(), Some(73));
    assert!(out.join("mine").exists());
    assert!(run(&[text(&model), "-o", text(&out), "--force"]).status.success());
    assert!(!out.join("mine").exists() && ModelDir::open(&out).is_ok());
    let copy = edited(top.path(), &|_| {}, |c| c);
    for inside in [copy.clone(), copy.join("q"), top.path().to_path_buf()] {
        assert_eq!(run(&[text(&copy), "-o", text(&inside), "--force"]).status.code(), Some(2));
    }
    assert_eq!(run(&[text(&model), "-o", text(&top.path().join("no/such/out"))]).status.code(), Some(73));
    assert!(run(&[text(&model), "-o", "-"]).status.code() == Some(2) && !Path::new("-").exists());
}

#[test]
fn bad_models_are_refused_by_name() {
    assert_eq!(refused(Path::new("/nonexistent"), &[]).0, 66);
    let (code, message) = refused(&golden("tiny_llama_bnb4"), &[]);
    assert!(code == 65 && message.contains("already quantized"), "{message}");
    let up = "model.layers.1.mlp.up_proj.weight";
    let edits: [(Edit, &str); 7] = [
        (&|t| find(t, up).1[6..8].copy_from_slice(&[0xc0, 0x7f]), "up_proj.weight\": NaN at index 3"),
        (
            &|t| find(t, "lm_head.weight").1[..2].copy_from_slice(&[0x80, 0x7f]),
            "lm_head.weight\": infinity at index 0",
        ),
        (&|t| t.retain(|t| t.0.name != up), "no tensor \"model.layers.1.mlp.up_proj.weight\""),
        (&|t| find(t, up).0.dtype = Dtype::I16, "dtype I16"),
        (&|t| find(t, up).0.name = up.replace("up_proj", "router"), "router.weight\" of shape [160, 64]"),
        (&|t| t.retain(|t| !t.0.name.contains("layers.1.")), "config.json says 2 layers, the weights hold 1"),
        (&|t| t.truncate(1), "config.json says 2 layers, the weights hold 0"),
    ];
    for (edit, says) in edits {
        let top = tempfile::tempdir().unwrap();
        let (code, message) = refused(&edited(top.path(), edit, |c| c), &[]);
        assert!(code == 65 && message.contains(says), "{code} {message}");
    }
    let top = tempfile::tempdir().unwrap();
    let model = edited(top.path(), &|_| {}, |c| c);
    let whole = fs::read(model.join("model.safetensors")).unwrap();
    fs::write(model.join("model.safetensors"), &whole[..whole.len() - 1]).unwrap();
    let (code, message) = refused(&model, &[]);
    assert!(code == 65 && message.contains("cut short"), "{message}");
}

#[test]
fn a_closed_reader_is_quiet_and_a_full_device_is_74() {
    let top = tempfile::tempdir().unwrap();
    let out = top.path().join("out");
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_kto-quantize"))
        .args([text(&golden("tiny_llama_bf16")), "-q", "-o", text(&out)])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(
        (output.status.code(), String::from_utf8(output.stderr).unwrap().lines().count()),
        (Some(74), 1)
    );
    let script = format!(
        "set -o pipefail; '{}' '{}' -q --force -o '{}' | true",
        env!("CARGO_BIN_EXE_kto-quantize"),
        text(&golden("tiny_llama_bf16")),
        text(&out)
    );
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    assert!(ModelDir::open(&out).is_ok());
}

/// A model of one block that takes a moment to write.
fn larger(dir: &Path) -> PathBuf {
    edited(
        dir,
        &|tensors| {
            tensors.retain(|t| !t.0.name.contains("layers.1."));
            for (spec, data) in tensors {
                let wide: Vec<usize> = spec.shape.iter().map(|d| d * 16).collect();
                *data = data.repeat(wide.iter().product::<usize>() * 2 / data.len());
                spec.shape = wide;
            }
        },
        |c| c.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"),
    )
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
    // The last run swept up what the killed ones left: only the model and the result are there.
    assert_eq!(fs::read_dir(top.path()).unwrap().count(), 2, "{finished} of 12 came to their end");
}
