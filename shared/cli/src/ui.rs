//! What a tool says on standard error, and how loudly.
//!
//! A failure to write there is never an error: a full or closed log must not end the work.

use crate::{Error, Progress, make::Make, progress::Style};
use clap::{Args, ColorChoice, ValueEnum};
use indicatif::ProgressBar;
use std::{
    env,
    fmt::Display,
    io::{self, IsTerminal, Write},
    sync::{Arc, Mutex, PoisonError},
};

/// Flags that every tool has.
#[derive(Args, Clone, Debug, Default)]
pub struct Common {
    /// Print errors only
    #[arg(short, long, global = true, help_heading = "Messages")]
    pub quiet: bool,
    /// Say more (repeat for more)
    #[arg(short, long, action = clap::ArgAction::Count, global = true, help_heading = "Messages")]
    pub verbose: u8,
    /// Colour messages: auto, always or never
    ///
    /// `auto` colours on a terminal, and obeys NO_COLOR and CLICOLOR_FORCE.
    #[arg(long, value_name = "WHEN", default_value = "auto", hide_possible_values = true, global = true)]
    #[arg(help_heading = "Messages")]
    pub color: ColorChoice,
    /// Show progress: auto, always or never
    ///
    /// A bar on a terminal, elsewhere a line after 5 s and then every 30 s; `auto` is silent with --quiet or NO_PROGRESS.
    #[arg(long, value_name = "WHEN", default_value = "auto", hide_possible_values = true, global = true)]
    #[arg(help_heading = "Messages")]
    pub progress: When,
    /// Configuration, manifest and dependencies.
    #[command(flatten)]
    pub make: Make,
}

impl Common {
    /// Returns whether data for people on standard output has colours.
    pub fn colours_stdout(&self) -> bool {
        colour(self.color, io::stdout().is_terminal())
    }
}

/// A choice that can be left to the tool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// As the surroundings suggest.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// In no case.
    Never,
}

/// The tool's voice. Everything goes to standard error; data goes through [`crate::output`].
pub struct Ui {
    tool: &'static str,
    quiet: bool,
    verbose: u8,
    colour: bool,
    style: Style,
    /// The bar on the screen, which messages must not tear.
    bar: Arc<Mutex<Option<ProgressBar>>>,
}

impl Ui {
    /// Returns the voice of `tool`.
    pub fn new(tool: &'static str, common: &Common) -> Self {
        Self {
            tool,
            quiet: common.quiet,
            verbose: common.verbose,
            colour: colour(common.color, io::stderr().is_terminal()),
            style: progress_style(common),
            bar: Arc::default(),
        }
    }
    /// Returns a voice that says nothing, for tests and for libraries called without a user.
    pub fn silent(tool: &'static str) -> Self {
        let common =
            Common { quiet: true, progress: When::Never, color: ColorChoice::Never, ..Common::default() };
        Self::new(tool, &common)
    }
    /// A line of the report (silent with `-q`).
    pub fn note(&self, line: impl Display) {
        if !self.quiet {
            self.line(format_args!("{}: {line}", self.tool));
        }
    }
    /// Something is wrong but the work goes on (silent with `-q`).
    pub fn warn(&self, line: impl Display) {
        self.note(format_args!("{}: {line}", paint("warning", YELLOW, self.colour)));
    }
    /// Why the tool is about to end without success though nothing broke: said with `-q` too.
    pub fn failure(&self, line: impl Display) {
        self.line(format_args!("{}: {line}", self.tool));
    }
    /// A detail for `-v`.
    pub fn detail(&self, line: impl Display) {
        if self.verbose > 0 {
            self.note(line);
        }
    }
    /// A detail for `-vv`.
    pub fn trace(&self, line: impl Display) {
        if self.verbose > 1 {
            self.note(line);
        }
    }
    /// Starts a progress display of `total` `unit`s (0: not known). A bar on a terminal, drawn first after 250 ms;
    /// elsewhere a line after 5 s and then every 30 s, or nothing with `-q`.
    pub fn progress(&self, total: u64, unit: &'static str) -> Progress {
        Progress::new(self.tool, self.style, total, unit, Arc::clone(&self.bar))
    }
    /// Whether only errors are wanted.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    fn line(&self, line: impl Display) {
        let bar = self.bar.lock().unwrap_or_else(PoisonError::into_inner);
        match &*bar {
            Some(bar) => bar.suspend(|| say(line)),
            None => say(line),
        }
    }
}

/// Prints the one line of an error and its hint.
pub(crate) fn report(tool: &str, error: &Error, colour: bool) {
    let mut text = format!("{}: {}", paint(tool, RED, colour), crate::escape(&error.to_string()));
    if let Some(hint) = error.hint() {
        text += &format!("\n{}: {}", paint("hint", CYAN, colour), crate::escape(hint));
    }
    say(text);
}

/// Prints a line on standard error with one write, so that lines of several processes do not mix.
pub(crate) fn say(line: impl Display) {
    let _ = io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}

const RED: &str = "1;31";
const YELLOW: &str = "1;33";
const CYAN: &str = "1;36";

fn paint(word: &str, code: &str, colour: bool) -> String {
    if colour { format!("\x1b[{code}m{word}\x1b[0m") } else { word.into() }
}

/// Decides about colour: the flag, then NO_COLOR, then CLICOLOR_FORCE, then the terminal.
pub(crate) fn colour(choice: ColorChoice, terminal: bool) -> bool {
    let set = |name: &str| env::var_os(name).is_some_and(|v| !v.is_empty());
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto if set("NO_COLOR") => false,
        ColorChoice::Auto if env::var_os("CLICOLOR_FORCE").is_some_and(|v| !v.is_empty() && v != "0") => true,
        ColorChoice::Auto => terminal && !is_dumb(),
    }
}

fn is_dumb() -> bool {
    env::var_os("TERM").is_some_and(|v| v == "dumb")
}

fn progress_style(common: &Common) -> Style {
    let set = |name: &str| env::var_os(name).is_some_and(|v| !v.is_empty());
    let bar = io::stderr().is_terminal() && !is_dumb() && !set("NO_COLOR");
    match common.progress {
        When::Never => Style::Off,
        When::Auto if common.quiet || set("NO_PROGRESS") => Style::Off,
        When::Auto | When::Always if bar => Style::Bar,
        When::Auto | When::Always => Style::Lines,
    }
}
