//! `--shard I/N`: which bytes of which inputs are a part's own.
//!
//! The inputs lie behind one another on one line of bytes, which is cut into N equal parts. A row of a plain file of JSON Lines
//! belongs to the part in which its first byte lies; every other file as a whole to the part in which it begins. So every
//! row belongs to one part, and the parts in order are the whole.

use kto_cli::{
    Error, Result, escape,
    input::{self, Input},
};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// An input, or some of its lines.
pub struct Part {
    /// The file.
    pub path: PathBuf,
    /// The bytes in which a row of it begins; `None`: the whole input.
    pub bytes: Option<(u64, u64)>,
}

/// Returns the inputs of one part, or all of them.
pub fn parts(files: &[PathBuf], shard: Option<(u64, u64)>) -> Result<Vec<Part>> {
    let whole = |path: &PathBuf| Part { path: path.clone(), bytes: None };
    let Some((part, of)) = shard else { return Ok(files.iter().map(whole).collect()) };
    let mut sizes = Vec::new();
    for path in files {
        sizes.push(path.metadata().map_err(|e| Error::reading(path, &e))?.len());
    }
    let total = u128::from(sizes.iter().sum::<u64>());
    let cut = |i: u64| (total * u128::from(i) / u128::from(of)) as u64;
    let (from, to) = (cut(part), cut(part + 1));
    let mut parts = Vec::new();
    let mut begin = 0;
    for (path, size) in files.iter().zip(sizes) {
        let (start, end) = (begin, begin + size);
        begin = end;
        // The first part takes an empty file, so that somebody says that it is empty.
        let first = part == 0 && size == 0;
        if is_lines(path)? {
            let (low, high) = (from.max(start), to.min(end));
            if low < high || first {
                parts.push(Part { path: path.clone(), bytes: Some((low - start, high - start)) });
            }
        } else if (from..to).contains(&start) || first {
            parts.push(whole(path));
        }
    }
    Ok(parts)
}

/// True for a plain file whose first line is a JSON object.
fn is_lines(path: &Path) -> Result<bool> {
    let mut head = Vec::new();
    let file = input::open_file(path)?;
    file.take(4 << 10).read_to_end(&mut head).map_err(|e| Error::reading(path, &e))?;
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&head).trim_ascii_start();
    let first = text.split(|b| *b == b'\n').next().unwrap_or_default().trim_ascii();
    Ok(first.first() == Some(&b'{') && first != b"{")
}

/// Opens the lines that begin in `from..to`. Returns how many lines lie before them, when that is asked for; without it
/// messages call the input FILE@OFFSET.
pub fn open(path: &Path, from: u64, to: u64, count: bool) -> Result<(Input, u64)> {
    let failed = |e: io::Error| Error::reading(path, &e);
    let mut file = input::open_file(path)?;
    let start = if from == 0 { 0 } else { line_behind(&mut file, from - 1).map_err(failed)? };
    let end = line_behind(&mut file, to.saturating_sub(1)).map_err(failed)?;
    let mut before = 0;
    if count {
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        before = lines(&mut (&file).take(start)).map_err(failed)?;
    }
    file.seek(SeekFrom::Start(start)).map_err(failed)?;
    let shown = escape(&path.display().to_string());
    let name = if start == 0 || count { shown } else { format!("{shown}@{start}") };
    let reader = BufReader::with_capacity(256 << 10, file.take(end.saturating_sub(start)));
    Ok((Input { name, reader: Box::new(reader) }, before))
}

/// The position behind the first line end at or behind `at`, or the file's end.
fn line_behind(file: &mut File, at: u64) -> io::Result<u64> {
    file.seek(SeekFrom::Start(at))?;
    let mut reader = BufReader::new(file);
    let mut position = at;
    loop {
        let bytes = reader.fill_buf()?;
        if bytes.is_empty() {
            return Ok(position);
        }
        match bytes.iter().position(|b| *b == b'\n') {
            Some(found) => return Ok(position + found as u64 + 1),
            None => {
                let n = bytes.len();
                position += n as u64;
                reader.consume(n);
            }
        }
    }
}

fn lines(reader: &mut impl Read) -> io::Result<u64> {
    let (mut count, mut buffer) = (0, vec![0; 1 << 20]);
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(count),
            n => count += buffer[..n].iter().filter(|b| **b == b'\n').count() as u64,
        }
    }
}
