//! Opening a model with its adapter, and checking that they belong together.

use crate::args::ModelArgs;
use candle_core::DType;
use kto_cli::{Context, Error, Record, Result, Ui, escape};
use kto_formats::{
    adapter::{self, Adapter},
    model_dir::ModelDir,
};
use kto_hub::Need;
use kto_model::{architecture::Architecture, base::BaseModel, fit, lora::Lora, weights};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Replaces a name on the hub by the directory in the cache, downloading it if need be.
pub fn locate(model: &mut PathBuf, ui: &Ui) -> Result<()> {
    let known = |config: &Value| Architecture::from_config(config).map(drop);
    *model = kto_hub::locate(model, &Need::Weights(known), ui)?;
    Ok(())
}

/// A base and perhaps an adapter on it.
pub struct Policy {
    /// The base.
    pub base: BaseModel,
    /// The adapter.
    pub lora: Option<Lora>,
    positions: usize,
}

impl Policy {
    /// Opens what the flags name, for rows of at most `positions` tokens.
    pub fn open(args: &ModelArgs, positions: usize, ui: &Ui) -> Result<Self> {
        let directory = ModelDir::open(&args.model)?;
        directory.notes.iter().for_each(|note| ui.warn(note));
        let architecture = Architecture::from_config(&directory.config).at(shown(&args.model))?;
        weights::check(&architecture, &directory).at(shown(&args.model))?;
        if let Some(text) = weights::unused(&architecture, &directory) {
            ui.warn(format_args!("{}: {text}", shown(&args.model)));
        }
        let lora = match &args.adapter {
            Some(path) => Some(adapter(path, "--adapter", &directory, &architecture, args.force_base)?),
            None => None,
        };
        let base = BaseModel::load(directory, DType::F32, positions).at(shown(&args.model))?;
        Ok(Self { base, lora, positions })
    }

    /// Makes room for sequences of `positions` tokens.
    pub fn reserve(&mut self, positions: usize) -> Result<()> {
        if positions > self.positions {
            let a = &self.base.architecture;
            self.positions = positions.max((2 * self.positions).min(a.max_positions));
            self.base.set_positions(self.positions)?;
        }
        Ok(())
    }
}

impl Policy {
    /// Notes what was opened.
    pub fn note(&self, args: &ModelArgs, record: &mut Record) {
        record.model(&args.model, || self.base.directory().fingerprint());
        args.adapter.iter().for_each(|path| record.directory(&adapter::directory(path)));
    }
}

/// Reads an adapter for a base. Error 78 when it was trained on another one and `force` is not given.
pub fn adapter(
    path: &Path,
    flag: &str,
    directory: &ModelDir,
    architecture: &Architecture,
    force: bool,
) -> Result<Lora> {
    let adapter = Adapter::read(&adapter::directory(path))?;
    if !force {
        fit::check_adapter(directory, &adapter, format_args!("{flag} {}", shown(path)))?;
    }
    Lora::from_adapter(architecture, &adapter, DType::F32).at(shown(path))
}

/// Sets the number of worker threads of the process.
pub fn set_threads(threads: Option<u32>) -> Result<()> {
    // Not left to the first use, which would panic where no thread can be started. 0: as many as there are cores.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.map_or(0, |n| n as usize));
    pool.build_global().map_err(Error::threads)
}

/// A path for messages.
pub fn shown(path: &Path) -> String {
    escape(&path.display().to_string())
}
