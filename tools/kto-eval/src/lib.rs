//! Scores preferences and generates answers, with a base model or with an adapter on it.
//!
//! Arguments → opened and checked models → rows in, JSON Lines out, in the order of the input. Never trains; writes
//! nothing but its output. Deliberately absent: judging answers.

#![forbid(unsafe_code)]

mod args;
mod generate;
mod models;
mod score;

pub use args::{Args, Command, GenerateArgs, LossKind, ModelArgs, ScoreArgs};

use kto_cli::{Exit, Result, Ui, signal};

/// Runs the tool.
pub fn run(args: Args, ui: &Ui) -> Result<Exit> {
    signal::install();
    match &args.command {
        Command::Score(score) => score::run(score, &args.common, ui),
        Command::Generate(generate) => generate::run(generate, &args.common, ui),
    }
}
