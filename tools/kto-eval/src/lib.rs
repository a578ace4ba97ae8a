//! Scores preferences and generates answers, with a base model or with an adapter on it.
//!
//! Arguments → opened and checked models → rows in, JSON Lines out, in the order of the input. Never trains; writes
//! nothing but its output. Deliberately absent: judging answers.

#![forbid(unsafe_code)]

mod args;
mod cached;
mod generate;
mod models;
mod score;

pub use args::{Args, Command, GenerateArgs, LossKind, ModelArgs, ModelsArgs, ScoreArgs};

use kto_cli::{Exit, Result, Ui, signal};
use std::path::Path;

/// Runs the tool.
pub fn run(mut args: Args, ui: &Ui) -> Result<Exit> {
    signal::install();
    match &mut args.command {
        Command::Score(score) => {
            score::check_outputs(score)?;
            models::locate(&mut score.model.model, ui)?;
            if let Some(reference) = score.reference.as_mut().filter(|path| *path != Path::new("base")) {
                models::locate(reference, ui)?;
            }
            score::run(score, &args.common, ui)
        }
        Command::Generate(generate) => {
            models::locate(&mut generate.model.model, ui)?;
            generate::run(generate, &args.common, ui)
        }
        Command::Models(models) => cached::run(models, ui),
    }
}
