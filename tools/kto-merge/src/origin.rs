//! Which base an adapter belongs to, and what has been merged already.

use kto_cli::{Error, Result, Ui, escape, hash::Sha256Hex};
use kto_formats::{
    lora::LoraSet,
    model_dir::{MERGED_FROM, ModelDir},
    safetensors_out::pt_metadata,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Checks the adapters against the base and returns the metadata of the result: the merges so far and these.
/// Errors (78): an adapter was trained on another base, or is merged into this one already.
pub fn metadata(
    base: &ModelDir,
    adapters: &[LoraSet],
    force: bool,
    ui: &Ui,
) -> Result<BTreeMap<String, String>> {
    let print = base.fingerprint();
    let place = escape(&base.path.display().to_string());
    let merged = base.tensors.metadata().get(MERGED_FROM);
    let mut merges = match merged.map(|text| serde_json::from_str(text)) {
        Some(Ok(Value::Array(list))) => list,
        _ => Vec::new(),
    };
    let before = merges.len();
    for adapter in adapters {
        let identity = identity(adapter);
        let earlier = &merges[..before];
        if !force && earlier.iter().any(|m| m.get("adapter") == Some(&json!(identity))) {
            return Err(Error::config(format!("{place}: this adapter is merged into this base already"))
                .with_hint("--force-base merges it again"));
        }
        check_base(base, adapter, force)?;
        if merges[before..].iter().any(|m| m.get("adapter") == Some(&json!(identity))) {
            ui.warn("the same adapter is given twice: its change counts twice");
        }
        merges.push(json!({"base": print, "adapter": identity}));
    }
    let mut metadata = pt_metadata();
    metadata.insert(MERGED_FROM.into(), Value::Array(merges).to_string());
    Ok(metadata)
}

/// Fails (78) when the adapter was trained on another base.
pub fn check_base(base: &ModelDir, adapter: &LoraSet, force: bool) -> Result<()> {
    if force || adapter.fits(base) {
        return Ok(());
    }
    let place = escape(&base.path.display().to_string());
    Err(Error::config(format!("{place}: the adapter was trained on another base"))
        .with_hint("--force-base merges it all the same"))
}

/// The hash of everything of an adapter that the merge depends on.
pub fn identity(adapter: &LoraSet) -> String {
    let mut hash = Sha256Hex::new();
    let mut floats = |name: &str, values: &[f32]| {
        hash.update(&(name.len() as u64).to_le_bytes());
        hash.update(name.as_bytes());
        hash.update(&(values.len() as u64).to_le_bytes());
        hash.update_floats(values);
    };
    for (module, m) in &adapter.modules {
        floats(module, &[m.scale as f32]);
        [Some(&m.a), Some(&m.b), m.magnitude.as_ref()]
            .into_iter()
            .flatten()
            .for_each(|values| floats("", values));
    }
    for (name, saved) in &adapter.saved {
        floats(name, &saved.values);
    }
    hash.finish()
}
