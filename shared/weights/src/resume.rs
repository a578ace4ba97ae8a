//! What makes two runs the same job, and the directory that they both work on.

use kto_cli::{Result, Ui, atomic::AtomicDir};
use kto_formats::{model_dir::ModelDir, safetensors_placed};
use std::path::Path;

/// Starts the directory `target`, or goes on with what an earlier run of the same `job` has left of it; says what of that is not used.
/// Errors: as [`AtomicDir::resume`] has them.
pub fn resume(target: &Path, force: bool, if_changed: bool, job: &str, ui: &Ui) -> Result<AtomicDir> {
    let directory = AtomicDir::resume(target, force, if_changed, job, &safetensors_placed::seal)?;
    directory.notes().iter().for_each(|note| ui.note(note));
    Ok(directory)
}

/// Returns a text that is another one when a byte of the model's weights has changed, or may have: the fingerprint, and what the system
/// says of the files. A copy of a model is another source: results of both never mix, the work begins anew.
pub fn source(model: &ModelDir) -> String {
    let stamps = model.tensors.stamps().map(|stamp| format!("\n{stamp:?}"));
    format!("{}{}", model.fingerprint(), stamps.collect::<String>())
}
