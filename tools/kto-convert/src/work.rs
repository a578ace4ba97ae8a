//! What happens to a chunk of rows on a worker's thread: converted, checked, filtered, written as text.
//!
//! Nothing here knows other chunks: what must be known of all records travels with the result as [`Meta`].

use crate::{
    args::{Form, Pii, Policy},
    direct::{self, Direct},
    forms,
    near::{self, Signature},
    pii::Finder,
    plan::{OnError, Plan},
    problem::{Problem, Reason},
    readers::Piece,
    report::Report,
    rows::{self, Converted},
    shapes::Shape,
};
use kto_cli::{Context, Error, Result};
use kto_formats::{
    buffers::{Buffer, Buffers},
    chunks::{self, Taker},
    record::{self, Record},
    rows::Row,
};
use serde_json::{Value, json};
use std::ops::Range;
use twox_hash::XxHash3_128;

/// Bad rows that are named one by one when the run goes on.
pub const NAMED: usize = 5;

/// So many rows in a row that cannot be copied, and the rest of the chunk is not looked at for that.
const GIVE_UP: u32 = 32;

/// Converts chunks.
pub struct Worker<'a> {
    plan: &'a Plan,
    finder: Option<Finder>,
    /// Records carry what the order, the duplicate check and everything that needs all of them asks for.
    metas: bool,
    /// Rows may be copied.
    direct: bool,
    /// For what is written.
    buffers: Buffers,
}

/// What became of a chunk.
#[derive(Default)]
pub struct Done {
    /// The records, one a line.
    pub bytes: Buffer,
    /// What must be known of each.
    pub metas: Vec<Meta>,
    /// The counts.
    pub report: Report,
    /// The first bad rows, in words.
    pub warnings: Vec<String>,
    /// Lines for the quarantine.
    pub quarantine: Vec<u8>,
    /// For `--explain`: shapes with the place and the columns of their first row.
    pub shapes: Vec<(&'static Shape, String)>,
    /// Why the run ends behind these records, if it does.
    pub end: Option<Error>,
}

/// A record among others.
pub struct Meta {
    /// Where its line ends in [`Done::bytes`].
    pub end: usize,
    /// It is the rejected side of a pair.
    pub second: bool,
    /// A row ends with it.
    pub ends_row: bool,
    /// Its label.
    pub label: bool,
    /// Of prompt and completion; 0 when it is not to be compared (one side of a pair of equals).
    pub hash: u128,
    /// Of the prompt.
    pub prompt: u64,
    /// Number of the input, and line in it.
    pub place: (u32, u64),
    /// For nearly equal completions.
    pub near: Option<Box<Signature>>,
}

impl<'a> Worker<'a> {
    /// Prepares what all threads share.
    pub fn new(plan: &'a Plan) -> Self {
        let metas = plan.rows.duplicates || plan.needs_all() || plan.order != crate::args::Order::Interleave;
        let finder = (plan.rows.pii != Pii::Off).then(Finder::new);
        // Records are somewhat longer than rows, and a prompt is written for each side.
        Self { plan, finder, metas, direct: direct::is_enough(plan), buffers: Buffers::new(2 * chunks::SIZE) }
    }

    /// The same, with every row taken apart.
    #[cfg(test)]
    pub fn without_copies(self) -> Self {
        Self { direct: false, ..self }
    }

    /// Converts a chunk.
    pub fn run(&self, piece: Piece) -> Done {
        let name = piece.chunk.name().to_owned();
        let (input, table) = (piece.input, piece.table);
        let direct = (self.direct && !table).then(Direct::default);
        let done = Done { bytes: self.buffers.take(), ..Done::default() };
        let mut chunk = Pass { worker: self, name: &name, input, table, direct, left: 0, done };
        let end = piece.chunk.give(&mut chunk);
        Done { end: end.err(), ..chunk.done }
    }
}

struct Pass<'a> {
    worker: &'a Worker<'a>,
    name: &'a str,
    input: u32,
    table: bool,
    /// Takes rows that need no more than being copied.
    direct: Option<Direct>,
    /// Rows that it has left, one behind the other.
    left: u32,
    done: Done,
}

impl Taker for Pass<'_> {
    fn text(&mut self, line: u64, text: &[u8]) -> bool {
        let Some(direct) = &mut self.direct else { return false };
        match direct.take(text, self.worker.plan, &mut self.done.bytes) {
            Some(taken) => {
                self.left = 0;
                self.count(&taken, line);
                true
            }
            None => {
                self.left += 1;
                if self.left == GIVE_UP {
                    self.direct = None;
                }
                false
            }
        }
    }

    fn row(&mut self, row: Row, text: &[u8]) -> Result<()> {
        let plan = self.worker.plan;
        self.done.report.rows += row.rows;
        self.done.report.lossy += row.replaced;
        let place = Place { name: self.name, line: row.line };
        let value = match row.value {
            Ok(value) => value,
            // The reader has put the place in front.
            Err(error) => return self.refuse(Reason::Unreadable, error, place, text, None, row.rows),
        };
        // Not a bad row but the end of a broken stream: no --on-error passes over it.
        value.as_object().map_or(Ok(()), record::refuse_stopped).at(place)?;
        let kept = matches!(plan.rows.on_error, OnError::Quarantine(_)).then(|| value.clone());
        let columns = plan.explain.then(|| value.as_object().map(record::columns)).flatten();
        match rows::convert(value, self.table, plan).and_then(|row| self.settle(row)) {
            Ok(converted) => {
                if let Some(columns) = columns {
                    self.explain(converted.found, place, &columns);
                }
                self.write(converted, &row.exact, place, row.rows);
                Ok(())
            }
            Err(Problem { reason, error }) => match Err(error).at(place) {
                Ok(()) => Ok(()),
                Err(error) => self.refuse(reason, error, place, text, kept, row.rows),
            },
        }
    }
}

impl Pass<'_> {
    /// Counts a row that was copied.
    fn count(&mut self, taken: &direct::Taken, line: u64) {
        let report = &mut self.done.report;
        report.rows += 1;
        *report.shapes.entry(taken.shape).or_default() += 1;
        for (i, record) in taken.records.iter().flatten().enumerate() {
            *(if record.label { &mut report.desirable } else { &mut report.undesirable }) += 1;
            if self.worker.metas {
                self.done.metas.push(Meta {
                    end: record.end,
                    second: i == 1,
                    ends_row: false,
                    label: record.label,
                    hash: XxHash3_128::oneshot(&self.done.bytes[record.start..record.said]).max(1),
                    prompt: 0,
                    place: (self.input, line),
                    near: None,
                });
            }
        }
        if let Some(last) = self.done.metas.last_mut() {
            last.ends_row = true;
        }
    }

    /// Applies the policies that refuse a whole row.
    fn settle(&self, row: Converted) -> Result<Converted, Problem> {
        let rules = &self.worker.plan.rows;
        if rules.empty == Policy::Fail
            && let Some(blank) = row.records.iter().position(|r| r.completion.is_blank())
        {
            let which = match (row.paired, blank) {
                (false, _) => "completion",
                (true, at) if at.is_multiple_of(2) => "chosen",
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
    fn refuse(
        &mut self,
        reason: Reason,
        error: Error,
        place: Place<'_>,
        text: &[u8],
        value: Option<Value>,
        rows: u64,
    ) -> Result<()> {
        let rules = &self.worker.plan.rows;
        let equal_sides = reason == Reason::Tie && rules.ties == Policy::Fail;
        let asked = (reason == Reason::PromptsDiffer && rules.prompts_differ == Policy::Skip)
            || (reason.is_no_fault() && !equal_sides);
        if !asked && rules.on_error == OnError::Stop {
            return Err(error);
        }
        if !asked {
            self.done.report.bad += rows;
            if self.done.warnings.len() < NAMED {
                self.done.warnings.push(error.to_string());
            }
            if let OnError::Quarantine(_) = rules.on_error {
                let row = value.unwrap_or_else(|| String::from_utf8_lossy(text).into_owned().into());
                let line = json!({"place": place.to_string(), "reason": reason.name(), "error": error.to_string(), "row": row});
                self.done.quarantine.extend_from_slice(line.to_string().as_bytes());
                self.done.quarantine.push(b'\n');
            }
        }
        let tally = self.done.report.skipped_rows.entry(reason).or_default();
        (0..rows).for_each(|_| tally.note(place));
        Ok(())
    }

    fn write(&mut self, row: Converted, exact: &[(String, String)], place: Place<'_>, rows: u64) {
        let plan = self.worker.plan;
        let report = &mut self.done.report;
        *report.shapes.entry(row.shape).or_default() += rows;
        let skip_tie = row.tie && plan.rows.ties == Policy::Skip;
        for (odd, tally) in [
            (row.tie && !skip_tie, &mut report.ties),
            (row.differ, &mut report.prompts_differ),
            (row.mixed, &mut report.mixed),
            (row.replaced, &mut report.replaced),
        ] {
            if odd {
                tally.note(place);
            }
        }
        for reason in &row.left_out {
            report.skipped_records.entry(*reason).or_default().note(place);
        }
        let first = self.done.metas.len();
        if plan.to == Form::Paired {
            self.write_pairs(row, exact, place, skip_tie);
        } else {
            let (paired, tie, shared) = (row.paired, row.tie, row.paired && !row.differ);
            let mut prompt = None;
            for (i, mut record) in row.records.into_iter().enumerate() {
                let second = paired && i % 2 == 1;
                // The second side of a pair begins as the first one does.
                let known = prompt.take().filter(|_| second && shared);
                if self.keep(&mut record, place, skip_tie) {
                    prompt = self.write_record(&record, exact, place, Side { second, tie, prompt: known });
                }
            }
        }
        if let Some(last) = self.done.metas[first..].last_mut() {
            last.ends_row = true;
        }
    }

    /// Decides about a record by its content, and changes what is to be changed.
    fn keep(&mut self, record: &mut Record, place: Place<'_>, skip_tie: bool) -> bool {
        let plan = self.worker.plan;
        let report = &mut self.done.report;
        let blank = record.completion.is_blank();
        let mut refused = match (skip_tie, blank && plan.rows.empty == Policy::Skip) {
            (true, _) => Some(Reason::Tie),
            (_, true) => Some(Reason::EmptyCompletion),
            _ => plan.filters.refuses(record),
        };
        if let Some(finder) = self.worker.finder.as_ref().filter(|_| refused.is_none()) {
            let found = match plan.rows.pii {
                Pii::Redact => finder.redact(record),
                _ => finder.count(record),
            };
            if found.iter().any(|n| *n > 0) {
                report.pii.note(place);
                report.pii_kinds.iter_mut().zip(found).for_each(|(sum, n)| *sum += n);
                refused = (plan.rows.pii == Pii::Drop).then_some(Reason::Pii);
            }
        }
        if let Some(reason) = refused {
            report.skipped_records.entry(reason).or_default().note(place);
            return false;
        }
        if blank {
            report.empty.note(place);
        }
        if plan.provenance {
            record.extra.insert("_src".into(), place.name.into());
            record.extra.insert("_line".into(), place.line.into());
        }
        true
    }

    /// Writes a record; returns where its prompt is.
    fn write_record(
        &mut self,
        record: &Record,
        exact: &[(String, String)],
        place: Place<'_>,
        side: Side,
    ) -> Option<Range<usize>> {
        let start = self.done.bytes.len();
        let form = self.worker.plan.to;
        let written = match forms::write(form, record, exact, side.prompt, &mut self.done.bytes) {
            Ok(written) => written,
            Err(reason) => {
                self.done.report.skipped_records.entry(reason).or_default().note(place);
                return None;
            }
        };
        let report = &mut self.done.report;
        *(if record.label { &mut report.desirable } else { &mut report.undesirable }) += 1;
        let prompt_at = (form == Form::Kto).then_some(written.prompt);
        if !self.worker.metas {
            return prompt_at;
        }
        let (second, tie) = (side.second, side.tie);
        let text = &self.done.bytes[start..written.said];
        let hash = if tie { 0 } else { XxHash3_128::oneshot(text).max(1) };
        let plan = self.worker.plan;
        let near = (plan.rows.dedup == crate::args::Dedup::Near && !tie).then(|| near::signature(record));
        let prompt = if plan.needs_all() { forms::prompt_hash(&record.prompt) } else { 0 };
        let end = self.done.bytes.len();
        let place = (self.input, place.line);
        self.done.metas.push(Meta {
            end,
            second,
            ends_row: false,
            label: record.label,
            hash,
            prompt,
            place,
            near,
        });
        prompt_at
    }

    /// Writes pairs of a row's desirable and undesirable records to one prompt.
    fn write_pairs(&mut self, row: Converted, exact: &[(String, String)], place: Place<'_>, skip_tie: bool) {
        let tie = row.tie;
        let mut kept: Vec<Record> = Vec::new();
        for mut record in row.records {
            if self.keep(&mut record, place, skip_tie) {
                kept.push(record);
            }
        }
        let mut alone = 0;
        while !kept.is_empty() {
            let record = kept.remove(0);
            let Some(at) = kept.iter().position(|r| r.label != record.label && r.prompt == record.prompt)
            else {
                alone += 1;
                continue;
            };
            let other = kept.remove(at);
            let (chosen, rejected) = if record.label { (&record, &other) } else { (&other, &record) };
            let start = self.done.bytes.len();
            forms::write_pair(chosen, rejected, exact, &mut self.done.bytes);
            self.done.report.desirable += 1;
            self.done.report.undesirable += 1;
            self.done.report.pairs += 1;
            if self.worker.metas {
                let text = &self.done.bytes[start..];
                let hash = if tie { 0 } else { XxHash3_128::oneshot(text).max(1) };
                let near = (self.worker.plan.rows.dedup == crate::args::Dedup::Near && !tie)
                    .then(|| near::signature(chosen));
                let prompt = forms::prompt_hash(&chosen.prompt);
                let (end, place) = (self.done.bytes.len(), (self.input, place.line));
                let meta =
                    Meta { end, second: false, ends_row: false, label: true, hash, prompt, place, near };
                self.done.metas.push(meta);
            }
        }
        if alone > 0 {
            let tally = self.done.report.skipped_records.entry(Reason::Form).or_default();
            (0..alone).for_each(|_| tally.note(place));
        }
    }

    fn explain(&mut self, shape: &'static Shape, place: Place<'_>, columns: &str) {
        if !self.done.shapes.iter().any(|(known, _)| known.name == shape.name) {
            let line = format!("{place}: {}{columns}: {}", shape.name, shape.words);
            self.done.shapes.push((shape, line));
        }
    }
}

/// What a record is among those of its row.
struct Side {
    /// The rejected one of a pair.
    second: bool,
    /// One of two equals.
    tie: bool,
    /// Where the same prompt was written.
    prompt: Option<Range<usize>>,
}

/// Where a row is.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The input's name.
    pub name: &'a str,
    /// The line, or the row of a column file.
    pub line: u64,
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.name, self.line)
    }
}
