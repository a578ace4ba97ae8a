//! Looking a model up in the cache.

use crate::{ModelName, Need, Settings, name::is_commit};
use kto_cli::{Context, Result, escape, input};
use std::path::{Path, PathBuf};

/// What the cache holds of a model.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// The snapshot, with all that is needed.
    Whole(PathBuf),
    /// The snapshot lacks this file.
    Part(String),
    /// Nothing.
    None,
}

impl Found {
    /// Says what is missing.
    pub fn lacks(&self) -> String {
        match self {
            Self::Part(name) => format!("the Hugging Face cache lacks its {}", escape(name)),
            _ => "the Hugging Face cache does not hold it".into(),
        }
    }
}

/// Finds the snapshot of a model.
pub fn find(settings: &Settings, name: &ModelName, need: &Need) -> Result<Found> {
    let folder = settings.cache.join(name.folder());
    let commit = match name.is_commit() {
        true => Some(name.revision.clone()),
        false => reference(&folder, &name.revision),
    };
    let Some(commit) = commit else { return Ok(Found::None) };
    let snapshot = folder.join("snapshots").join(commit);
    if !snapshot.is_dir() {
        return Ok(Found::None);
    }
    let lacking = need.lacking(&snapshot).at(name)?;
    Ok(lacking.map_or(Found::Whole(snapshot), Found::Part))
}

/// The commit that a revision stood for when it was last fetched.
pub fn reference(folder: &Path, revision: &str) -> Option<String> {
    let path = folder.join("refs").join(revision);
    let commit = if path.is_file() { input::read_text(&path, 4096).ok()? } else { return None };
    let commit = commit.trim();
    is_commit(commit).then(|| commit.to_string())
}
