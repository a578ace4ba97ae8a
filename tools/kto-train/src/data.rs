//! The token file: where it comes from, whether it fits the model, and what its user should know before hours of training.

use crate::{args::Args, plan::Plan, run_dir::RunDir, stored::Stored};
use kto_cli::{Error, Kind, Result, Ui, atomic, escape, input, signal::AtOnce};
use kto_formats::tokens::{TokenRow, TokenSet};
use kto_model::architecture::Architecture;
use std::{
    io::{self, BufRead, IsTerminal},
    path::Path,
};

/// Name of the copy of piped data in the run directory.
const SPOOL: &str = "data.kto.arrow";

/// Reads the token file, or standard input. On --resume an empty one, or a terminal, stands for the copy of what was piped before.
pub fn read(args: &Args) -> Result<TokenSet> {
    let spooled = args.out.join(SPOOL);
    let has_copy =
        is_piped(args) && args.resume.is_some() && spooled.exists() && Stored::read(&args.out).is_some();
    // Whoever pipes into it may take long, and there is nothing yet to save.
    let _at_once = is_piped(args).then(AtOnce::begin);
    let mut input = match has_copy && io::stdin().is_terminal() {
        true => input::open(&spooled)?,
        false => input::open(&input::or_stdin(std::slice::from_ref(&args.data))?[0])?,
    };
    if has_copy && input.reader.fill_buf().map_err(|e| input::error(&input.name, &e))?.is_empty() {
        input = input::open(&spooled)?;
    }
    TokenSet::read(&input.name, input.reader)
}

/// Refuses (73) to overwrite a token file in `--out` that is no run's copy.
pub fn check_spool(args: &Args) -> Result<()> {
    let path = args.out.join(SPOOL);
    if !is_piped(args) || !path.exists() || Stored::read(&args.out).is_some() {
        return Ok(());
    }
    let text = format!("{}: in the way of the copy of piped data", escape(&path.display().to_string()));
    Err(Error::new(Kind::CantCreate, text).with_hint("--data with this file, or another --out"))
}

/// Copies piped data into the run directory, for --resume.
pub fn spool(dir: &RunDir, tokens: &TokenSet) -> Result<()> {
    let path = dir.file(SPOOL);
    let mut file = atomic::AtomicFile::create(&path)?;
    tokens.write(&mut file).map_err(|e| Error::writing(&path, &e))?;
    file.commit()
}

/// Whether the data comes through standard input.
pub fn is_piped(args: &Args) -> bool {
    args.data == Path::new("-")
}

/// Returns how many positions a row or a KL pair can have.
pub fn positions(tokens: &TokenSet) -> usize {
    let longest = |f: fn(TokenRow) -> usize| tokens.rows().map(f).max().unwrap_or(0);
    let joined = longest(|r| r.prompt_ids.len()) + longest(|r| r.completion_ids.len());
    joined.min(tokens.meta.max_length as usize)
}

/// Fails (65) when a token id has no row in the embedding.
pub fn check_ids(architecture: &Architecture, tokens: &TokenSet) -> Result<()> {
    for (i, row) in tokens.rows().enumerate() {
        let place = format_args!("row {}", i + 1);
        architecture.check_ids(row.prompt_ids, place)?;
        architecture.check_ids(row.completion_ids, place)?;
    }
    Ok(())
}

/// Reports counts, and warns of what spoils a run.
pub fn report(plan: &Plan, architecture: &Architecture, tokens: &TokenSet, ui: &Ui) {
    let desirable = tokens.rows().filter(|r| r.label).count();
    let undesirable = tokens.len() - desirable;
    ui.note(format_args!(
        "{} rows ({desirable} desirable, {undesirable} undesirable; {} cut, {} dropped by kto-tokenize), {} steps",
        tokens.len(),
        tokens.meta.truncated,
        tokens.meta.dropped,
        plan.total_steps
    ));
    if plan.eval_data.as_ref() == Some(&plan.data) {
        ui.warn("--eval-data holds the rows of --data: evaluations of what is trained on do not show whether it helps");
    }
    if plan.loss != "sft" {
        warn_of_imbalance(plan, desirable as f64, undesirable as f64, ui);
    }
    let longest = tokens.rows().map(|r| r.prompt_ids.len() + r.completion_ids.len()).max().unwrap_or(0);
    let (longest, known) = (longest.min(tokens.meta.max_length as usize), architecture.max_positions);
    if longest > known {
        ui.warn(format_args!(
            "the longest row has {longest} tokens, the model was made for {known}: kto-tokenize --max-length {known}"
        ));
    }
}

/// Equation 8 of the paper: λD·nD / (λU·nU) should lie in [1, 4/3].
fn warn_of_imbalance(plan: &Plan, desirable: f64, undesirable: f64, ui: &Ui) {
    if desirable == 0.0 || undesirable == 0.0 {
        return ui.warn("all rows have one label: KTO learns from the difference between the two");
    }
    let ratio = plan.desirable_weight * desirable / (plan.undesirable_weight * undesirable);
    if (0.99..=1.34).contains(&ratio) || !ratio.is_normal() {
        return;
    }
    // The class that is too light gets the weight.
    let (flag, low) = match ratio < 1.0 {
        true => ("--desirable-weight", plan.desirable_weight / ratio),
        false => ("--undesirable-weight", plan.undesirable_weight * ratio * 0.75),
    };
    ui.warn(format_args!(
        "desirable and undesirable rows weigh {ratio:.2} to 1; the KTO paper advises 1 to 1.33: {flag} {low:.2} to {:.2}",
        low * 4.0 / 3.0
    ));
}
