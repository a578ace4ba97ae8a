//! How fast a run goes: its progress line, its lines of timing.jsonl, and its summary.
//!
//! Tokens are counted as TRL counts them, prompt and completion of every row, whatever the packs share. What is left is
//! reckoned in them too: rows differ in length. metrics.jsonl has none of this, so that its bytes can be compared.

use kto_cli::{Progress, Ui, memory, units};
use kto_formats::tokens::TokenSet;
use serde_json::{Map, Value, json};
use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// An amount of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Rows, or pairs of the reference pass.
    pub rows: u64,
    /// Tokens of their prompts and completions.
    pub tokens: u64,
}

impl Work {
    /// Returns the work of the completion of row `completion` after the prompt of row `prompt`.
    pub fn of(tokens: &TokenSet, max_length: usize, prompt: usize, completion: usize) -> Self {
        let joined = tokens.row(prompt).prompt_ids.len() + tokens.row(completion).completion_ids.len();
        Self { rows: 1, tokens: joined.min(max_length) as u64 }
    }
}

impl std::ops::Add for Work {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { rows: self.rows + other.rows, tokens: self.tokens + other.tokens }
    }
}

impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), |a, b| a + b)
    }
}

/// One phase of a run: the reference pass, or the steps.
pub struct Pace {
    progress: Progress,
    began: Instant,
    /// By this process.
    worked: Cell<Work>,
    /// By earlier ones.
    before: Cell<Work>,
}

impl Pace {
    /// Begins a phase of `total` tokens, of which `before` is done.
    pub fn new(ui: &Ui, total: u64, before: Work, text: &str) -> Self {
        let progress = ui.progress(total, "tokens");
        progress.skip(before.tokens);
        progress.say(text);
        Self { progress, began: Instant::now(), worked: Cell::default(), before: Cell::new(before) }
    }

    /// Counts work that an earlier process has done after all.
    pub fn skip(&self, work: Work) {
        self.before.set(self.before.get() + work);
        self.progress.skip(work.tokens);
    }

    /// Shows that of `work` a share is done.
    pub fn under_way(&self, work: Work, share: f64) {
        self.progress.under_way((work.tokens as f64 * share) as u64);
    }

    /// Says what is going on, when it is shown next.
    pub fn say(&self, text: &str) {
        self.progress.say(text);
    }

    /// Counts work and shows it; `text` says what else there is to know.
    pub fn add(&self, work: Work, text: &str) {
        self.worked.set(self.worked.get() + work);
        let rows = self.before.get().rows + self.worked.get().rows;
        self.progress.say(format!("{text}, {rows} rows{}", peak()));
        self.progress.add(work.tokens);
    }

    /// Returns what this process has done in the phase, and how long it took.
    pub fn lap(&self) -> Lap {
        Lap { work: self.worked.get(), time: self.began.elapsed() }
    }
}

/// Work and its time.
#[derive(Clone, Copy, Debug)]
pub struct Lap {
    /// What was done.
    pub work: Work,
    /// In this time.
    pub time: Duration,
}

impl Lap {
    fn rate(&self) -> f64 {
        self.work.tokens as f64 / self.time.as_secs_f64().max(1e-9)
    }

    /// Returns a line of timing.jsonl; step 0 is the reference pass. `device_peak` is the most that was taken of a GPU's memory.
    pub fn line(&self, step: u64, device_peak: Option<u64>) -> Value {
        let mut line = Map::new();
        line.insert("step".into(), json!(step));
        line.insert("rows".into(), json!(self.work.rows));
        line.insert("tokens".into(), json!(self.work.tokens));
        line.insert("seconds".into(), json!(digits(self.time.as_secs_f64(), 1e6)));
        line.insert("tokens_per_second".into(), json!(digits(self.rate(), 1e3)));
        if let Some(peak) = memory::peak_resident() {
            line.insert("peak_memory".into(), json!(peak));
        }
        if let Some(peak) = device_peak {
            line.insert("peak_device_memory".into(), json!(peak));
        }
        Value::Object(line)
    }
}

/// Returns the run's last line. `reference` is the reference pass, if this process made one; `device_peak` as in [`Lap::line`].
pub fn summary(steps: u64, lap: Lap, reference: Option<Lap>, device_peak: Option<u64>) -> String {
    let Work { rows, tokens } = lap.work;
    let (time, rate) = (units::duration(lap.time.as_secs_f64()), units::rate(lap.rate()));
    let reference = reference.map_or_else(String::new, |lap| {
        format!(", after a reference pass of {}", units::duration(lap.time.as_secs_f64()))
    });
    let on_gpu = device_peak.map_or_else(String::new, |peak| format!(", {} on the GPU", units::size(peak)));
    let plural = if steps == 1 { "" } else { "s" };
    format!(
        "{steps} step{plural}, {rows} rows, {tokens} tokens in {time}, {rate} tokens/s{reference}{}{on_gpu}",
        peak()
    )
}

/// Returns what the progress line says of a step, from its line of metrics.jsonl.
pub fn describe(line: &Value, step: u64, total_steps: u64) -> String {
    let mut text = format!("step {step}/{total_steps}");
    for (key, name, digits) in [("loss", "loss", 4), ("rewards/margins", "margin", 3), ("kl", "kl", 3)] {
        if let Some(v) = line.get(key).and_then(Value::as_f64) {
            text += &format!(", {name} {v:.digits$}");
        }
    }
    text
}

fn peak() -> String {
    memory::peak_resident().map_or_else(String::new, |bytes| format!(", peak memory {}", units::size(bytes)))
}

fn digits(value: f64, scale: f64) -> f64 {
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lap(rows: u64, tokens: u64, seconds: u64) -> Lap {
        Lap { work: Work { rows, tokens }, time: Duration::from_secs(seconds) }
    }

    #[test]
    fn a_line_of_timing_has_the_rate_of_its_step() {
        let line = lap(4, 1408, 20).line(3, None);
        let get = |key: &str| line[key].as_f64();
        assert_eq!((get("step"), get("rows"), get("tokens")), (Some(3.0), Some(4.0), Some(1408.0)));
        assert_eq!((get("seconds"), get("tokens_per_second")), (Some(20.0), Some(70.4)));
        assert_eq!(line.get("peak_memory").is_some(), cfg!(target_os = "linux"));
        assert!(line.get("peak_device_memory").is_none());
        assert_eq!(lap(4, 1408, 20).line(3, Some(7 << 30))["peak_device_memory"].as_u64(), Some(7 << 30));
    }

    #[test]
    fn the_summary_counts_what_this_process_did() {
        let text = summary(10, lap(160, 12_000, 723), Some(lap(9, 9, 62)), Some(5 << 30));
        let begin = "10 steps, 160 rows, 12000 tokens in 12 min 03 s, 16.6 tokens/s, after a reference pass of 1 min 02 s";
        assert!(text.starts_with(begin) && text.ends_with(", 5.00 GiB on the GPU"), "{text}");
    }

    #[test]
    fn a_step_without_rewards_has_a_loss() {
        let line = json!({"loss": 0.61234, "rewards/margins": -0.25, "kl": 0.0});
        assert_eq!(describe(&line, 2, 9), "step 2/9, loss 0.6123, margin -0.250, kl 0.000");
        assert_eq!(describe(&json!({"loss": 3.0}), 2, 9), "step 2/9, loss 3.0000");
    }
}
