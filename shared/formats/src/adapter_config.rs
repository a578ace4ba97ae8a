//! adapter_config.json of a PEFT LoRA adapter.
//!
//! Called by [`crate::adapter`]. Reading refuses by name every feature that would change the arithmetic and that these
//! tools do not have (single trained tokens, methods that rewrite the base weights, …), known or not:
//! an unknown field passes only when it is null, false, zero or empty. What the fields mean is in [`crate::peft`]. Writing gives the fields of
//! PEFT 0.21.2; what training leaves alone (exclusions, patterns) is written as it was read.

use crate::{
    json::quoted,
    mmap::shown,
    model_dir::read_json,
    peft::{PeftConfig, wrong},
    python_json,
};
use kto_cli::{Context, Error, Result, escape};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::{fmt, path::Path};

/// The PEFT release whose fields are written.
const PEFT_VERSION: &str = "0.21.2";

/// Fields that may hold anything: they do not change the product of the two matrices.
const HARMLESS: [&str; 27] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
];

/// Fields that choose what is trained, and its sizes, beside `target_modules`; written as they are.
const KEPT: [&str; 9] = [
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "rank_pattern",
];

/// What `target_modules` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Targets {
    /// Names of modules (`q_proj`), or full paths.
    Names(Vec<String>),
    /// A regular expression for whole paths, or `all-linear`.
    Pattern(String),
}

impl Default for Targets {
    fn default() -> Self {
        Self::Names(Vec::new())
    }
}

impl<const N: usize> From<[&str; N]> for Targets {
    fn from(names: [&str; N]) -> Self {
        Self::Names(names.map(str::to_string).into())
    }
}

/// For a line of a plan.
impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Names(names) => f.write_str(&names.join(" ")),
            Self::Pattern(text) => f.write_str(text),
        }
    }
}

/// The settings of a LoRA adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterConfig {
    /// Rank R of the modules that no pattern names.
    pub r: usize,
    /// Numerator of their scale.
    pub lora_alpha: f64,
    /// Probability of dropping an input element in training.
    pub lora_dropout: f64,
    /// The adapted modules.
    pub target_modules: Targets,
    /// Where the base came from; a hint only.
    pub base_model_name_or_path: Option<String>,
    /// Scale by alpha/√r instead of alpha/r.
    pub use_rslora: bool,
    /// Rows of the adapted weights are scaled to a trained length.
    pub use_dora: bool,
    /// `rank_pattern`, `layers_to_transform` and their like, by field, where they are not PEFT's defaults.
    pub kept: Map<String, Value>,
}

impl AdapterConfig {
    /// Returns the factor of B·A: alpha/r, or alpha/√r with rank-stabilised LoRA; of the modules that no pattern names.
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Returns what the settings mean for each module. Error (65) that names the field: a pattern that is none.
    pub fn peft(&self) -> Result<PeftConfig> {
        match self.value() {
            Value::Object(object) => PeftConfig::read(&object),
            _ => Err(Error::internal("adapter_config.json is no object")),
        }
    }

    /// Reads `path`. Errors: 66 when missing; 65 that names the field.
    pub fn read(path: &Path) -> Result<Self> {
        let object = read_json(path)?;
        from_object(&object).at(shown(path))
    }

    /// Returns the text of adapter_config.json, as PEFT writes it.
    pub fn to_json(&self) -> String {
        python_json::pretty_sorted(&self.value())
    }

    fn value(&self) -> Value {
        let mut value = json!({
            "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path, "bias": "none", "corda_config": null,
            "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
            "inference_mode": true, "init_lora_weights": true, "kasa_config": null, "layer_replication": null,
            "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": whole(self.lora_alpha),
            "lora_bias": false, "lora_dropout": self.lora_dropout, "lora_ga_config": null, "megatron_config": null,
            "megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null,
            "peft_type": "LORA", "peft_version": PEFT_VERSION, "qalora_group_size": 16, "r": self.r,
            "rank_pattern": {}, "revision": null, "target_modules": self.target_modules,
            "target_parameters": null, "task_type": "CAUSAL_LM", "trainable_token_indices": null,
            "use_bdlora": null, "use_dora": self.use_dora, "use_qalora": false, "use_rslora": self.use_rslora,
            "velora_config": null,
        });
        self.kept.iter().for_each(|(field, kept)| value[field] = kept.clone());
        value
    }
}

/// A number as Python writes it that has read it from a whole one.
pub fn whole(number: f64) -> Value {
    let whole = number.fract() == 0.0 && number.abs() < 1e15;
    if whole { json!(number as i64) } else { json!(number) }
}

pub(crate) fn from_object(object: &Map<String, Value>) -> Result<AdapterConfig> {
    refuse_unsupported(object)?;
    let peft = PeftConfig::read(object)?;
    if peft.changes_base() {
        return Err(Error::data(format!(
            "init_lora_weights {} changes the base weights, which is not supported",
            quoted(&peft.init_lora_weights)
        )));
    }
    let base_model_name_or_path = match object.get("base_model_name_or_path") {
        None | Some(Value::Null) => None,
        Some(Value::String(s)) => Some(s.clone()),
        Some(other) => return Err(wrong("base_model_name_or_path", "a string or null", other)),
    };
    Ok(AdapterConfig {
        r: peft.r,
        lora_alpha: peft.lora_alpha,
        lora_dropout: peft.lora_dropout,
        target_modules: target_modules(object.get("target_modules"))?,
        base_model_name_or_path,
        use_rslora: peft.use_rslora,
        use_dora: peft.use_dora,
        kept: kept(object),
    })
}

/// Returns the fields of [`KEPT`] that say something.
fn kept(object: &Map<String, Value>) -> Map<String, Value> {
    let says = |field: &str, value: &Value| match value {
        Value::Null => false,
        Value::Bool(flag) => *flag != (field == "init_lora_weights"),
        Value::Object(map) => !map.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::String(text) => !(text.is_empty() || field == "bias" && text == "none"),
        Value::Number(_) => true,
    };
    let fields = KEPT.iter().filter_map(|field| Some((*field, object.get(*field)?)));
    fields.filter(|(field, value)| says(field, value)).map(|(f, v)| (f.to_string(), v.clone())).collect()
}

/// None of them leaves the choice to the tensors that are there.
fn target_modules(value: Option<&Value>) -> Result<Targets> {
    match value {
        None | Some(Value::Null) => Ok(Targets::default()),
        Some(Value::String(text)) if text.is_empty() => Ok(Targets::default()),
        Some(Value::String(text)) => Ok(Targets::Pattern(text.clone())),
        Some(Value::Array(items)) => items
            .iter()
            .map(|v| {
                v.as_str().map(str::to_string).ok_or_else(|| wrong("target_modules", "a list of strings", v))
            })
            .collect::<Result<_>>()
            .map(Targets::Names),
        Some(other) => Err(wrong("target_modules", "a list of strings or a string", other)),
    }
}

fn refuse_unsupported(object: &Map<String, Value>) -> Result<()> {
    match object.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        other => {
            return Err(Error::data(format!(
                "peft_type \"{}\" is not LORA",
                escape(other.unwrap_or("(none)"))
            )));
        }
    }
    for (key, value) in object {
        let nothing = match value {
            Value::Null | Value::Bool(false) => true,
            Value::String(s) => s.is_empty(),
            Value::Array(a) => a.is_empty(),
            Value::Object(o) => o.is_empty(),
            Value::Number(n) => n.as_f64() == Some(0.0),
            Value::Bool(true) => false,
        };
        if !nothing && !HARMLESS.contains(&key.as_str()) {
            let text: String = value.to_string().chars().take(60).collect();
            return Err(Error::data(format!("{} = {} is not supported", escape(key), escape(&text))));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(change: impl FnOnce(&mut Map<String, Value>)) -> Result<AdapterConfig> {
        let config =
            AdapterConfig { r: 8, lora_alpha: 16.0, target_modules: ["q_proj"].into(), ..Default::default() };
        let mut value: Map<String, Value> = serde_json::from_str(&config.to_json()).unwrap();
        change(&mut value);
        from_object(&value)
    }

    #[test]
    fn what_is_written_is_read_back() {
        let config = parse(|_| {}).unwrap();
        assert_eq!((config.r, config.scale()), (8, 2.0));
        assert_eq!(config.target_modules, ["q_proj"].into());
        let rs = parse(|v| drop(v.insert("use_rslora".into(), json!(true)))).unwrap();
        assert!((rs.scale() - 16.0 / 8f64.sqrt()).abs() < 1e-15);
        let all = parse(|v| drop(v.insert("target_modules".into(), json!("all-linear")))).unwrap();
        assert_eq!(all.target_modules, Targets::Pattern("all-linear".into()));
        parse(|v| drop(v.insert("some_new_field".into(), json!(null)))).unwrap();
    }

    #[test]
    fn what_is_written_is_what_peft_has_written() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/peft/configs.jsonl");
        let mut same = 0;
        for line in std::fs::read_to_string(path).unwrap().lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            let object = row["config"].as_object().unwrap();
            let Ok(config) = from_object(object) else { continue };
            let written: Value = serde_json::from_str(&config.to_json()).unwrap();
            // The older name of the same default.
            assert_eq!(written, row["config"], "{}", row["name"]);
            same += 1;
        }
        assert!(same >= 15, "{same}");
    }

    #[test]
    fn unsupported_features_are_named() {
        for (key, value) in [
            ("bias", json!("some")),
            ("lora_bias", json!(true)),
            ("fan_in_fan_out", json!(true)),
            ("trainable_token_indices", json!([1])),
            ("target_parameters", json!(["x"])),
            ("layer_replication", json!([[0, 1]])),
            ("use_qalora", json!(true)),
            ("init_lora_weights", json!("pissa_niter_4")),
            ("peft_type", json!("LOHA")),
            ("some_new_field", json!(1)),
        ] {
            let error = parse(|v| drop(v.insert(key.into(), value))).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn wrong_values_are_named() {
        for (key, value) in [
            ("r", json!(0)),
            ("r", json!(1e18)),
            ("r", json!("8")),
            ("lora_alpha", json!("16")),
            ("lora_dropout", json!(1.0)),
            ("target_modules", json!([1])),
            ("use_rslora", json!("yes")),
            ("use_dora", json!(1)),
            ("rank_pattern", json!({"q_proj": 0})),
            ("alpha_pattern", json!(["q_proj"])),
            ("layers_to_transform", json!("1")),
            ("base_model_name_or_path", json!(3)),
        ] {
            let error = parse(|v| drop(v.insert(key.into(), value))).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
        assert!(parse(|v| drop(v.remove("lora_alpha"))).unwrap_err().to_string().contains("lora_alpha"));
    }
}
