//! config.json and the metadata of the result, as each library expects them.

use crate::{
    args::FormName,
    plan::{Job, Plan},
};
use kto_formats::{
    bnb::{self, FourBitKind, torch_name},
    mlx::{self, Setting},
    model_dir::{MERGED_FROM, QUANTIZED_FROM},
    safetensors_out::pt_metadata,
};
use kto_weights::{Form, roles::role};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;

impl Plan {
    /// Returns the safetensors metadata.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let mut metadata = pt_metadata();
        if matches!(self.job, Job::Quantize(FormName::Mlx, _)) {
            metadata.insert("format".into(), "mlx".into());
        }
        metadata.insert(QUANTIZED_FROM.into(), self.model.fingerprint());
        let merged = self.model.tensors.metadata().get(MERGED_FROM);
        metadata.extend(merged.map(|merged| (MERGED_FROM.to_string(), merged.clone())));
        metadata
    }

    /// Returns config.json.
    pub fn config(&self) -> Value {
        let mut config = self.model.config.clone();
        match &self.job {
            Job::Dequantize(dtype) => {
                if let Value::Object(map) = &mut config {
                    map.remove("quantization_config");
                    map.remove("quantization");
                    if let Some(dtype) = dtype {
                        let key = if map.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
                        map.insert(key.into(), torch_name(*dtype).into());
                    }
                }
            }
            Job::Quantize(FormName::Mlx, choice) => {
                let value = mlx::quantization(choice.common, &self.mlx_layers());
                config["quantization"] = value.clone();
                config["quantization_config"] = value;
            }
            Job::Quantize(..) => config["quantization_config"] = self.bitsandbytes(),
        }
        config
    }

    fn bitsandbytes(&self) -> Value {
        let four = self.forms.values().find_map(|form| match form {
            Some(Form::FourBit { kind, nested, dtype, .. }) => Some((*kind, *nested, *dtype)),
            _ => None,
        });
        let setting = match four {
            Some((kind, double_quant, compute)) => bnb::Setting::FourBit { kind, double_quant, compute },
            None => bnb::Setting::Int8,
        };
        let head = self.forms.get("lm_head.weight").is_some_and(|f| !matches!(f, Some(Form::Float(_))));
        let skipped = match (head, self.skipped.is_empty()) {
            // What transformers does by itself.
            (false, true) => None,
            (false, false) => Some([vec!["lm_head".to_string()], self.skipped.clone()].concat()),
            (true, _) => Some(self.skipped.clone()),
        };
        bnb::quantization_config(setting, skipped.as_deref())
    }

    /// The setting of every module that mlx-lm would quantize; `None` for those that stay as they are.
    fn mlx_layers(&self) -> BTreeMap<String, Option<Setting>> {
        let mut layers = BTreeMap::new();
        for (name, form) in &self.forms {
            let Some(module) = name.strip_suffix(".weight").filter(|module| role(module).is_some()) else {
                continue;
            };
            let setting = match form {
                Some(Form::Affine { bits, group, .. }) => Some(Setting { bits: *bits, group: *group }),
                _ => None,
            };
            layers.insert(module.to_string(), setting);
        }
        layers
    }

    /// Returns what the forms of the result are, with how many weights have each, for the plan.
    pub fn summary(&self) -> Vec<(String, usize)> {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for form in self.forms.values() {
            *counts.entry(form.map_or("as it is".into(), describe)).or_default() += 1;
        }
        counts.into_iter().collect()
    }
}

/// Returns a form in a few words.
pub fn describe(form: Form) -> String {
    let float = |dtype: Dtype| torch_name(dtype).to_string();
    match form {
        Form::Float(dtype) => float(dtype),
        Form::FourBit { kind, block, nested, .. } => {
            let scales = if nested { ", scales in 8 bits" } else { "" };
            format!("{} in blocks of {block}{scales}", if kind == FourBitKind::Nf4 { "nf4" } else { "fp4" })
        }
        Form::Int8 => "int8 by rows".into(),
        Form::Affine { bits, group, .. } => format!("mlx {bits} bits in groups of {group}"),
        Form::Ggml(form) => format!("{form:?}"),
    }
}

/// Returns a line of the report: a tensor's error.
pub fn report_line(name: &str, shape: &[usize], form: Form, errors: &kto_weights::Errors) -> String {
    let n: u64 = shape.iter().map(|d| *d as u64).product();
    let value = json!({
        "tensor": name,
        "form": describe(form),
        "shape": shape,
        "bits_per_weight": 8.0 * form.bytes(shape) as f64 / n.max(1) as f64,
        "rms": errors.rms(),
        "relative_rms": errors.relative(),
        "max": errors.largest(),
        "cosine": errors.cosine(),
    });
    value.to_string() + "\n"
}
