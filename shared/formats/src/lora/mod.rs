//! Adapters in every form that is read: PEFT and MLX, plain, rank-stabilised or weight-decomposed (DoRA), with ranks and alphas of
//! their own for some modules, with modules that were trained whole.
//!
//! All become one [`LoraSet`]: matrices in the orientation of PEFT and the factor of their product. [`crate::adapter`] is what of them training
//! starts from and writes. Invariant: matrices fit each other and hold finite values.

pub mod checkpoint;
mod mlx;
pub(crate) mod peft;

pub(crate) use peft::is_embedding;

use crate::{
    adapter,
    mmap::shown,
    model_dir::{ModelDir, same_origin},
    tensors::{TensorView, check_finite},
};
use kto_cli::{Error, Kind, Result};
use std::{collections::BTreeMap, path::Path};

/// The two matrices of one module and what their product counts for: ΔW = scale · B · A.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraModule {
    /// A: (R, in), row-major.
    pub a: Vec<f32>,
    /// B: (out, R), row-major. Of an embedding `out` is the vocabulary.
    pub b: Vec<f32>,
    /// Rank.
    pub r: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Rows of the weight.
    pub out_features: usize,
    /// Factor of the product.
    pub scale: f64,
    /// DoRA: the length that each row of W + ΔW gets.
    pub magnitude: Option<Vec<f32>>,
}

/// A tensor that was trained whole and takes the place of the base's.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Vec<f32>,
}

/// Whose form an adapter has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ecosystem {
    /// adapter_model.safetensors of PEFT.
    Peft,
    /// adapters.safetensors of mlx-lm.
    Mlx,
}

/// An adapter.
#[derive(Clone, Debug)]
pub struct LoraSet {
    /// Module (`model.layers.0.self_attn.q_proj`) to matrices.
    pub modules: BTreeMap<String, LoraModule>,
    /// Tensor name (`lm_head.weight`) to its new values.
    pub saved: BTreeMap<String, Saved>,
    /// Fingerprint of the base, where the file tells it.
    pub base_fingerprint: Option<String>,
    /// Where the base came from, as the settings say; a hint only.
    pub base_name: Option<String>,
    /// Probability of dropout in training.
    pub dropout: f64,
    /// Whose form it had.
    pub ecosystem: Ecosystem,
    /// Whether PEFT puts it on a model that takes images too, whose language model it was trained on.
    pub of_part: bool,
}

impl LoraSet {
    /// Reads an adapter directory of either form, a checkpoint of kto-train, or of a run directory its adapter. Errors: 66 for a missing
    /// file; 65 that names the field or tensor.
    pub fn read(path: &Path) -> Result<Self> {
        let dir = adapter::directory(path);
        let kind = std::fs::metadata(&dir).map_err(|e| hinted(Error::reading(&dir, &e), &dir))?;
        if !kind.is_dir() {
            return Err(Error::new(Kind::NoInput, format!("{}: not a directory", shown(&dir)))
                .with_hint("give the directory that holds adapter_config.json"));
        }
        if !dir.join(adapter::CONFIG).exists() && dir.join("run.json").is_file() {
            let text = format!("{}: a run that is not finished has no adapter yet", shown(&dir));
            let error = Error::new(Kind::NoInput, text).with_hint("kto-train --resume goes on with it");
            return Err(hinted(error, &dir));
        }
        let set = if checkpoint::is_one(&dir) && !dir.join(adapter::CONFIG).exists() {
            checkpoint::read(&dir)?
        } else if dir.join(mlx::WEIGHTS).exists() && !dir.join(adapter::WEIGHTS).exists() {
            mlx::read(&dir)?
        } else {
            peft::read(&dir)?
        };
        if set.modules.is_empty() && set.saved.is_empty() {
            return Err(Error::data(format!("{}: no LoRA matrices", shown(&dir))));
        }
        Ok(set)
    }

    /// Writes an adapter directory, the settings last. Errors (65): what the form cannot say.
    pub fn write(&self, dir: &Path, ecosystem: Ecosystem) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, &e))?;
        match ecosystem {
            Ecosystem::Peft => peft::write(self, dir),
            Ecosystem::Mlx => mlx::write(self, dir),
        }
    }

    /// Returns whether the adapter was trained on this base, or on a form of it; see [`adapter::Adapter::fits`].
    pub fn fits(&self, base: &ModelDir) -> bool {
        let trained_on = self.base_fingerprint.as_deref();
        trained_on.is_none_or(|trained_on| same_origin(trained_on, &base.fingerprint()))
    }

    /// Returns the largest rank.
    pub fn rank(&self) -> usize {
        self.modules.values().map(|m| m.r).max().unwrap_or(0)
    }
}

/// The values of a tensor. Error (65): one that is not finite.
fn finite(view: &TensorView) -> Result<Vec<f32>> {
    let values = view.to_f32()?;
    check_finite(view.name, 0, &values)?;
    Ok(values)
}

/// Names the newest checkpoint of the run that `path` is or lies in.
fn hinted(error: Error, path: &Path) -> Error {
    match path.ancestors().take(3).find_map(checkpoint::newest) {
        Some(newest) => {
            error.with_hint(format!("{} holds the adapter of the newest checkpoint", shown(&newest)))
        }
        None => error,
    }
}

#[cfg(test)]
mod tests;
