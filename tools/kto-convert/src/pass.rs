//! The one pass over the inputs: chunks converted on all cores, their results taken in order.

use crate::{
    duplicates::{self, Duplicates},
    order::Ordered,
    pipeline,
    plan::{OnError, Plan},
    readers::{self, Inputs, Part, Piece},
    report::{Report, plural},
    shapes::Shape,
    sink::Sink,
    whole::Whole,
    work::{Done, NAMED, Worker},
};
use kto_cli::{Error, Record, Result, Ui, output::Output};
use std::path::PathBuf;

/// Converts all inputs; the output is final when this returns without an error.
pub fn run(plan: &Plan, files: &[PathBuf], record: &Record, ui: &Ui) -> Result<Report> {
    let quarantine = match &plan.rows.on_error {
        OnError::Quarantine(path) => Some(Output::create(Some(path))?.if_changed(plan.if_changed)),
        _ => None,
    };
    let mut pass = Pass {
        ui,
        sink: Sink::create(plan)?,
        report: Report { is_kto: plan.to == crate::args::Form::Kto, ..Report::default() },
        seen: plan.counts_duplicates().then(|| Duplicates::new(duplicates::BUDGET)),
        ordered: Ordered::new(plan.order),
        whole: plan.needs_all().then(|| Whole::new(plan)),
        quarantine,
        named: 0,
        explained: Vec::new(),
    };
    let parts = readers::parts(files, plan.shard)?;
    pass.report.inputs = parts.iter().map(|part| shown(&part.path)).collect();
    match pass.read(plan, parts).and_then(|()| pass.end(plan)) {
        Ok(()) => pass.finish(record),
        Err(error) => {
            pass.sink.abandon(&error);
            Err(error)
        }
    }
}

fn shown(path: &std::path::Path) -> String {
    if path == std::path::Path::new("-") {
        return "<stdin>".into();
    }
    kto_cli::escape(&path.display().to_string())
}

/// A chunk, or the error behind the last one.
type Job = Result<Piece>;

struct Pass<'a> {
    ui: &'a Ui,
    sink: Sink,
    report: Report,
    /// The duplicate check, when duplicates are written.
    seen: Option<Duplicates>,
    ordered: Ordered,
    whole: Option<Whole<'a>>,
    quarantine: Option<Output>,
    /// Bad rows that were named.
    named: usize,
    /// Shapes that were explained.
    explained: Vec<&'static str>,
}

impl Pass<'_> {
    /// Converts all rows of all inputs.
    fn read(&mut self, plan: &Plan, parts: Vec<Part>) -> Result<()> {
        let progress = self.ui.progress(0, "rows");
        let worker = Worker::new(plan);
        let mut inputs = Inputs::new(plan, parts);
        let mut over = false;
        let next = || -> Option<Job> {
            if over {
                return None;
            }
            match inputs.next_piece() {
                Ok(Some(piece)) => Some(Ok(piece)),
                Ok(None) => None,
                Err(error) => {
                    over = true;
                    Some(Err(error))
                }
            }
        };
        let work = |job: Job| job.map(|piece| worker.run(piece));
        pipeline::run(plan.threads, next, work, |done| {
            let done = done?;
            progress.add(done.report.rows);
            self.take(done)
        })
    }

    /// Takes the results of a chunk.
    fn take(&mut self, mut done: Done) -> Result<()> {
        for (shape, line) in std::mem::take(&mut done.shapes) {
            self.explain(shape, &line);
        }
        for warning in std::mem::take(&mut done.warnings) {
            self.named += 1;
            if self.named <= NAMED {
                self.ui.warn(format_args!("row skipped: {warning}"));
            }
        }
        if let Some(quarantine) = &mut self.quarantine {
            quarantine.write(&done.quarantine)?;
        }
        match &mut self.whole {
            Some(whole) => whole.take(&done)?,
            None => self.ordered.write(&done, &mut self.sink)?,
        }
        if let Some(seen) = &mut self.seen {
            let mut nth = 0;
            for meta in &done.metas {
                if meta.hash != 0 {
                    seen.note(meta.hash, meta.label, meta.place, nth)?;
                }
                nth = if meta.ends_row { 0 } else { nth + 1 };
            }
        }
        self.report.absorb(std::mem::take(&mut done.report));
        done.end.map_or(Ok(()), Err)
    }

    fn explain(&mut self, shape: &'static Shape, line: &str) {
        if !self.explained.contains(&shape.name) {
            self.explained.push(shape.name);
            self.ui.note(line);
        }
    }

    /// Writes what was held back, and counts what was seen twice.
    fn end(&mut self, plan: &Plan) -> Result<()> {
        self.ordered.finish(&mut self.sink)?;
        if let Some(whole) = self.whole.take() {
            whole.finish(&mut self.report, &mut self.sink)?;
        }
        if let Some(seen) = self.seen.take() {
            let (duplicates, conflicts) = seen.finish()?;
            self.report.repeated(duplicates, conflicts);
        }
        let report = &self.report;
        if report.written() == 0 && !plan.rows.allow_empty && plan.shard.is_none() {
            let names = report.inputs.join(", ");
            let what = match report.rows {
                0 => "no rows".to_owned(),
                rows => format!("nothing to write, {} skipped", plural(rows, "row")),
            };
            return Err(Error::data(format!("{names}: {what}")).with_hint("--allow-empty accepts that"));
        }
        Ok(())
    }

    fn finish(mut self, record: &Record) -> Result<Report> {
        if self.report.bad > NAMED as u64 {
            self.ui.warn(format_args!("{} skipped in all", plural(self.report.bad, "row")));
        }
        if let Some(quarantine) = self.quarantine.take() {
            quarantine.finish()?;
        }
        self.report.splits = self.sink.finish(record)?;
        Ok(self.report)
    }
}
