//! Where records go: one output, or the files of a directory; as JSON Lines or Parquet.

use crate::{
    args::OutFormat,
    parquet::ParquetSink,
    plan::{Plan, Split},
};
use kto_cli::{
    Error, Kind, Record, Result,
    atomic::{AtomicDir, AtomicFile},
    output::Output,
};
use kto_formats::record;
use serde_json::json;
use std::path::PathBuf;

/// The place of a run's records.
pub enum Sink {
    /// Lines.
    Lines {
        out: Output,
        /// Something has been given to the output.
        begun: bool,
    },
    /// A column file.
    Parquet(Box<ParquetSink>),
    /// Files of a directory, by prompt.
    Splits(Box<Splits>),
}

/// The files of a directory.
pub struct Splits {
    directory: AtomicDir,
    target: PathBuf,
    files: Vec<(Split, AtomicFile, u64)>,
}

impl Sink {
    /// Opens the output of the plan.
    pub fn create(plan: &Plan) -> Result<Self> {
        if !plan.splits.is_empty() {
            let Some(target) = plan.output.clone() else { return Err(Error::internal("splits without -o")) };
            let directory = AtomicDir::create_if_changed(&target, plan.force, plan.if_changed)?;
            let file = |split: &Split| {
                let path = directory.path().join(format!("{}.jsonl", split.name));
                Ok((split.clone(), AtomicFile::create(&path)?, 0))
            };
            let files = plan.splits.iter().map(file).collect::<Result<Vec<_>>>()?;
            return Ok(Self::Splits(Box::new(Splits { directory, target, files })));
        }
        let out = Output::create(plan.output.as_deref())?.if_changed(plan.if_changed);
        Ok(match plan.out_format {
            OutFormat::Jsonl => Self::Lines { out, begun: false },
            OutFormat::Parquet => Self::Parquet(Box::new(ParquetSink::new(out))),
        })
    }

    /// Takes whole lines. `prompt` is the hash by which a file is chosen.
    pub fn write(&mut self, lines: &[u8], prompt: u64) -> Result<()> {
        match self {
            Self::Lines { out, begun } => {
                *begun |= !lines.is_empty();
                out.write(lines)
            }
            Self::Parquet(sink) => sink.write(lines),
            Self::Splits(splits) => splits.write(lines, prompt),
        }
    }

    /// Makes the output final; returns what the files of a directory got.
    pub fn finish(self, record: &Record) -> Result<Vec<(String, u64)>> {
        match self {
            Self::Lines { out, .. } => out.finish().map(|()| Vec::new()),
            Self::Parquet(sink) => sink.finish().map(|()| Vec::new()),
            Self::Splits(splits) => splits.finish(record),
        }
    }

    /// Ends a run that failed. A file does not appear; a stream that has begun gets a last line that no reader of
    /// records accepts, so that the next tool in the pipe stops too instead of taking a part for the whole.
    pub fn abandon(self, error: &Error) {
        if let Self::Lines { mut out, begun: true } = self
            && error.kind() != Kind::ClosedPipe
            && matches!(out, Output::Stdout(_))
        {
            // Whatever goes wrong here, the error itself is reported and the exit code tells.
            let _ = out.write(format!("{}\n", json!({record::STOPPED: error.to_string()})).as_bytes());
            let _ = out.finish();
        }
    }
}

impl Splits {
    fn write(&mut self, line: &[u8], prompt: u64) -> Result<()> {
        // 53 bits, which a float holds exactly.
        let share = (prompt >> 11) as f64 / (1_u64 << 53) as f64;
        let last = self.files.len() - 1;
        let at = self.files.iter().position(|(split, ..)| share < split.end).unwrap_or(last);
        let (_, file, count) = &mut self.files[at];
        *count += 1;
        file.write(line)
    }

    fn finish(self, record: &Record) -> Result<Vec<(String, u64)>> {
        let mut counts = Vec::new();
        for (split, file, count) in self.files {
            file.commit()?;
            counts.push((split.name, count));
        }
        record.commit(self.directory, &self.target)?;
        Ok(counts)
    }
}
