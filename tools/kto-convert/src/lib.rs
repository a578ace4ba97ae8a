//! kto-convert: turns preference data of many shapes into KTO records.
//!
//! Arguments become a [`Plan`], the plan drives one pass over the inputs: reader → workers (shape, checks, text) → order → output.
//! Invariants: every row read is written, counted as skipped, or ends the run; the output does not depend on the number
//! of threads. Memory is bounded by the longest row and the chunks under way; what needs all records at once stays within
//! `--memory` and goes to temporary files beyond it. Deliberately absent: tokenizing, and any judgement of content.

#![forbid(unsafe_code)]

mod args;
mod direct;
mod duplicates;
mod filters;
mod forms;
mod labels;
mod near;
mod order;
mod parquet;
mod pass;
mod pii;
mod pipeline;
mod plan;
mod problem;
mod readers;
mod report;
mod rows;
mod shapes;
mod sink;
mod spill;
mod store;
mod thresholds;
mod weights;
mod whole;
mod work;

pub use args::Args;
pub use plan::Plan;

use kto_cli::{
    Error, Exit, Record, Result, Ui,
    output::{self, Output},
};

/// Runs the tool.
pub fn run(args: Args, ui: &Ui) -> Result<Exit> {
    let plan = Plan::new(&args)?;
    let files = readers::expand(&plan.inputs)?;
    let mut record = Record::new(&args.common);
    let is_file = plan.splits.is_empty();
    record.output(plan.output.as_deref().filter(|_| is_file));
    record.side(plan.report.as_deref());
    if let plan::OnError::Quarantine(path) = &plan.rows.on_error {
        record.side(Some(path));
    }
    record.files(&files);
    record.check_sides()?;
    if is_file {
        record.check()?;
    }
    let report = pass::run(&plan, &files, &record, ui)?;
    report.print(ui);
    if let Some(path) = &plan.report {
        let text =
            serde_json::to_string_pretty(&report.json()).map_err(|e| Error::internal(e.to_string()))?;
        let mut out = Output::create(Some(path))?.if_changed(plan.if_changed);
        out.write(format!("{text}\n").as_bytes())?;
        out.finish()?;
    }
    match &plan.output {
        Some(directory) if !is_file => output::print_path(directory)?,
        _ => record.finish()?,
    }
    Ok(Exit::Ok)
}
