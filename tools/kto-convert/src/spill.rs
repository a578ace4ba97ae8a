//! Sorting more than the memory holds.
//!
//! Entries of three numbers are collected up to a budget, sorted, and written as a run to a temporary file without a name; at the
//! end the runs are merged. Nothing is written as long as the budget holds.

use kto_cli::{Error, Kind, Result, escape};
use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    mem::size_of,
};

/// What is sorted: by the first number, then the second, then the third.
pub type Entry = [u64; 3];

/// Entries of a run that are in memory while runs are merged.
const WINDOW: usize = 2048;
/// Runs that are merged at once.
const MOST_RUNS: usize = 512;

/// Collects entries.
pub struct Sorter {
    held: Vec<Entry>,
    /// Entries that fit into the budget.
    most: usize,
    file: Option<File>,
    /// Where each run begins and ends, in entries.
    runs: Vec<(u64, u64)>,
}

impl Sorter {
    /// Sorts within `budget` bytes.
    pub fn new(budget: usize) -> Self {
        let most = (budget / size_of::<Entry>()).max(1024);
        Self { held: Vec::new(), most, file: None, runs: Vec::new() }
    }

    /// Takes an entry.
    pub fn push(&mut self, entry: Entry) -> Result<()> {
        if self.held.len() == self.most {
            self.spill()?;
        }
        if self.held.len() == self.held.capacity() {
            // Twice the room, but never more than the budget.
            let more = self.held.len().max(1024).min(self.most - self.held.len());
            self.held.reserve_exact(more);
        }
        self.held.push(entry);
        Ok(())
    }

    /// Ends the collecting.
    pub fn sorted(mut self) -> Result<Sorted> {
        self.held.sort_unstable();
        if self.runs.is_empty() {
            return Ok(Sorted::Held(self.held.into_iter()));
        }
        if !self.held.is_empty() {
            self.spill()?;
        }
        self.held = Vec::new();
        let Some(file) = self.file.take() else { return Err(Error::internal("runs without a file")) };
        let runs = self.runs.iter().map(|(at, end)| Run { at: *at, end: *end, window: Vec::new() }).collect();
        let mut merge = Merge { file, runs, heap: BinaryHeap::new() };
        for i in 0..merge.runs.len() {
            merge.refill(i)?;
        }
        Ok(Sorted::Merged(merge))
    }

    fn spill(&mut self) -> Result<()> {
        if self.runs.len() == MOST_RUNS {
            return Err(Error::new(Kind::OutOfMemory, "too many records for this --memory")
                .with_hint("--memory SIZE raises it"));
        }
        self.held.sort_unstable();
        let file = match self.file.take() {
            Some(file) => file,
            None => tempfile::tempfile().map_err(|e| failed(&e))?,
        };
        let begin = self.runs.last().map_or(0, |(_, end)| *end);
        let mut writer = BufWriter::with_capacity(1 << 18, &file);
        for entry in &self.held {
            for number in entry {
                writer.write_all(&number.to_le_bytes()).map_err(|e| failed(&e))?;
            }
        }
        writer.flush().map_err(|e| failed(&e))?;
        drop(writer);
        self.runs.push((begin, begin + self.held.len() as u64));
        self.held.clear();
        self.file = Some(file);
        Ok(())
    }
}

/// The error of a temporary file.
pub fn failed(error: &io::Error) -> Error {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text).to_lowercase();
    Error::new(Kind::Io, format!("temporary file: {}", escape(&text)))
        .with_hint("TMPDIR=DIR names a directory with more space")
}

/// The entries in order.
pub enum Sorted {
    /// All were in memory.
    Held(std::vec::IntoIter<Entry>),
    /// Runs from a file.
    Merged(Merge),
}

impl Sorted {
    /// Returns the next entry.
    pub fn next(&mut self) -> Result<Option<Entry>> {
        match self {
            Self::Held(entries) => Ok(entries.next()),
            Self::Merged(merge) => merge.next(),
        }
    }
}

/// Runs while they are merged.
pub struct Merge {
    file: File,
    runs: Vec<Run>,
    heap: BinaryHeap<Reverse<(Entry, usize)>>,
}

struct Run {
    /// The next entry that is still in the file.
    at: u64,
    end: u64,
    /// What was read of it, the last entry first.
    window: Vec<Entry>,
}

impl Merge {
    fn next(&mut self) -> Result<Option<Entry>> {
        let Some(Reverse((entry, run))) = self.heap.pop() else { return Ok(None) };
        self.refill(run)?;
        Ok(Some(entry))
    }

    /// Puts the next entry of a run on the heap.
    fn refill(&mut self, i: usize) -> Result<()> {
        let run = &mut self.runs[i];
        if run.window.is_empty() && run.at < run.end {
            let count = (run.end - run.at).min(WINDOW as u64) as usize;
            let mut bytes = vec![0; count * size_of::<Entry>()];
            self.file.seek(SeekFrom::Start(run.at * size_of::<Entry>() as u64)).map_err(|e| failed(&e))?;
            self.file.read_exact(&mut bytes).map_err(|e| failed(&e))?;
            run.at += count as u64;
            let number = |bytes: &[u8], i: usize| {
                let mut eight = [0; 8];
                eight.copy_from_slice(&bytes[8 * i..8 * i + 8]);
                u64::from_le_bytes(eight)
            };
            let entries = bytes.chunks_exact(size_of::<Entry>());
            run.window = entries.rev().map(|b| [number(b, 0), number(b, 1), number(b, 2)]).collect();
        }
        if let Some(entry) = run.window.pop() {
            self.heap.push(Reverse((entry, i)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(count: u64, budget: usize) -> Vec<Entry> {
        let mut sorter = Sorter::new(budget);
        let mut state = 7_u64;
        for i in 0..count {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            sorter.push([state >> 50, i % 3, i]).unwrap();
        }
        let mut sorted = sorter.sorted().unwrap();
        let mut out = Vec::new();
        while let Some(entry) = sorted.next().unwrap() {
            out.push(entry);
        }
        out
    }

    #[test]
    fn a_small_budget_gives_the_same_order() {
        for count in [0, 1, 1023, 1024, 1025, 10_000, 50_000] {
            let held = all(count, 1 << 30);
            assert_eq!(held.len() as u64, count);
            assert!(held.is_sorted());
            assert_eq!(all(count, 1), held, "{count}");
        }
    }
}
