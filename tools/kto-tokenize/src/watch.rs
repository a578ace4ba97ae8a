//! The watchdog: which row each thread works on, and since when.
//!
//! Fuel bounds what a template does, but not how long its compilation or a tokenizer's expression takes. Nothing can
//! stop such a thread, so the thread that watches gives up in its place and the process ends. Without locks: a row is
//! entered and left with two stores.

use kto_cli::{Error, Result};
use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Between two looks.
pub const TICK: Duration = Duration::from_millis(200);

/// What all threads are doing.
pub struct Watch {
    start: Instant,
    limit: Duration,
    /// One for each thread, and the last for the thread that reads and loads.
    slots: Vec<Slot>,
    /// The input whose rows are being tokenized.
    input: Mutex<String>,
    done: AtomicU64,
}

/// Milliseconds after the start (0: idle) and the line.
#[derive(Default)]
struct Slot {
    since: AtomicU64,
    line: AtomicU64,
}

impl Watch {
    /// Returns a watch over `threads` threads and the one that feeds them.
    pub fn new(threads: usize, limit: Duration) -> Self {
        let slots = (0..=threads).map(|_| Slot::default()).collect();
        Self { start: Instant::now(), limit, slots, input: Mutex::default(), done: AtomicU64::new(0) }
    }

    /// Names the input that lines belong to from now on.
    pub fn enter_input(&self, name: &str) {
        *self.input.lock().unwrap_or_else(PoisonError::into_inner) = name.to_string();
    }

    /// Runs `body` as work on `line` by thread `thread`; None is the feeding thread, whose work is called `loading`.
    pub fn over<T>(&self, thread: Option<usize>, line: u64, body: impl FnOnce() -> T) -> T {
        let slot = &self.slots[thread.unwrap_or(self.slots.len() - 1)];
        slot.line.store(line, Ordering::Relaxed);
        slot.since.store(self.now().max(1), Ordering::Release);
        let value = body();
        slot.since.store(0, Ordering::Release);
        value
    }

    /// Counts finished rows.
    pub fn add_done(&self, rows: u64) {
        self.done.fetch_add(rows, Ordering::Relaxed);
    }

    /// Returns how many rows are finished.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Returns an error (65) when a row takes too long.
    pub fn check(&self) -> Result<()> {
        let now = self.now();
        for (i, slot) in self.slots.iter().enumerate() {
            let since = slot.since.load(Ordering::Acquire);
            if since > 0 && now.saturating_sub(since) > self.limit.as_millis() as u64 {
                return Err(self.stuck(i, slot.line.load(Ordering::Relaxed)));
            }
        }
        Ok(())
    }

    fn stuck(&self, slot: usize, line: u64) -> Error {
        let seconds = self.limit.as_secs();
        let what = if slot + 1 == self.slots.len() {
            format!("loading the tokenizer or the chat template takes more than {seconds} s")
        } else {
            let input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
            format!("{}:{line}: tokenizing this row takes more than {seconds} s", kto_cli::escape(&input))
        };
        Error::data(what).with_hint(format!("--row-timeout {} waits longer", seconds * 6))
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_hangs_is_named() {
        let watch = Watch::new(2, Duration::ZERO);
        watch.enter_input("a.jsonl");
        watch.over(Some(1), 7, || {
            std::thread::sleep(Duration::from_millis(5));
            let text = watch.check().unwrap_err().to_string();
            assert!(text.starts_with("a.jsonl:7: tokenizing this row"), "{text}");
        });
        assert!(watch.check().is_ok());
        watch.over(None, 0, || {
            std::thread::sleep(Duration::from_millis(5));
            assert!(watch.check().unwrap_err().to_string().starts_with("loading"));
        });
    }
}
