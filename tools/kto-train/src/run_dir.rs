//! The run directory: who may write it, what is in it, and its manifest.
//!
//! `run.json` plan and state, `metrics.jsonl` and `timing.jsonl` a line a step, `adapter/` the result, `checkpoints/step-N/`,
//! `reference.safetensors` cached reference log-probabilities, `data.kto.arrow` when the data came through a pipe. With held-out rows
//! `eval.jsonl`, `best/` and `eval_reference.safetensors`; `nonfinite.jsonl` when there was something to list.

use crate::{
    args::Args,
    plan::{self, Plan},
    resume::Resume,
    stored::{State, Stored},
};
use kto_cli::{
    Error, Kind, Record, Result, Ui, atomic, escape,
    lock::{RunLock, Wait},
};
use kto_model::memory::MemoryPlan;
use serde_json::{Map, Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A locked run directory.
pub struct RunDir {
    path: PathBuf,
    /// What the manifest says of configuration and inputs.
    record: Option<Record>,
    _lock: RunLock,
}

/// What an existing directory may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Refuse when a run is in it.
    Refuse,
    /// Remove the run that is in it.
    Replace,
    /// Go on with it.
    Resume,
}

/// Everything that a run writes; nothing else in the directory is ever touched. In the order in which a run is removed:
/// no checkpoint may outlive the run.json that says what it is of.
const OWN: [&str; 10] = [
    "checkpoints",
    "best",
    "adapter",
    "metrics.jsonl",
    "eval.jsonl",
    "nonfinite.jsonl",
    "timing.jsonl",
    "reference.safetensors",
    "eval_reference.safetensors",
    "run.json",
];

/// Logs that are cut to the checkpoint on `--resume`, in the order of [`crate::checkpoint::Position::log_bytes`].
pub const LOGS: [&str; 3] = ["metrics.jsonl", "eval.jsonl", "nonfinite.jsonl"];

/// Caches that a further run can use.
pub const REFERENCES: [&str; 2] = ["reference.safetensors", "eval_reference.safetensors"];

/// What a finished run is asked about. The first one is what make looks at: it appears last, and whole.
pub const RESULTS: [&str; 3] =
    ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl"];

/// What shows that a run is in a directory.
const SIGNS: [&str; 3] = ["run.json", "checkpoints", "adapter"];

impl RunDir {
    /// Creates `path` and locks it with `lock`. Errors: 73 when it holds a run or cannot be created, 75 when another process uses it.
    pub fn open(
        path: &Path,
        existing: Existing,
        lock: impl FnOnce(&Path) -> Result<RunLock>,
    ) -> Result<Self> {
        atomic::create_dir_all(path)?;
        let lock = lock(path)?;
        let this = Self { path: path.to_path_buf(), record: None, _lock: lock };
        check(path, existing)?;
        // A run that was killed at its last checkpoint, or with a best adapter half replaced, writes no further one.
        atomic::sweep(&this.checkpoints());
        atomic::sweep(path);
        // Copies that a killed process has left are of no use: they are made again.
        if existing == Existing::Replace || existing == Existing::Refuse && is_copying(path) {
            this.clear()?;
        }
        Ok(this)
    }

    /// Takes what the manifest will say of configuration and inputs.
    pub fn with_record(mut self, record: Record) -> Self {
        self.record = Some(record);
        self
    }

    /// Writes the rule for make, and with `--manifest FILE` a copy of run.json.
    pub fn finish(&self) -> Result<()> {
        self.record.as_ref().map_or(Ok(()), |record| finish(&self.path, record))
    }

    /// Fails (74) when somebody has removed or moved the directory: what is written there would be of no use.
    pub fn still_there(&self) -> Result<()> {
        if self.file("run.json").exists() {
            return Ok(());
        }
        let text = format!(
            "{}: removed or moved while the run was under way",
            escape(&self.path.display().to_string())
        );
        Err(Error::new(Kind::Io, text)
            .with_hint("the run can go on from what was saved before, with --out there and --resume"))
    }

    /// Returns what run.json says.
    pub fn stored(&self) -> Option<Stored> {
        Stored::read(&self.path)
    }

    /// Returns the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns where the checkpoints are.
    pub fn checkpoints(&self) -> PathBuf {
        checkpoints(&self.path)
    }

    /// Returns the path of one of the run's files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes run.json.
    pub fn write_manifest(
        &self,
        plan: &Plan,
        memory: &MemoryPlan,
        state: State,
        result: Value,
    ) -> Result<()> {
        let mut sections = match &self.record {
            Some(record) => record.sections(&self.results(state == State::Finished))?,
            None => Map::new(),
        };
        let manifest = json!({
            "format": 1,
            "tool": "kto-train",
            "version": kto_cli::version::number(),
            "state": state.name(),
            "configuration": sections.remove("configuration"),
            "inputs": sections.remove("inputs"),
            "outputs": sections.remove("outputs"),
            "plan": plan,
            // Not a part of the plan: all but the rows of a pack may change on --resume.
            "memory": {
                "pack_rows": memory.pack_rows,
                "head_rows": memory.head_rows,
                "reference_rows": memory.reference_rows,
                "kept_layers": memory.kept_layers,
                "stream": memory.stream,
                "predicted_peak": memory.peak,
            },
            // When they are other ones, the weights are hashed again on --resume.
            "base_files": plan.typed.base_files,
            "model": plan.typed.model.display().to_string(),
            "result": result,
            "environment": sections.remove("environment"),
        });
        let mut text =
            serde_json::to_vec_pretty(&manifest).map_err(|e| Error::internal(format!("run.json: {e}")))?;
        text.push(b'\n');
        atomic::write(&self.file("run.json"), &text)
    }

    /// Returns the files that a finished run is asked about.
    fn results(&self, finished: bool) -> Vec<PathBuf> {
        let paths = RESULTS.iter().map(|name| self.file(name));
        paths.filter(|path| finished && path.exists()).collect()
    }

    fn clear(&self) -> Result<()> {
        OWN.iter().try_for_each(|name| self.remove(name))
    }

    /// Removes one of the run's files or directories, if it is there.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.file(name);
        let result = match fs::symlink_metadata(&path) {
            Err(_) => Ok(()),
            Ok(m) if m.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
        };
        result.map_err(|e| Error::writing(&path, &e))
    }
}

/// Returns where the checkpoints of the run directory `path` are.
pub fn checkpoints(path: &Path) -> PathBuf {
    path.join("checkpoints")
}

/// Writes the rule for make, and with `--manifest FILE` a copy of run.json.
pub fn finish(path: &Path, record: &Record) -> Result<()> {
    record.finish_with(&[path.join(RESULTS[0])], &path.join("run.json"))
}

/// Whether the directory holds no more than what a killed process has copied into it.
fn is_copying(path: &Path) -> bool {
    Stored::read(path).is_some_and(|stored| stored.copied_from().is_some())
}

/// Refuses (73) a directory with a run in it, unless that is wanted. Called before the model is loaded, and under the lock.
pub fn check(path: &Path, existing: Existing) -> Result<()> {
    let shown = escape(&path.display().to_string());
    // Beside a run there may be anything: only what a run writes is ever touched.
    if let Some(foreign) = foreign(path).filter(|_| Stored::read(path).is_none()) {
        let text = format!("{shown}: not a run directory: there is \"{foreign}\" in it");
        return Err(Error::new(Kind::CantCreate, text).with_hint("--out with a new directory"));
    }
    let is_run = SIGNS.iter().any(|name| path.join(name).exists()) && !is_copying(path);
    if existing != Existing::Refuse || !is_run {
        return Ok(());
    }
    Err(Error::new(Kind::CantCreate, format!("{shown}: there is a run in this directory"))
        .with_hint("--resume to go on with it, --force to replace it"))
}

/// Locks a run directory. Error: 75 when another process uses it for longer than `wait`.
pub fn lock(path: &Path, wait: Wait, ui: &Ui) -> Result<RunLock> {
    RunLock::acquire_within(path, wait, |holder| ui.note(format_args!("waiting: {holder}")))
}

/// Returns a file that no run has written. Token files may lie beside a run.
fn foreign(path: &Path) -> Option<String> {
    let known = |name: &str| {
        // What --depfile, --manifest and a shell leave beside a run is nobody's reason to refuse it.
        let beside = [".kto.arrow", ".log", ".d", "manifest.json"];
        OWN.contains(&name) || name.starts_with('.') || beside.iter().any(|end| name.ends_with(end))
    };
    let names =
        fs::read_dir(path).ok()?.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()));
    names.filter(|n| !known(n)).min().map(|n| escape(&n))
}

/// Refuses (2) to replace a run by one that reads from it: its files would be gone before the new run has ended.
pub fn check_inputs(args: &Args, existing: Existing) -> Result<()> {
    let replaced = existing == Existing::Replace;
    let Some(out) = fs::canonicalize(&args.out).ok().filter(|_| replaced) else { return Ok(()) };
    let checkpoint = match &args.resume {
        Some(Resume::From(path)) => Some(path),
        _ => None,
    };
    let inputs = [
        ("--model", Some(&args.model)),
        ("--init-adapter", args.init_adapter.as_ref()),
        ("the checkpoint of --resume", checkpoint),
    ];
    for (flag, path) in inputs {
        let Some(input) = path.and_then(|p| fs::canonicalize(p).ok()) else { continue };
        if OWN.iter().any(|name| input.starts_with(out.join(name))) {
            let text = format!("--force would remove {flag}, which is a part of the run in --out");
            return Err(Error::usage(text).with_hint("another --out, or move the directory away first"));
        }
    }
    Ok(())
}

/// Lists the fields in which two plans differ, as (field, old, new).
pub fn differences(old: &Value, new: &Plan) -> Vec<(String, String, String)> {
    let new = serde_json::to_value(new).unwrap_or_default();
    let (Some(old), Some(new)) = (old.as_object(), new.as_object()) else { return Vec::new() };
    let gone = old.keys().filter(|field| !new.contains_key(*field));
    let differs = |field: &String| {
        let value = new.get(field).cloned().unwrap_or_default();
        let before = old.get(field).cloned().or_else(|| plan::before(field))?;
        (before != value).then(|| (field.clone(), before.to_string(), value.to_string()))
    };
    new.keys().chain(gone).filter_map(differs).collect()
}

/// Returns the differences as a message names them.
pub fn told(differences: &[(String, String, String)]) -> String {
    let text = differences.iter().map(|(field, old, new)| format!("{field} was {old}, is {new}"));
    text.collect::<Vec<_>>().join("; ")
}

/// Refuses (78) to go on with another plan than the stored one, field by field.
pub fn refuse_differences(stored: &Value, plan: &Plan) -> Result<()> {
    let differences = differences(stored, plan);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::config(format!("cannot resume: {}", told(&differences)))
        .with_hint("give the run's own flags and files, or start anew with another --out"))
}
