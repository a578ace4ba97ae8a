//! kto-convert: turns preference data of many shapes into KTO records.
//!
//! Arguments become a [`Plan`], the plan drives one pass over the inputs: reader → shape → checks → order → output.
//! Invariant: every row read is written, counted as skipped, or ends the run. Memory is bounded by the longest row,
//! except for `--order shuffle` and the hashes of the duplicate check. Deliberately absent: tokenizing, and any
//! judgement of content.

#![forbid(unsafe_code)]

mod args;
mod duplicates;
mod labels;
mod order;
mod pass;
mod plan;
mod problem;
mod readers;
mod report;
mod rows;
mod shapes;
mod weights;

pub use args::Args;
pub use plan::Plan;

use kto_cli::{Error, Exit, Record, Result, Ui, output::Output};

/// Runs the tool.
pub fn run(args: Args, ui: &Ui) -> Result<Exit> {
    let plan = Plan::new(&args)?;
    let mut record = Record::new(&args.common);
    record.output(plan.output.as_deref());
    record.output(plan.report.as_deref());
    record.files(&plan.inputs);
    record.check()?;
    let report = pass::run(&plan, ui)?;
    report.print(ui);
    if let Some(path) = &plan.report {
        let text =
            serde_json::to_string_pretty(&report.json()).map_err(|e| Error::internal(e.to_string()))?;
        let mut out = Output::create(Some(path))?.if_changed(plan.if_changed);
        out.write(format!("{text}\n").as_bytes())?;
        out.finish()?;
    }
    record.finish()?;
    Ok(Exit::Ok)
}
