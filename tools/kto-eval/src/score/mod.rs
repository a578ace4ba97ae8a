//! `kto-eval score`: every row of a token file under policy and reference.

mod assertion;
mod run_plan;
mod scorer;
mod summary;

use crate::{
    args::ScoreArgs,
    models::{Policy, set_threads, shown},
};
use assertion::Assertion;
use kto_cli::{
    Common, Context, Error, Exit, Record, Result, Ui, escape, input, output, output::Output, signal,
};
use kto_formats::tokens::TokenSet;
use kto_model::{
    fit,
    loss::{Loss, LossSpec},
    partners::PromptGroups,
};
use run_plan::RunPlan;
use scorer::{Reference, Scorer};
use serde_json::{Map, Value, json};
use std::{io::Write, path::Path};
use summary::Summary;

/// Refuses (2) outputs that exclude each other.
pub fn check_outputs(args: &ScoreArgs) -> Result<()> {
    if is_stdout(args.summary.as_deref()) && args.output.is_some() {
        return Err(Error::usage(
            "--summary - prints the summary in place of the rows, --output writes rows",
        )
        .with_hint("--summary FILE"));
    }
    Ok(())
}

/// Runs `kto-eval score`.
pub fn run(args: &ScoreArgs, common: &Common, ui: &Ui) -> Result<Exit> {
    let assertions = args.fail_if.iter().map(|text| Assertion::parse(text)).collect::<Result<Vec<_>>>()?;
    let summary_only = args.no_rows || is_stdout(args.summary.as_deref());
    let run = args.model.adapter.as_deref().and_then(|path| RunPlan::find(path, ui));
    let loss = run_plan::loss(args, run.as_ref(), ui)?;
    check_known(args, &assertions, &loss)?;
    let mut record = begin(args, common)?;
    set_threads(args.model.threads)?;
    let tokens = read_tokens(&args.file)?;
    let policy = Policy::open(&args.model, positions(&tokens), ui)?;
    check(args, &tokens, &policy, ui)?;
    let reference_path = run_plan::reference(args, run.as_ref(), ui)?;
    let reference = Reference::open(&reference_path, &policy, &args.model, positions(&tokens))?;
    policy.note(&args.model, &mut record);
    reference.note(&reference_path, &mut record);
    record.check_sides()?;
    if reference.is_policy() {
        ui.warn("no --adapter and no --reference: policy and reference are one model, all rewards are 0");
    }
    let groups = PromptGroups::new(&tokens);
    let partners = match args.no_kl || reference.is_policy() {
        true => None,
        false => Some(partners(&groups, run_plan::seed(args, run.as_ref())?)?),
    };
    if let Some(run) = &run {
        run.note_micro_batches(&tokens, ui);
    }
    let scorer =
        Scorer { policy: &policy, reference: &reference, tokens: &tokens, partners: partners.as_deref() };
    let if_changed = common.make.if_changed;
    let rows = match summary_only {
        true => None,
        false => Some(Output::create(args.output.as_deref())?.if_changed(if_changed)),
    };
    let mut summary = Summary::new(loss, &groups, reference.is_policy());
    let rows = score_all(&scorer, rows, &mut summary, ui)?;
    let verdict = Verdict { args, assertions: &assertions, if_changed };
    let exit = report(&verdict, rows, &summary.finish(), ui)?;
    if exit == Exit::Ok {
        record.finish()?;
    }
    Ok(exit)
}

/// What the run reads and writes, as far as it is known before the models are open.
fn begin(args: &ScoreArgs, common: &Common) -> Result<Record> {
    let mut record = Record::new(common);
    record.output(args.output.as_deref());
    record.output(args.summary.as_deref());
    record.file(&args.file);
    record.check()?;
    Ok(record)
}

/// What decides whether the outputs appear.
struct Verdict<'a> {
    args: &'a ScoreArgs,
    assertions: &'a [Assertion],
    if_changed: bool,
}

/// Refuses (2) an assertion about what --no-kl leaves out, before any work.
fn check_known(args: &ScoreArgs, assertions: &[Assertion], loss: &LossSpec) -> Result<()> {
    let one_model = args.model.adapter.is_none()
        && args.reference.as_deref().is_none_or(|path| path == Path::new("base"));
    if !args.no_kl || one_model {
        return Ok(());
    }
    let needs_kl = |key| ["kl", "kl_raw"].contains(&key) || key == "loss" && loss.loss == Loss::Kto;
    match assertions.iter().zip(&args.fail_if).find(|(a, _)| needs_kl(a.key())) {
        None => Ok(()),
        Some((assertion, text)) => {
            let text = escape(text);
            Err(Error::usage(format!("--fail-if \"{text}\": --no-kl leaves {} out", assertion.key())))
        }
    }
}

/// Scores chunk by chunk and writes the rows in order. Returns the output, not yet final.
fn score_all(
    scorer: &Scorer,
    mut out: Option<Output>,
    summary: &mut Summary,
    ui: &Ui,
) -> Result<Option<Output>> {
    let progress = ui.progress(scorer.tokens.len() as u64, "rows");
    let mut start = 0;
    while start < scorer.tokens.len() {
        signal::check()?;
        let end = scorer.chunk_end(start);
        for score in scorer.score(start..end)? {
            if let Some(out) = &mut out {
                let mut line = score.json(summary.beta()).to_string();
                line.push('\n');
                out.write(line.as_bytes())?;
            }
            summary.add(&score);
        }
        if let Some(Output::Stdout(out)) = &mut out {
            out.flush().map_err(|e| output::error(Path::new("standard output"), &e))?;
        }
        progress.add((end - start) as u64);
        start = end;
    }
    Ok(out)
}

/// Checks the assertions and writes the summary. A file appears only when no assertion fails: a target of make must not
/// be there after a failure.
fn report(verdict: &Verdict, rows: Option<Output>, summary: &Map<String, Value>, ui: &Ui) -> Result<Exit> {
    let Verdict { args, assertions, if_changed } = *verdict;
    let failures: Vec<String> = assertions
        .iter()
        .zip(&args.fail_if)
        .filter_map(|(a, text)| Some(format!("--fail-if {text}: {}", a.failure(summary)?)))
        .collect();
    match rows {
        Some(Output::File(_)) if !failures.is_empty() => {}
        Some(rows) => rows.finish()?,
        None => {}
    }
    for line in summary::lines(summary) {
        ui.note(line);
    }
    if let Some(path) = &args.summary {
        let text = serde_json::to_string_pretty(summary).map_err(|e| Error::internal(e.to_string()))? + "\n";
        if is_stdout(Some(path)) {
            let mut out = Output::create(None)?;
            out.write(text.as_bytes())?;
            out.finish()?;
        } else if failures.is_empty() {
            let mut out = Output::create(Some(path))?.if_changed(if_changed);
            out.write(text.as_bytes())?;
            out.finish()?;
        }
    }
    failures.iter().for_each(|line| ui.failure(escape(line)));
    Ok(if failures.is_empty() { Exit::Ok } else { Exit::AssertionFailed })
}

fn is_stdout(path: Option<&Path>) -> bool {
    path == Some(Path::new("-"))
}

fn read_tokens(path: &Path) -> Result<TokenSet> {
    let input = if path == Path::new("-") { input::or_stdin(&[])? } else { vec![path.into()] };
    let input = input::open(&input[0])?;
    let tokens = TokenSet::read(&input.name, input.reader)?;
    if tokens.is_empty() {
        return Err(Error::data(format!("{}: the token file has no rows", input.name))
            .with_hint("kto-tokenize says how many rows it dropped and why"));
    }
    Ok(tokens)
}

/// Longest sequence that can be scored: a prompt with its own or another row's completion.
fn positions(tokens: &TokenSet) -> usize {
    let prompt = tokens.rows().map(|r| r.prompt_ids.len()).max().unwrap_or(0);
    let completion = tokens.rows().map(|r| r.completion_ids.len()).max().unwrap_or(0);
    (prompt + completion).min(tokens.meta.max_length as usize)
}

/// Checks that the tokens are the model's.
fn check(args: &ScoreArgs, tokens: &TokenSet, policy: &Policy, ui: &Ui) -> Result<()> {
    if !args.model.force_base {
        fit::check_tokenizer(policy.base.directory(), &tokens.meta).at(shown(&args.file))?;
    }
    for (i, row) in tokens.rows().enumerate() {
        let place = format_args!("{}: row {}", shown(&args.file), i + 1);
        policy.base.architecture.check_ids(row.prompt_ids, place)?;
        policy.base.architecture.check_ids(row.completion_ids, place)?;
    }
    let limit = policy.base.architecture.max_positions;
    if positions(tokens) > limit {
        ui.warn(format_args!("rows of up to {} tokens, the model is made for {limit}", positions(tokens)));
    }
    Ok(())
}

/// Draws the KL partner of every row.
fn partners(groups: &PromptGroups, seed: u64) -> Result<Vec<usize>> {
    groups.held_out(seed).ok_or_else(|| {
        Error::data("all rows have the same prompt: the KL estimate needs completions of another prompt")
            .with_hint("--no-kl")
    })
}

/// A number for JSON; what is not finite becomes null.
fn number(value: f64) -> Value {
    json!(value)
}
