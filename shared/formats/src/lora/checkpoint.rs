//! The adapter in a checkpoint of kto-train, which a run that is not finished has in place of a directory of PEFT.
//!
//! Called by [`super::LoraSet::read`]. Its numbers are `adapter/…` in state.safetensors, beside the optimizer's; its settings are those
//! of the plan in manifest.json. Invariant: the numbers are the bytes that the manifest was written for.

use super::{Ecosystem, LoraModule, LoraSet, Saved, finite};
use crate::{
    adapter_config,
    mmap::shown,
    model_dir::read_json,
    peft::PeftConfig,
    tensors::{TensorStore, TensorView},
};
use kto_cli::{Context, Error, Result, escape, hash};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

const STATE: &str = "state.safetensors";
const MANIFEST: &str = "manifest.json";
/// What stands before the names of the adapter's tensors.
const PREFIX: &str = "adapter/";
/// Key of the metadata: the base is a part of a model that takes images too.
pub const OF_PART: &str = "kto.of_part";

/// Fields of a plan that are called as PEFT calls them.
const FIELDS: [&str; 13] = [
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
];

/// Returns whether a directory is a checkpoint.
pub fn is_one(dir: &Path) -> bool {
    dir.join(STATE).is_file() && dir.join(MANIFEST).is_file()
}

/// Returns the newest checkpoint of a run directory.
pub fn newest(run: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(run.join("checkpoints")).ok()?.filter_map(|e| Some(e.ok()?.path()));
    entries.filter(|path| is_one(path) && !is_hidden(path)).max()
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// Returns the settings as adapter_config.json has them. Error (65): no manifest of a checkpoint.
pub fn settings(dir: &Path) -> Result<Map<String, Value>> {
    let path = dir.join(MANIFEST);
    of_plan(&read_json(&path)?).at(shown(&path))
}

fn of_plan(manifest: &Map<String, Value>) -> Result<Map<String, Value>> {
    let plan = manifest.get("plan").and_then(Value::as_object);
    let plan = plan.ok_or_else(|| Error::data("not of a checkpoint of kto-train"))?;
    let set = |field: &str| plan.get(field).filter(|value| !value.is_null()).cloned();
    let mut settings: Map<String, Value> =
        FIELDS.iter().filter_map(|field| Some((field.to_string(), set(field)?))).collect();
    settings.extend(set("lora_r").map(|r| ("r".to_string(), r)));
    settings.insert("peft_type".into(), json!("LORA"));
    Ok(settings)
}

/// Reads the adapter. Error (65): numbers that are not those of the manifest.
pub fn read(dir: &Path) -> Result<LoraSet> {
    let place = shown(&dir.join(MANIFEST));
    let manifest = read_json(&dir.join(MANIFEST))?;
    let settings = of_plan(&manifest).at(&place)?;
    let config = adapter_config::from_object(&settings).at(&place)?;
    let peft = PeftConfig::read(&settings).at(&place)?;
    let path = dir.join(STATE);
    check(&path, &manifest)?;
    let store = TensorStore::open_file(&path)?;
    let (modules, saved) = tensors(&store, &peft).at(shown(&path))?;
    Ok(LoraSet {
        modules,
        saved,
        base_fingerprint: manifest["plan"]["base"].as_str().map(str::to_string),
        base_name: None,
        dropout: config.lora_dropout,
        ecosystem: Ecosystem::Peft,
        of_part: store.metadata().contains_key(OF_PART),
    })
}

/// Refuses (65) numbers that are not those of the manifest.
fn check(path: &Path, manifest: &Map<String, Value>) -> Result<()> {
    let wanted = manifest["files"][STATE]["sha256"].as_str();
    let found = hash::files(&[path.to_path_buf()])?;
    if wanted.is_some() && found.first().and_then(|f| f.sha256.as_deref()) == wanted {
        return Ok(());
    }
    Err(Error::data(format!("{}: does not match its hash in {MANIFEST}", shown(path)))
        .with_hint("another checkpoint of the run"))
}

type Tensors = (BTreeMap<String, LoraModule>, BTreeMap<String, Saved>);

fn tensors(store: &TensorStore, peft: &PeftConfig) -> Result<Tensors> {
    let (mut modules, mut saved) = (BTreeMap::new(), BTreeMap::new());
    let of = |name: &str| store.require(&format!("{PREFIX}{name}"));
    for view in store.views() {
        let Some(name) = view.name.strip_prefix(PREFIX) else { continue };
        if let Some(module) = name.strip_suffix(".lora_A") {
            let magnitude = match peft.use_dora {
                true => Some(finite(&of(&format!("{module}.lora_magnitude_vector"))?)?),
                false => None,
            };
            modules.insert(
                module.to_string(),
                read_module((&view, &of(&format!("{module}.lora_B"))?), module, magnitude, peft)?,
            );
        } else if !name.ends_with(".lora_B") && !name.ends_with(".lora_magnitude_vector") {
            saved.insert(name.to_string(), Saved { shape: view.shape.to_vec(), values: finite(&view)? });
        }
    }
    Ok((modules, saved))
}

fn read_module(
    (a, b): (&TensorView, &TensorView),
    module: &str,
    magnitude: Option<Vec<f32>>,
    peft: &PeftConfig,
) -> Result<LoraModule> {
    let r = peft.rank(module)?;
    let (&[_, in_features], &[out_features, _]) = (a.shape, b.shape) else {
        return Err(Error::data(format!("\"{}\" has no two matrices", escape(module))));
    };
    a.expect_shape(&[r, in_features])?;
    b.expect_shape(&[out_features, r])?;
    Ok(LoraModule {
        a: finite(a)?,
        b: finite(b)?,
        r,
        in_features,
        out_features,
        scale: peft.scale(module)?,
        magnitude,
    })
}
