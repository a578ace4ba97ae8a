//! kto-tokenize: turns KTO records into a token file.
//!
//! Arguments become a [`Plan`], the plan drives one pass over the inputs: reader → template → tokenizer → token set.
//! Invariants: every row read is written, counted as dropped or skipped, or ends the run; rows keep their order at any
//! number of threads; the file depends on the rows, the model's tokenizer and template, and the flags only. Memory is
//! bounded: the file begins with counts that are known at the end, so its batches wait in a temporary file. Deliberately absent: other shapes than
//! records (kto-convert makes them), cutting to the maximum length (kto-train does it after joining KL pairs).

#![forbid(unsafe_code)]

mod args;
mod encoder;
mod pass;
mod plan;
mod report;
mod show;
mod turns;
mod watch;

pub use args::Args;
pub use plan::Plan;

use kto_cli::{Context, output::Output};
use kto_cli::{Error, Exit, Record, Result, Ui, output};
use kto_formats::{template::ChatTemplate, tokens::TokenMeta};
use kto_hub::Need;
use report::Report;
use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
};
use watch::Watch;

/// Runs the tool.
pub fn run(args: Args, ui: &Ui) -> Result<Exit> {
    let mut plan = Plan::new(&args)?;
    plan.model = kto_hub::locate(&args.model, &Need::Tokenizer, ui)?;
    if plan.show.is_some() {
        return show(plan, ui);
    }
    if plan.output.is_none() && std::io::stdout().is_terminal() {
        let error = Error::usage("a token file is binary and standard output is a terminal");
        return Err(error.with_hint("-o FILE, or pipe it into kto-train"));
    }
    let record = record(&args, &plan)?;
    record.check()?;
    let if_changed = args.common.make.if_changed;
    let mut output = Output::create(plan.output.as_deref())?.if_changed(if_changed);
    let (target, report_path) = (plan.output.clone(), plan.report.clone());
    let (set, report) = watched(plan, ui, pass::run)?;
    let meta = set.meta.clone();
    let name = target.unwrap_or_else(|| PathBuf::from("standard output"));
    set.write(&mut output).map_err(|e| output::error(&name, &e))?;
    output.finish()?;
    report.print(&meta, ui);
    if let Some(path) = &report_path {
        write_report(path, &report, &meta, if_changed)?;
    }
    record.finish()?;
    Ok(Exit::Ok)
}

/// What the run reads and writes.
fn record(args: &Args, plan: &Plan) -> Result<Record> {
    let mut record = Record::new(&args.common);
    record.output(plan.output.as_deref());
    record.output(plan.report.as_deref());
    record.files(&plan.inputs);
    record.tokenizer(&plan.model);
    if let Some(choice) = &plan.template {
        record.files(&ChatTemplate::file_of_choice(&plan.model, choice)?);
    }
    Ok(record)
}

fn show(plan: Plan, ui: &Ui) -> Result<Exit> {
    let (text, notes) = watched(plan, ui, show::run)?;
    notes.iter().for_each(|note| ui.warn(note));
    let mut output = Output::create(None)?;
    output.write(text.as_bytes())?;
    output.finish()?;
    Ok(Exit::Ok)
}

/// Works on threads of its own, so that this one can watch the clock: a row that hangs in a template or in a
/// tokenizer's expression ends the run, although nothing can end the row.
fn watched<T: Send + 'static>(
    plan: Plan,
    ui: &Ui,
    work: impl FnOnce(&Plan, &Watch) -> Result<T> + Send + 'static,
) -> Result<T> {
    let watch = Arc::new(Watch::new(plan.threads, plan.row_timeout));
    let (sender, receiver) = mpsc::channel();
    let worker_watch = Arc::clone(&watch);
    let worker = thread::Builder::new().name("tokenize".into()).spawn(move || {
        let _ = sender.send(work(&plan, &worker_watch));
    });
    let worker = worker.map_err(Error::threads)?;
    let progress = ui.progress(0, "row");
    let mut shown = 0;
    loop {
        match receiver.recv_timeout(watch::TICK) {
            Ok(result) => return result,
            Err(mpsc::RecvTimeoutError::Timeout) => watch.check()?,
            Err(mpsc::RecvTimeoutError::Disconnected) => match worker.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => return Err(Error::internal("the worker stopped without a result")),
            },
        }
        let done = watch.done();
        progress.add(done - shown);
        shown = done;
    }
}

fn write_report(path: &Path, report: &Report, meta: &TokenMeta, if_changed: bool) -> Result<()> {
    let text =
        serde_json::to_string_pretty(&report.json(meta)).map_err(|e| Error::internal(e.to_string()))?;
    let mut out = Output::create(Some(path)).at("--report")?.if_changed(if_changed);
    out.write(format!("{text}\n").as_bytes()).at("--report")?;
    out.finish().at("--report")
}
