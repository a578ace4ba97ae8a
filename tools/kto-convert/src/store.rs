//! Bytes that are written once, in order, and read again at any place: in memory up to a budget, then in a temporary file
//! without a name.

use crate::spill::failed;
use kto_cli::Result;
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    mem,
};

/// Bytes that are read ahead: places are often asked for in order.
const AHEAD: usize = 256 << 10;

/// The bytes.
pub struct Store {
    /// What is not in the file yet.
    held: Vec<u8>,
    budget: usize,
    file: Option<File>,
    /// Bytes in the file.
    flushed: u64,
    /// A part of the file, and where it begins.
    window: (u64, Vec<u8>),
}

impl Store {
    /// Holds up to `budget` bytes in memory.
    pub fn new(budget: usize) -> Self {
        Self { held: Vec::new(), budget: budget.max(1), file: None, flushed: 0, window: (0, Vec::new()) }
    }

    /// How much was written.
    pub fn len(&self) -> u64 {
        self.flushed + self.held.len() as u64
    }

    /// Appends; returns where.
    pub fn append(&mut self, bytes: &[u8]) -> Result<u64> {
        let at = self.len();
        if self.held.len() + bytes.len() > self.budget {
            self.flush()?;
        }
        self.held.extend_from_slice(bytes);
        Ok(at)
    }

    /// Returns the `len` bytes at `at`.
    pub fn read(&mut self, at: u64, len: usize) -> Result<&[u8]> {
        if at >= self.flushed {
            let at = (at - self.flushed) as usize;
            return Ok(&self.held[at..at + len]);
        }
        let (start, window) = &self.window;
        let inside = at >= *start && at + len as u64 <= start + window.len() as u64;
        if !inside {
            let behind = if at == start + window.len() as u64 { AHEAD } else { 0 };
            let mut bytes = mem::take(&mut self.window.1);
            let left = (self.flushed - at) as usize;
            bytes.resize(len.max(behind).min(left.max(len)), 0);
            if let Some(file) = &mut self.file {
                file.seek(SeekFrom::Start(at)).map_err(|e| failed(&e))?;
                file.read_exact(&mut bytes).map_err(|e| failed(&e))?;
            }
            self.window = (at, bytes);
        }
        let from = (at - self.window.0) as usize;
        Ok(&self.window.1[from..from + len])
    }

    /// Gives back the memory of what is held once nothing more will be written.
    fn flush(&mut self) -> Result<()> {
        let file = match self.file.take() {
            Some(file) => file,
            None => tempfile::tempfile().map_err(|e| failed(&e))?,
        };
        let file = self.file.insert(file);
        file.seek(SeekFrom::End(0)).map_err(|e| failed(&e))?;
        file.write_all(&self.held).map_err(|e| failed(&e))?;
        self.flushed += self.held.len() as u64;
        self.held.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_from_memory_and_file() {
        for budget in [1, 100, 5000, 1 << 20] {
            let mut store = Store::new(budget);
            let piece = |i: u64| vec![i as u8; (i * 7 % 90) as usize + 1];
            let places: Vec<u64> = (0..1000).map(|i| store.append(&piece(i)).unwrap()).collect();
            for i in (0..1000).chain((0..1000).rev()).chain([3, 900, 4, 899]) {
                let wanted = piece(i);
                assert_eq!(store.read(places[i as usize], wanted.len()).unwrap(), wanted, "{budget} {i}");
            }
            assert_eq!(store.len(), (0..1000).map(|i| piece(i).len() as u64).sum::<u64>());
        }
    }
}
