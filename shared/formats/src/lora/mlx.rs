//! Adapters in the files of mlx-lm: adapters.safetensors and adapter_config.json.
//!
//! A linear layer has `lora_a` (in, R) and `lora_b` (R, out), with DoRA `m` (out); an embedding `lora_a` (vocabulary, R) and `lora_b`
//! (R, hidden). The product counts `lora_parameters.scale` times; the scale is not divided by the rank. mlx-lm loads only what these names
//! say, and adapts the last `num_layers` blocks.

use super::{
    Ecosystem, LoraModule, LoraSet, finite,
    peft::{is_embedding, transposed},
};
use crate::{
    adapter,
    mmap::shown,
    model_dir::read_json,
    python_json,
    safetensors_out::{SafetensorsWriter, TensorSpec, standard_order},
    tensors::{TensorStore, push_floats},
    text_part,
};
use kto_cli::{Context, Error, Result, atomic, escape};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Where mlx-lm has the language model of a model that takes images too.
const IN_WHOLE: &str = "language_model.";
/// File name of the matrices.
pub const WEIGHTS: &str = "adapters.safetensors";

pub fn read(dir: &Path) -> Result<LoraSet> {
    let place = shown(&dir.join(adapter::CONFIG));
    let settings = read_json(&dir.join(adapter::CONFIG))?;
    let kind = settings.get("fine_tune_type").and_then(Value::as_str).unwrap_or("lora");
    if !matches!(kind, "lora" | "dora") {
        return Err(Error::data(format!("{place}: fine_tune_type \"{}\" is no adapter", escape(kind))));
    }
    let parameters = settings.get("lora_parameters").unwrap_or(&Value::Null);
    let scale = parameters["scale"].as_f64().filter(|s| s.is_finite());
    let scale = scale.ok_or_else(|| Error::data(format!("{place}: no number lora_parameters.scale")))?;
    let store = TensorStore::open_file(&dir.join(WEIGHTS))?;
    let modules = modules(&store, scale, kind == "dora").at(shown(&dir.join(WEIGHTS)))?;
    let of_part = store.names().any(|name| text_part::inside(name).is_some());
    Ok(LoraSet {
        modules,
        saved: BTreeMap::new(),
        base_fingerprint: store.metadata().get(adapter::FINGERPRINT).cloned(),
        base_name: settings.get("model").and_then(Value::as_str).map(str::to_string),
        dropout: parameters["dropout"].as_f64().unwrap_or(0.0),
        ecosystem: Ecosystem::Mlx,
        of_part,
    })
}

fn modules(store: &TensorStore, scale: f64, dora: bool) -> Result<BTreeMap<String, LoraModule>> {
    let mut names = BTreeSet::new();
    for name in store.names() {
        let module = [".lora_a", ".lora_b", ".m"].iter().find_map(|part| name.strip_suffix(part));
        let other = || Error::data(format!("tensor \"{}\" is not a part of a LoRA layer", escape(name)));
        names.insert(module.ok_or_else(other)?);
    }
    let mut modules = BTreeMap::new();
    for module in names {
        let get = |part: &str| {
            let view = store.require(&format!("{module}.{part}"))?;
            Ok::<_, Error>((view.shape.to_vec(), finite(&view)?))
        };
        let ((a_shape, a), (b_shape, b)) = (get("lora_a")?, get("lora_b")?);
        let (&[first, r], &[other, last]) = (&a_shape[..], &b_shape[..]) else {
            return Err(Error::data(format!("\"{}\": shapes {a_shape:?} and {b_shape:?}", escape(module))));
        };
        if r != other {
            let text = format!("lora_a of shape {a_shape:?} and lora_b of shape {b_shape:?} do not fit");
            return Err(Error::data(format!("\"{}\": {text}", escape(module))));
        }
        let magnitude = match dora {
            false => None,
            true => {
                let (shape, m) = get("m")?;
                if shape != [last] {
                    return Err(Error::data(format!(
                        "\"{}\": m of shape {shape:?}, expected [{last}]",
                        escape(module)
                    )));
                }
                Some(m)
            }
        };
        let made = if is_embedding(module) {
            LoraModule { a: b, b: a, r, in_features: last, out_features: first, scale, magnitude }
        } else {
            let (a, b) = (transposed(&a, first, r), transposed(&b, r, last));
            LoraModule { a, b, r, in_features: first, out_features: last, scale, magnitude }
        };
        modules.insert(text_part::adapted(module)?, made);
    }
    Ok(modules)
}

pub fn write(set: &LoraSet, dir: &Path) -> Result<()> {
    if let Some(name) = set.saved.keys().next() {
        return Err(Error::data(format!(
            "\"{}\" was trained whole, which mlx-lm's adapters cannot say",
            escape(name)
        ))
        .with_hint("merge it into the base instead"));
    }
    let dora = set.modules.values().any(|m| m.magnitude.is_some());
    let (r, scale) = set.modules.values().next().map_or((1, 1.0), |m| (m.r, m.scale));
    let odd = set.modules.iter().find(|(_, m)| m.r != r || m.magnitude.is_some() != dora);
    if let Some((module, _)) = odd {
        return Err(Error::data(format!(
            "\"{}\": mlx-lm has one rank and kind for all modules",
            escape(module)
        ))
        .with_hint("--rank makes one rank of them"));
    }
    let mut specs = Vec::new();
    let mut values: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    let mut put = |name: String, shape: Vec<usize>, data: Vec<f32>| {
        specs.push(TensorSpec::new(name.clone(), Dtype::F32, shape));
        values.insert(name, data);
    };
    for (module, m) in &set.modules {
        let module = if set.of_part { format!("{IN_WHOLE}{module}") } else { module.clone() };
        // Another scale than the common one goes into B.
        let b: Vec<f32> = m.b.iter().map(|v| (f64::from(*v) * (m.scale / scale)) as f32).collect();
        if is_embedding(&module) {
            put(format!("{module}.lora_a"), vec![m.out_features, r], b);
            put(format!("{module}.lora_b"), vec![r, m.in_features], m.a.clone());
        } else {
            put(format!("{module}.lora_a"), vec![m.in_features, r], transposed(&m.a, r, m.in_features));
            put(format!("{module}.lora_b"), vec![r, m.out_features], transposed(&b, m.out_features, r));
        }
        if let Some(magnitude) = &m.magnitude {
            put(format!("{module}.m"), vec![m.out_features], magnitude.clone());
        }
    }
    standard_order(&mut specs);
    let mut metadata = BTreeMap::new();
    if let Some(fingerprint) = &set.base_fingerprint {
        metadata.insert(adapter::FINGERPRINT.to_string(), fingerprint.clone());
    }
    let mut writer = SafetensorsWriter::new(&dir.join(WEIGHTS), specs.clone(), &metadata)?;
    for spec in specs {
        let mut bytes = Vec::new();
        push_floats(Dtype::F32, &values[&spec.name], &mut bytes)?;
        writer.write(&spec.name, &bytes)?;
    }
    writer.finish()?;
    // -1: all blocks; the keys say which modules.
    let keys: BTreeSet<String> = set.modules.keys().map(|module| inner(module)).collect();
    let value = json!({
        "fine_tune_type": if dora { "dora" } else { "lora" },
        "model": set.base_name,
        "num_layers": -1,
        "lora_parameters": {"rank": r, "scale": scale, "dropout": set.dropout, "keys": keys},
    });
    atomic::write(&dir.join(adapter::CONFIG), (python_json::pretty_sorted(&value) + "\n").as_bytes())
}

/// The name of a module inside its block, as mlx-lm's keys have it; outside the blocks the whole name.
fn inner(module: &str) -> String {
    let inside = module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    inside.map_or(module, |(_, rest)| rest).to_string()
}
