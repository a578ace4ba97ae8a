//! What a run did: counts and lengths, as lines for people and as JSON for programs.
//!
//! Invariants: rows read = rows used + skipped; turns = rows written + dropped. Without `--train-on all` a row used is
//! one turn.

use crate::encoder::Ids;
use kto_cli::{Ui, tally::Tally};
use kto_formats::tokens::TokenMeta;
use serde_json::{Value, json};
use std::collections::BTreeMap;

fn json_of(tally: &Tally) -> Value {
    json!({"count": tally.count, "first": tally.first})
}

/// The counts of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Rows read, good or bad.
    pub rows: u64,
    /// Rows made of them.
    pub turns: u64,
    /// Rows left out because the prompt reaches the maximum length.
    pub dropped: Tally,
    /// Rows that training will cut.
    pub truncated: Tally,
    /// Rows left out because they could not be used; what was wrong with the first five.
    skipped: Tally,
    /// Rows whose prompt does not end on a token boundary of the whole.
    boundary_moved: Tally,
    /// Rows with control tokens that were kept as text.
    shielded: Tally,
    desirable: u64,
    undesirable: u64,
    /// The tokenizer's model_max_length.
    made_for: Option<u64>,
    /// What of the tokenizer is not followed.
    notes: Vec<String>,
    prompts: Lengths,
    completions: Lengths,
    totals: Lengths,
}

impl Report {
    /// Returns the report before the first row. `notes` say what of the tokenizer is not followed, `made_for` how many tokens it is made
    /// for.
    pub fn new(notes: Vec<String>, made_for: Option<u64>) -> Self {
        Self { notes, made_for, ..Self::default() }
    }

    /// Counts a bad row by its message, which begins with its place.
    pub fn skip(&mut self, what: String) {
        self.skipped.note(&what);
    }

    /// Counts what is odd about a row.
    pub fn note(&mut self, place: &str, ids: &Ids) {
        if ids.boundary_moved {
            self.boundary_moved.note(place);
        }
        if ids.shielded {
            self.shielded.note(place);
        }
    }

    /// Counts a row that is written, before its completion is capped.
    pub fn measure(&mut self, ids: &Ids) {
        *if ids.label { &mut self.desirable } else { &mut self.undesirable } += 1;
        self.prompts.add(ids.prompt.len());
        self.completions.add(ids.completion.len());
        self.totals.add(ids.prompt.len() + ids.completion.len());
    }

    fn written(&self) -> u64 {
        self.desirable + self.undesirable
    }

    /// Says why there is nothing to write.
    pub fn nothing_left(&self) -> String {
        match self.rows {
            0 => "no rows".into(),
            rows => format!(
                "no rows left of {rows}: {} dropped, {} skipped",
                self.dropped.count, self.skipped.count
            ),
        }
    }

    /// Prints the summary and the warnings.
    pub fn print(&self, meta: &TokenMeta, ui: &Ui) {
        let (rows, written) = (self.rows, self.written());
        let (yes, no) = (self.desirable, self.undesirable);
        let (dropped, truncated, skipped) = (self.dropped.count, self.truncated.count, self.skipped.count);
        ui.note(format_args!(
            "{rows} rows read, {written} written ({yes} desirable, {no} undesirable), {dropped} dropped, {truncated} \
             truncated, {skipped} skipped"
        ));
        for (what, lengths) in
            [("prompt", &self.prompts), ("completion", &self.completions), ("total", &self.totals)]
        {
            let [p50, p90, p99, max] = lengths.percentiles();
            ui.note(format_args!("{what} tokens: p50 {p50}, p90 {p90}, p99 {p99}, max {max}"));
        }
        self.warn(ui);
        let [.., longest] = self.totals.percentiles();
        let longest = (longest as u64).min(meta.max_length.into());
        if let Some(known) = self.made_for.filter(|known| *known < longest) {
            ui.warn(format_args!(
                "the longest row is trained with {longest} tokens, the tokenizer's model_max_length is {known}, at which nothing is \
                 cut: --max-length {known}"
            ));
        }
    }

    fn warn(&self, ui: &Ui) {
        self.notes.iter().for_each(|note| ui.warn(note));
        for (tally, what) in [
            (&self.skipped, "cannot be used and were skipped"),
            (&self.dropped, "dropped, because the prompt reaches the maximum length"),
            (&self.truncated, "longer than the maximum length; kto-train cuts the end of the completion"),
            (
                &self.shielded,
                "hold control tokens, kept as text (--allow-special takes them as control tokens)",
            ),
            (
                &self.boundary_moved,
                "have a prompt that is tokenized differently before a completion; the completion begins where they part",
            ),
        ] {
            match tally.count {
                0 => {}
                n => ui.warn(format_args!("{n} rows {what}: {}", tally.places())),
            }
        }
        if self.written() > 0 && (self.desirable == 0 || self.undesirable == 0) {
            ui.warn("all rows have the same label; KTO needs both");
        }
    }

    /// Returns the summary as JSON.
    pub fn json(&self, meta: &TokenMeta) -> Value {
        json!({
            "rows": self.rows,
            "turns": self.turns,
            "written": self.written(),
            "desirable": self.desirable,
            "undesirable": self.undesirable,
            "dropped": json_of(&self.dropped),
            "truncated": json_of(&self.truncated),
            "skipped": json_of(&self.skipped),
            "control_tokens_as_text": json_of(&self.shielded),
            "boundary_moved": json_of(&self.boundary_moved),
            "prompt_tokens": self.prompts.json(),
            "completion_tokens": self.completions.json(),
            "total_tokens": self.totals.json(),
            "max_length": meta.max_length,
            "vocab_size": meta.vocab_size,
            "tokenizer": meta.tokenizer,
            "template": meta.template,
        })
    }
}

/// Lengths in tokens: how many rows have each. There are far fewer lengths than rows.
#[derive(Clone, Debug, Default)]
struct Lengths {
    rows: BTreeMap<usize, u64>,
}

impl Lengths {
    fn add(&mut self, length: usize) {
        *self.rows.entry(length).or_default() += 1;
    }

    /// Returns p50, p90, p99 (nearest rank) and the maximum.
    fn percentiles(&self) -> [usize; 4] {
        let count: u64 = self.rows.values().sum();
        [50, 90, 99, 100].map(|percent| {
            let mut left = (count * percent).div_ceil(100);
            let reached = self.rows.iter().find(|(_, rows)| {
                left = left.saturating_sub(**rows);
                left == 0
            });
            reached.map_or(0, |(length, _)| *length)
        })
    }

    fn json(&self) -> Value {
        let [p50, p90, p99, max] = self.percentiles();
        let sum: u64 = self.rows.iter().map(|(length, rows)| *length as u64 * rows).sum();
        json!({"sum": sum, "p50": p50, "p90": p90, "p99": p99, "max": max})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        assert_eq!(Lengths::default().percentiles(), [0; 4]);
        let of = |lengths: &[usize]| {
            let mut all = Lengths::default();
            lengths.iter().for_each(|length| all.add(*length));
            all
        };
        assert_eq!(of(&[7]).percentiles(), [7; 4]);
        let all: Vec<usize> = (1..=200).rev().collect();
        assert_eq!(of(&all).percentiles(), [100, 180, 198, 200]);
        assert_eq!(of(&[3, 3, 3, 9]).percentiles(), [3, 9, 9, 9]);
        assert_eq!(of(&[3, 3, 3, 9]).json()["sum"], 18);
    }
}
