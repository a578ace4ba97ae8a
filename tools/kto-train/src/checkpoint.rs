//! Checkpoints: everything that the next step depends on beside the plan, in a directory that appears whole.
//!
//! Order, KL partners, dropout and learning rate are functions of the step, so the state is the adapter in f32, the optimizer's
//! parts as they are (f32, or 8-bit codes with their scales), the step, how long the logs were, and what the evaluations have
//! found, with the best adapter. Which checkpoint a run goes on from is decided in [`crate::resume`].

mod manifest;

pub use manifest::{MANIFEST, Manifest};

use crate::{cadence::Keep, optimizer::Optimizer, run_dir::RunDir};
use candle_core::{DType, Tensor};
use kto_cli::{
    Error, Kind, Result,
    atomic::{self, AtomicDir},
    escape,
};
use kto_formats::{
    lora::checkpoint::OF_PART,
    safetensors_out::{SafetensorsWriter, TensorSpec},
    tensors::{TensorStore, TensorView},
};
use kto_model::lora::Lora;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The numbers.
const STATE: &str = "state.safetensors";
/// Elements that are written at a time.
const PIECE: usize = 1 << 18;
/// The best adapter, in the run directory and in a checkpoint.
pub const BEST: &str = "best";

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Steps done.
    pub step: u64,
    /// Those of them that had no effect: loss or gradient was not finite.
    pub skipped: u64,
    /// Tokens seen.
    pub num_tokens: u64,
    /// Length of metrics.jsonl in bytes.
    pub metrics_bytes: u64,
    /// Length of eval.jsonl.
    pub eval_bytes: u64,
    /// Length of nonfinite.jsonl.
    pub nonfinite_bytes: u64,
    /// What the evaluations have found.
    pub evaluated: Evaluated,
}

impl Position {
    /// Returns the optimizer's own count of its steps: as torch's under a GradScaler, skipped steps are none.
    pub fn updates(&self) -> u64 {
        self.step - self.skipped
    }

    /// Returns the lengths of the logs, in the order of [`crate::run_dir::LOGS`].
    pub fn log_bytes(&self) -> [u64; 3] {
        [self.metrics_bytes, self.eval_bytes, self.nonfinite_bytes]
    }
}

/// What the evaluations of a run have found so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// The step of the last one; 0 when there was none.
    pub step: u64,
    /// The step of the one with the lowest loss; 0 when none had a finite one.
    pub best_step: u64,
    /// Its loss.
    pub best_loss: f64,
    /// Evaluations since then.
    pub waited: u64,
}

impl Evaluated {
    /// Notes an evaluation after `step`; whether it is the best one. A loss that is not finite never is.
    pub fn note(&mut self, step: u64, loss: f64) -> bool {
        self.step = step;
        let better = loss.is_finite() && (self.best_step == 0 || loss < self.best_loss);
        if better {
            (self.best_step, self.best_loss, self.waited) = (step, loss, 0);
        } else {
            self.waited += 1;
        }
        better
    }
}

/// What a checkpoint is made of.
pub struct State<'a> {
    /// Where the run stands.
    pub position: Position,
    /// The adapter.
    pub lora: &'a Lora,
    /// The moments.
    pub optimizer: &'a Optimizer,
    /// The plan.
    pub plan: Value,
    /// Rows of a pack.
    pub pack_rows: usize,
    /// Whether the base is the language model of one that takes images too.
    pub of_part: bool,
}

/// Writes a checkpoint and removes old ones.
pub fn save(run: &RunDir, state: State, keep: Keep) -> Result<()> {
    let parent = run.checkpoints();
    run.still_there()?;
    atomic::create_dir_all(&parent)?;
    let step = state.position.step;
    let directory = AtomicDir::create(&path_of(run, step), true)?;
    let metadata = state.of_part.then(|| (OF_PART.to_string(), "true".to_string())).into_iter().collect();
    write_tensors(&directory.path().join(STATE), &named(state.lora, state.optimizer), &metadata)?;
    if state.position.evaluated.best_step > 0 {
        // No hard links: whoever edits a file of best/ would edit the checkpoints.
        copy_best(run, &directory.path().join(BEST))?;
    }
    Manifest::new(directory.path(), state.position, state.pack_rows, state.plan)?.write(directory.path())?;
    directory.commit()?;
    let steps = list(&parent).into_iter().map(|(step, _)| step).collect();
    for old in keep.outdated(steps, step) {
        // An old checkpoint that stays is no reason to stop.
        let _ = fs::remove_dir_all(path_of(run, old));
    }
    Ok(())
}

/// Returns where the checkpoint of `step` is.
pub fn path_of(run: &RunDir, step: u64) -> PathBuf {
    run.checkpoints().join(format!("step-{step:08}"))
}

/// Loads the numbers of the checkpoint `path` into `lora` and `optimizer`. `manifest` has been verified.
pub fn load(path: &Path, manifest: &Manifest, lora: &Lora, optimizer: &Optimizer) -> Result<()> {
    if !manifest.files.contains_key(STATE) {
        return Err(Error::data(format!("no {STATE}")));
    }
    let store = TensorStore::open_file(&path.join(STATE))?;
    let parts = named(lora, optimizer);
    // All is checked before anything is overwritten, and one tensor at a time is in memory twice.
    let mut views = Vec::with_capacity(parts.len());
    for (name, tensor) in &parts {
        let view = store.require(name)?;
        view.expect_shape(tensor.dims())?;
        if view.dtype != stored(tensor) {
            let (name, found, needed) = (escape(view.name), view.dtype, stored(tensor));
            return Err(Error::data(format!("tensor \"{name}\" is {found} where {needed} is needed")));
        }
        views.push(view);
    }
    for ((_, target), view) in parts.iter().zip(&views) {
        target.slice_set(&loaded(view, target)?, 0, 0).map_err(internal)?;
    }
    Ok(())
}

/// Copies the best adapter so far. Error (74): somebody has removed it.
pub fn copy_best(run: &RunDir, to: &Path) -> Result<()> {
    let best = run.file(BEST);
    if best.is_dir() {
        return copy_dir(&best, to);
    }
    let text = format!("{}: removed while the run was under way", escape(&best.display().to_string()));
    Err(Error::new(Kind::Io, text).with_hint("--resume brings back the one of the newest checkpoint"))
}

/// Returns the checkpoint directories by step, oldest first.
pub fn list(parent: &Path) -> Vec<(u64, PathBuf)> {
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
    let mut found: Vec<(u64, PathBuf)> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|path| path.is_dir())
        .filter_map(|path| Some((step(&path)?, path)))
        .collect();
    found.sort();
    found
}

/// Copies the files of a directory, not its folders, into another one.
pub fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(|e| Error::writing(to, &e))?;
    for entry in fs::read_dir(from).map_err(|e| Error::reading(from, &e))? {
        let (path, name) = entry.map(|e| (e.path(), e.file_name())).map_err(|e| Error::reading(from, &e))?;
        if path.is_file() {
            let target = to.join(name);
            fs::copy(&path, &target).map_err(|e| Error::writing(&target, &e))?;
        }
    }
    Ok(())
}

/// Returns everything that is stored, by name.
fn named<'a>(lora: &'a Lora, optimizer: &'a Optimizer) -> Vec<(String, &'a Tensor)> {
    let adapter = lora.named_tensors().map(|(name, t)| (format!("adapter/{name}"), t));
    adapter.chain(optimizer.parts(lora)).collect()
}

fn write_tensors(
    path: &Path,
    parts: &[(String, &Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let specs = parts.iter().map(|(name, t)| TensorSpec::new(name.clone(), stored(t), t.dims())).collect();
    let mut writer = SafetensorsWriter::new(path, specs, metadata)?;
    for (name, tensor) in parts {
        // A whole head is large: no copy of all of it.
        let flat = tensor.flatten_all().map_err(internal)?;
        let count = flat.elem_count();
        for start in (0..count).step_by(PIECE) {
            let piece = flat.narrow(0, start, PIECE.min(count - start)).map_err(internal)?;
            writer.write(name, &bytes(&piece).map_err(internal)?)?;
        }
    }
    writer.finish()
}

/// Returns how a tensor is stored: codes as they are, numbers in f32.
fn stored(tensor: &Tensor) -> Dtype {
    if tensor.dtype() == DType::U8 { Dtype::U8 } else { Dtype::F32 }
}

/// Returns the bytes of a vector.
fn bytes(flat: &Tensor) -> candle_core::Result<Vec<u8>> {
    match stored(flat) {
        Dtype::U8 => flat.to_vec1(),
        _ => Ok(flat.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect()),
    }
}

/// Returns a stored tensor in the type and shape of `like`.
fn loaded(view: &TensorView, like: &Tensor) -> Result<Tensor> {
    let tensor = match view.dtype {
        Dtype::U8 => Tensor::from_slice(view.data, like.shape(), like.device()),
        _ => Tensor::from_vec(view.to_f32()?, like.shape(), like.device()),
    };
    tensor.and_then(|t| t.to_dtype(like.dtype())).map_err(internal)
}

fn internal(e: candle_core::Error) -> Error {
    Error::internal(format!("checkpoint: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lower_loss_is_better() {
        let mut e = Evaluated::default();
        let noted = [f64::NAN, 0.5, 0.5, 0.6, 0.4, f64::INFINITY].map(|loss| {
            let better = e.note(e.step + 10, loss);
            (better, e.best_step, e.waited)
        });
        let expected =
            [(false, 0, 1), (true, 20, 0), (false, 20, 1), (false, 20, 2), (true, 50, 0), (false, 50, 1)];
        assert_eq!(noted, expected);
        assert_eq!((e.step, e.best_loss), (60, 0.4));
    }
}
