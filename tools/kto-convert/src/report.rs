//! What a run did: counts by shape, label and reason, as lines for people and as JSON for programs.
//!
//! Invariant (tested): rows read = rows converted + rows skipped, and the records of the converted rows = records
//! written + records skipped. Nothing is lost uncounted.

use crate::{problem::Reason, weights};
use kto_cli::Ui;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Places kept per count.
const PLACES: usize = 5;

/// A count and where it was met first.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub count: u64,
    /// The first five places, `name:line`.
    pub first: Vec<String>,
    /// There were more places.
    more: bool,
}

impl Tally {
    /// Counts one more.
    pub fn note(&mut self, place: &str) {
        self.count += 1;
        let same = self.first.last().is_some_and(|last| last == place);
        if !same && self.first.len() < PLACES {
            self.first.push(place.to_owned());
        } else {
            self.more |= !same;
        }
    }

    fn places(&self) -> String {
        let more = if self.more { ", …" } else { "" };
        format!("{}{more}", self.first.join(", "))
    }

    fn json(&self) -> Value {
        json!({"count": self.count, "first": self.first})
    }
}

/// The counts of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Names of the inputs.
    pub inputs: Vec<String>,
    /// Rows read, good or bad.
    pub rows: u64,
    /// Converted rows by shape.
    pub shapes: BTreeMap<&'static str, u64>,
    /// Records written.
    pub desirable: u64,
    pub undesirable: u64,
    /// Rows that gave no record.
    pub skipped_rows: BTreeMap<Reason, Tally>,
    /// Records left out of rows that were converted.
    pub skipped_records: BTreeMap<Reason, Tally>,
    /// What was written but is odd.
    pub ties: Tally,
    pub prompts_differ: Tally,
    pub empty: Tally,
    pub duplicates: Tally,
    pub conflicts: Tally,
    pub mixed: Tally,
    pub replaced: Tally,
    /// Characters replaced under --lossy.
    pub lossy: u64,
}

impl Report {
    /// Records written.
    pub fn written(&self) -> u64 {
        self.desirable + self.undesirable
    }

    fn oddities(&self) -> [(&'static str, &'static str, &'static str, &Tally); 7] {
        [
            ("ties", "pair", "with equal sides, written with both labels", &self.ties),
            (
                "prompts_differ",
                "pair",
                "with different prompts, each side with its own",
                &self.prompts_differ,
            ),
            ("empty_completions", "empty completion", "written", &self.empty),
            (
                "conflicts",
                "record",
                "called good and bad (same text as before, other label)",
                &self.conflicts,
            ),
            ("duplicates", "record", "seen before", &self.duplicates),
            ("mixed", "row", "with text beside messages, or the prompt said twice, made alike", &self.mixed),
            (
                "replaced_columns",
                "row",
                "whose own column gave way to the record's field of that name",
                &self.replaced,
            ),
        ]
    }

    /// Prints the summary.
    pub fn print(&self, ui: &Ui) {
        let shapes: Vec<String> = self.shapes.iter().map(|(name, n)| format!("{n} {name}")).collect();
        let colon = if shapes.is_empty() { "" } else { ": " };
        ui.note(format_args!("{} read{colon}{}", plural(self.rows, "row"), shapes.join(", ")));
        let (good, bad) = (self.desirable, self.undesirable);
        let written = plural(self.written(), "record");
        ui.note(format_args!("{written} written: {good} desirable, {bad} undesirable"));
        for (what, skipped) in [("row", &self.skipped_rows), ("record", &self.skipped_records)] {
            for (reason, tally) in skipped {
                let count = plural(tally.count, what);
                ui.note(format_args!("{count} skipped, {}: {}", reason.name(), tally.places()));
            }
        }
        for (_, what, words, tally) in self.oddities().into_iter().filter(|(.., t)| t.count > 0) {
            ui.warn(format_args!("{} {words}: {}", plural(tally.count, what), tally.places()));
        }
        if self.lossy > 0 {
            ui.warn(format_args!("{} replaced by U+FFFD", plural(self.lossy, "broken character")));
        }
        if let Some(advice) = weights::advice(good, bad) {
            ui.warn(advice);
        }
    }

    /// Returns the summary as one JSON object.
    pub fn json(&self) -> Value {
        let skipped = |tallies: &BTreeMap<Reason, Tally>| -> Value {
            tallies.iter().map(|(reason, tally)| (reason.name().to_owned(), tally.json())).collect()
        };
        let total = |tallies: &BTreeMap<Reason, Tally>| tallies.values().map(|t| t.count).sum::<u64>();
        let oddities: Value =
            self.oddities().into_iter().map(|(key, .., t)| (key.to_owned(), t.json())).collect();
        json!({
            "inputs": self.inputs,
            "rows": {
                "read": self.rows,
                "converted": self.shapes.values().sum::<u64>(),
                "skipped": total(&self.skipped_rows),
                "by_shape": self.shapes,
                "skipped_by_reason": skipped(&self.skipped_rows),
            },
            "records": {
                "written": self.written(),
                "desirable": self.desirable,
                "undesirable": self.undesirable,
                "skipped": total(&self.skipped_records),
                "skipped_by_reason": skipped(&self.skipped_records),
            },
            "written_but_odd": oddities,
            "replaced_characters": self.lossy,
            "weights": weights::advice(self.desirable, self.undesirable),
        })
    }
}

/// `1 row`, `2 rows`.
pub fn plural(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}
