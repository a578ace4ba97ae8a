//! How far the work is: a bar on a terminal, a plain line now and then elsewhere.

use crate::ui::say;
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
        let first = if style == Style::Bar { FIRST } else { INTERVAL };
        let due = AtomicU64::new(millis(first));
        let (start, done, text) = (Instant::now(), AtomicU64::new(0), Mutex::default());
        Self { tool, style, total, unit, start, done, due, text, bar }
    }
    /// Moves on by `n`.
    pub fn add(&self, n: u64) {
        let done = self.done.fetch_add(n, Ordering::Relaxed) + n;
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
        let line = self.line(done);
        let mut slot = lock(&self.bar);
        let bar = slot.get_or_insert_with(|| bar(self.total));
        bar.set_message(line);
        bar.set_position(done);
    }

    /// Our own rate, over the whole time: the display's would begin when it is first drawn.
    fn line(&self, done: u64) -> String {
        let (unit, text) = (self.unit, lock(&self.text));
        let rate = done as f64 / self.start.elapsed().as_secs_f64().max(1e-3);
        let mut line = match (done * 100).checked_div(self.total) {
            Some(percent) => {
                let left = self.total.saturating_sub(done) as f64 / rate.max(1e-9);
                format!("{done}/{} {unit} ({percent} %), {rate:.1}/s, {} left", self.total, duration(left))
            }
            None => format!("{done} {unit}, {rate:.1}/s"),
        };
        if !text.is_empty() {
            line += &format!(", {text}");
        }
        line
    }
}

/// Seconds as `12 s`, `3 min 20 s`, `5 h 02 min`.
fn duration(seconds: f64) -> String {
    let s = seconds as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s / 60 % 60),
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
    let template = if total == 0 { "{spinner} {wide_msg}" } else { "{bar:20} {wide_msg}" };
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
        let endless = Progress::new("kto-x", Style::Lines, 0, "rows", Arc::default());
        assert!(endless.line(7).starts_with("7 rows, "));
        assert_eq!([12.9, 200.0, 18_120.0].map(duration), ["12 s", "3 min 20 s", "5 h 02 min"]);
    }
}
