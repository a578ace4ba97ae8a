//! What run.json says of the run that is in a directory: its plan, how far it is, what it was begun with.
//!
//! Written by [`crate::run_dir::RunDir::write_manifest`]; read before a run goes on, and by `--if-changed`.

use crate::{run_dir::RESULTS, weights::Weights};
use kto_cli::hash;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It begins from a checkpoint of another run: all that is in the directory are copies, perhaps not yet all of them.
    Copying,
    /// It trains, or was killed.
    Running,
    /// It has had its time, or was told to stop, and is saved.
    Paused,
    /// It has ended.
    Finished,
}

impl State {
    /// Returns the word for it in run.json.
    pub fn name(self) -> &'static str {
        match self {
            Self::Copying => "copying",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Finished => "finished",
        }
    }
}

/// The run.json of a run directory.
pub struct Stored {
    run: PathBuf,
    manifest: Value,
}

impl Stored {
    /// Reads the run.json in `run`; nothing when there is none that can be read.
    pub fn read(run: &Path) -> Option<Self> {
        let bytes = kto_cli::input::read(&run.join("run.json"), 16 << 20).ok()?;
        Some(Self { run: run.into(), manifest: serde_json::from_slice(&bytes).ok()? })
    }

    /// Returns the plan.
    pub fn plan(&self) -> Option<&Value> {
        self.manifest.get("plan").filter(|plan| plan.is_object())
    }

    /// Returns whether the run has ended and its results are there, byte for byte.
    pub fn is_finished(&self) -> bool {
        self.is(State::Finished) && RESULTS.iter().all(|name| self.has(name))
    }

    /// Whether a result is what run.json says of it. The run may have been moved since: its own part of the path counts.
    fn has(&self, name: &str) -> bool {
        let path = self.run.join(name);
        let outputs = self.manifest.get("outputs").and_then(Value::as_array);
        let is_it = |entry: &&Value| entry["path"].as_str().is_some_and(|p| Path::new(p).ends_with(name));
        match outputs.and_then(|all| all.iter().find(is_it)) {
            Some(entry) => match hash::files(&[path]).as_deref() {
                Ok([found]) => found.sha256.as_deref() == entry["sha256"].as_str(),
                _ => false,
            },
            None => path.exists(),
        }
    }

    /// Returns the checkpoint of another run from which this one begins, when it was killed while it copied that.
    pub fn copied_from(&self) -> Option<&str> {
        let from = self.manifest.get("result")?.get("from")?.as_str();
        from.filter(|_| self.is(State::Copying))
    }

    /// Returns the rows of a pack with which the run has begun: sums over other packs would differ in their last bits.
    pub fn pack_rows(&self) -> Option<usize> {
        let rows = self.manifest.get("memory")?.get("pack_rows")?.as_u64()?;
        usize::try_from(rows).ok().filter(|rows| *rows > 0)
    }

    /// Returns the base's weights as the run found them.
    pub fn weights(&self) -> Option<Weights> {
        let sha256 = self.plan()?.get("base_weights")?.as_str()?.to_string();
        let files = serde_json::from_value(self.manifest.get("base_files")?.clone()).ok()?;
        Some(Weights { sha256, files })
    }

    fn is(&self, state: State) -> bool {
        self.manifest.get("state").is_some_and(|name| name == state.name())
    }
}
