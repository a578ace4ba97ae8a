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
};

mod gguf;
mod models;
mod partial;

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

/// Fused matrices, and norms with biases, which stay as they are.
#[test]
fn families_of_another_form_are_quantized_as_bitsandbytes_does() {
    let top = tempfile::tempdir().unwrap();
    for name in ["phi3-longrope", "stablelm"] {
        let (source, out) = (golden("../families").join(name), top.path().join(name));
        let output = run(&[text(&source), "-o", text(&out), "-q"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let ours = ModelDir::open(&out).unwrap();
        let theirs = ModelDir::open(&golden("../families-nf4").join(name)).unwrap();
        assert_eq!(ours.tensors.names().collect::<Vec<_>>(), theirs.tensors.names().collect::<Vec<_>>());
        for view in theirs.tensors.views() {
            let own = ours.tensors.require(view.name).unwrap();
            let equal = (own.dtype, own.shape, own.data) == (view.dtype, view.shape, view.data);
            assert!(equal, "{name} {}", view.name);
        }
        // And back: what bitsandbytes' codes decode to.
        let back = top.path().join(format!("{name}-back"));
        let output = run(&[text(&out), "-o", text(&back), "-q", "--dequantize"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let (back, source) = (ModelDir::open(&back).unwrap(), ModelDir::open(&source).unwrap());
        assert_eq!(back.tensors.names().collect::<Vec<_>>(), source.tensors.names().collect::<Vec<_>>());
    }
}

/// A model with a part of its matrices fused is no known family.
#[test]
fn fused_and_separate_matrices_do_not_mix() {
    let top = tempfile::tempdir().unwrap();
    let q = "model.layers.0.self_attn.q_proj.weight";
    let model = edited(top.path(), &|t| find(t, q).0.name = q.replace("q_proj", "qkv_proj"), |c| c);
    assert!(refused(&model, &[]).1.contains("no tensor \"model.layers.0.self_attn.q_proj.weight\""));
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
    let wider =
        ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"];
    let config = |config: String| {
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config["num_hidden_layers"] = 1.into();
        wider.iter().for_each(|field| config[field] = (16 * config[field].as_u64().unwrap()).into());
        config.to_string()
    };
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
        config,
    )
}

fn made(model: &Path, out: &Path, more: &[&str]) -> ModelDir {
    let output = run(&[&[text(model), "-q", "-o", text(out)], more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ModelDir::open(out).unwrap()
}

#[test]
fn every_form_comes_back_as_floats() {
    let top = tempfile::tempdir().unwrap();
    let model = golden("tiny_llama_bf16");
    let dense = ModelDir::open(&model).unwrap();
    let forms: [(&[&str], f64); 6] = [
        (&["--form", "nf4"], 0.11),
        (&["--form", "nf4", "--block-size", "256", "--no-double-quant"], 0.13),
        (&["--form", "fp4"], 0.16),
        (&["--form", "int8"], 0.012),
        (&["--form", "mlx", "--bits", "3", "--group-size", "32"], 0.2),
        (
            &[
                "--form",
                "mlx",
                "--bits",
                "8",
                "--group-size",
                "32",
                "--override",
                "up_proj=5:64",
                "--skip",
                "lm_head",
            ],
            // 5 bits in groups of 64: a step of about 0.15 of the standard deviation.
            0.05,
        ),
    ];
    for (i, (flags, bound)) in forms.iter().enumerate() {
        let (quantized, back) = (top.path().join(format!("q{i}")), top.path().join(format!("b{i}")));
        let smaller = made(&model, &quantized, flags);
        let floats = made(&quantized, &back, &["--dequantize", "--dtype", "f32"]);
        assert!(floats.config.get("quantization_config").is_none() && floats.config["dtype"] == "float32");
        assert!(floats.fingerprint().ends_with(&smaller.fingerprint()));
        assert!(floats.tensors.names().eq(dense.tensors.names()), "{flags:?}");
        for view in dense.tensors.views() {
            let (given, made) = (view.to_f32().unwrap(), floats.tensors.require(view.name).unwrap());
            assert_eq!((made.dtype, made.shape), (Dtype::F32, view.shape));
            let off: f64 =
                given.iter().zip(made.to_f32().unwrap()).map(|(g, m)| f64::from(g - m).powi(2)).sum();
            let length: f64 = given.iter().map(|g| f64::from(*g).powi(2)).sum();
            assert!((off / length).sqrt() < *bound, "{flags:?} {}: {}", view.name, (off / length).sqrt());
            let kept = view.shape.len() == 1 || flags.contains(&"lm_head") && view.name == "lm_head.weight";
            assert!(!kept || off == 0.0, "{flags:?} {}", view.name);
        }
    }
    // 8 bits of bitsandbytes are those that transformers saved.
    let (ours, theirs) = (
        ModelDir::open(&top.path().join("q3")).unwrap(),
        ModelDir::open(&golden("tiny_llama_int8")).unwrap(),
    );
    assert!(ours.tensors.names().eq(theirs.tensors.names()) && ours.config == theirs.config);
    for view in theirs.tensors.views() {
        assert!(ours.tensors.require(view.name).unwrap().data == view.data, "{}", view.name);
    }
    assert_eq!(refused(&model, &["--dequantize"]).0, 65);
}

#[test]
fn flags_that_do_not_fit_the_form_are_usage_errors() {
    let model = golden("tiny_llama_bf16");
    for flags in [
        &["--bits", "4"][..],
        &["--form", "mlx", "--block-size", "128"],
        &["--form", "mlx", "--no-double-quant"],
        &["--form", "int8", "--type", "Q8_0"],
        &["--embeddings", "quantize"],
        &["--override", "up_proj=6"],
        &["--form", "mlx", "--override", "up_proj=7"],
        &["--form", "mlx", "--override", "nothing=4"],
        &["--form", "gguf", "--override", "up_proj=Q9"],
        &["--form", "gguf", "--override", "nothing=Q8_0"],
        &["--form", "gguf", "--dtype", "f32"],
        &["--form", "mlx", "--dtype", "f32"],
        &["--dtype", "f32"],
        &["--form", "gguf", "--max-shard-size", "1GB"],
        &["--form", "gguf", "--block-size", "64"],
        &["--form", "mlx", "--block-size", "64"],
        &["--form", "int8", "--block-size", "64"],
        &["--form", "int8", "--no-double-quant"],
        &["--form", "gguf", "--bits", "4"],
        &["--form", "gguf", "--type", "F16", "--embeddings", "quantize"],
        &["--form", "gguf", "--type", "BF16", "--head", "quantize"],
        &["--dequantize", "--form", "nf4"],
    ] {
        let (code, message) = refused(&model, flags);
        assert!(code == 2 && !message.contains("panicked"), "{flags:?} {message}");
    }
}

#[test]
fn the_report_names_every_quantized_tensor() {
    let top = tempfile::tempdir().unwrap();
    let report = top.path().join("report.jsonl");
    made(&golden("tiny_llama_bf16"), &top.path().join("q"), &["--report", text(&report)]);
    let lines: Vec<serde_json::Value> =
        fs::read_to_string(report).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 14);
    for line in lines {
        let relative = line["relative_rms"].as_f64().unwrap();
        assert!((0.05..0.11).contains(&relative) && line["cosine"].as_f64().unwrap() > 0.99, "{line}");
        assert!((line["bits_per_weight"].as_f64().unwrap() - 4.125).abs() < 0.001, "{line}");
    }
}

#[test]
fn a_report_overwrites_neither_input_nor_result() {
    let top = tempfile::tempdir().unwrap();
    let model = edited(top.path(), &|_| (), |config| config);
    let weights = model.join("model.safetensors");
    let before = fs::read(&weights).unwrap();
    let gguf = top.path().join("x.gguf");
    for (out, more, report) in [
        (top.path().join("q"), &[][..], &weights),
        (gguf.clone(), &["--form", "gguf"], &gguf),
        (gguf.clone(), &["--form", "gguf"], &weights),
    ] {
        let output = run(&[&[text(&model), "-o", text(&out), "--report", text(report)], more].concat());
        assert_eq!(output.status.code(), Some(2), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(!out.exists());
    }
    assert!(fs::read(&weights).unwrap() == before);
}

/// Codes without their scales, and scales without their codes, are no weights.
#[test]
fn a_quantized_model_with_a_part_missing_is_not_dequantized() {
    for (model, lost) in [
        ("tiny_llama_int8", "model.layers.0.mlp.down_proj.SCB"),
        ("tiny_llama_int8", "model.layers.0.mlp.down_proj.weight"),
        ("tiny_llama_bnb4", "model.layers.0.mlp.down_proj.weight"),
    ] {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("model");
        fs::create_dir(&dir).unwrap();
        fs::copy(golden(model).join("config.json"), dir.join("config.json")).unwrap();
        let store = TensorStore::open_file(&golden(model).join("model.safetensors")).unwrap();
        let left: Vec<_> = store.views().filter(|v| v.name != lost).collect();
        assert_eq!(left.len() + 1, store.views().count(), "{lost}");
        let specs = left.iter().map(|v| TensorSpec::new(v.name, v.dtype, v.shape)).collect();
        let mut writer =
            SafetensorsWriter::new(&dir.join("model.safetensors"), specs, &Default::default()).unwrap();
        left.iter().for_each(|v| writer.write(v.name, v.data).unwrap());
        writer.finish().unwrap();
        let (code, message) = refused(&dir, &["--dequantize", "--dtype", "bf16"]);
        assert_eq!(code, 65, "{lost}: {message}");
    }
}

#[test]
fn biases_of_queries_and_keys_go_with_their_rows() {
    let top = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/families/llama-biases");
    let out = top.path().join("x.gguf");
    let output = run(&[text(&model), "-o", text(&out), "--form", "gguf", "--type", "F32"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_gguf_file_says_what_it_is_and_is_replaced_only_with_force() {
    let top = tempfile::tempdir().unwrap();
    let out = top.path().join("m.gguf");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/demo/model");
    let call = |more: &[&str]| run(&[&[text(&model), "--form", "gguf", "-o", text(&out)], more].concat());
    assert!(call(&["--type", "q8_0"]).status.success());
    let bytes = fs::read(&out).unwrap();
    assert!(bytes.starts_with(b"GGUF\x03\0\0\0") && bytes.len() > 1_000_000);
    let holds = |text: &[u8]| bytes.windows(text.len()).any(|w| w == text);
    for key in
        ["general.architecture", "tokenizer.chat_template", "tokenizer.ggml.merges", "blk.3.ffn_down.weight"]
    {
        assert!(holds(key.as_bytes()), "{key}");
    }
    assert_eq!(call(&[]).status.code(), Some(73));
    assert!(fs::read(&out).unwrap() == bytes);
    // With the same bytes it is left alone, with others refused.
    let time = || fs::metadata(&out).unwrap().modified().unwrap();
    let before = time();
    assert!(call(&["--type", "q8_0", "--if-changed"]).status.success() && time() == before);
    assert_eq!(call(&["--type", "f16", "--if-changed"]).status.code(), Some(73));
    assert!(fs::read(&out).unwrap() == bytes);
    assert!(call(&["--force", "--type", "f16", "-q"]).status.success() && fs::read(&out).unwrap() != bytes);
}
