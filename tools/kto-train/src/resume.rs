//! From which checkpoint a run goes on: the newest whole one, strictly the newest, or one that the user names.
//!
//! A checkpoint of another run is copied into the new run directory first, with the logs up to it, so that from then on there is
//! one kind of checkpoint only. Nothing is loaded before all of it has been verified.

use crate::{
    checkpoint::{self, BEST, MANIFEST, Manifest, Position, copy_dir},
    optimizer::Optimizer,
    plan::Plan,
    run_dir::{self, LOGS, RunDir},
};
use kto_cli::{
    Context, Error, Kind, Result, Ui,
    atomic::{self, AtomicDir},
    escape, input,
};
use kto_model::lora::Lora;
use std::{
    ffi::OsString,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

/// What `--resume` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The newest checkpoint that is whole, or the start.
    Auto,
    /// The newest checkpoint, or nothing.
    Strict,
    /// This checkpoint directory.
    From(PathBuf),
}

impl From<OsString> for Resume {
    fn from(text: OsString) -> Self {
        match text.to_str() {
            Some("auto") => Self::Auto,
            Some("strict") => Self::Strict,
            _ => Self::From(text.into()),
        }
    }
}

/// Returns the checkpoint directory that is named and is not one of `out`'s own.
pub fn foreign<'a>(out: &Path, how: Option<&'a Resume>) -> Option<&'a Path> {
    let Some(Resume::From(path)) = how else { return None };
    let (own, parent) = (fs::canonicalize(run_dir::checkpoints(out)), fs::canonicalize(path));
    let is_own = own.is_ok_and(|own| parent.is_ok_and(|p| p.parent() == Some(own.as_path())));
    (!is_own).then_some(path)
}

/// A checkpoint directory, and where it stands.
type Found = (PathBuf, Position);

/// What is needed to find a checkpoint.
pub struct Search<'a> {
    /// Where it is looked for, and brought to.
    pub dir: &'a RunDir,
    /// What it must be of.
    pub plan: &'a Plan,
    /// Hears what was passed over.
    pub ui: &'a Ui,
}

impl Search<'_> {
    /// Loads what `how` asks for into `lora` and `optimizer`, brings `best/` to its state, and returns where the run stands.
    pub fn load(&self, how: &Resume, lora: &Lora, optimizer: &Optimizer) -> Result<Position> {
        let found = match how {
            Resume::Auto => self.newest_whole(lora, optimizer)?,
            Resume::Strict => Some(self.newest(lora, optimizer)?),
            Resume::From(path) => Some(self.named(path, lora, optimizer)?),
        };
        self.restore_best(found.as_ref())?;
        Ok(found.map_or_else(Position::default, |(_, position)| position))
    }

    fn newest_whole(&self, lora: &Lora, optimizer: &Optimizer) -> Result<Option<Found>> {
        for (_, path) in checkpoint::list(&self.dir.checkpoints()).into_iter().rev() {
            match self.read(&path, lora, optimizer) {
                Ok(position) => return Ok(Some((path, position))),
                Err(e) => self.ui.warn(format_args!("checkpoint passed over: {}: {e}", shown(&path))),
            }
        }
        Ok(None)
    }

    fn newest(&self, lora: &Lora, optimizer: &Optimizer) -> Result<Found> {
        let parent = self.dir.checkpoints();
        let Some((_, path)) = checkpoint::list(&parent).pop() else {
            return Err(Error::config(format!("{}: no checkpoint to resume from", shown(&parent)))
                .with_hint("--resume=auto starts anew when there is none"));
        };
        match self.read(&path, lora, optimizer) {
            Ok(position) => Ok((path, position)),
            Err(e) => {
                let refused: Result<Found> = Err(refused(e).with_hint("--resume=auto takes an older one"));
                refused.at(shown(&path))
            }
        }
    }

    fn named(&self, path: &Path, lora: &Lora, optimizer: &Optimizer) -> Result<Found> {
        let manifest = Manifest::read(path).at(shown(path)).map_err(refused)?;
        let step = manifest.position.step;
        let mut own = path.to_path_buf();
        let is_copied = foreign(self.dir.path(), Some(&Resume::From(path.into()))).is_some();
        if is_copied {
            own = checkpoint::path_of(self.dir, step);
            self.bring(path, &own, manifest.position)?;
        }
        let position = self.read(&own, lora, optimizer).at(shown(&own)).map_err(|e| match e.kind() {
            // Our own file by now, not an input: that it cannot be opened is a failure of the disk.
            Kind::NoInput if is_copied => e.with_kind(Kind::Io),
            _ => refused(e),
        })?;
        for (later, path) in checkpoint::list(&self.dir.checkpoints()) {
            if later > step {
                fs::remove_dir_all(&path).map_err(|e| Error::writing(&path, &e))?;
            }
        }
        Ok((own, position))
    }

    /// Verifies a checkpoint of this directory, then loads it.
    fn read(&self, path: &Path, lora: &Lora, optimizer: &Optimizer) -> Result<Position> {
        let manifest = Manifest::read(path)?;
        run_dir::refuse_differences(&manifest.plan, self.plan)?;
        manifest.verify(path)?;
        checkpoint::load(path, &manifest, lora, optimizer)?;
        Ok(manifest.position)
    }

    /// Copies a checkpoint of another run, its logs up to there, and its reference log-probabilities.
    fn bring(&self, from: &Path, to: &Path, position: Position) -> Result<()> {
        let run = fs::canonicalize(from).map_err(|e| Error::reading(from, &e))?;
        let run = run.ancestors().nth(2).unwrap_or(Path::new("."));
        for (name, bytes) in LOGS.into_iter().zip(position.log_bytes()) {
            if bytes > 0 {
                copy_start(&run.join(name), &self.dir.file(name), bytes)?;
            }
        }
        for name in run_dir::REFERENCES {
            // Made anew when they are missing, or of something else.
            let _ = copy_start(&run.join(name), &self.dir.file(name), u64::MAX);
        }
        atomic::create_dir_all(&self.dir.checkpoints())?;
        let directory = AtomicDir::create(to, true)?;
        copy_dir(from, directory.path())?;
        if position.evaluated.best_step > 0 {
            copy_dir(&from.join(BEST), &directory.path().join(BEST))?;
        }
        directory.commit()
    }

    /// Makes `best/` what it was at the checkpoint: a run that was killed may have got further before.
    fn restore_best(&self, found: Option<&Found>) -> Result<()> {
        let best = self.dir.file(BEST);
        let Some((path, _)) = found.filter(|(_, position)| position.evaluated.best_step > 0) else {
            return match fs::remove_dir_all(&best) {
                Err(e) if best.exists() => Err(Error::writing(&best, &e)),
                _ => Ok(()),
            };
        };
        let directory = AtomicDir::create(&best, true)?;
        copy_dir(&path.join(BEST), directory.path())?;
        directory.commit()
    }
}

/// Returns the plan and the rows of a pack of a checkpoint directory. Error (78) when it is none.
pub fn peek(path: &Path) -> Result<Manifest> {
    if !path.join(MANIFEST).exists() {
        return Err(Error::config(format!("{}: not a checkpoint directory", shown(path)))
            .with_hint("--resume=RUN/checkpoints/step-N"));
    }
    Manifest::read(path).at(shown(path)).map_err(refused)
}

/// Returns the error of a checkpoint that is asked for by name: a damaged one is a mismatch (78), a disk that fails stays one (74).
pub fn refused(error: Error) -> Error {
    if error.kind() == Kind::Io { error } else { error.with_kind(Kind::Config) }
}

/// Copies the first `bytes` bytes of a file, or what there is of them.
fn copy_start(from: &Path, to: &Path, bytes: u64) -> Result<()> {
    let Ok(file) = input::open_file(from) else { return Ok(()) };
    let mut start = Vec::new();
    file.take(bytes).read_to_end(&mut start).map_err(|e| Error::reading(from, &e))?;
    atomic::write(to, &start)
}

fn shown(path: &Path) -> String {
    escape(&path.display().to_string())
}
