//! What becomes of bases: never overwritten, their forms told in config.json, what was trained whole scaled too.

use super::*;
use kto_formats::{
    bnb::{FourBitKind, QuantState},
    gguf::GgufReader,
    model_dir::{MERGED_FROM, QUANTIZED_FROM},
    safetensors_out::{SafetensorsWriter, TensorSpec, pt_metadata},
};
use kto_kernels::quant::Kind;

fn copied(from: &Path, to: &Path) -> PathBuf {
    fs::create_dir(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    to.to_path_buf()
}

/// The result is an adapter; the models beside it are inputs all the same.
#[test]
fn an_adapter_replaces_no_model() {
    let top = tempfile::tempdir().unwrap();
    let base = copied(&llama().0, &top.path().join("base"));
    let config = base.join("config.json");
    let tuned = top.path().join("tuned");
    merged(&base, &llama().1, &tuned, &["-q"]);
    let to = ["--to", "mlx", "--force"];
    for (out, more) in [
        (base.clone(), &to[..]),
        (top.path().join("a"), &["--to", "mlx", "--manifest", text(&config)]),
        (top.path().join("b"), &["--to", "peft", "--rank", "2", "--manifest", text(&config)]),
    ] {
        let output = run(&base, &llama().1, &out, more);
        assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let extract = ["--base", text(&base), "--extract", text(&tuned), "--rank", "4"];
    let call = |more: &[&str]| Command::new(TOOL).args(extract).args(more).output().unwrap();
    let out = top.path().join("c");
    assert_eq!(call(&["-o", text(&out), "--manifest", text(&config)]).status.code(), Some(2));
    assert!(ModelDir::open(&base).is_ok());
    // Its manifest tells both models, and make knows the directory by a file that is there.
    let rule = top.path().join("rule");
    assert!(call(&["-q", "-o", text(&out), "--depfile", text(&rule)]).status.success());
    let manifest = fs::read_to_string(out.join("manifest.json")).unwrap();
    assert!(manifest.contains("base") && manifest.contains("tuned"), "{manifest}");
    assert!(fs::read_to_string(&rule).unwrap().contains("tuned/model.safetensors"));
    let other = top.path().join("d");
    let depfile = ["--manifest", "none", "--depfile", text(&rule)];
    assert!(call(&[&["-q", "-o", text(&other)][..], &depfile].concat()).status.success());
    assert!(fs::read_to_string(&rule).unwrap().contains("d/adapter_config.json:"));
}

/// LoRA on an embedding changes what is looked up; the head that shared its tensor keeps the values.
#[test]
fn lora_on_a_tied_embedding_leaves_the_head() {
    let top = tempfile::tempdir().unwrap();
    let adapter = top.path().join("adapter");
    fs::create_dir(&adapter).unwrap();
    let config = r#"{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"]}"#;
    fs::write(adapter.join("adapter_config.json"), config).unwrap();
    let name = |side| format!("base_model.model.model.embed_tokens.lora_embedding_{side}");
    let specs = vec![
        TensorSpec::new(name("A"), Dtype::F32, [2, 48]),
        TensorSpec::new(name("B"), Dtype::F32, [32, 2]),
    ];
    let file = adapter.join("adapter_model.safetensors");
    let mut writer = SafetensorsWriter::new(&file, specs, &pt_metadata()).unwrap();
    for (side, n) in [("A", 2 * 48), ("B", 32 * 2)] {
        let bytes: Vec<u8> = (0..n).flat_map(|i| (0.1 + i as f32 * 0.01).to_le_bytes()).collect();
        writer.write(&name(side), &bytes).unwrap();
    }
    writer.finish().unwrap();
    let base = testdata("families/qwen2");
    let made = merged(&base, &adapter, &top.path().join("out"), &["--dtype", "f32"]);
    let values = |model: &ModelDir, name: &str| model.tensors.require(name).unwrap().to_f32().unwrap();
    let before = values(&ModelDir::open(&base).unwrap(), "model.embed_tokens.weight");
    assert_eq!(values(&made, "lm_head.weight"), before);
    assert_ne!(values(&made, "model.embed_tokens.weight"), before);
    assert_eq!(made.config["tie_word_embeddings"], false);
}

#[test]
fn what_was_trained_whole_is_scaled_and_seen() {
    let top = tempfile::tempdir().unwrap();
    let (base, adapter) = (testdata("families/qwen2"), testdata("adapters/whole-head"));
    let head = |scale: &str| {
        let made = merged(&base, &adapter, &top.path().join(scale), &["--dtype", "f32", "--scale", scale]);
        ["lm_head", "model.embed_tokens"]
            .map(|name| made.tensors.require(&format!("{name}.weight")).unwrap().to_f32().unwrap())
    };
    let ([none, embedding], [half, _], [whole, _]) = (head("0"), head("0.5"), head("1"));
    assert!(none == embedding && whole != embedding);
    for ((h, w), e) in half.iter().zip(&whole).zip(&embedding) {
        assert!((h - (w + e) / 2.0).abs() < 1e-6);
    }
    // A head of its own where the base has none is told of when the difference becomes an adapter.
    let whole = top.path().join("1");
    let extract = ["--base", text(&base), "--extract", text(&whole), "--rank", "2"];
    let output = Command::new(TOOL).args(extract).args(["-o", text(&top.path().join("x"))]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("not in the adapter: lm_head.weight"), "{said}");
}

/// The settings of the base are those of the result only where the form is the same.
#[test]
fn a_result_of_another_form_says_so() {
    let top = tempfile::tempdir().unwrap();
    let adapter = small_adapter(&top.path().join("adapter"), None);
    let made =
        merged(&testdata("bnb/tiny_llama_int8"), &adapter, &top.path().join("nf4"), &["--form", "nf4"]);
    let settings = &made.config["quantization_config"];
    assert!(settings["load_in_4bit"] == true && settings["load_in_8bit"] == false, "{settings}");
    // 32 columns have no groups of 64.
    let (code, message) =
        refused(&testdata("families/llama-biases"), &testdata("adapters/dora-biases"), &["--form", "mlx"]);
    assert!(code == 2 && message.contains("no matrix of the model fits"), "{message}");
}

/// A name on the hub is a base for every command, not for merging alone.
#[test]
fn a_base_has_a_name_for_adapters_too() {
    let top = tempfile::tempdir().unwrap();
    let of_name = top.path().join("models--some--base");
    fs::create_dir_all(of_name.join("snapshots")).unwrap();
    fs::create_dir_all(of_name.join("refs")).unwrap();
    fs::write(of_name.join("refs/main"), "0123456789abcdef0123456789abcdef01234567").unwrap();
    let snapshot = of_name.join("snapshots/0123456789abcdef0123456789abcdef01234567");
    let base = copied(&llama().0, &snapshot);
    let tuned = top.path().join("tuned");
    merged(&base, &llama().1, &tuned, &["-q"]);
    let adapter = llama().1;
    for (i, more) in [
        &["--adapter", text(&adapter), "--to", "mlx"][..],
        &["--adapter", text(&adapter), "--to", "peft", "--rank", "2"],
        &["--extract", text(&tuned), "--rank", "2"],
    ]
    .into_iter()
    .enumerate()
    {
        let out = top.path().join(i.to_string());
        let call = ["-q", "--base", "some/base", "-o", text(&out)];
        let mut command = Command::new(TOOL);
        command.args(call).args(more).env("HF_HUB_CACHE", top.path()).env("HF_HUB_OFFLINE", "1");
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(out.join("adapter_config.json").exists());
    }
}

/// What a plan says of the size after, and whether that is only the most.
fn planned(base: &Path, adapter: &Path, more: &[&str]) -> (u64, bool) {
    let top = tempfile::tempdir().unwrap();
    let output = run(base, adapter, &top.path().join("out"), &[&["--plan"], more].concat());
    let said = String::from_utf8(output.stdout).unwrap();
    let line = said.lines().find(|line| line.starts_with("size ")).unwrap();
    let bytes = line.split_once('(').unwrap().1.split_once(" bytes) after").unwrap().0.parse().unwrap();
    (bytes, line.contains("before, at most "))
}

#[test]
fn a_plan_knows_the_size_to_the_byte() {
    let top = tempfile::tempdir().unwrap();
    let adapter = small_adapter(&top.path().join("adapter"), None);
    let (dense, four) = (testdata("bnb/tiny_llama_bf16"), testdata("bnb/tiny_llama_bnb4"));
    for (i, (base, more)) in [
        (&dense, &[][..]),
        (&dense, &["--form", "nf4"]),
        (&dense, &["--form", "mlx"]),
        (&four, &[]),
        (&four, &["--form", "nf4"]),
    ]
    .into_iter()
    .enumerate()
    {
        let made = merged(base, &adapter, &top.path().join(i.to_string()), more);
        let bytes: u64 = made.tensors.views().map(|view| view.data.len() as u64).sum();
        let (planned, most) = planned(base, &adapter, more);
        assert!(planned == bytes || most && planned > bytes && planned - bytes <= 24 * 14, "{more:?}");
        assert_eq!(most, more.contains(&"nf4"));
    }
    let out = top.path().join("x.gguf");
    assert!(run(&dense, &adapter, &out, &["--form", "gguf"]).status.success());
    let size = fs::metadata(&out).unwrap().len();
    assert_eq!(planned(&dense, &adapter, &["--form", "gguf"]), (size, false));
}

/// Names with the tables of FP4 in the place of NF4's: a base whose codes are those of another kind of 4 bits.
fn fp4(from: &Path, to: &Path) -> PathBuf {
    let base = copied(from, to);
    let store = TensorStore::open_file(&base.join("model.safetensors")).unwrap();
    let (nf4, fp4) = (FourBitKind::Nf4.suffix(), FourBitKind::Fp4.suffix());
    let table: Vec<u8> = Kind::Fp4.values().iter().flat_map(|v| v.to_le_bytes()).collect();
    let tensors: Vec<_> = store
        .views()
        .map(|view| {
            let data = match view.name {
                name if name.ends_with(nf4) => {
                    let state = QuantState::parse(view.data).unwrap();
                    QuantState { kind: FourBitKind::Fp4, ..state }.to_json().into_bytes()
                }
                name if name.ends_with(".weight.quant_map") => table.clone(),
                _ => view.data.to_vec(),
            };
            let shape = if view.name.ends_with(nf4) { vec![data.len()] } else { view.shape.to_vec() };
            (TensorSpec::new(view.name.replace(nf4, fp4), view.dtype, shape), data)
        })
        .collect();
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    drop(store);
    fs::remove_file(base.join("model.safetensors")).unwrap();
    let mut writer = SafetensorsWriter::new(&base.join("model.safetensors"), specs, &pt_metadata()).unwrap();
    tensors.iter().for_each(|(spec, data)| writer.write(&spec.name, data).unwrap());
    writer.finish().unwrap();
    let config = fs::read_to_string(base.join("config.json")).unwrap();
    fs::write(base.join("config.json"), config.replace("\"nf4\"", "\"fp4\"")).unwrap();
    base
}

/// NF4 is what was asked for: the base's codes of another kind are no reason to keep them.
#[test]
fn a_base_of_fp4_becomes_nf4() {
    let top = tempfile::tempdir().unwrap();
    let adapter = small_adapter(&top.path().join("adapter"), None);
    let base = fp4(&testdata("bnb/tiny_llama_bnb4"), &top.path().join("fp4"));
    let out = top.path().join("out");
    let output = run(&base, &adapter, &out, &["--form", "nf4"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("are quantized anew, as nf4"), "{said}");
    let (made, before) = (ModelDir::open(&out).unwrap(), ModelDir::open(&base).unwrap());
    let settings = &made.config["quantization_config"];
    assert_eq!(settings["bnb_4bit_quant_type"], "nf4");
    assert_eq!(
        settings["llm_int8_skip_modules"],
        before.config["quantization_config"]["llm_int8_skip_modules"]
    );
    let mut count = 0;
    for name in kto_weights::weights(&before) {
        let Some(was) = Nf4Tensor::find(&before.tensors, name).unwrap() else { continue };
        let now = Nf4Tensor::find(&made.tensors, name).unwrap().unwrap();
        assert_eq!((was.state.kind, now.state.kind), (FourBitKind::Fp4, FourBitKind::Nf4));
        assert_eq!(
            (was.state.block, was.state.nested.is_some()),
            (now.state.block, now.state.nested.is_some())
        );
        count += 1;
        if name == "model.layers.1.self_attn.k_proj.weight" {
            continue; // The adapter's.
        }
        let (mut old, mut new) = (vec![0.0; was.len()], vec![0.0; was.len()]);
        was.dequantize_into(&mut old).unwrap();
        now.dequantize_into(&mut new).unwrap();
        let off = old.iter().zip(&new).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
        let all = old.iter().map(|a| a.powi(2)).sum::<f32>();
        assert!(off < 0.02 * all, "{name}: {off} of {all}");
    }
    assert_eq!(count, 14);
}

/// What was merged goes with the weights, in whatever form.
#[test]
fn a_gguf_file_tells_what_was_merged() {
    let top = tempfile::tempdir().unwrap();
    let base = testdata("bnb/tiny_llama_bf16");
    let print = ModelDir::open(&base).unwrap().fingerprint();
    let adapter = small_adapter(&top.path().join("adapter"), Some(print.clone()));
    let (directory, file) = (top.path().join("directory"), top.path().join("x.gguf"));
    let list = merged(&base, &adapter, &directory, &[]).tensors.metadata()[MERGED_FROM].clone();
    assert!(list.contains(&print) && list.contains("adapter"));
    assert!(run(&base, &adapter, &file, &["--form", "gguf"]).status.success());
    let keys = GgufReader::open(&file).unwrap();
    // Its weights are no quantization of the base.
    assert_eq!((keys.text(MERGED_FROM), keys.has(QUANTIZED_FROM)), (Some(&*list), false));
}

/// Nothing but the rounding is left of a change: whatever the form, that is said.
#[test]
fn a_result_that_equals_the_base_is_told() {
    let top = tempfile::tempdir().unwrap();
    let adapter = small_adapter(&top.path().join("adapter"), None);
    let base = testdata("bnb/tiny_llama_bf16");
    for form in [&[][..], &["--form", "nf4"], &["--form", "mlx"], &["--form", "gguf"]] {
        for (scale, equal) in [("0", true), ("1", false)] {
            let out = top.path().join(format!("{}{scale}", form.concat()));
            let output = run(&base, &adapter, &out, &[form, &["--scale", scale]].concat());
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.success(), "{form:?}: {said}");
            assert_eq!(said.contains("the result equals the base"), equal, "{form:?} {scale}: {said}");
        }
    }
}
