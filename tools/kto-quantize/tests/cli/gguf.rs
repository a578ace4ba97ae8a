//! GGUF, both ways: files of the gguf package and our own become the model they were made of.

use super::{run, text};
use kto_formats::{
    gguf::{GgufReader, GgufTensor, GgufValue, header},
    model_dir::{MERGED_FROM, ModelDir},
    safetensors_out::{SafetensorsWriter, TensorSpec, pt_metadata},
    tensors::TensorStore,
    tokenizer::TextTokenizer,
};
use kto_kernels::quant::{Codec, Ggml};
use kto_model::{architecture::Architecture, rotary::frequencies};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

/// A copy of a tiny model with another configuration.
fn model(dir: &Path, name: &str, edit: impl Fn(&mut Value)) -> PathBuf {
    let (from, to) = (testdata("families").join(name), dir.join("model"));
    fs::create_dir(&to).unwrap();
    fs::copy(from.join("model.safetensors"), to.join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    edit(&mut config);
    fs::write(to.join("config.json"), config.to_string()).unwrap();
    to
}

/// What llama.cpp can compute of it.
fn within_llama_cpp(config: &mut Value) {
    if let Some(part) = config.get_mut("text_config") {
        return within_llama_cpp(part);
    }
    if config.get("query_pre_attn_scalar").is_some() {
        config["query_pre_attn_scalar"] = config["head_dim"].clone();
    }
    if let Some(Value::Object(rope)) = config.get_mut("rope_parameters") {
        rope.retain(|field, _| !field.starts_with("beta"));
    }
}

fn to_gguf(model: &Path, out: &Path, more: &[&str]) {
    let made = run(&[&[text(model), "-q", "--form", "gguf", "-o", text(out)], more].concat());
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

fn from_gguf(file: &Path, out: &Path, more: &[&str]) -> ModelDir {
    let made = run(&[&[text(file), "-q", "--dequantize", "-o", text(out)], more].concat());
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert_eq!(String::from_utf8(made.stdout).unwrap(), format!("{}\n", out.display()));
    ModelDir::open(out).unwrap()
}

/// Fails unless both hold the same tensors, bit for bit.
fn assert_same(a: &ModelDir, b: &ModelDir, name: &str) {
    assert!(a.tensors.names().eq(b.tensors.names()), "{name}");
    for (a, b) in a.tensors.views().zip(b.tensors.views()) {
        assert_eq!((a.dtype, a.shape, a.data), (b.dtype, b.shape, b.data), "{name}: {}", a.name);
    }
}

fn architecture(model: &ModelDir) -> Architecture {
    Architecture::from_config(&model.config).unwrap()
}

#[test]
fn every_family_comes_back_bit_for_bit() {
    for entry in fs::read_dir(testdata("families")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.contains('.') || name == "llama-dynamic" {
            continue;
        }
        let top = tempfile::tempdir().unwrap();
        let source = model(top.path(), &name, within_llama_cpp);
        let (file, back) = (top.path().join("m.gguf"), top.path().join("back"));
        let source_dir = ModelDir::open(&source).unwrap();
        to_gguf(&source, &file, &["--type", "BF16"]);
        let made = from_gguf(&file, &back, &[]);
        assert_same(&source_dir, &made, &name);
        let (mut given, mut found) = (architecture(&source_dir), architecture(&made));
        // The factor of sine and cosine went through the ratio of two f32.
        if let (
            kto_model::rotary::Scaling::Yarn { attention: a, .. },
            kto_model::rotary::Scaling::Yarn { attention: b, .. },
        ) = (&mut given.rotary.scaling, &mut found.rotary.scaling)
        {
            assert!((*a - *b).abs() < 1e-6, "{name}: {a} {b}");
            *b = *a;
        }
        assert_eq!(given, found, "{name}");
    }
}

#[test]
fn files_of_the_gguf_package_are_read() {
    let mut count = 0;
    for entry in fs::read_dir(testdata("gguf")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "gguf") {
            continue;
        }
        count += 1;
        let name = path.file_stem().unwrap().to_str().unwrap();
        let top = tempfile::tempdir().unwrap();
        let source = model(top.path(), name, within_llama_cpp);
        let source = ModelDir::open(&source).unwrap();
        let made = from_gguf(&path, &top.path().join("back"), &[]);
        assert_same(&source, &made, name);
        let (given, found) = (architecture(&source), architecture(&made));
        let length = 16;
        let near = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-5 * a);
        assert!(near(frequencies(&given.rotary, length), frequencies(&found.rotary, length)), "{name}");
        assert!((given.rotary.attention_factor() - found.rotary.attention_factor()).abs() < 1e-6, "{name}");
        let same = |a: Architecture| Architecture { rotary: given.rotary.clone(), ..a };
        assert_eq!(given, same(found), "{name}");
    }
    assert_eq!(count, 11);
}

#[test]
fn blocks_become_what_ggml_has_in_them() {
    let top = tempfile::tempdir().unwrap();
    let source = model(top.path(), "llama-linear", |_| {});
    let tensors = ModelDir::open(&source).unwrap().tensors;
    for (kind, form) in [("Q8_0", Ggml::Q8_0), ("Q4_0", Ggml::Q4_0)] {
        let (file, back) = (top.path().join(kind), top.path().join(format!("{kind}-back")));
        to_gguf(&source, &file, &["--type", kind]);
        let made = from_gguf(&file, &back, &["--dtype", "f32"]);
        // Rows of queries change places, their blocks do not change.
        for module in ["q_proj", "v_proj", "o_proj"] {
            let name = format!("model.layers.1.self_attn.{module}.weight");
            let given = tensors.require(&name).unwrap().to_f32().unwrap();
            let mut bytes = vec![0; form.planes(given.len())[0]];
            assert!(form.encode(&given, [&mut bytes, &mut [], &mut []]));
            let mut expected = vec![0.0; given.len()];
            form.decode([&bytes, &[], &[]], &mut expected);
            assert_eq!(made.tensors.require(&name).unwrap().to_f32().unwrap(), expected, "{kind} {name}");
        }
        // Without --dtype it is what the scales are in.
        let plain = from_gguf(&file, &top.path().join(format!("{kind}-plain")), &["--max-shard-size", "4KB"]);
        assert!(plain.tensors.views().all(|v| v.dtype == Dtype::F16));
        assert!(back.with_file_name(format!("{kind}-plain")).join("model.safetensors.index.json").exists());
        assert_eq!(plain.config["dtype"], "float16");
    }
}

/// A model of one block with a tokenizer of testdata.
fn with_tokenizer(dir: &Path, tokenizer: &str, model_type: &str) -> PathBuf {
    let (from, to) = (testdata(tokenizer), dir.join("model"));
    fs::create_dir(&to).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        if from.join(name).exists() {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }
    let json: Value = serde_json::from_slice(&fs::read(to.join("tokenizer.json")).unwrap()).unwrap();
    let ids = json["model"]["vocab"].as_object().unwrap().values();
    let ids = ids.chain(json["added_tokens"].as_array().unwrap().iter().map(|t| &t["id"]));
    let rows = ids.map(|id| id.as_u64().unwrap()).max().unwrap() as usize + 1;
    let mut config = json!({
        "model_type": model_type, "vocab_size": rows, "hidden_size": 4, "intermediate_size": 4,
        "num_hidden_layers": 1, "num_attention_heads": 1, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
        "tie_word_embeddings": true,
    });
    if model_type == "mistral" {
        (config["bos_token_id"], config["eos_token_id"]) = (1.into(), 2.into());
    }
    fs::write(to.join("config.json"), config.to_string()).unwrap();
    let block = |module: &str| format!("model.layers.0.{module}.weight");
    let mut names: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![rows, 4]), ("model.norm.weight".into(), vec![4])];
    for module in ["input_layernorm", "post_attention_layernorm"] {
        names.push((block(module), vec![4]));
    }
    let linears: &[(&str, usize)] = match model_type {
        "phi3" => &[
            ("self_attn.qkv_proj", 12),
            ("self_attn.o_proj", 4),
            ("mlp.gate_up_proj", 8),
            ("mlp.down_proj", 4),
        ],
        _ => &[
            ("self_attn.q_proj", 4),
            ("self_attn.k_proj", 4),
            ("self_attn.v_proj", 4),
            ("self_attn.o_proj", 4),
            ("mlp.gate_proj", 4),
            ("mlp.up_proj", 4),
            ("mlp.down_proj", 4),
        ],
    };
    for (module, rows) in linears {
        names.push((block(module), vec![*rows, 4]));
    }
    if model_type == "qwen2" {
        for module in ["q_proj", "k_proj", "v_proj"] {
            names.push((format!("model.layers.0.self_attn.{module}.bias"), vec![4]));
        }
    }
    let specs: Vec<_> = names
        .iter()
        .map(|(name, shape)| TensorSpec::new(name.as_str(), Dtype::BF16, shape.as_slice()))
        .collect();
    let mut writer = SafetensorsWriter::new(&to.join("model.safetensors"), specs, &pt_metadata()).unwrap();
    for (name, shape) in &names {
        writer.write(name, &vec![0; 2 * shape.iter().product::<usize>()]).unwrap();
    }
    writer.finish().unwrap();
    to
}

/// All texts of testdata/tokenize.
fn texts() -> Vec<String> {
    let lines = fs::read_to_string(testdata("tokenize/encodings.jsonl")).unwrap();
    let texts = lines.lines().map(|line| {
        let row: Value = serde_json::from_str(line).unwrap();
        row["text"].as_str().unwrap().to_string()
    });
    let mut texts: Vec<String> = texts.collect();
    texts.sort();
    texts.dedup();
    texts.extend(
        ["<s>a b</s> c", "<|im_start|>user\nhi <|im_end|> there", "[INST] x [/INST]y"].map(String::from),
    );
    texts
}

/// The texts that two tokenizers encode in different ways.
fn differing(a: &Path, b: &Path) -> Vec<String> {
    let (a, b) = (TextTokenizer::from_model_dir(a).unwrap(), TextTokenizer::from_model_dir(b).unwrap());
    let same = |text: &String| {
        let (x, y) = (a.encode(text, true).unwrap(), b.encode(text, true).unwrap());
        x == y && a.decode(&x).unwrap() == b.decode(&y).unwrap()
    };
    texts().into_iter().filter(|text| !same(text)).collect()
}

/// The file without what only our writer says.
fn as_of_others(file: &Path) -> PathBuf {
    let mut bytes = fs::read(file).unwrap();
    let key = b"kto.tokenizer";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    bytes[at..at + 3].copy_from_slice(b"abc");
    let path = file.with_extension("other.gguf");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn tokenizers_come_back() {
    // The model types under which these files are published, where transformers has no rules of its own for them.
    for (tokenizer, model_type) in [
        ("stories260k", "llama"),
        ("demo/model", "llama"),
        ("trl/qwen2/model", "qwen2"),
        ("tokenize/gpt2", "llama"),
        ("tokenize/minimind", "llama"),
        ("tokenize/qwen2.5", "qwen2"),
        ("tokenize/mistral-v3", "mistral"),
        ("tokenize/phi-3-mini", "phi3"),
    ] {
        let top = tempfile::tempdir().unwrap();
        let source = with_tokenizer(top.path(), tokenizer, model_type);
        let (file, back) = (top.path().join("m.gguf"), top.path().join("back"));
        to_gguf(&source, &file, &["--type", "BF16"]);
        from_gguf(&file, &back, &[]);
        assert_eq!(differing(&source, &back), [""; 0], "{tokenizer}");
        if let Ok(template) = fs::read(source.join("chat_template.jinja")) {
            assert_eq!(fs::read(back.join("chat_template.jinja")).unwrap(), template);
        }
        let other = top.path().join("other");
        from_gguf(&as_of_others(&file), &other, &[]);
        assert_eq!(differing(&source, &other), [""; 0], "{tokenizer} as another writer has it");
    }
}

/// A file of another writer with these keys and tensors, all zeros.
fn crafted(
    path: &Path,
    architecture: &str,
    edit: impl Fn(&mut Vec<(String, GgufValue)>, &mut Vec<GgufTensor>),
) {
    let number = |key: &str, n| (format!("llama.{key}"), GgufValue::U32(n));
    let mut keys = vec![
        ("general.architecture".to_string(), GgufValue::String(architecture.into())),
        number("block_count", 1),
        number("context_length", 64),
        number("embedding_length", 32),
        number("feed_forward_length", 32),
        number("attention.head_count", 2),
        ("llama.attention.layer_norm_rms_epsilon".into(), GgufValue::F32(1e-5)),
    ];
    let tensor = |name: &str, rows: usize| {
        let shape = if name.ends_with("norm.weight") { vec![rows] } else { vec![rows, 32] };
        let bytes = 4 * shape.iter().product::<usize>() as u64;
        GgufTensor { name: name.into(), shape, kind: 0, bytes }
    };
    let mut tensors = vec![tensor("token_embd.weight", 8), tensor("output_norm.weight", 32)];
    for name in [
        "attn_norm",
        "ffn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ] {
        tensors.push(tensor(&format!("blk.0.{name}.weight"), 32));
    }
    edit(&mut keys, &mut tensors);
    let made = header(&keys, &tensors);
    let mut bytes = made.bytes;
    bytes.resize(made.size as usize, 0);
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_is_no_model_of_these_is_refused_by_name() {
    let top = tempfile::tempdir().unwrap();
    let path = top.path().join("m.gguf");
    crafted(&path, "llama", |_, _| {});
    let made = from_gguf(&path, &top.path().join("sound"), &[]);
    assert!(made.tensors.len() == 11 && made.config["tie_word_embeddings"] == true);
    type Edit<'a> = &'a dyn Fn(&mut Vec<(String, GgufValue)>, &mut Vec<GgufTensor>);
    let set = |key: &'static str, value: GgufValue| {
        move |keys: &mut Vec<(String, GgufValue)>, _: &mut Vec<GgufTensor>| {
            keys.retain(|(k, _)| k != key);
            keys.push((key.into(), value.clone()));
        }
    };
    let first = |edit: fn(&mut GgufTensor)| {
        move |_: &mut Vec<(String, GgufValue)>, all: &mut Vec<GgufTensor>| edit(&mut all[8])
    };
    let tokens = GgufValue::Strings(vec!["a".into(); 9]);
    let cases: [(Edit, &str); 16] = [
        (&set("general.architecture", GgufValue::String("mamba".into())), "architecture \"mamba\""),
        (&set("general.type", GgufValue::String("mmproj".into())), "holds a \"mmproj\""),
        (&set("llama.block_count", GgufValue::U32(2)), "no tensor \"blk.1.attn_norm.weight\""),
        (&set("llama.block_count", GgufValue::U32(1 << 24)), "16777216 blocks, 11 tensors"),
        (&set("llama.block_count", GgufValue::F32(1.0)), "\"llama.block_count\" must be one whole number"),
        (
            &set("llama.attention.head_count", GgufValue::Ints(vec![2])),
            "\"llama.attention.head_count\" must be one",
        ),
        (&set("llama.attention.head_count", GgufValue::U32(3)), "no heads"),
        (
            &set("llama.attention.key_length", GgufValue::U32(64)),
            "tensor \"blk.0.attn_k.weight\" has shape [32, 32], expected [128, 32]",
        ),
        (&set("llama.rope.dimension_count", GgufValue::U32(8)), "8 of 16 dimensions of a head turn"),
        (&set("llama.rope.scaling.type", GgufValue::String("yarn".into())), "rope scaling of type \"yarn\""),
        (
            &set("llama.rope.freq_base", GgufValue::F32(f32::NAN)),
            "\"llama.rope.freq_base\" must be a number above 0",
        ),
        (&set("tokenizer.ggml.tokens", tokens), "9 tokens, 8 rows of the embedding"),
        (
            &first(|t| t.name = "blk.0.ffn_gate_exps.weight".into()),
            "tensor \"blk.0.ffn_gate_exps.weight\" is none of",
        ),
        (
            &first(|t| t.name = "blk.0.attn_q_norm.weight".into()),
            "tensor \"blk.0.attn_q_norm.weight\" is none of",
        ),
        (&first(|t| (t.kind, t.bytes, t.shape) = (17, 74 * 32, vec![32, 256])), "type IQ2_XS is not read"),
        (&first(|t| (t.shape, t.bytes) = (vec![16, 32], 2048)), "has shape [16, 32], expected [32, 32]"),
    ];
    for (edit, expected) in cases {
        crafted(&path, "llama", edit);
        let out = top.path().join("out");
        let made = run(&[text(&path), "--dequantize", "-o", text(&out)]);
        let message = String::from_utf8(made.stderr).unwrap();
        assert_eq!(made.status.code(), Some(65), "{expected}: {message}");
        assert!(message.contains(expected), "{expected}: {message}");
        assert!(
            message.lines().filter(|l| !l.starts_with("hint: ")).count() == 1 && !out.exists(),
            "{message}"
        );
    }
    // A splitting rule that is not known costs the tokenizer, not the model.
    crafted(&path, "llama", |keys, _| {
        let list = |all: &[&str]| GgufValue::Strings(all.iter().map(|t| t.to_string()).collect());
        keys.push(("tokenizer.ggml.model".into(), GgufValue::String("gpt2".into())));
        keys.push(("tokenizer.ggml.pre".into(), GgufValue::String("viking".into())));
        keys.push(("tokenizer.ggml.tokens".into(), list(&["a", "b", "ab"])));
        keys.push(("tokenizer.ggml.merges".into(), list(&["a b"])));
    });
    let out = top.path().join("bare");
    let made = run(&[text(&path), "--dequantize", "-o", text(&out)]);
    let message = String::from_utf8(made.stderr).unwrap();
    assert!(made.status.success() && message.contains("\"viking\" is not known"), "{message}");
    assert!(!out.join("tokenizer.json").exists() && out.join("config.json").exists());
}

#[test]
fn a_gguf_file_elsewhere_says_what_to_do() {
    let top = tempfile::tempdir().unwrap();
    let path = top.path().join("m.gguf");
    crafted(&path, "llama", |_, _| {});
    let made = run(&[text(&path), "-o", text(&top.path().join("out"))]);
    let message = String::from_utf8(made.stderr).unwrap();
    assert!(
        made.status.code() == Some(65) && message.contains("hint: kto-quantize FILE.gguf --dequantize"),
        "{message}"
    );
    let error = ModelDir::open(&path).err().unwrap();
    assert!(
        error.to_string().contains("a GGUF file") && error.hint().is_some_and(|h| h.contains("--dequantize"))
    );
    let error = TextTokenizer::from_model_dir(&path).err().unwrap();
    assert!(
        error.to_string().contains("a GGUF file") && error.hint().is_some_and(|h| h.contains("--dequantize"))
    );
    fs::write(top.path().join("x.gguf"), "GGUF\u{1}\0\0\0").unwrap();
    let made = run(&[text(&top.path().join("x.gguf")), "--dequantize", "-o", text(&top.path().join("out"))]);
    assert!(String::from_utf8(made.stderr).unwrap().contains("x.gguf: GGUF version 1 is not read"));
    let plan = run(&[text(&path), "--dequantize", "--plan", "-o", text(&top.path().join("out"))]);
    let plan = String::from_utf8(plan.stdout).unwrap();
    assert!(plan.contains("kto-train needs on a GPU, in bf16, from "), "{plan}");
    assert!(plan.contains("11 weights float32") && !top.path().join("out").exists(), "{plan}");
}

/// Divisors as llama.cpp's converter computes them for Llama 3.1 and 3.2, where nothing else in the file tells the rule.
#[test]
fn llama_3s_divisors_become_its_rule() {
    let (low, high, original, theta) = (1.0, 4.0, 8192.0, 5e5f64);
    for factor in [8.0, 32.0] {
        let divisor = |i: usize| {
            let wavelength = 2.0 * std::f64::consts::PI * theta.powf(2.0 * i as f64 / 16.0);
            match wavelength {
                short if short < original / high => 1.0,
                long if long > original / low => factor,
                other => {
                    let smooth = (original / other - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            }
        };
        let divisors: Vec<f32> = (0..8).map(|i| divisor(i) as f32).collect();
        assert!(divisors.iter().any(|d| *d > 1.0 && f64::from(*d) < factor));
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("m.gguf");
        crafted(&path, "llama", |keys, tensors| {
            keys.push(("llama.rope.freq_base".into(), GgufValue::F32(5e5)));
            let name = "rope_freqs.weight".into();
            tensors.insert(0, GgufTensor { name, shape: vec![8], kind: 0, bytes: 32 });
        });
        let mut bytes = fs::read(&path).unwrap();
        let range = GgufReader::open(&path).unwrap().tensors()["rope_freqs.weight"].range.clone();
        for (place, divisor) in bytes[range].chunks_mut(4).zip(&divisors) {
            place.copy_from_slice(&divisor.to_le_bytes());
        }
        fs::write(&path, bytes).unwrap();
        let made = from_gguf(&path, &top.path().join("out"), &[]);
        let rope = json!({
            "type": "llama3", "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": 8192,
        });
        assert_eq!((&made.config["rope_scaling"], &made.config["rope_theta"]), (&rope, &json!(5e5)));
    }
}

/// What was merged into a model goes with it through GGUF.
#[test]
fn the_list_of_merges_comes_back() {
    let top = tempfile::tempdir().unwrap();
    let source = model(top.path(), "llama3", within_llama_cpp);
    let path = source.join("model.safetensors");
    let store = TensorStore::open_file(&path).unwrap();
    let tensors: Vec<_> =
        store.views().map(|v| (TensorSpec::new(v.name, v.dtype, v.shape), v.data.to_vec())).collect();
    drop(store);
    let list = r#"[{"adapter":"ab","base":"cd"}]"#;
    let mut metadata = pt_metadata();
    metadata.insert(MERGED_FROM.into(), list.into());
    fs::remove_file(&path).unwrap();
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::new(&path, specs, &metadata).unwrap();
    tensors.iter().for_each(|(spec, data)| writer.write(&spec.name, data).unwrap());
    writer.finish().unwrap();
    let (file, back) = (top.path().join("m.gguf"), top.path().join("back"));
    to_gguf(&source, &file, &["--type", "F32"]);
    assert_eq!(GgufReader::open(&file).unwrap().text(MERGED_FROM), Some(list));
    assert_eq!(from_gguf(&file, &back, &[]).tensors.metadata()[MERGED_FROM], list);
}
