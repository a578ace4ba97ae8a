//! kto-merge from outside: the arithmetic, provenance, streams, kills, and inputs that are refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod models;
mod verify;

use kto_formats::{
    adapter::{Adapter, AdapterMeta},
    bnb::Nf4Tensor,
    lora::LoraModule,
    model_dir::ModelDir,
    tensors::TensorStore,
};
use safetensors::Dtype;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

const TOOL: &str = env!("CARGO_BIN_EXE_kto-merge");

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

fn run(base: &Path, adapter: &Path, out: &Path, more: &[&str]) -> Output {
    let fixed = ["--base", text(base), "--adapter", text(adapter), "-o", text(out)];
    Command::new(TOOL).args(fixed).args(more).stdin(Stdio::null()).output().unwrap()
}

fn merged(base: &Path, adapter: &Path, out: &Path, more: &[&str]) -> ModelDir {
    let output = run(base, adapter, out, more);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{}\n", out.display()));
    ModelDir::open(out).unwrap()
}

/// Runs the tool, expects failure and no output directory, returns code and message.
fn refused(base: &Path, adapter: &Path, more: &[&str]) -> (i32, String) {
    let top = tempfile::tempdir().unwrap();
    let output = run(base, adapter, &top.path().join("out"), more);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(output.stdout.is_empty());
    assert!(message.lines().filter(|l| !l.starts_with("hint: ")).count() == 1, "{message}");
    assert_eq!(fs::read_dir(top.path()).unwrap().count(), 0, "{message}");
    (output.status.code().unwrap(), message)
}

fn llama() -> (PathBuf, PathBuf) {
    (testdata("trl/llama/model"), testdata("trl/llama/adapter_final"))
}

/// An adapter for the tiny models of testdata/bnb: rank 1, one module.
fn small_adapter(dir: &Path, base_fingerprint: Option<String>) -> PathBuf {
    let mut adapter = Adapter::read(&llama().1).unwrap();
    adapter.config.r = 1;
    let module = "model.layers.1.self_attn.k_proj".to_string();
    let mut pair = adapter.tensors[&module].clone();
    (pair.r, pair.in_features, pair.out_features) = (1, 64, 32);
    pair.a.truncate(64);
    pair.b.truncate(32);
    adapter.tensors = [(module, pair)].into();
    adapter.write(dir, AdapterMeta { base_fingerprint, ..AdapterMeta::default() }).unwrap();
    dir.to_path_buf()
}

/// Checks every tensor of `made` against W + scale·B·A in f64, up to `tolerance` of a dtype's rounding.
fn check(made: &ModelDir, base: &ModelDir, adapter: &Adapter, dtype: Option<Dtype>, tolerance: f64) {
    let scale = adapter.config.scale();
    let mut adapted = 0;
    for view in made.tensors.views() {
        let stored = base.tensors.require(view.name).unwrap();
        let mut expected: Vec<f64> = match Nf4Tensor::find(&base.tensors, view.name).unwrap() {
            Some(weight) => {
                let mut values = vec![0.0; weight.len()];
                weight.dequantize_into(&mut values).unwrap();
                assert_eq!(view.dtype, dtype.unwrap_or(weight.state.dtype), "{}", view.name);
                values.into_iter().map(f64::from).collect()
            }
            None => {
                assert_eq!(view.dtype, dtype.unwrap_or(stored.dtype), "{}", view.name);
                stored.to_f32().unwrap().into_iter().map(f64::from).collect()
            }
        };
        let pair = view.name.strip_suffix(".weight").and_then(|m| adapter.tensors.get(m));
        if let Some(p) = pair {
            adapted += 1;
            for (i, e) in expected.iter_mut().enumerate() {
                let (row, column) = (i / p.in_features, i % p.in_features);
                let product = |k| f64::from(p.b[row * p.r + k]) * f64::from(p.a[k * p.in_features + column]);
                *e += scale * (0..p.r).map(product).sum::<f64>();
            }
        }
        for (v, e) in view.to_f32().unwrap().iter().zip(&expected) {
            assert!((f64::from(*v) - e).abs() <= tolerance * e.abs().max(0.1), "{}: {v} {e}", view.name);
        }
    }
    assert_eq!(adapted, adapter.tensors.len());
}

#[test]
fn weights_are_base_plus_product_in_every_dtype() {
    let top = tempfile::tempdir().unwrap();
    for case in ["llama", "qwen2"] {
        let (base, adapter) =
            (testdata(&format!("trl/{case}/model")), testdata(&format!("trl/{case}/adapter_final")));
        let (b, a) = (ModelDir::open(&base).unwrap(), Adapter::read(&adapter).unwrap());
        for (flag, dtype, tolerance) in
            [("f32", Dtype::F32, 1e-6), ("bf16", Dtype::BF16, 4e-3), ("f16", Dtype::F16, 1e-3)]
        {
            let out = top.path().join(format!("{case}-{flag}"));
            let made = merged(&base, &adapter, &out, &["-q", "--dtype", flag]);
            check(&made, &b, &a, Some(dtype), tolerance);
            let name = if flag == "f32" {
                "float32"
            } else if flag == "bf16" {
                "bfloat16"
            } else {
                "float16"
            };
            assert_eq!(made.config["dtype"], name);
        }
        let made = merged(&base, &adapter, &top.path().join(case), &[]);
        check(&made, &b, &a, None, 1e-6);
        assert_eq!(made.config, b.config);
        assert_eq!(made.tensors.contains("lm_head.weight"), case == "llama");
        for file in
            ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
        {
            assert!(
                fs::read(base.join(file)).unwrap() == fs::read(top.path().join(case).join(file)).unwrap()
            );
        }
    }
}

/// An adapter of PEFT on fused matrices has one A and one B for each of them.
#[test]
fn adapters_on_fused_matrices_are_merged() {
    let top = tempfile::tempdir().unwrap();
    for name in ["phi3", "stablelm"] {
        let (base, path) = (testdata(&format!("families/{name}")), top.path().join(name));
        let golden = TensorStore::open_file(&base.join("golden.safetensors")).unwrap();
        let mut adapter = Adapter::read(&llama().1).unwrap();
        (adapter.config.r, adapter.config.lora_alpha) = (2, 3.0);
        let of = |name: &str| golden.require(name).unwrap();
        let modules = golden.names().filter_map(|n| n.strip_prefix("lora/")?.strip_suffix(".lora_A.weight"));
        let pair = |module: &str| {
            let [a, b] = ["A", "B"].map(|side| of(&format!("lora/{module}.lora_{side}.weight")));
            let (in_features, out_features) = (a.shape[1], b.shape[0]);
            let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
            LoraModule { a, b, r: 2, in_features, out_features, scale: 1.5, magnitude: None }
        };
        adapter.tensors = modules.map(|module| (module.to_string(), pair(module))).collect();
        assert_eq!(adapter.tensors.len(), if name == "phi3" { 8 } else { 14 });
        adapter.write(&path, AdapterMeta::default()).unwrap();
        let made =
            merged(&base, &path, &top.path().join(format!("{name}-merged")), &["-q", "--dtype", "f32"]);
        check(&made, &ModelDir::open(&base).unwrap(), &adapter, Some(Dtype::F32), 1e-6);
    }
}

#[test]
fn a_quantized_base_becomes_dense_and_shards_hold_the_same() {
    let top = tempfile::tempdir().unwrap();
    let adapter = small_adapter(&top.path().join("adapter"), None);
    let base = testdata("bnb/tiny_llama_bnb4");
    let made = merged(&base, &adapter, &top.path().join("one"), &["--threads", "1"]);
    assert!(made.config.get("quantization_config").is_none());
    assert_eq!(made.tensors.len(), 21);
    check(&made, &ModelDir::open(&base).unwrap(), &Adapter::read(&adapter).unwrap(), None, 4e-3);
    let many = merged(&base, &adapter, &top.path().join("many"), &["--max-shard-size", "50kB"]);
    assert!(top.path().join("many/model.safetensors.index.json").exists() && many.notes.is_empty());
    assert_eq!(made.fingerprint(), many.fingerprint());
}

#[test]
fn the_base_is_known_and_merging_twice_is_refused() {
    let top = tempfile::tempdir().unwrap();
    let base = testdata("bnb/tiny_llama_bf16");
    let print = ModelDir::open(&base).unwrap().fingerprint();
    let from = |name: &str, print: String| small_adapter(&top.path().join(name), Some(print));
    let right = from("right", print.clone());
    merged(&base, &right, &top.path().join("once"), &[]);
    // Trained on a 4-bit form of this base.
    merged(&base, &from("quantized", format!("ab+{print}")), &top.path().join("origin"), &[]);
    let wrong = from("wrong", "0".repeat(64));
    let (code, message) = refused(&base, &wrong, &[]);
    assert!(
        code == 78 && message.contains("trained on another base") && message.contains("--force-base"),
        "{message}"
    );
    merged(&base, &wrong, &top.path().join("forced"), &["--force-base"]);
    // The base comes before the shapes, which do not fit either.
    let mut strange = Adapter::read(&right).unwrap();
    strange.tensors =
        strange.tensors.into_values().map(|p| ("model.layers.9.mlp.up_proj".into(), p)).collect();
    let meta = AdapterMeta { base_fingerprint: Some("0".repeat(64)), ..AdapterMeta::default() };
    strange.write(&top.path().join("strange"), meta).unwrap();
    assert_eq!(refused(&base, &top.path().join("strange"), &[]).0, 78);
    assert_eq!(refused(&base, &top.path().join("strange"), &["--force-base"]).0, 65);
    for adapter in [&right, &from("again", print)] {
        let (code, message) = refused(&top.path().join("once"), adapter, &[]);
        assert!(code == 78 && message.contains("merged into this base already"), "{message}");
    }
    merged(&top.path().join("once"), &right, &top.path().join("twice"), &["--force-base"]);
}

#[test]
fn outputs_inside_an_input_are_usage_errors() {
    let top = tempfile::tempdir().unwrap();
    let (base, adapter) = (top.path().join("base"), top.path().join("adapter"));
    for (from, to) in [(&llama().0, &base), (&llama().1, &adapter)] {
        fs::create_dir(to).unwrap();
        for file in fs::read_dir(from).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    std::os::unix::fs::symlink("base", top.path().join("link")).unwrap();
    for out in [base.clone(), base.join("m"), adapter.clone(), top.path().join("link"), top.path().into()] {
        assert_eq!(run(&base, &adapter, &out, &["--force"]).status.code(), Some(2), "{}", out.display());
    }
    assert!(ModelDir::open(&base).is_ok() && Adapter::read(&adapter).is_ok());
    let out = top.path().join("out");
    let dry = run(&base, &adapter, &out, &["--dry-run"]);
    assert!(dry.status.success() && !out.exists());
    assert!(String::from_utf8(dry.stdout).unwrap().contains("merge 14 modules, rank 8, scale 2, weight 1"));
    merged(&base, &adapter, &out, &[]);
    // A run directory stands for its adapter.
    let in_run = top.path().join("run");
    fs::create_dir(&in_run).unwrap();
    std::os::unix::fs::symlink(&adapter, in_run.join("adapter")).unwrap();
    merged(&base, &in_run, &in_run.join("merged"), &[]);
    let dash = run(&base, &adapter, Path::new("-"), &[]);
    assert!(dash.status.code() == Some(2) && !Path::new("-").exists());
    assert_eq!(run(&base, &adapter, &out, &[]).status.code(), Some(73));
    merged(&base, &adapter, &out, &["--force"]);
}

#[test]
fn what_does_not_fit_is_named() {
    let (base, adapter) = llama();
    assert_eq!(refused(Path::new("/nonexistent"), &adapter, &[]).0, 66);
    assert_eq!(refused(&base, Path::new("/nonexistent"), &[]).0, 66);
    assert!(refused(&base, &base, &[]).1.contains("adapter_config.json"));
    assert!(refused(&adapter, &adapter, &[]).1.contains("config.json"));
    let top = tempfile::tempdir().unwrap();
    let made = |name: &str, change: &dyn Fn(&mut Adapter)| {
        let mut changed = Adapter::read(&adapter).unwrap();
        change(&mut changed);
        changed.write(&top.path().join(name), AdapterMeta::default()).unwrap();
        refused(&base, &top.path().join(name), &[])
    };
    let module = "model.layers.0.mlp.up_proj";
    let rename = |to: &'static str| {
        move |a: &mut Adapter| {
            let pair = a.tensors.remove(module).unwrap();
            a.tensors.insert(to.into(), pair);
        }
    };
    let cases = [
        made("layer", &rename("model.layers.9.mlp.up_proj")),
        made("shape", &rename("lm_head")),
        made("nan", &|a| a.tensors.get_mut(module).unwrap().b[3] = f32::NAN),
        made("huge", &|a| a.tensors.get_mut(module).unwrap().b.fill(f32::MAX)),
    ];
    for ((code, message), says) in cases.iter().zip([
        "the base has no tensor \"model.layers.9.mlp.up_proj.weight\"",
        "\"lm_head\" is adapted with shape [112, 64], but the base's tensor has [384, 64]",
        "up_proj.lora_B.weight\": NaN at index 3",
        "up_proj.weight\": ",
    ]) {
        assert!(*code == 65 && message.contains(says), "{message}");
    }
    let mut large = Adapter::read(&adapter).unwrap();
    large.tensors.values_mut().for_each(|p| p.b.fill(1e5));
    large.write(&top.path().join("large"), AdapterMeta::default()).unwrap();
    let (code, message) = refused(&base, &top.path().join("large"), &["--dtype", "f16"]);
    assert!(
        code == 65 && message.contains("too large for the form") && message.contains("hint: --dtype"),
        "{message}"
    );
    let config = top.path().join("layer/adapter_config.json");
    let with = |from: &str, to: &str| {
        let text = fs::read_to_string(&config).unwrap().replace(from, to);
        fs::write(top.path().join("large/adapter_config.json"), text).unwrap();
        refused(&base, &top.path().join("large"), &[]).1
    };
    assert!(with("\"use_dora\": false", "\"use_dora\": true").contains("no lora_magnitude_vector"));
    assert!(
        with("\"use_qalora\": false", "\"use_qalora\": true").contains("use_qalora = true is not supported")
    );
    assert!(with("\"rank_pattern\": {}", "\"rank_pattern\": {\"up_proj\": 4}").contains("expected [4, 64]"));
}

#[test]
fn a_quantized_result_keeps_what_the_adapter_does_not_touch() {
    let top = tempfile::tempdir().unwrap();
    let adapter = small_adapter(&top.path().join("adapter"), None);
    // NF4: everything but the one adapted weight has the bytes of the base.
    let base = testdata("bnb/tiny_llama_bnb4");
    let made = merged(&base, &adapter, &top.path().join("nf4"), &["--form", "nf4"]);
    let stored = ModelDir::open(&base).unwrap();
    assert!(made.config == stored.config && made.tensors.names().eq(stored.tensors.names()));
    for view in stored.tensors.views() {
        let touched = view.name.starts_with("model.layers.1.self_attn.k_proj.weight");
        assert!(touched || made.tensors.require(view.name).unwrap().data == view.data, "{}", view.name);
    }
    let k = "model.layers.1.self_attn.k_proj.weight";
    assert!(made.tensors.require(k).unwrap().data != stored.tensors.require(k).unwrap().data);
    // MLX: rows of the weight that B leaves alone keep codes, scales and biases.
    let quantize = Path::new(TOOL).with_file_name("kto-quantize");
    if !quantize.exists() {
        return; // Tests of this crate alone do not build the other tool.
    }
    let mlx = top.path().join("mlx");
    let call = Command::new(quantize)
        .args([
            text(&testdata("bnb/tiny_llama_bf16")),
            "-q",
            "--form",
            "mlx",
            "--group-size",
            "32",
            "-o",
            text(&mlx),
        ])
        .output()
        .unwrap();
    assert!(call.status.success(), "{}", String::from_utf8_lossy(&call.stderr));
    let mut half = Adapter::read(&adapter).unwrap();
    half.tensors.values_mut().for_each(|p| p.b[..16].fill(0.0));
    half.write(&top.path().join("half"), AdapterMeta::default()).unwrap();
    let made = merged(&mlx, &top.path().join("half"), &top.path().join("mlx-merged"), &["--form", "mlx"]);
    let stored = ModelDir::open(&mlx).unwrap();
    for part in ["weight", "scales", "biases"] {
        let name = format!("model.layers.1.self_attn.k_proj.{part}");
        let (a, b) = (stored.tensors.require(&name).unwrap().data, made.tensors.require(&name).unwrap().data);
        assert!(a[..a.len() / 2] == b[..a.len() / 2] && a != b, "{part}");
    }
}

#[test]
fn mixtures_layers_and_scales_are_those_of_the_definition() {
    let top = tempfile::tempdir().unwrap();
    let (base, adapter) = llama();
    let start = top.path().join("start");
    let mut fresh = Adapter::read(&testdata("trl/llama/adapter_init")).unwrap();
    fresh.tensors.values_mut().for_each(|pair| pair.b.fill(0.0));
    fresh.write(&start, AdapterMeta::default()).unwrap();
    let b = ModelDir::open(&base).unwrap();
    let of = |name: &str, more: &[&str]| {
        let out = top.path().join(name);
        merged(&base, &adapter, &out, &[&["--dtype", "f32"], more].concat())
    };
    let values = |model: &ModelDir, name: &str| model.tensors.require(name).unwrap().to_f32().unwrap();
    let (first, second) = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight");
    let (whole, half) = (of("whole", &[]), of("half", &["--scale", "0.5"]));
    for ((w, h), b) in values(&whole, first).iter().zip(values(&half, first)).zip(values(&b, first)) {
        assert!((f64::from(*w - b) * 0.5 - f64::from(h - b)).abs() < 1e-6);
    }
    let one = of("one", &["--layers", "1"]);
    assert!(values(&one, first) == values(&b, first) && values(&one, second) == values(&whole, second));
    // The other adapter's B is zero: it adds nothing, and of a mean of two signs nothing but the other is left.
    let more = ["--adapter", text(&start)];
    let sum = of("sum", &[&more[..], &["--weight", "2", "--weight", "5"]].concat());
    for ((w, s), b) in values(&whole, first).iter().zip(values(&sum, first)).zip(values(&b, first)) {
        assert!((2.0 * f64::from(*w - b) - f64::from(s - b)).abs() < 1e-5);
    }
    let ties = of("ties", &[&more[..], &["--method", "ties", "--density", "1"]].concat());
    for (w, t) in values(&whole, first).iter().zip(values(&ties, first)) {
        assert!((w - t).abs() < 1e-6);
    }
    let dare = |name: &str, seed: &str| of(name, &["--method", "dare", "--density", "0.5", "--seed", seed]);
    let (x, y, z) = (dare("d1", "1"), dare("d2", "1"), dare("d3", "2"));
    assert!(values(&x, first) == values(&y, first) && values(&x, first) != values(&z, first));
    let untouched = values(&x, first).iter().zip(values(&b, first)).filter(|(x, b)| *x == b).count();
    let n = values(&b, first).len();
    assert!((n * 2 / 5..n * 3 / 5).contains(&untouched), "{untouched} of {n}");
    for more in
        [&["--weight", "1", "--weight", "2"][..], &["--layers", "7-9"], &["--layers", "x"], &["--rank", "3"]]
    {
        assert_eq!(refused(&base, &adapter, more).0, 2, "{more:?}");
    }
    // What would have no effect.
    for more in [
        &["--density", "0.3"][..],
        &["--type", "Q8_0", "--form", "nf4"],
        &["--form", "gguf", "--max-shard-size", "1GB"],
        &["--form", "gguf", "--dtype", "f32"],
        &["--extract", "x", "--rank", "2"],
    ] {
        assert_eq!(refused(&base, &adapter, more).0, 2, "{more:?}");
    }
    assert_eq!(run(&base, &adapter, &top.path().join("x.gguf"), &[]).status.code(), Some(2));
    // The same adapter twice is its double, and is said.
    let twice =
        run(&base, &adapter, &top.path().join("twice"), &["--adapter", text(&adapter), "--dtype", "f32"]);
    let said = String::from_utf8(twice.stderr).unwrap();
    assert!(twice.status.success() && said.contains("given twice"), "{said}");
    let twice = ModelDir::open(&top.path().join("twice")).unwrap();
    for ((w, s), b) in values(&whole, first).iter().zip(values(&twice, first)).zip(values(&b, first)) {
        assert!((2.0 * f64::from(*w - b) - f64::from(s - b)).abs() < 1e-5);
    }
}

#[test]
fn adapters_change_their_form_and_rank() {
    let top = tempfile::tempdir().unwrap();
    let (base, adapter) = llama();
    let call = |name: &str, args: &[&str]| {
        let out = top.path().join(name);
        let output = Command::new(TOOL).args(args).args(["-q", "-o", text(&out)]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        out
    };
    let whole = merged(&base, &adapter, &top.path().join("whole"), &["--dtype", "f32"]);
    let same = |adapter: &Path, name: &str, tolerance: f32| {
        let made = merged(&base, adapter, &top.path().join(name), &["--dtype", "f32"]);
        for view in whole.tensors.views() {
            let (a, b) = (view.to_f32().unwrap(), made.tensors.require(view.name).unwrap().to_f32().unwrap());
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= tolerance), "{name} {}", view.name);
        }
    };
    let mlx = call("mlx", &["--adapter", text(&adapter), "--to", "mlx"]);
    assert!(mlx.join("adapters.safetensors").exists());
    same(&mlx, "of-mlx", 0.0);
    same(&call("back", &["--adapter", text(&mlx), "--to", "peft"]), "of-back", 0.0);
    let twice =
        ["--adapter", text(&adapter), "--adapter", text(&adapter), "--weight", "0.75", "--weight", "0.25"];
    same(&call("rank", &[&twice[..], &["--to", "peft", "--rank", "8"]].concat()), "of-rank", 1e-6);
    let out = top.path().join("whole");
    same(
        &call("extracted", &["--base", text(&base), "--extract", text(&out), "--rank", "8"]),
        "of-extracted",
        1e-6,
    );
    for args in [&twice[..], &["--adapter", text(&adapter), "--layers", "0"]] {
        let output = Command::new(TOOL)
            .args(args)
            .args(["--to", "peft", "-o", text(&top.path().join("no"))])
            .output()
            .unwrap();
        assert!(output.status.code() == Some(2) && !top.path().join("no").exists());
    }
}

#[test]
fn a_closed_reader_is_quiet_and_a_full_device_is_74() {
    let top = tempfile::tempdir().unwrap();
    let (base, adapter) = llama();
    let call = format!(
        "'{TOOL}' -q --force --base '{}' --adapter '{}' -o '{}'",
        text(&base),
        text(&adapter),
        text(&top.path().join("out"))
    );
    let bash = |script: String| Command::new("bash").args(["-c", &script]).output().unwrap();
    let output = bash(format!("{call} > /dev/full"));
    assert_eq!(
        (output.status.code(), String::from_utf8(output.stderr).unwrap().lines().count()),
        (Some(74), 1)
    );
    let output = bash(format!("set -o pipefail; {call} | true"));
    assert!(output.status.success() && output.stderr.is_empty());
}

#[test]
fn kill_leaves_the_old_directory_or_the_new_one() {
    let top = tempfile::tempdir().unwrap();
    let ((base, adapter), out) = (llama(), top.path().join("out"));
    for round in 0..12 {
        fs::remove_dir_all(&out).ok();
        fs::create_dir(&out).unwrap();
        fs::write(out.join("old"), "x").unwrap();
        let mut child = Command::new(TOOL)
            .args(["--base", text(&base), "--adapter", text(&adapter), "-o", text(&out), "-q", "--force"])
            .args(["--max-shard-size", "5kB"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(3 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        if out.join("old").exists() {
            assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
        } else {
            assert_eq!(ModelDir::open(&out).unwrap().tensors.len(), 21);
            assert!(out.join("tokenizer.json").exists());
        }
    }
    assert!(run(&base, &adapter, &out, &["--force"]).status.success());
    assert_eq!(fs::read_dir(top.path()).unwrap().count(), 1);
}
