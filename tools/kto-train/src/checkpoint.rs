//! Checkpoints: everything that the next step depends on beside the plan, in a directory that appears whole.
//!
//! Order, KL partners, dropout and learning rate are functions of the step, so the state is the adapter in f32, the optimizer's parts
//! as they are (f32, or 8-bit codes with their scales), the step, and how long metrics.jsonl was.

use crate::{optimizer::Optimizer, run_dir::RunDir};
use candle_core::{DType, Tensor};
use kto_cli::{Error, Result, atomic, escape, hash::Sha256Hex, input};
use kto_formats::{
    safetensors_out::{SafetensorsWriter, TensorSpec},
    tensors::{TensorStore, TensorView},
};
use kto_model::lora::Lora;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// Checkpoints kept.
const KEEP: usize = 2;

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Steps done.
    pub step: u64,
    /// Tokens seen.
    pub num_tokens: u64,
    /// Length of metrics.jsonl in bytes.
    pub metrics_bytes: u64,
}

/// Writes the checkpoint of `position` and removes old ones.
pub fn save(run: &RunDir, position: Position, lora: &Lora, optimizer: &Optimizer) -> Result<()> {
    let parent = run.file("checkpoints");
    fs::create_dir_all(&parent).map_err(|e| Error::writing(&parent, &e))?;
    let directory = atomic::AtomicDir::create(&parent.join(format!("step-{:08}", position.step)), true)?;
    let state = directory.path().join("state.safetensors");
    let parts = named(lora, optimizer);
    let specs = parts.iter().map(|(name, t)| TensorSpec::new(name.clone(), stored(t), t.dims())).collect();
    let mut writer = SafetensorsWriter::new(&state, specs, &BTreeMap::new())?;
    for (name, tensor) in &parts {
        writer.write(name, &bytes(tensor).map_err(internal)?)?;
    }
    writer.finish()?;
    let manifest = json!({
        "format": 1, "step": position.step, "num_tokens": position.num_tokens, "metrics_bytes": position.metrics_bytes,
        "state_sha256": sha256(&state)?,
    });
    atomic::write(&directory.path().join("manifest.json"), manifest.to_string().as_bytes())?;
    directory.commit()?;
    for old in list(&parent).into_iter().rev().skip(KEEP) {
        // An old checkpoint that stays is no reason to stop.
        let _ = fs::remove_dir_all(old);
    }
    Ok(())
}

/// Loads the newest complete checkpoint into `lora` and `optimizer`. Returns `None` when there is none;
/// `note` hears of the ones that were passed over.
pub fn load(
    run: &RunDir,
    lora: &Lora,
    optimizer: &Optimizer,
    note: impl Fn(String),
) -> Result<Option<Position>> {
    for path in list(&run.file("checkpoints")).into_iter().rev() {
        match read(&path, lora, optimizer) {
            Ok(position) => return Ok(Some(position)),
            Err(e) => note(format!("checkpoint passed over: {}: {e}", path.display())),
        }
    }
    Ok(None)
}

fn read(path: &Path, lora: &Lora, optimizer: &Optimizer) -> Result<Position> {
    let manifest = input::read(&path.join("manifest.json"), 1 << 20)?;
    let manifest: Value =
        serde_json::from_slice(&manifest).map_err(|_| Error::data("manifest.json is not JSON"))?;
    let number = |field: &str| {
        manifest.get(field).and_then(Value::as_u64).ok_or_else(|| Error::data(format!("no \"{field}\"")))
    };
    if number("format")? != 1 {
        return Err(Error::data("written by a newer kto-train"));
    }
    let state = path.join("state.safetensors");
    let hash = sha256(&state)?;
    if manifest.get("state_sha256").and_then(Value::as_str) != Some(hash.as_str()) {
        return Err(Error::data("state.safetensors does not match its hash"));
    }
    let store = TensorStore::open_file(&state)?;
    let parts = named(lora, optimizer);
    // All is checked before anything is overwritten.
    let mut values = Vec::with_capacity(parts.len());
    for (name, tensor) in &parts {
        let view = store.require(name)?;
        view.expect_shape(tensor.dims())?;
        values.push(loaded(&view, tensor)?);
    }
    for ((_, target), values) in parts.iter().zip(&values) {
        target.slice_set(values, 0, 0).map_err(internal)?;
    }
    Ok(Position {
        step: number("step")?,
        num_tokens: number("num_tokens")?,
        metrics_bytes: number("metrics_bytes")?,
    })
}

/// Hashes a file without holding it: it is three times the adapter.
fn sha256(path: &Path) -> Result<String> {
    let mut hash = Sha256Hex::new();
    io::copy(&mut input::open(path)?.reader, &mut hash).map_err(|e| Error::reading(path, &e))?;
    Ok(hash.finish())
}

/// Returns the complete checkpoint directories, oldest first.
fn list(parent: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| {
            p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("step-") && !n.contains('.'))
        })
        .collect();
    found.sort();
    found
}

/// Returns everything that is stored, by name.
fn named<'a>(lora: &'a Lora, optimizer: &'a Optimizer) -> Vec<(String, &'a Tensor)> {
    let adapter = lora.named_tensors().map(|(name, t)| (format!("adapter/{name}"), t));
    adapter.chain(optimizer.parts(lora)).collect()
}

/// Returns how a tensor is stored: codes as they are, numbers in f32.
fn stored(tensor: &Tensor) -> Dtype {
    if tensor.dtype() == DType::U8 { Dtype::U8 } else { Dtype::F32 }
}

fn bytes(tensor: &Tensor) -> candle_core::Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    match stored(tensor) {
        Dtype::U8 => flat.to_vec1(),
        _ => Ok(flat.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect()),
    }
}

/// Returns a stored tensor in the type and shape of `like`.
fn loaded(view: &TensorView, like: &Tensor) -> Result<Tensor> {
    if view.dtype != stored(like) {
        let (name, found, needed) = (escape(view.name), view.dtype, stored(like));
        return Err(Error::data(format!("tensor \"{name}\" is {found} where {needed} is needed")));
    }
    let tensor = match view.dtype {
        Dtype::U8 => Tensor::from_slice(view.data, like.shape(), like.device()),
        _ => Tensor::from_vec(view.to_f32()?, like.shape(), like.device()),
    };
    tensor.and_then(|t| t.to_dtype(like.dtype())).map_err(internal)
}

fn internal(e: candle_core::Error) -> Error {
    Error::internal(format!("checkpoint: {e}"))
}
