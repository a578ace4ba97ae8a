//! Records of transformers' configurations, rotary frequencies against its own, and what is refused.

use super::*;
use crate::rotary::{Scaling, frequencies};
use kto_formats::model_dir::ModelDir;
use kto_formats::tensors::TensorStore;
use serde_json::json;
use std::path::PathBuf;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/families")).join(name)
}

fn names() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder(""))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn record(name: &str) -> Record {
    Record::read(&ModelDir::open(&folder(name)).unwrap().config, &Family::all()).unwrap()
}

#[test]
fn frequencies_are_those_of_transformers() {
    let mut checked = 0;
    for name in names() {
        let record = record(&name);
        let golden = TensorStore::open_file(&folder(&name).join("golden.safetensors")).unwrap();
        for (length, positions) in [("short", 12), ("long", 28)] {
            for (kind, rotary) in [
                ("all", Some(&record.rotary)),
                ("full_attention", Some(&record.rotary)),
                ("sliding_attention", record.sliding_rotary.as_ref()),
            ] {
                let key = format!("rope.{length}/{kind}");
                let Some(expected) = golden.get(&key) else { continue };
                let (expected, rotary) = (expected.to_f32().unwrap(), rotary.unwrap());
                let found = frequencies(rotary, positions);
                assert_eq!(found.len(), expected.len(), "{name} {key}");
                for (a, b) in found.iter().zip(&expected) {
                    // The reference computes them in f32.
                    assert!(
                        (a - f64::from(*b)).abs() <= 1e-6 * a.abs(),
                        "{name} {key}: {found:?} {expected:?}"
                    );
                }
                let factor = golden.require(&format!("{key}.factor")).unwrap().to_f32().unwrap()[0];
                assert!((rotary.attention_factor() - f64::from(factor)).abs() < 1e-6, "{name} {key}");
                checked += 1;
            }
        }
    }
    assert_eq!(checked, 2 * (18 + 2));
}

/// The sizes of the record are those of the tensors.
#[test]
fn every_tensor_is_accounted_for() {
    for name in names() {
        let (record, model) = (record(&name), ModelDir::open(&folder(&name)).unwrap());
        let shape = |tensor: &str| model.tensors.get(tensor).map(|view| view.shape.to_vec());
        let block = |tensor: &str| shape(&format!("model.layers.1.{tensor}"));
        let (q, kv) = (record.shape.heads * record.shape.dim, record.shape.kv_heads * record.shape.dim);
        let (c, i) = (record.hidden, record.intermediate);
        assert_eq!(shape("model.embed_tokens.weight"), Some(vec![record.vocab_size, c]), "{name}");
        assert_eq!(shape("lm_head.weight").is_none(), record.tied, "{name}");
        assert_eq!(block("self_attn.o_proj.weight"), Some(vec![c, q]), "{name}");
        match record.fused {
            true => {
                assert_eq!(block("self_attn.qkv_proj.weight"), Some(vec![q + 2 * kv, c]), "{name}");
                assert_eq!(block("mlp.gate_up_proj.weight"), Some(vec![2 * i, c]), "{name}");
            }
            false => {
                assert_eq!(block("self_attn.q_proj.weight"), Some(vec![q, c]), "{name}");
                assert_eq!(block("self_attn.v_proj.weight"), Some(vec![kv, c]), "{name}");
                assert_eq!(block("mlp.gate_proj.weight"), Some(vec![i, c]), "{name}");
            }
        }
        for (tensor, there) in [
            ("self_attn.q_proj.bias", record.qkv_bias),
            ("self_attn.o_proj.bias", record.o_bias),
            ("mlp.down_proj.bias", record.mlp_bias),
            ("self_attn.q_norm.weight", record.qk_norm),
            ("input_layernorm.bias", record.norm == Norm::Layer),
            ("post_feedforward_layernorm.weight", record.post_norms),
        ] {
            assert_eq!(block(tensor).is_some(), there, "{name} {tensor}");
        }
    }
}

#[test]
fn windows_caps_and_scales() {
    let gemma2 = record("gemma2");
    assert_eq!((gemma2.window, gemma2.sliding.as_slice()), (Some(8), &[true, false][..]));
    assert_eq!((gemma2.attention_cap, gemma2.logit_cap), (Some(5.0), Some(3.0)));
    assert_eq!((gemma2.attention_scale, gemma2.embedding_scale), (12f64.powf(-0.5), 32f64.sqrt()));
    assert_eq!((gemma2.activation, gemma2.norm), (Activation::GeluTanh, Norm::RmsPlusOne));
    let gemma3 = record("gemma3");
    assert_eq!(gemma3.sliding, [true, false, true]);
    assert_eq!((gemma3.rotary.theta, gemma3.sliding_rotary.unwrap().theta), (1e6, 1e4));
    assert_eq!((gemma3.attention_cap, gemma3.logit_cap), (None, None));
    assert_eq!(record("mistral-window").sliding, [true, true]);
    assert_eq!(record("qwen2").sliding, [false, false]);
    assert_eq!(record("qwen3").shape, HeadShape { heads: 4, kv_heads: 2, dim: 16 });
    assert_eq!((record("stablelm").rotary.dim, record("phi3-partial").rotary.dim), (4, 4));
}

/// A configuration with the sizes that all need.
fn config(model_type: &str, more: Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    });
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn read(model_type: &str, more: Value) -> Result<Record> {
    Record::read(&config(model_type, more), &Family::all())
}

/// Files of before transformers 5 say the same in other words.
#[test]
fn older_files_are_read() {
    let llama = read(
        "llama",
        json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    );
    let llama = llama.unwrap().rotary;
    assert_eq!(
        (llama.theta, &llama.scaling),
        (5e5, &Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 16.0 })
    );
    let linear = read("llama", json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap().rotary;
    assert_eq!(linear.scaling, Scaling::Linear { factor: 2.0 });
    let factors = json!([1, 1, 1, 2]);
    let phi = read(
        "phi3",
        json!({"original_max_position_embeddings": 16, "rope_scaling":
        {"type": "su", "short_factor": factors, "long_factor": factors}, "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}),
    );
    assert!(
        matches!(phi.unwrap().rotary.scaling, Scaling::Long { original: 16.0, attention, .. } if (attention - 1.5f64.sqrt()).abs() < 1e-12)
    );
    // Before it had its name; the length is Phi 3's own when none is written.
    let yarn = json!({"rope_scaling": {"type": "yarn", "short_factor": factors, "long_factor": factors}});
    let yarn = read("phi3", yarn).unwrap().rotary.scaling;
    assert!(matches!(yarn, Scaling::Long { original: 4096.0, attention: 1.0, .. }), "{yarn:?}");
    let gemma = read(
        "gemma3_text",
        json!({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 8,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 4}),
    )
    .unwrap();
    assert_eq!(gemma.sliding, [true, true, true, false, true, true, true, false]);
    assert_eq!(gemma.rotary.scaling, Scaling::Linear { factor: 8.0 });
    assert_eq!(gemma.sliding_rotary.unwrap().scaling, Scaling::Default);
    assert_eq!((gemma.shape.dim, gemma.tied), (256, true));
    let qwen =
        read("qwen2", json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 6}))
            .unwrap();
    assert_eq!(qwen.sliding.iter().filter(|s| **s).count(), 2);
    assert_eq!(read("qwen2", json!({"sliding_window": 8})).unwrap().window, None);
    let stable = read("stablelm", json!({"partial_rotary_factor": 0.25, "head_dim": null})).unwrap();
    assert_eq!((stable.rotary.dim, stable.norm_eps, stable.qkv_bias), (2, 1e-5, false));
    assert_eq!(read("stablelm", json!({"rope_theta": 1e4})).unwrap().rotary, stable.rotary);
    assert_eq!(read("gemma2", json!({})).unwrap().attention_cap, Some(50.0));
    assert_eq!(read("gemma2", json!({"attn_logit_softcapping": null})).unwrap().attention_cap, None);
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    for (model_type, more, said) in [
        ("mixtral", json!({}), "model_type \"mixtral\" is not supported"),
        ("", json!({}), "model_type \"\" is not supported"),
        ("llama", json!({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}), "remote code"),
        ("x", json!({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}), "remote code"),
        ("llama", json!({"hidden_act": "relu"}), "hidden_act \"relu\""),
        ("llama", json!({"rope_scaling": {"type": "xpos", "factor": 2}}), "type \"xpos\""),
        ("llama", json!({"rope_scaling": {"factor": 2}}), "no \"rope_type\""),
        ("llama", json!({"rope_scaling": 3}), "must be an object"),
        ("llama", json!({"rope_scaling": {"type": "linear"}}), "no \"factor\""),
        (
            "llama",
            json!({"rope_scaling": {"type": "linear", "factor": -1}}),
            "\"factor\" must be a number above 0",
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}),
            "must be 4 numbers",
        ),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 1, "low_freq_factor": 4, "high_freq_factor": 4}}),
            "must be below",
        ),
        ("stablelm", json!({"partial_rotary_factor": 0.1}), "no even size"),
        (
            "llama",
            json!({"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}}),
            "turns whole heads",
        ),
        ("gemma2", json!({"sliding_window": null}), "\"sliding_window\" is null"),
        ("llama", json!({"num_key_value_heads": 3}), "not a multiple"),
        ("llama", json!({"head_dim": 7}), "must be even"),
        ("llama", json!({"hidden_size": 30}), "not a multiple"),
        ("llama", json!({"hidden_size": 0}), "\"hidden_size\" must be an integer"),
        ("llama", json!({"tie_word_embeddings": "yes"}), "must be true or false"),
        ("llama", json!({"layer_types": ["full_attention"]}), "a list of 8 names"),
        ("qwen3", json!({"layer_types": vec!["sliding_attention"; 8]}), "layer_types \"sliding_attention\""),
        ("llama", json!({"layer_types": vec!["sliding_attention"; 8]}), "layer_types \"sliding_attention\""),
        ("qwen3", json!({"layer_types": vec!["linear_attention"; 8]}), "layer_types \"linear_attention\""),
        ("stablelm", json!({"use_parallel_residual": true}), "use_parallel_residual"),
        ("stablelm", json!({"qk_layernorm": true}), "qk_layernorm"),
        ("gemma3_text", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
    ] {
        let error = read(model_type, more).unwrap_err();
        assert_eq!(error.kind(), kto_cli::Kind::Data);
        let text = error.to_string();
        assert!(text.starts_with("config.json: ") && text.contains(said), "{text}");
    }
    let error = Record::read(&config("gemma2", json!({})), &[Family::Llama, Family::Qwen2]).unwrap_err();
    assert_eq!(error.hint(), Some("supported families: llama, qwen2"));
}

/// Fields of other families, and such that are left out: what transformers ignores is ignored, what it obeys is obeyed, what it cannot
/// compute is refused (`scripts/oracle/family_fields.py`).
#[test]
fn fields_mean_what_they_mean_to_transformers() {
    let cases: Value = serde_json::from_slice(&std::fs::read(folder("fields.json")).unwrap()).unwrap();
    let mut checked = 0;
    for case in cases.as_array().unwrap() {
        let name = case["model"].as_str().unwrap();
        let plain = ModelDir::open(&folder(name)).unwrap().config;
        let mut config = plain.clone();
        for (field, value) in case["set"].as_object().unwrap() {
            config[field] = value.clone();
        }
        for field in case["removed"].as_array().unwrap() {
            config.as_object_mut().unwrap().remove(field.as_str().unwrap());
        }
        let (plain, found) =
            (Record::read(&plain, &Family::all()).unwrap(), Record::read(&config, &Family::all()));
        let place = format!("{name}: {}", case["what"]);
        match (case["found"].as_str().unwrap(), found) {
            ("ignored", Ok(found)) => {
                // The texts are shorter than a usual window, and one that no layer has is none.
                let seen = found.sliding.contains(&true) && found.window.is_some_and(|window| window < 28);
                if !seen && found.window.is_some() && found.sliding.contains(&true) {
                    assert_eq!(json!(found.window), case["window"], "{place}");
                }
                let rest = Record { window: plain.window, sliding: plain.sliding.clone(), ..found.clone() };
                assert_eq!(if seen { found } else { rest }, plain, "{place}");
            }
            ("obeyed", Ok(found)) => {
                assert_ne!(found, plain, "{place}");
                if found.sliding.contains(&true) {
                    assert_eq!(json!(found.window), case["window"], "{place}");
                }
            }
            ("refused", Err(_)) => {}
            (theirs, ours) => panic!("{place}: {theirs} there, here {ours:?}"),
        }
        checked += 1;
    }
    assert_eq!(checked, 8 * 17);
}
