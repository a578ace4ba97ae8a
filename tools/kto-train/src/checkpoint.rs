//! Checkpoints: everything that the next step depends on beside the plan, in a directory that appears whole.
//!
//! Order, KL partners, dropout and learning rate are functions of the step, so the state is the adapter in f32, the moments,
//! the step, and how long metrics.jsonl was.

use crate::{optimizer::Optimizer, run_dir::RunDir};
use candle_core::Tensor;
use kto_cli::{Error, Kind, Result, atomic, hash::Sha256Hex, input};
use kto_formats::{
    safetensors_out::{SafetensorsWriter, TensorSpec},
    tensors::TensorStore,
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
    atomic::create_dir_all(&parent)?;
    let directory = atomic::AtomicDir::create(&parent.join(format!("step-{:08}", position.step)), true)?;
    let state = directory.path().join("state.safetensors");
    let parts = named(lora, optimizer);
    let specs = parts.iter().map(|(name, t)| TensorSpec::new(name.clone(), Dtype::F32, t.dims())).collect();
    let mut writer = SafetensorsWriter::new(&state, specs, &BTreeMap::new())?;
    for (name, tensor) in &parts {
        let values = tensor
            .flatten_all()
            .and_then(|t| t.to_vec1::<f32>())
            .map_err(|e| Error::internal(format!("checkpoint: {e}")))?;
        writer.write(name, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())?;
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
        values.push(view.to_f32()?);
    }
    for ((_, target), values) in parts.iter().zip(values) {
        let set = || {
            let loaded =
                Tensor::from_vec(values, target.shape(), target.device())?.to_dtype(target.dtype())?;
            target.slice_set(&loaded, 0, 0)
        };
        set().map_err(|e| Error::internal(format!("checkpoint: {e}")))?;
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
    // Our own file, not an input: that it cannot be opened is a failure of the disk.
    let mut file = input::open(path).map_err(|e| e.with_kind(Kind::Io))?;
    io::copy(&mut file.reader, &mut hash).map_err(|e| Error::reading(path, &e))?;
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

fn named<'a>(lora: &'a Lora, optimizer: &'a Optimizer) -> Vec<(String, &'a Tensor)> {
    let part = |prefix: &'static str, lora: &'a Lora| {
        lora.named().flat_map(move |(name, f)| {
            [(format!("{prefix}/{name}.lora_A"), &f.a), (format!("{prefix}/{name}.lora_B"), &f.b)]
        })
    };
    part("adapter", lora).chain(part("m", &optimizer.m)).chain(part("v", &optimizer.v)).collect()
}
