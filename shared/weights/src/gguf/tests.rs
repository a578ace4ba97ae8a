//! The order of rows, the mixtures, rotations, damaged files; whole files are held against llama.cpp by scripts/oracle/gguf_{peers,families}.py.

use super::{rows::Reordered, *};
use safetensors::Dtype;
use serde_json::json;
use std::path::Path;

struct Rows(usize, usize);

impl Values for Rows {
    fn len(&self) -> usize {
        self.0 * self.1
    }
    fn columns(&self) -> usize {
        self.1
    }
    fn read(&self, start: usize, out: &mut [f32]) {
        out.iter_mut().enumerate().for_each(|(i, o)| *o = ((start + i) / self.1) as f32);
    }
}

#[test]
fn halves_of_a_head_take_turns() {
    let values = Reordered::new(Box::new(Rows(12, 2)), 2, Way::Into);
    let mut out = vec![0.0; 24];
    values.read(0, &mut out);
    let rows: Vec<f32> = out.chunks(2).map(|r| r[0]).collect();
    assert_eq!(rows, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 6.0, 9.0, 7.0, 10.0, 8.0, 11.0]);
    values.read(8, &mut out[..4]);
    assert_eq!(out[..4], [2.0, 2.0, 5.0, 5.0]);
    // A bias, whose only row is as long as it is.
    let bias = Reordered::new(Box::new(Rows(1, 12)), 2, Way::Into);
    assert_eq!((bias.columns, bias.rows), (1, 6));
    // There and back.
    let there = Box::new(Reordered::new(Box::new(Rows(12, 2)), 2, Way::Into));
    Reordered::new(there, 2, Way::OutOf).read(0, &mut out);
    assert!(out.chunks(2).enumerate().all(|(i, row)| row[0] == i as f32));
}

#[test]
fn mixtures_are_those_of_llama_cpp() {
    let config =
        json!({"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 24, "vocab_size": 10});
    let family = Family::of(&config).unwrap();
    let of = |name: &str, file, tied| {
        types::label(types::form(name, &[512, 512], Dtype::BF16, file, &family, tied))
    };
    let more: Vec<usize> = (0..24)
        .filter(|b| of(&format!("blk.{b}.ffn_down.weight"), FileType::Q4KM, false) == "Q6_K")
        .collect();
    assert_eq!(more, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]);
    assert_eq!(of("blk.0.attn_q.weight", FileType::Q4KM, false), "Q4_K");
    assert_eq!(of("token_embd.weight", FileType::Q4KM, false), "Q4_K");
    assert_eq!(of("token_embd.weight", FileType::Q5KM, true), "Q6_K");
    assert_eq!(of("output.weight", FileType::Q4_0, false), "Q6_K");
    assert_eq!(of("output.weight", FileType::Q8_0, false), "Q8_0");
    assert_eq!(types::label(types::instead(Form::Ggml(kto_kernels::quant::Ggml::Q4K), &[4, 64])), "Q5_0");
    assert_eq!(types::label(types::instead(Form::Ggml(kto_kernels::quant::Ggml::Q6K), &[4, 20])), "F16");
}

#[test]
fn names_that_llama_cpp_does_not_have_are_refused() {
    let config =
        json!({"model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 10});
    let family = Family::of(&config).unwrap();
    assert_eq!(
        family.tensor("model.layers.1.self_attn.q_proj.bias").unwrap(),
        ("blk.1.attn_q.bias".into(), Change::None)
    );
    for name in [
        "model.layers.1.mlp.router.weight",
        "model.layers.x.mlp.up_proj.weight",
        "other.weight",
        "lm_head.scales",
    ] {
        assert!(family.tensor(name).is_err(), "{name}");
    }
    assert!(Family::of(&json!({"model_type": "mamba"})).is_err());
}

/// The bytes before the tensors may be anything: what is opened then has its weights in the file, and nothing panics.
#[test]
fn a_damaged_file_is_refused_or_sound() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/gguf");
    let top = tempfile::tempdir().unwrap();
    let path = top.path().join("m.gguf");
    let ui = Ui::silent("test");
    let mut opened = 0;
    for name in ["gemma3", "phi3-longrope"] {
        let bytes = std::fs::read(folder.join(name).with_extension("gguf")).unwrap();
        let start = GgufModel::open(&folder.join(format!("{name}.gguf"))).unwrap();
        let start = start.file.tensors().values().map(|t| t.range.start).min().unwrap();
        for at in (0..start).step_by(23) {
            for value in [0, bytes[at] ^ 1, 0xff] {
                let mut bad = bytes.clone();
                bad[at] = value;
                std::fs::write(&path, bad).unwrap();
                let Ok(model) = GgufModel::open(&path) else { continue };
                opened += 1;
                let _ = (model.tokenizer(&ui), model.generation(), model.dtype());
                let weight = &model.weights[at % model.weights.len()];
                let values = model.values(weight);
                let mut row = vec![0.0; values.columns()];
                values.read(0, &mut row);
            }
        }
    }
    assert!(opened > 100, "{opened}");
}

#[test]
fn rotations_that_llama_cpp_does_not_have_are_refused() {
    let rope = |kind: &str, scaling: serde_json::Value| {
        let config = json!({
            "model_type": kind, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 10, "hidden_size": 32,
            "intermediate_size": 8, "max_position_embeddings": 64, "rope_scaling": scaling,
        });
        let family = Family::of(&config).unwrap();
        settings::write(&config, &family, FileType::F16)
    };
    for (kind, scaling, what) in [
        ("llama", json!({"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        ("llama", json!({"rope_type": "yarn", "factor": 2.0, "beta_fast": 8.0}), "beta_fast"),
        ("llama", json!({"rope_type": "yarn", "factor": 2.0, "truncate": false}), "yarn"),
        ("llama", json!({"rope_type": "linear"}), "no \"factor\""),
        ("llama", json!({"factor": 2.0}), "factor"),
        (
            "qwen2",
            json!({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
            "llama3",
        ),
        (
            "llama",
            json!({"rope_type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1, 1, 1, 1]}),
            "longrope",
        ),
        (
            "phi3",
            json!({"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}),
            "must be 4 numbers",
        ),
        ("qwen2", json!({"rope_type": "linear", "factor": -1.0}), "a number above 0"),
    ] {
        let error = rope(kind, scaling.clone()).err().unwrap_or_else(|| panic!("{scaling}")).to_string();
        assert!(error.contains(what), "{scaling}: {error}");
    }
    let sound = rope("llama", json!({"rope_type": "default"})).unwrap();
    assert!(sound.tensors.is_empty() && sound.notes.is_empty());
    let part = json!({"rope_type": "default", "partial_rotary_factor": 0.5});
    // transformers looks at it in families of which only a part may turn.
    let turning = |kind| {
        let keys = rope(kind, part.clone()).unwrap().keys;
        keys.into_iter().find(|(key, _)| key.ends_with("rope.dimension_count")).unwrap().1
    };
    assert_eq!((turning("llama"), turning("phi3")), (GgufValue::U32(8), GgufValue::U32(4)));
}

#[test]
fn gemmas_that_llama_cpp_computes_in_another_way_are_refused() {
    let gemma = |kind: &str, field: &str, value: serde_json::Value| {
        let mut config = json!({
            "model_type": kind, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 10, "hidden_size": 32,
            "intermediate_size": 8, "head_dim": 8, "query_pre_attn_scalar": 8,
        });
        config[field] = value;
        let family = Family::of(&config).unwrap();
        settings::write(&config, &family, FileType::F16).map(|settings| settings.keys)
    };
    let layers = |text: &str| {
        let name = |c| if c == 's' { "sliding_attention" } else { "full_attention" };
        text.chars().map(name).collect::<serde_json::Value>()
    };
    let refused = |kind, field, value: serde_json::Value| gemma(kind, field, value).is_err();
    assert!(refused("gemma2", "query_pre_attn_scalar", json!(16)));
    assert!(refused("gemma2", "attn_logit_softcapping", json!(null)));
    assert!(!refused("gemma3_text", "attn_logit_softcapping", json!(50.0)));
    assert!(refused("gemma3_text", "layer_types", layers("ffss")));
    assert!(refused("gemma3_text", "use_bidirectional_attention", json!(true)));
    assert!(refused("gemma2", "hidden_activation", json!("gelu")));
    let pattern = |kind, text| {
        let keys = gemma(kind, "layer_types", layers(text)).unwrap();
        let found = keys.into_iter().find(|(key, _)| key.ends_with("sliding_window_pattern"));
        found.map(|(_, value)| value)
    };
    assert_eq!(pattern("gemma2", "sfsf"), None);
    assert_eq!(pattern("gemma3_text", "ssss"), None);
    assert_eq!(pattern("gemma3_text", "sfsf"), Some(GgufValue::U32(2)));
    assert_eq!(pattern("gemma3_text", "ffff"), Some(GgufValue::U32(1)));
    assert_eq!(pattern("gemma2", "sssf"), Some(GgufValue::U32(4)));
}

#[test]
fn windows_that_llama_cpp_leaves_out_are_said() {
    let notes = |kind: &str, window: u32| {
        let config = json!({
            "model_type": kind, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 10, "hidden_size": 32,
            "intermediate_size": 8, "max_position_embeddings": 64, "sliding_window": window, "use_sliding_window": true,
        });
        settings::write(&config, &Family::of(&config).unwrap(), FileType::F16).unwrap().notes.len()
    };
    for kind in ["mistral", "phi3", "qwen2", "qwen3"] {
        assert_eq!((notes(kind, 8), notes(kind, 64)), (1, 0), "{kind}");
    }
    assert_eq!(notes("llama", 8), 0);
}
