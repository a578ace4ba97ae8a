//! The checked form of the arguments: everything explicit.

use crate::args::{Args, OnError, TrainOn};
use kto_cli::{Error, Result, input};
use std::{path::PathBuf, thread, time::Duration};

/// What a run does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Inputs in order; `-` is standard input.
    pub inputs: Vec<PathBuf>,
    /// The model directory.
    pub model: PathBuf,
    /// Where the token file goes; `None` is standard output.
    pub output: Option<PathBuf>,
    /// Where the JSON summary goes.
    pub report: Option<PathBuf>,
    /// Tokens of prompt + completion that training will keep.
    pub max_length: u32,
    /// The template that was chosen, a file or a name.
    pub template: Option<PathBuf>,
    /// What of a conversation is trained on.
    pub train_on: TrainOn,
    /// Completions continue the prompt's last message.
    pub continue_final: bool,
    /// Rows to show instead of writing a token file.
    pub show: Option<u64>,
    /// What is shown has colours.
    pub colour: bool,
    /// An end-of-sequence token in place of the model's.
    pub eos: Option<String>,
    /// Control tokens in text become control tokens.
    pub allow_special: bool,
    /// The time that templates see.
    pub now: Option<i64>,
    /// Bad rows are counted instead of ending the run.
    pub skip_errors: bool,
    /// No rows is fine.
    pub allow_empty: bool,
    /// The longest time for a row.
    pub row_timeout: Duration,
    /// Threads that tokenize.
    pub threads: usize,
}

impl Plan {
    /// Checks the arguments. Errors are usage errors (2).
    pub fn new(args: &Args) -> Result<Self> {
        if args.eos.as_deref() == Some("") {
            return Err(Error::usage("--eos must name a token"));
        }
        let is_stdout = |path: &PathBuf| path.as_os_str() == "-" || path.as_os_str() == "/dev/stdout";
        if args.report.as_ref().is_some_and(is_stdout) && args.output.as_ref().is_none_or(is_stdout) {
            let error = Error::usage("--report - and the token file would both go to standard output");
            return Err(error.with_hint("-o FILE takes the token file"));
        }
        let is_file = |path: &PathBuf| path.as_os_str() != "-";
        Ok(Self {
            inputs: input::or_stdin(&args.files)?,
            model: args.model.clone(),
            output: args.output.clone().filter(is_file),
            report: args.report.clone(),
            max_length: args.max_length,
            template: args.chat_template.clone(),
            train_on: args.train_on,
            continue_final: args.continue_final_message,
            show: args.show,
            colour: args.common.colours_stdout(),
            eos: args.eos.clone(),
            allow_special: args.allow_special,
            now: args.now,
            skip_errors: args.on_error == OnError::Skip,
            allow_empty: args.allow_empty,
            row_timeout: Duration::from_secs(args.row_timeout.into()),
            threads: match args.threads {
                Some(threads) => threads.into(),
                None => thread::available_parallelism().map_or(1, usize::from),
            },
        })
    }
}
