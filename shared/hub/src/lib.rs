//! Where models come from: a directory, the Hugging Face cache, or the hub.
//!
//! Called by every tool that takes a model, before anything else is done with it. [`locate`] turns what the user gave
//! into a directory. The layout of the cache is huggingface_hub's, so both share it: `blobs/<etag>` hold the bytes,
//! `snapshots/<commit>/…` are symbolic links to them, `refs/<revision>` name the commit.
//! Invariants: what the cache holds whole is used without asking the network, so a run does not change because a model
//! was updated; a blob appears under its name only when all of it is there and its hash is right; the token goes to the
//! hub's own host and into no message. Deliberately absent: uploads, data sets, the Xet protocol (the hub serves the
//! same files over HTTP).

#![forbid(unsafe_code)]

mod cache;
#[cfg(feature = "download")]
mod download;
mod files;
mod name;
mod scan;
mod settings;

pub use files::Need;
pub use name::ModelName;
pub use scan::{CachedModel, scan};
pub use settings::Settings;

use kto_cli::{Error, Kind, Result, Ui, escape};
use std::path::{Path, PathBuf};

/// Returns the directory that `given` means: itself when it is one, else the snapshot of `org/name[@revision]` in the
/// cache, downloaded if need be and allowed.
///
/// Errors: 66 when there is no such directory or model, or it may not be downloaded; 65 when what arrives is not what
/// the hub announced, or the model has no weights in safetensors; 69 when the hub cannot be reached; 75 when it asks to
/// come back later; 73 or 74 when the cache cannot be written.
pub fn locate(given: &Path, need: &Need, ui: &Ui) -> Result<PathBuf> {
    match named(given) {
        Some(name) => locate_named(&Settings::from_environment()?, &name, need, ui),
        None if !given.exists() => Err(Error::new(
            Kind::NoInput,
            format!("{}: no such directory", escape(&given.display().to_string())),
        )
        .with_hint("a model on the hub is called org/name[@revision]")),
        None => Ok(given.into()),
    }
}

/// Returns the name of a model on the hub that `given` is; None for what exists as a file and what can only be one.
pub fn named(given: &Path) -> Option<ModelName> {
    if given.exists() { None } else { given.to_str().and_then(ModelName::parse) }
}

/// Finds a model of the hub; see [`locate`].
pub fn locate_named(settings: &Settings, name: &ModelName, need: &Need, ui: &Ui) -> Result<PathBuf> {
    let found = cache::find(settings, name, need)?;
    if let cache::Found::Whole(path) = &found {
        ui.detail(format_args!("{name}: {}", escape(&path.display().to_string())));
        return Ok(path.clone());
    }
    let lacks = found.lacks();
    if settings.offline {
        return Err(refused(name, &lacks, "and HF_HUB_OFFLINE forbids to download it"));
    }
    #[cfg(feature = "download")]
    return download::fetch(settings, name, need, ui);
    #[cfg(not(feature = "download"))]
    Err(refused(name, &lacks, "and this tool was built without downloads (feature hub)"))
}

fn refused(name: &ModelName, lacks: &str, why: &str) -> Error {
    Error::new(Kind::NoInput, format!("{name}: no such directory, {lacks}, {why}"))
        .with_hint("--model takes a directory, or org/name[@revision] of a model in the Hugging Face cache")
}
