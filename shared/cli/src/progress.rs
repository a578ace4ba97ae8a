//! How far the work is: a bar on a terminal, a plain line now and then elsewhere.

use crate::{ui::say, units};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Short work shows nothing.
const FIRST: Duration = Duration::from_millis(250);
/// Redraws a second.
const RATE: u8 = 15;
/// Before the first plain line: a log shows early that there is life.
const FIRST_LINE: Duration = Duration::from_secs(5);
/// Between two plain lines, so that cron mail stays short.
const INTERVAL: Duration = Duration::from_secs(30);

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Off,
    Bar,
    Lines,
}

/// A progress display; ends when dropped. May be moved on from several threads.
pub struct Progress {
    tool: &'static str,
    style: Style,
    total: u64,
    unit: &'static str,
    start: Instant,
    done: AtomicU64,
    /// The part of `done` that took no time.
    skipped: AtomicU64,
    /// Milliseconds after `start` at which something is shown next.
    due: AtomicU64,
    text: Mutex<String>,
    bar: Arc<Mutex<Option<ProgressBar>>>,
}

impl Progress {
    pub(crate) fn new(
        tool: &'static str,
        style: Style,
        total: u64,
        unit: &'static str,
        bar: Arc<Mutex<Option<ProgressBar>>>,
    ) -> Self {
        let first = if style == Style::Bar { FIRST } else { FIRST_LINE };
        let due = AtomicU64::new(millis(first));
        let [done, skipped] = [const { AtomicU64::new(0) }; 2];
        Self {
            tool,
            style,
            total,
            unit,
            start: Instant::now(),
            done,
            skipped,
            due,
            text: Mutex::default(),
            bar,
        }
    }
    /// Moves on by `n`.
    pub fn add(&self, n: u64) {
        let done = self.done.fetch_add(n, Ordering::Relaxed) + n;
        self.show_if_due(done);
    }
    /// Shows that of the next [`Progress::add`] about `n` is done: a long step is no silence.
    pub fn under_way(&self, n: u64) {
        self.show_if_due(self.done.load(Ordering::Relaxed) + n);
    }
    fn show_if_due(&self, done: u64) {
        if self.style == Style::Off {
            return;
        }
        let (now, due) = (millis(self.start.elapsed()), self.due.load(Ordering::Relaxed));
        let step = if self.style == Style::Bar { 1000 / u64::from(RATE) } else { millis(INTERVAL) };
        // Of several threads that find it due, one shows it.
        if now >= due
            && self.due.compare_exchange(due, now + step, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.show(done);
        }
    }
    /// Moves on by `n` that an earlier run has done: they count as done, not in the rate.
    pub fn skip(&self, n: u64) {
        self.skipped.fetch_add(n, Ordering::Relaxed);
        self.done.fetch_add(n, Ordering::Relaxed);
    }
    /// Shows a short text beside the bar.
    pub fn say(&self, text: impl Into<String>) {
        if self.style != Style::Off {
            *lock(&self.text) = text.into();
        }
    }

    fn show(&self, done: u64) {
        if self.style == Style::Lines {
            return say(format_args!("{}: {}", self.tool, self.line(done)));
        }
        let message = self.message(done);
        let mut slot = lock(&self.bar);
        let bar = slot.get_or_insert_with(|| bar(self.total));
        bar.set_message(message);
        bar.set_position(done);
    }

    /// The plain line: everything, amounts first.
    fn line(&self, done: u64) -> String {
        let (unit, rate) = (self.unit, self.rate(done));
        let mut line = match self.percent(done) {
            Some(percent) => {
                let (total, left) = (self.total, self.left(done));
                format!("{done}/{total} {unit} ({percent} %), {} {unit}/s, {left} left", units::rate(rate))
            }
            None => format!("{done} {unit}, {} {unit}/s", units::rate(rate)),
        };
        let text = lock(&self.text);
        if !text.is_empty() {
            line += &format!(", {text}");
        }
        line
    }

    /// The text beside the bar, which a narrow terminal cuts: what one looks for comes first.
    fn message(&self, done: u64) -> String {
        let (unit, text) = (self.unit, lock(&self.text).clone());
        let rate = units::rate(self.rate(done));
        match self.percent(done) {
            Some(percent) if !text.is_empty() => {
                let (total, left) = (self.total, self.left(done));
                format!("{percent} %, {left} left, {rate} {unit}/s, {text}, {done}/{total} {unit}")
            }
            _ => self.line(done),
        }
    }

    fn percent(&self, done: u64) -> Option<u64> {
        (done * 100).checked_div(self.total)
    }

    /// Our own rate, over the whole time: the display's would begin when it is first drawn.
    fn rate(&self, done: u64) -> f64 {
        let worked = done.saturating_sub(self.skipped.load(Ordering::Relaxed));
        worked as f64 / self.start.elapsed().as_secs_f64().max(1e-3)
    }

    fn left(&self, done: u64) -> String {
        let rate = self.rate(done);
        if rate <= 0.0 {
            return "unknown time".into();
        }
        units::duration(self.total.saturating_sub(done) as f64 / rate)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.style == Style::Bar
            && let Some(bar) = lock(&self.bar).take()
        {
            bar.finish_and_clear();
        }
    }
}

fn bar(total: u64) -> ProgressBar {
    // wide_msg is cut at the right margin: a line that wraps could not be erased.
    let template = if total == 0 { "{spinner} {wide_msg}" } else { "{bar:10} {wide_msg}" };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let target = ProgressDrawTarget::stderr_with_hz(RATE);
    ProgressBar::with_draw_target((total > 0).then_some(total), target).with_style(style)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_line_says_how_far_and_how_fast() {
        let progress = Progress::new("kto-x", Style::Lines, 200, "rows", Arc::default());
        progress.add(50);
        progress.say("loss 0.5");
        let line = progress.line(50);
        assert!(line.starts_with("50/200 rows (25 %), ") && line.ends_with(" left, loss 0.5"), "{line}");
        assert!(line.contains(" rows/s, "), "{line}");
        let endless = Progress::new("kto-x", Style::Lines, 0, "rows", Arc::default());
        assert!(endless.line(7).starts_with("7 rows, "));
        let message = progress.message(50);
        assert!(
            message.starts_with("25 %, ") && message.ends_with(" rows/s, loss 0.5, 50/200 rows"),
            "{message}"
        );
    }

    #[test]
    fn what_an_earlier_run_did_is_done_but_not_in_the_rate() {
        let progress = Progress::new("kto-x", Style::Lines, 200, "rows", Arc::default());
        progress.skip(50);
        assert_eq!(progress.line(50), "50/200 rows (25 %), 0.0 rows/s, unknown time left");
        progress.add(10);
        assert!(progress.rate(60) > 0.0 && progress.line(60).starts_with("60/200 rows (30 %), "));
    }
}
