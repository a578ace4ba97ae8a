//! The language model of a model that takes images too, as a model of its own: Gemma 3 from 4B on.
//!
//! Called by [`crate::model_dir`]. The configuration of the part takes the place of the whole, with what its files leave out; tensors get the
//! names that they have in a text model, those of the image part are left out. So no tool knows of it but for the names in an adapter,
//! which PEFT puts on the whole.

use crate::adapter_config::{AdapterConfig, Targets};
use kto_cli::{Error, Result, escape};
use serde_json::{Map, Value, json};

/// `model_type` of the whole.
const WHOLE: &str = "gemma3";
/// Beginnings of names: as published files have them, and as the module is called in transformers.
const PREFIXES: [(&str, &str); 3] =
    [("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."), (IN_WHOLE, "model.")];
/// Where the part is in the module of transformers, so in the names of an adapter.
const IN_WHOLE: &str = "model.language_model.";
/// What the whole says of the weights and of the text's end.
const OF_THE_WHOLE: [&str; 7] = [
    "quantization_config",
    "quantization",
    "dtype",
    "torch_dtype",
    "eos_token_id",
    "tie_word_embeddings",
    "transformers_version",
];

/// Returns the configuration of the language model; `None` where the whole is one.
pub fn config(whole: &Map<String, Value>) -> Option<Map<String, Value>> {
    if whole.get("model_type").and_then(Value::as_str) != Some(WHOLE) {
        return None;
    }
    let mut part = whole.get("text_config")?.as_object()?.clone();
    for (field, value) in defaults() {
        part.entry(field).or_insert(value);
    }
    // transformers asks the whole alone.
    part.remove("tie_word_embeddings");
    for field in OF_THE_WHOLE {
        if let Some(value) = whole.get(field) {
            part.insert(field.into(), value.clone());
        }
    }
    // What the whole was built with is said there once.
    if whole.contains_key("torch_dtype") {
        part.remove("dtype");
    }
    part.insert("architectures".into(), json!(["Gemma3ForCausalLM"]));
    Some(part)
}

/// Defaults of transformers' Gemma3TextConfig (5.23) that are no defaults of a text model's own file here.
fn defaults() -> [(String, Value); 8] {
    [
        ("model_type", json!("gemma3_text")),
        ("vocab_size", json!(262_208)),
        ("hidden_size", json!(2304)),
        ("intermediate_size", json!(9216)),
        ("num_hidden_layers", json!(26)),
        ("num_attention_heads", json!(8)),
        ("num_key_value_heads", json!(4)),
        ("max_position_embeddings", json!(131_072)),
    ]
    .map(|(field, value)| (field.to_string(), value))
}

/// As [`config`], of any value; what is no object, or no such model, comes back as it is.
pub fn of_value(whole: Value) -> Value {
    match whole.as_object().and_then(config) {
        Some(part) => Value::Object(part),
        None => whole,
    }
}

/// Returns the name of a tensor or module in a text model; `None` for one of the image part.
pub fn name(of_whole: &str) -> Option<String> {
    inside(of_whole).or_else(|| of_whole.starts_with("lm_head.").then(|| of_whole.to_string()))
}

/// Returns the name in a text model of what lies under the language model by its name in the whole.
pub fn inside(of_whole: &str) -> Option<String> {
    PREFIXES.iter().find_map(|(from, to)| Some(format!("{to}{}", of_whole.strip_prefix(from)?)))
}

/// Modules of the image part, as an adapter has them.
const IMAGES: [&str; 2] = ["vision_tower", "multi_modal_projector"];

/// Returns the name in a text model of a module or tensor of an adapter, which may be one of the whole. Error (65): of the image part.
pub fn adapted(name: &str) -> Result<String> {
    let first = name.strip_prefix("model.").unwrap_or(name).split('.').next().unwrap_or_default();
    if IMAGES.contains(&first) {
        let text = format!("\"{}\" is of the part for images; of such a model", escape(name));
        return Err(Error::data(format!("{text} these tools have the language model alone")));
    }
    Ok(inside(name).unwrap_or_else(|| name.to_string()))
}

/// Returns the name in the whole, as an adapter has it.
pub fn outside(of_part: &str) -> String {
    of_part.strip_prefix("model.").map_or_else(|| of_part.to_string(), |rest| format!("{IN_WHOLE}{rest}"))
}

/// Returns the settings with which PEFT puts an adapter of the part on the whole. A list of names would mean layers of the image part too, so the
/// target is a pattern, which PEFT takes no choice of layers beside: then it spells the modules out. `modules` are those of the adapter.
pub fn settings<'a>(of_part: &AdapterConfig, modules: impl Iterator<Item = &'a str>) -> AdapterConfig {
    let inner = |name: &str| name.strip_prefix("model.").unwrap_or(name).to_string();
    let mut settings = of_part.clone();
    let choices = ["exclude_modules", "layers_to_transform", "layers_pattern"];
    let chosen = choices.iter().filter(|field| settings.kept.remove(**field).is_some()).count() > 0;
    let names: Vec<String> = match &of_part.target_modules {
        Targets::Names(names) if !chosen => names.iter().map(|name| inner(name)).collect(),
        _ => modules.map(inner).collect(),
    };
    let (start, names) = (IN_WHOLE.replace('.', r"\."), names.join("|").replace('.', r"\."));
    settings.target_modules = Targets::Pattern(format!(r"{start}(?:.*\.)?(?:{names})"));
    for field in ["rank_pattern", "alpha_pattern"] {
        if let Some(Value::Object(patterns)) = settings.kept.get_mut(field) {
            *patterns =
                std::mem::take(patterns).into_iter().map(|(name, value)| (inner(&name), value)).collect();
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes of the published model of 4B, whose file leaves most of them out.
    #[test]
    fn what_a_published_file_leaves_out_is_filled_in() {
        let text = r#"{"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "model_type": "gemma3",
            "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
            "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152}}"#;
        let whole: Map<String, Value> = serde_json::from_str(text).unwrap();
        let part = config(&whole).unwrap();
        let of = |field: &str| part.get(field).cloned().unwrap_or_default();
        assert_eq!(
            (of("hidden_size"), of("num_attention_heads"), of("vocab_size")),
            (json!(2560), json!(8), json!(262_208))
        );
        assert_eq!(
            (of("eos_token_id"), of("torch_dtype"), of("sliding_window")),
            (json!([1, 106]), json!("bfloat16"), json!(1024))
        );
        assert!(config(&part).is_none() && !part.contains_key("vision_config"));
    }

    #[test]
    fn names_lose_what_stands_before_the_language_model() {
        for (from, to) in [
            ("language_model.model.layers.0.mlp.up_proj.weight", Some("model.layers.0.mlp.up_proj.weight")),
            ("model.language_model.norm.weight", Some("model.norm.weight")),
            ("language_model.lm_head.weight", Some("lm_head.weight")),
            ("lm_head.weight", Some("lm_head.weight")),
            ("vision_tower.vision_model.post_layernorm.bias", None),
            ("model.vision_tower.post_layernorm.bias", None),
            ("multi_modal_projector.mm_soft_emb_norm.weight", None),
        ] {
            assert_eq!(name(from).as_deref(), to, "{from}");
        }
    }
}
