//! Which base an adapter belongs to, and what has been merged already.

use kto_cli::{Error, Result, escape, hash::Sha256Hex};
use kto_formats::{adapter::Adapter, model_dir::ModelDir, safetensors_out::pt_metadata};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Key of the list of merges in the safetensors metadata.
const MERGED_FROM: &str = "kto.merged_from";

/// Checks the adapter against the base and returns the metadata of the result: the merges so far and this one.
/// Errors (78): the adapter was trained on another base, or is merged into this one already.
pub fn metadata(base: &ModelDir, adapter: &Adapter, force: bool) -> Result<BTreeMap<String, String>> {
    let print = base.fingerprint();
    let place = escape(&base.path.display().to_string());
    let merged = base.tensors.metadata().get(MERGED_FROM);
    let mut merges = match merged.map(|text| serde_json::from_str(text)) {
        Some(Ok(Value::Array(list))) => list,
        _ => Vec::new(),
    };
    let identity = identity(adapter);
    if !force && merges.iter().any(|m| m.get("adapter") == Some(&json!(identity))) {
        return Err(Error::config(format!("{place}: this adapter is merged into this base already"))
            .with_hint("--force-base merges it again"));
    }
    if !force && !adapter.fits(base) {
        return Err(Error::config(format!("{place}: the adapter was trained on another base"))
            .with_hint("--force-base merges it all the same"));
    }
    merges.push(json!({"base": print, "adapter": identity}));
    let mut metadata = pt_metadata();
    metadata.insert(MERGED_FROM.into(), Value::Array(merges).to_string());
    Ok(metadata)
}

/// The hash of everything that the merge depends on.
fn identity(adapter: &Adapter) -> String {
    let mut hash = Sha256Hex::new();
    hash.update(&adapter.config.scale().to_le_bytes());
    for (module, pair) in &adapter.tensors {
        hash.update(&(module.len() as u64).to_le_bytes());
        hash.update(module.as_bytes());
        for value in pair.a.iter().chain(&pair.b) {
            hash.update(&value.to_le_bytes());
        }
    }
    hash.finish()
}
