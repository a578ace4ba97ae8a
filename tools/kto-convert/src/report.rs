//! What a run did: counts by shape, label and reason, as lines for people and as JSON for programs.
//!
//! Invariant (tested): rows read = rows converted + rows skipped, and the records of the converted rows = records
//! written + records skipped. Nothing is lost uncounted.

use crate::{duplicates::Repeated, pii, problem::Reason, weights};
use kto_cli::Ui;
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, fmt::Display};

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
    pub fn note(&mut self, place: impl Display) {
        self.count += 1;
        if self.first.len() == PLACES && self.more {
            return;
        }
        let place = place.to_string();
        let same = self.first.last().is_some_and(|last| *last == place);
        if !same && self.first.len() < PLACES {
            self.first.push(place);
        } else {
            self.more |= !same;
        }
    }

    /// Adds what was counted behind it.
    pub fn absorb(&mut self, later: Self) {
        self.count += later.count;
        self.more |= later.more;
        for place in later.first {
            let same = self.first.last() == Some(&place);
            if !same && self.first.len() < PLACES {
                self.first.push(place);
            } else {
                self.more |= !same;
            }
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
    /// Records with personal data, and how much of each kind.
    pub pii: Tally,
    pub pii_kinds: [u64; 6],
    /// Pairs written, each of which counts as a desirable and an undesirable record.
    pub pairs: u64,
    /// Records written once more to balance the labels.
    pub repeated: u64,
    /// Rows that could not be used.
    pub bad: u64,
    /// The output has both labels.
    pub is_kto: bool,
    /// Records by file of the output directory.
    pub splits: Vec<(String, u64)>,
    /// Characters replaced under --lossy.
    pub lossy: u64,
}

impl Report {
    /// Records written.
    pub fn written(&self) -> u64 {
        self.desirable + self.undesirable
    }

    /// Adds the counts of what comes behind.
    pub fn absorb(&mut self, later: Self) {
        self.rows += later.rows;
        self.desirable += later.desirable;
        self.undesirable += later.undesirable;
        self.lossy += later.lossy;
        self.pairs += later.pairs;
        self.bad += later.bad;
        self.pii_kinds.iter_mut().zip(later.pii_kinds).for_each(|(sum, n)| *sum += n);
        for (name, count) in later.shapes {
            *self.shapes.entry(name).or_default() += count;
        }
        for (sum, tallies) in
            [(&mut self.skipped_rows, later.skipped_rows), (&mut self.skipped_records, later.skipped_records)]
        {
            for (reason, tally) in tallies {
                sum.entry(reason).or_default().absorb(tally);
            }
        }
        for (sum, tally) in [
            (&mut self.ties, later.ties),
            (&mut self.prompts_differ, later.prompts_differ),
            (&mut self.empty, later.empty),
            (&mut self.mixed, later.mixed),
            (&mut self.replaced, later.replaced),
            (&mut self.pii, later.pii),
        ] {
            sum.absorb(tally);
        }
    }

    /// Takes what the duplicate check found.
    pub fn repeated(&mut self, duplicates: Repeated, conflicts: Repeated) {
        self.duplicates = self.tally(duplicates);
        self.conflicts = self.tally(conflicts);
    }

    fn tally(&self, repeated: Repeated) -> Tally {
        let first: Vec<String> = repeated.first.iter().map(|place| self.place(*place)).collect();
        let mut places: Vec<String> = Vec::new();
        first.into_iter().for_each(|place| {
            if places.last() != Some(&place) {
                places.push(place);
            }
        });
        let more = repeated.count > repeated.first.len() as u64;
        Tally { count: repeated.count, first: places, more }
    }

    /// The words for a place.
    pub fn place(&self, (input, line): (u32, u64)) -> String {
        format!("{}:{line}", self.inputs.get(input as usize).map_or("?", String::as_str))
    }

    fn oddities(&self) -> [(&'static str, &'static str, &'static str, &Tally); 8] {
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
                "called good and bad (same text as before, other label), kept (--conflicts drop leaves them out)",
                &self.conflicts,
            ),
            ("duplicates", "record", "seen before, kept (--dedup exact leaves them out)", &self.duplicates),
            ("mixed", "row", "with text beside messages, or the prompt said twice, made alike", &self.mixed),
            (
                "replaced_columns",
                "row",
                "whose own column gave way to the record's field of that name",
                &self.replaced,
            ),
            ("personal_data", "record", "with personal data", &self.pii),
        ]
    }

    /// How much of each kind of personal data was found.
    fn kinds(&self) -> String {
        let found = pii::KINDS.iter().zip(self.pii_kinds).filter(|(_, n)| *n > 0);
        found.map(|(kind, n)| format!("{n} {kind}")).collect::<Vec<_>>().join(", ")
    }

    /// Prints the summary.
    pub fn print(&self, ui: &Ui) {
        let shapes: Vec<String> = self.shapes.iter().map(|(name, n)| format!("{n} {name}")).collect();
        let colon = if shapes.is_empty() { "" } else { ": " };
        ui.note(format_args!("{} read{colon}{}", plural(self.rows, "row"), shapes.join(", ")));
        let (good, bad) = (self.desirable, self.undesirable);
        if self.pairs > 0 {
            ui.note(format_args!("{} written", plural(self.pairs, "pair")));
        } else {
            let written = plural(self.written(), "record");
            let again = match self.repeated {
                0 => String::new(),
                n => format!(", {n} of them repeated for balance"),
            };
            ui.note(format_args!("{written} written: {good} desirable, {bad} undesirable{again}"));
        }
        if !self.splits.is_empty() {
            let parts: Vec<String> = self.splits.iter().map(|(name, n)| format!("{n} {name}")).collect();
            ui.note(format_args!("by prompt: {}", parts.join(", ")));
        }
        for (what, skipped) in [("row", &self.skipped_rows), ("record", &self.skipped_records)] {
            for (reason, tally) in skipped {
                let count = plural(tally.count, what);
                ui.note(format_args!("{count} skipped, {}: {}", reason.name(), tally.places()));
            }
        }
        for (_, what, words, tally) in self.oddities().into_iter().filter(|(.., t)| t.count > 0) {
            let kinds =
                if words.ends_with("personal data") { format!(" ({})", self.kinds()) } else { String::new() };
            ui.warn(format_args!("{} {words}{kinds}: {}", plural(tally.count, what), tally.places()));
        }
        if self.lossy > 0 {
            ui.warn(format_args!("{} replaced by U+FFFD", plural(self.lossy, "broken character")));
        }
        if let Some(advice) = self.advice() {
            ui.warn(advice);
        }
    }

    /// Advice on weights, for records that have both labels to train on.
    fn advice(&self) -> Option<String> {
        if self.pairs > 0 || !self.is_kto { None } else { weights::advice(self.desirable, self.undesirable) }
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
            "personal_data": pii::KINDS.iter().zip(self.pii_kinds).map(|(k, n)| ((*k).to_owned(), n.into())).collect::<Map<String, Value>>(),
            "pairs": self.pairs,
            "repeated_for_balance": self.repeated,
            "splits": self.splits.iter().map(|(k, n)| (k.clone(), (*n).into())).collect::<Map<String, Value>>(),
            "replaced_characters": self.lossy,
            "weights": self.advice(),
        })
    }
}

/// `1 row`, `2 rows`.
pub fn plural(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}
