//! The one pass over the inputs.

use crate::{
    args::{OnError, Policy},
    duplicates::{Duplicates, Seen},
    order::Sink,
    plan::Plan,
    problem::{Problem, Reason},
    readers::Reader,
    report::{Report, plural},
    rows::{self, Converted},
};
use kto_cli::{Context, Error, Result, Ui};
use kto_formats::{record, rows::Row};

/// Bad rows that are named one by one under `--on-error skip`.
const NAMED: u64 = 5;

/// Rows between two moves of the progress display.
const STRIDE: u64 = 256;

/// Converts all inputs; the output is final when this returns without an error.
pub fn run(plan: &Plan, ui: &Ui) -> Result<Report> {
    let mut pass = Pass {
        plan,
        ui,
        sink: Sink::create(plan)?,
        report: Report::default(),
        seen: plan.rows.duplicates.then(Duplicates::default),
        line: Vec::new(),
        bad: 0,
    };
    match pass.read() {
        Ok(()) => pass.finish(),
        Err(error) => {
            pass.sink.abandon(&error);
            Err(error)
        }
    }
}

struct Pass<'a> {
    plan: &'a Plan,
    ui: &'a Ui,
    sink: Sink,
    report: Report,
    seen: Option<Duplicates>,
    /// The record being written.
    line: Vec<u8>,
    /// Rows that could not be used.
    bad: u64,
}

impl Pass<'_> {
    /// Converts all rows of all inputs.
    fn read(&mut self) -> Result<()> {
        let progress = self.ui.progress(0, "rows");
        for path in &self.plan.inputs {
            let (name, mut reader) = Reader::open(path, self.plan)?;
            self.report.inputs.push(name.clone());
            let table = reader.is_table();
            while let Some(row) = reader.next_row()? {
                self.row(&name, row, table)?;
                if self.report.rows.is_multiple_of(STRIDE) {
                    progress.add(STRIDE);
                }
            }
            self.ui.detail(format_args!("{name} read"));
        }
        Ok(())
    }

    fn row(&mut self, name: &str, row: Row, table: bool) -> Result<()> {
        self.report.rows += 1;
        self.report.lossy += row.replaced;
        let place = format!("{name}:{}", row.line);
        let value = match row.value {
            Ok(value) => value,
            // The reader has put the place in front.
            Err(error) => return self.refuse(Reason::Unreadable, error, &place),
        };
        // Not a bad row but the end of a broken stream: no --on-error passes over it.
        value.as_object().map_or(Ok(()), record::refuse_stopped).at(&place)?;
        match rows::convert(value, table, self.plan).and_then(|row| self.settle(row)) {
            Ok(converted) => self.write(converted, &row.exact, &place),
            Err(Problem { reason, error }) => match Err(error).at(&place) {
                Ok(()) => Ok(()),
                Err(error) => self.refuse(reason, error, &place),
            },
        }
    }

    /// Applies the policies that refuse a whole row.
    fn settle(&self, row: Converted) -> Result<Converted, Problem> {
        let rules = &self.plan.rows;
        if rules.empty == Policy::Fail && row.records.iter().any(|r| r.completion.is_blank()) {
            let which = match row.records.as_slice() {
                [_] => "completion",
                [chosen, _] if chosen.completion.is_blank() => "chosen",
                _ => "rejected",
            };
            let error = Error::data(format!("empty completion in field \"{which}\""));
            return Err(Reason::EmptyCompletion
                .error(error.with_hint("--skip-empty leaves it out, --empty keep writes it")));
        }
        if rules.ties == Policy::Fail && row.tie {
            let error = Error::data("\"chosen\" and \"rejected\" are equal");
            return Err(Reason::Tie
                .error(error.with_hint("--ties skip leaves such pairs out, --ties keep writes them")));
        }
        Ok(row)
    }

    /// Ends the run, or counts the row as skipped.
    fn refuse(&mut self, reason: Reason, error: Error, place: &str) -> Result<()> {
        let unasked = !(reason == Reason::PromptsDiffer && self.plan.rows.prompts_differ == Policy::Skip);
        if unasked && self.plan.rows.on_error == OnError::Fail {
            return Err(error);
        }
        if unasked {
            self.bad += 1;
            if self.bad <= NAMED {
                self.ui.warn(format_args!("row skipped: {error}"));
            }
        }
        self.report.skipped_rows.entry(reason).or_default().note(place);
        Ok(())
    }

    fn write(&mut self, row: Converted, exact: &[(String, String)], place: &str) -> Result<()> {
        let rules = self.plan.rows;
        *self.report.shapes.entry(row.shape).or_default() += 1;
        let skip_tie = row.tie && rules.ties == Policy::Skip;
        for (odd, tally) in [
            (row.tie && !skip_tie, &mut self.report.ties),
            (row.differ, &mut self.report.prompts_differ),
            (row.mixed, &mut self.report.mixed),
            (row.replaced, &mut self.report.replaced),
        ] {
            if odd {
                tally.note(place);
            }
        }
        for (i, record) in row.records.iter().enumerate() {
            let blank = record.completion.is_blank();
            let skip = match (skip_tie, blank && rules.empty == Policy::Skip) {
                (true, _) => Some(Reason::Tie),
                (_, true) => Some(Reason::EmptyCompletion),
                _ => None,
            };
            if let Some(reason) = skip {
                self.report.skipped_records.entry(reason).or_default().note(place);
                continue;
            }
            if blank {
                self.report.empty.note(place);
            }
            self.line.clear();
            let said = record.write_json_exact(exact, &mut self.line);
            if let Some(seen) = self.seen.as_mut().filter(|_| !row.tie) {
                match seen.note(&self.line[..said], record.label) {
                    Seen::New => {}
                    Seen::Duplicate => self.report.duplicates.note(place),
                    Seen::Conflict => self.report.conflicts.note(place),
                }
            }
            *(if record.label { &mut self.report.desirable } else { &mut self.report.undesirable }) += 1;
            self.sink.record(&self.line, i == 1)?;
        }
        self.sink.end_row()
    }

    fn finish(self) -> Result<Report> {
        let report = self.report;
        if report.written() == 0 && !self.plan.rows.allow_empty {
            let names = report.inputs.join(", ");
            let what = if report.rows == 0 {
                "no rows".to_owned()
            } else {
                format!("nothing to write, {} skipped", plural(report.rows, "row"))
            };
            return Err(Error::data(format!("{names}: {what}")).with_hint("--allow-empty accepts that"));
        }
        if self.bad > NAMED {
            self.ui.warn(format_args!("{} skipped in all", plural(self.bad, "row")));
        }
        self.sink.finish()?;
        Ok(report)
    }
}
