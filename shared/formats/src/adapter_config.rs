//! adapter_config.json of a PEFT LoRA adapter.
//!
//! Called by [`crate::adapter`]. Reading refuses by name every feature that would change the arithmetic and that these
//! tools do not have (DoRA, trained biases, per-layer ranks, methods that rewrite the base weights, …), known or not:
//! an unknown field passes only when it is null, false, zero or empty. What the fields mean is in [`crate::peft`]. Writing gives the fields of PEFT 0.21.2.

use crate::{
    mmap::shown,
    model_dir::read_json,
    peft::{PeftConfig, wrong},
    python_json,
};
use kto_cli::{Context, Error, Result, escape};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The PEFT release whose fields are written.
const PEFT_VERSION: &str = "0.21.2";

/// Fields that may hold anything: they do not change the product of the two matrices.
const HARMLESS: [&str; 22] = [
    "auto_mapping",
    "base_model_name_or_path",
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
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// The settings of a LoRA adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Rank R of every pair.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Probability of dropping an input element in training.
    pub lora_dropout: f64,
    /// Module names (`q_proj`, or full paths). Empty when the file had a pattern instead of a list.
    pub target_modules: Vec<String>,
    /// Where the base came from; a hint only.
    pub base_model_name_or_path: Option<String>,
    /// Scale by alpha/√r instead of alpha/r.
    pub use_rslora: bool,
}

impl AdapterConfig {
    /// Returns the factor of B·A: alpha/r, or alpha/√r with rank-stabilised LoRA.
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Reads `path`. Errors: 66 when missing; 65 that names the field.
    pub fn read(path: &Path) -> Result<Self> {
        let object = read_json(path)?;
        from_object(&object).at(shown(path))
    }

    /// Returns the text of adapter_config.json, as PEFT writes it.
    pub fn to_json(&self) -> String {
        let whole = self.lora_alpha.fract() == 0.0 && self.lora_alpha.abs() < 1e15;
        let alpha = if whole { json!(self.lora_alpha as i64) } else { json!(self.lora_alpha) };
        let value = json!({
            "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path, "bias": "none", "corda_config": null,
            "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
            "inference_mode": true, "init_lora_weights": true, "kasa_config": null, "layer_replication": null,
            "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": alpha,
            "lora_bias": false, "lora_dropout": self.lora_dropout, "lora_ga_config": null, "megatron_config": null,
            "megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null,
            "peft_type": "LORA", "peft_version": PEFT_VERSION, "qalora_group_size": 16, "r": self.r,
            "rank_pattern": {}, "revision": null, "target_modules": self.target_modules,
            "target_parameters": null, "task_type": "CAUSAL_LM", "trainable_token_indices": null,
            "use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": self.use_rslora,
            "velora_config": null,
        });
        python_json::pretty_sorted(&value)
    }
}

pub(crate) fn from_object(object: &Map<String, Value>) -> Result<AdapterConfig> {
    refuse_unsupported(object)?;
    let peft = PeftConfig::read(object)?;
    if peft.changes_base() {
        return Err(Error::data(format!(
            "init_lora_weights \"{}\" changes the base weights, which is not supported",
            escape(&peft.init_lora_weights)
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
    })
}

/// A list is taken over; a pattern (or "all-linear") leaves the choice to the tensors that are there.
fn target_modules(value: Option<&Value>) -> Result<Vec<String>> {
    match value {
        None | Some(Value::Null | Value::String(_)) => Ok(Vec::new()),
        Some(Value::Array(items)) => items
            .iter()
            .map(|v| {
                v.as_str().map(str::to_string).ok_or_else(|| wrong("target_modules", "a list of strings", v))
            })
            .collect(),
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
            Value::String(s) => s.is_empty() || (key == "bias" && s == "none"),
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
        let config = AdapterConfig {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: vec!["q_proj".into()],
            base_model_name_or_path: None,
            use_rslora: false,
        };
        let mut value: Map<String, Value> = serde_json::from_str(&config.to_json()).unwrap();
        change(&mut value);
        from_object(&value)
    }

    #[test]
    fn what_is_written_is_read_back() {
        let config = parse(|_| {}).unwrap();
        assert_eq!((config.r, config.scale()), (8, 2.0));
        assert_eq!(config.target_modules, ["q_proj"]);
        let rs = parse(|v| drop(v.insert("use_rslora".into(), json!(true)))).unwrap();
        assert!((rs.scale() - 16.0 / 8f64.sqrt()).abs() < 1e-15);
        let all = parse(|v| drop(v.insert("target_modules".into(), json!("all-linear")))).unwrap();
        assert!(all.target_modules.is_empty());
        parse(|v| drop(v.insert("some_new_field".into(), json!(null)))).unwrap();
    }

    #[test]
    fn unsupported_features_are_named() {
        for (key, value) in [
            ("use_dora", json!(true)),
            ("bias", json!("all")),
            ("modules_to_save", json!(["lm_head"])),
            ("rank_pattern", json!({"q_proj": 4})),
            ("alpha_pattern", json!({"q_proj": 4})),
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
            ("base_model_name_or_path", json!(3)),
        ] {
            let error = parse(|v| drop(v.insert(key.into(), value))).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
        assert!(parse(|v| drop(v.remove("lora_alpha"))).unwrap_err().to_string().contains("lora_alpha"));
    }
}
