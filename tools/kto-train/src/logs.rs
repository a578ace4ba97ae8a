//! The logs of a run, and their lengths at a checkpoint.

use crate::{
    checkpoint::Position,
    run_dir::{LOGS, RunDir},
    run_log::RunLog,
};
use kto_cli::{Error, Result};
use serde_json::Value;
use std::{fs, path::PathBuf};

/// The files that grow with the run.
pub struct Logs {
    /// A line a step.
    pub metrics: RunLog,
    /// The same with times; it is never cut.
    pub timing: RunLog,
    /// A line an evaluation.
    eval: Option<RunLog>,
    /// Steps that were not finite; there is no file before the first one.
    nonfinite: Option<RunLog>,
    nonfinite_path: PathBuf,
}

impl Logs {
    /// Opens the logs and cuts them to `position`. Where a log is shorter than that, because someone has shortened it, the position
    /// follows it.
    pub fn open(dir: &RunDir, position: &mut Position, evaluates: bool) -> Result<Self> {
        let [metrics, eval, nonfinite] = LOGS.map(|name| dir.file(name));
        if position.nonfinite_bytes == 0 && nonfinite.exists() {
            fs::remove_file(&nonfinite).map_err(|e| Error::writing(&nonfinite, &e))?;
        }
        let logs = Self {
            metrics: RunLog::open_at(metrics, position.metrics_bytes)?,
            timing: RunLog::open_end(dir.file("timing.jsonl"))?,
            eval: if evaluates { Some(RunLog::open_at(eval, position.eval_bytes)?) } else { None },
            nonfinite: match position.nonfinite_bytes {
                0 => None,
                bytes => Some(RunLog::open_at(nonfinite.clone(), bytes)?),
            },
            nonfinite_path: nonfinite,
        };
        position.metrics_bytes = logs.metrics.bytes();
        position.eval_bytes = logs.eval.as_ref().map_or(0, RunLog::bytes);
        position.nonfinite_bytes = logs.nonfinite.as_ref().map_or(0, RunLog::bytes);
        Ok(logs)
    }

    /// Appends a line to eval.jsonl and returns its new length.
    pub fn append_eval(&mut self, line: &Value) -> Result<u64> {
        match &mut self.eval {
            Some(log) => log.append(line),
            None => Err(Error::internal("an evaluation without a log")),
        }
    }

    /// Appends a line to nonfinite.jsonl and returns its new length.
    pub fn append_nonfinite(&mut self, line: &Value) -> Result<u64> {
        if self.nonfinite.is_none() {
            self.nonfinite = Some(RunLog::open_at(self.nonfinite_path.clone(), 0)?);
        }
        self.nonfinite.as_mut().map_or(Ok(0), |log| log.append(line))
    }

    /// Waits until all that a checkpoint counts on is on the disk.
    pub fn sync(&self) -> Result<()> {
        [Some(&self.metrics), self.eval.as_ref(), self.nonfinite.as_ref()]
            .into_iter()
            .flatten()
            .try_for_each(RunLog::sync)
    }
}
