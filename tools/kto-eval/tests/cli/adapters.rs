//! Adapters of every kind score as PEFT says, from PEFT's files and from the same adapter in mlx-lm's.

use super::{bytes, rows, scores::number, testdata, token_set, words};
use kto_formats::{
    lora::{Ecosystem, LoraSet},
    tensors::TensorStore,
};

#[test]
fn scores_are_those_of_peft() {
    for (name, family, in_mlx) in [
        ("dora", "qwen2", true),
        ("dora-fused", "phi3", true),
        ("dora-layers", "llama-linear", false),
        ("patterns", "qwen3", false),
        ("regex", "mistral-window", true),
        ("bias-adapted", "llama-biases", false),
        ("bias-all", "stablelm", false),
        ("whole-fused", "phi3", false),
        ("whole-norms", "gemma3", false),
        ("whole-tied", "gemma2", false),
    ] {
        let (model, adapter) =
            (testdata(&format!("families/{family}")), testdata(&format!("adapters/{name}")));
        let golden = TensorStore::open_file(&adapter.join("golden.safetensors")).unwrap();
        let ids = |name: String| -> Vec<u32> {
            let bytes = golden.require(&name).unwrap().data;
            bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let rows_of = [0, 1].map(|i| (ids(format!("{i}.prompt")), ids(format!("{i}.completion")), i == 0));
        let dir = tempfile::tempdir().unwrap();
        let written = LoraSet::read(&adapter).unwrap().write(dir.path(), Ecosystem::Mlx);
        assert_eq!(written.is_ok(), in_mlx, "{name}");
        let forms = [adapter.as_path(), dir.path()];
        for form in &forms[..1 + usize::from(in_mlx)] {
            let line = format!("score --model {} --adapter {} --no-kl", model.display(), form.display());
            let found = rows(&words(&line), &bytes(&token_set(&rows_of, 48, 64)));
            for key in ["logps", "reference_logps"] {
                for (row, expected) in found.iter().zip(golden.require(key).unwrap().to_f32().unwrap()) {
                    let off = (number(row, key) - f64::from(expected)).abs();
                    assert!(off < 1e-5 * f64::from(expected).abs(), "{name} {key}: {row} {expected}");
                }
            }
        }
    }
}

/// What these tools would score wrongly they do not score.
#[test]
fn what_is_trained_and_not_there_is_refused_by_name() {
    let (model, from) = (testdata("families/qwen2"), testdata("adapters/dora"));
    for (field, value, named, what) in [
        ("modules_to_save", "[\"lm_head\"]", "\"lm_head.weight\"", "the file does not hold it"),
        ("bias", "\"lora_only\"", "k_proj.bias\"", "the file does not hold it"),
        ("trainable_token_indices", "[1]", "trainable_token_indices", "is not supported"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(from.join("adapter_config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config[field] = serde_json::from_str(value).unwrap();
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        let weights = "adapter_model.safetensors";
        std::fs::copy(from.join(weights), dir.path().join(weights)).unwrap();
        let line = format!("score --model {} --adapter {} --no-kl", model.display(), dir.path().display());
        let tokens = token_set(&[(vec![3], vec![4], true), (vec![5], vec![6], false)], 48, 64);
        let output = super::run(&words(&line), &bytes(&tokens));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(65), "{text}");
        assert!(text.contains(named) && text.contains(what), "{text}");
    }
}
