//! Files of the run directory that grow by a line at a time: metrics.jsonl and timing.jsonl.

use kto_cli::{Error, Result, atomic};
use serde_json::Value;
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::PathBuf,
};

/// No line is longer.
const LONGEST: u64 = 1 << 16;

/// A JSON Lines file that is appended to.
pub struct RunLog {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl RunLog {
    /// Opens the file and cuts it to `bytes`: lines of steps that will be done again go. Of a file that someone shortened
    /// whole lines stay.
    pub fn open_at(path: PathBuf, bytes: u64) -> Result<Self> {
        Self::open(path, |file| if file.metadata()?.len() < bytes { whole_lines(file) } else { Ok(bytes) })
    }

    /// Opens the file and keeps its lines; one that a killed run has not ended goes.
    pub fn open_end(path: PathBuf) -> Result<Self> {
        Self::open(path, whole_lines)
    }

    fn open(path: PathBuf, length: impl FnOnce(&mut File) -> io::Result<u64>) -> Result<Self> {
        let is_new = !path.exists();
        let open = || {
            let mut file =
                OpenOptions::new().create(true).read(true).write(true).truncate(false).open(&path)?;
            let bytes = length(&mut file)?;
            file.set_len(bytes)?;
            file.seek(SeekFrom::End(0))?;
            Ok((file, bytes))
        };
        let (file, bytes) = open().map_err(|e| Error::writing(&path, &e))?;
        if is_new {
            // A checkpoint that outlives its log would be resumed with a log that lacks its beginning.
            atomic::sync_name(&path)?;
        }
        Ok(Self { path, file, bytes })
    }

    /// Returns the length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends a line and returns the new length.
    pub fn append(&mut self, line: &Value) -> Result<u64> {
        let text = format!("{line}\n");
        self.file.write_all(text.as_bytes()).map_err(|e| Error::writing(&self.path, &e))?;
        self.bytes += text.len() as u64;
        Ok(self.bytes)
    }

    /// Waits until the lines are on the disk.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::writing(&self.path, &e))
    }
}

fn whole_lines(file: &mut File) -> io::Result<u64> {
    let start = file.metadata()?.len().saturating_sub(LONGEST);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail)?;
    Ok(start + tail.iter().rposition(|b| *b == b'\n').map_or(0, |at| at as u64 + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_unfinished_line_is_cut_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("timing.jsonl");
        for (before, after) in [("", ""), ("{\"st", ""), ("1\n2\n", "1\n2\n"), ("1\n2", "1\n")] {
            std::fs::write(&path, before).unwrap();
            RunLog::open_end(path.clone()).unwrap().append(&json!(7)).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{after}7\n"));
        }
        let long = format!("{}\n{}", "x".repeat(200_000), "y".repeat(9));
        std::fs::write(&path, long).unwrap();
        assert_eq!(RunLog::open_end(path.clone()).unwrap().bytes, 200_001);
        assert_eq!(RunLog::open_at(path.clone(), 5).unwrap().bytes, 5);
        std::fs::write(&path, "12345\n78").unwrap();
        assert_eq!(RunLog::open_at(path, 50).unwrap().append(&json!(1)).unwrap(), 8);
    }
}
