//! A GGUF file, memory-mapped: its keys, and where each tensor lies.
//!
//! The file may be anything: every length is held against what is left of the file before it is used, so nothing is allocated that the file
//! could not fill, and every tensor's range lies inside the file and touches no other's. Versions 2 and 3, little-endian. What a key or a
//! tensor means is the business of the caller. Deliberately absent: files in several parts, whose tensors are elsewhere.

use super::{ALIGNMENT, GgufValue, kinds};
use crate::mmap::{FileStamp, Map, shown};
use kto_cli::{Context, Error, Result, escape, hash::Sha256Hex};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
    path::Path,
    sync::Arc,
};

/// Most keys, and most tensors.
const MOST_ENTRIES: u64 = 1 << 16;
/// Longest name of a key or tensor, in bytes.
const LONGEST_NAME: u64 = 1 << 12;
/// Most elements of an array: the largest vocabularies have some 300,000 tokens.
const MOST_ELEMENTS: u64 = 1 << 24;
/// Arrays in arrays, at most.
const DEEPEST: usize = 4;
/// Bytes of each end of a tensor that go into the fingerprint.
const SAMPLE: usize = 32 << 10;

/// A tensor of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufEntry {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// ggml's number of the type.
    pub kind: u32,
    /// Bytes in the file.
    pub range: Range<usize>,
}

/// An open file.
pub struct GgufReader {
    map: Arc<Map>,
    /// `None`: a value of a kind that is of no use here.
    keys: BTreeMap<String, Option<GgufValue>>,
    tensors: BTreeMap<String, GgufEntry>,
    /// Where the tensors begin.
    start: usize,
}

/// Returns whether a file is a GGUF file, by its first bytes. What cannot be read is none.
pub fn is_gguf(path: &Path) -> bool {
    path.is_file() && Map::open(path).is_ok_and(|map| map.starts_with(b"GGUF"))
}

impl GgufReader {
    /// Opens a file and checks all of its header. Errors: 66 when it cannot be read, 65 for everything that is not as it should be.
    pub fn open(path: &Path) -> Result<Self> {
        let map = Map::open(path)?;
        if is_part(path) {
            return Err(in_parts()).at(shown(path));
        }
        let (keys, tensors, start) = parse(&map).at(shown(path))?;
        Ok(Self { map: Arc::new(map), keys, tensors, start })
    }

    /// Returns the path as it was given, for messages.
    pub fn place(&self) -> String {
        shown(self.map.path())
    }

    /// Returns the value of a key; none also for kinds that are of no use here.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.keys.get(key).and_then(Option::as_ref)
    }

    /// Returns whether there is such a key.
    pub fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// Returns the text of a key.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key) {
            Some(GgufValue::String(text)) => Some(text),
            _ => None,
        }
    }

    /// Returns the tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, GgufEntry> {
        &self.tensors
    }

    /// Returns the bytes of a tensor.
    pub fn bytes(&self, entry: &GgufEntry) -> &[u8] {
        &self.map[entry.range.clone()]
    }

    /// Returns what the system said of the file when it was opened.
    pub fn stamp(&self) -> FileStamp {
        self.map.stamp()
    }

    /// Fails (65) when somebody has written to the file since it was opened: what was read of it then belongs to no one state of it.
    pub fn check_unchanged(&self) -> Result<()> {
        if self.map.is_unchanged() {
            return Ok(());
        }
        let text = format!("{}: changed while it was read", self.place());
        Err(Error::data(text).with_hint("the same command again"))
    }

    /// Gives the memory pages of a part of the file back to the system.
    pub fn release(&self, range: Range<usize>) {
        self.map.release(range);
    }

    /// Returns the identity of the file: SHA-256 over its header and the first and last 32 KiB of each tensor.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256Hex::new();
        hash.update(&self.map[..self.start]);
        for entry in self.tensors.values() {
            let data = self.bytes(entry);
            let head = data.len().min(SAMPLE);
            hash.update(&data[..head]);
            hash.update(&data[data.len().saturating_sub(SAMPLE).max(head)..]);
            self.release(entry.range.clone());
        }
        hash.finish()
    }
}

type Header = (BTreeMap<String, Option<GgufValue>>, BTreeMap<String, GgufEntry>, usize);

/// Reads the header of the file `bytes`. Errors (65) carry no path.
fn parse(bytes: &[u8]) -> Result<Header> {
    let mut cursor = Cursor { bytes, at: 0 };
    if !bytes.starts_with(b"GGUF") {
        return Err(Error::data("not a GGUF file: it does not begin with \"GGUF\""));
    }
    cursor.at = 4;
    match cursor.u32()? {
        2 | 3 => {}
        other @ (0 | 1 | 4..=0xffff) => {
            return Err(Error::data(format!("GGUF version {other} is not read, only 2 and 3")));
        }
        _ => return Err(Error::data("a GGUF file for big-endian machines, which is not read")),
    }
    let tensor_count = cursor.count("tensors", MOST_ENTRIES)?;
    let key_count = cursor.count("keys", MOST_ENTRIES)?;
    let mut keys = BTreeMap::new();
    for _ in 0..key_count {
        let name = cursor.name("key")?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind, 0).at(format!("key \"{}\"", escape(&name)))?;
        match keys.entry(name) {
            Entry::Vacant(place) => place.insert(value),
            Entry::Occupied(old) => {
                return Err(Error::data(format!("key \"{}\" is there twice", escape(old.key()))));
            }
        };
    }
    if matches!(keys.get("split.count"), Some(Some(GgufValue::U32(2..)))) {
        return Err(in_parts());
    }
    let alignment = alignment(&keys)?;
    let mut announced = Vec::with_capacity(tensor_count);
    for _ in 0..tensor_count {
        let name = cursor.name("tensor")?;
        let entry = cursor.tensor().at(format!("tensor \"{}\"", escape(&name)))?;
        announced.push((name, entry));
    }
    let start = (cursor.at as u64).next_multiple_of(alignment);
    let tensors = place(announced, start, alignment, bytes.len() as u64)?;
    // Without tensors the padding may be missing.
    Ok((keys, tensors, (start as usize).min(bytes.len())))
}

fn alignment(keys: &BTreeMap<String, Option<GgufValue>>) -> Result<u64> {
    match keys.get("general.alignment") {
        None => Ok(ALIGNMENT),
        Some(Some(GgufValue::U32(n))) if n.is_power_of_two() && (8..=1 << 20).contains(n) => {
            Ok(u64::from(*n))
        }
        Some(_) => Err(Error::data("\"general.alignment\" must be a power of two from 8 to 1048576")),
    }
}

/// A tensor as announced: shape, type, offset from the start of the data, bytes.
struct Announced {
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
    bytes: u64,
}

/// Checks names and ranges of the tensors and returns them by name.
fn place(
    announced: Vec<(String, Announced)>,
    start: u64,
    alignment: u64,
    size: u64,
) -> Result<BTreeMap<String, GgufEntry>> {
    let mut tensors = BTreeMap::new();
    for (name, Announced { shape, kind, offset, bytes }) in announced {
        let bad = |what: String| Error::data(format!("tensor \"{}\": {what}", escape(&name)));
        if offset % alignment != 0 {
            return Err(bad(format!("offset {offset} is no multiple of {alignment}")));
        }
        let end = start.checked_add(offset).and_then(|begin| begin.checked_add(bytes));
        let Some(end) = end.filter(|end| *end <= size) else {
            return Err(bad(format!(
                "{bytes} bytes at offset {offset} of the data, the file has {}: cut short?",
                size.saturating_sub(start)
            )));
        };
        let range = (end - bytes) as usize..end as usize;
        match tensors.entry(name) {
            Entry::Vacant(place) => place.insert(GgufEntry { shape, kind, range }),
            Entry::Occupied(old) => {
                return Err(Error::data(format!("tensor \"{}\" is there twice", escape(old.key()))));
            }
        };
    }
    let mut sorted: Vec<(&Range<usize>, &String)> = tensors.iter().map(|(n, e)| (&e.range, n)).collect();
    sorted.sort_by_key(|(range, _)| range.start);
    for pair in sorted.windows(2) {
        if pair[1].0.start < pair[0].0.end {
            let (a, b) = (escape(pair[0].1), escape(pair[1].1));
            return Err(Error::data(format!("tensors \"{a}\" and \"{b}\" share bytes")));
        }
    }
    Ok(tensors)
}

fn in_parts() -> Error {
    Error::data("one part of a GGUF file in several; only whole files are read")
        .with_hint("llama-gguf-split --merge FIRST_PART WHOLE")
}

/// Whether a name is that of a part: `-00001-of-00002.gguf`.
fn is_part(path: &Path) -> bool {
    let name = path.file_stem().and_then(|n| n.to_str()).unwrap_or_default();
    let Some((rest, count)) = name.rsplit_once("-of-") else { return false };
    let five = |text: &str| (text.len() == 5).then(|| text.parse::<u32>().ok()).flatten();
    let number = rest.rsplit_once('-').and_then(|(_, number)| five(number));
    number.is_some() && five(count).is_some_and(|count| count > 1)
}

/// A place in the header.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        if n > self.left() {
            let (at, left) = (self.at, self.left());
            return Err(Error::data(format!("cut short: {n} bytes wanted at byte {at}, {left} are left")));
        }
        let taken = &self.bytes[self.at..self.at + n as usize];
        self.at += n as usize;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str, most: u64) -> Result<usize> {
        let n = self.u64()?;
        if n > most {
            return Err(Error::data(format!("{n} {what}, at most {most}")));
        }
        Ok(n as usize)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let (at, length) = (self.at, self.u64()?);
        if length > LONGEST_NAME {
            return Err(Error::data(format!(
                "the name of a {what} at byte {at} has {length} bytes, at most {LONGEST_NAME}"
            )));
        }
        let text = std::str::from_utf8(self.take(length)?);
        let text =
            text.map_err(|_| Error::data(format!("the name of a {what} at byte {at} is not UTF-8")))?;
        Ok(text.to_string())
    }

    /// A text; none when it is not UTF-8.
    fn text(&mut self) -> Result<Option<String>> {
        let length = self.u64()?;
        Ok(std::str::from_utf8(self.take(length)?).ok().map(str::to_string))
    }

    /// A value of a kind by GGUF's number.
    fn value(&mut self, kind: u32, depth: usize) -> Result<Option<GgufValue>> {
        Ok(match kind {
            6 => Some(GgufValue::F32(f32::from_le_bytes(self.array()?))),
            12 => Some(GgufValue::F32(f64::from_le_bytes(self.array()?) as f32)),
            7 => match self.take(1)?[0] {
                byte @ 0..=1 => Some(GgufValue::Bool(byte == 1)),
                byte => return Err(Error::data(format!("{byte} is neither true nor false"))),
            },
            8 => self.text()?.map(GgufValue::String),
            9 => self.values(depth)?,
            _ => self.whole(kind)?.and_then(|n| u32::try_from(n).ok()).map(GgufValue::U32),
        })
    }

    /// A whole number of a kind; none beyond i64.
    fn whole(&mut self, kind: u32) -> Result<Option<i64>> {
        Ok(match kind {
            0 => Some(i64::from(self.take(1)?[0])),
            1 => Some(i64::from(self.take(1)?[0] as i8)),
            2 => Some(i64::from(u16::from_le_bytes(self.array()?))),
            3 => Some(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Some(i64::from(self.u32()?)),
            5 => Some(i64::from(i32::from_le_bytes(self.array()?))),
            10 => i64::try_from(self.u64()?).ok(),
            11 => Some(i64::from_le_bytes(self.array()?)),
            _ => return Err(Error::data(format!("a value of kind {kind}, which GGUF does not have"))),
        })
    }

    fn values(&mut self, depth: usize) -> Result<Option<GgufValue>> {
        let kind = self.u32()?;
        let count = self.count("elements", MOST_ELEMENTS)?;
        // Bytes that an element takes at least.
        let least: u64 = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => return Err(Error::data(format!("an array of kind {kind}, which GGUF does not have"))),
        };
        if count as u64 * least > self.left() {
            return Err(Error::data(format!("cut short: {count} elements, {} bytes are left", self.left())));
        }
        let floats: Vec<f32> = match kind {
            6 => (0..count).map(|_| self.array().map(f32::from_le_bytes)).collect::<Result<_>>()?,
            12 => (0..count).map(|_| Ok(f64::from_le_bytes(self.array()?) as f32)).collect::<Result<_>>()?,
            8 => return self.texts(count),
            9 if depth == DEEPEST => {
                return Err(Error::data(format!("arrays in arrays more than {DEEPEST} deep")));
            }
            9 => {
                for _ in 0..count {
                    self.value(kind, depth + 1)?;
                }
                return Ok(None);
            }
            _ => return self.wholes(if kind == 7 { 0 } else { kind }, count),
        };
        Ok(Some(GgufValue::Floats(floats)))
    }

    /// Texts; none when one is not UTF-8.
    fn texts(&mut self, count: usize) -> Result<Option<GgufValue>> {
        let mut all = Vec::with_capacity(count);
        for _ in 0..count {
            all.push(self.text()?);
        }
        Ok(all.into_iter().collect::<Option<Vec<String>>>().map(GgufValue::Strings))
    }

    /// Whole numbers; none when one is beyond i32.
    fn wholes(&mut self, kind: u32, count: usize) -> Result<Option<GgufValue>> {
        let mut all = Vec::with_capacity(count);
        for _ in 0..count {
            all.push(self.whole(kind)?.and_then(|n| i32::try_from(n).ok()));
        }
        Ok(all.into_iter().collect::<Option<Vec<i32>>>().map(GgufValue::Ints))
    }

    fn tensor(&mut self) -> Result<Announced> {
        let count = self.u32()?;
        if !(1..=4).contains(&count) {
            return Err(Error::data(format!("{count} dimensions, 1 to 4 are possible")));
        }
        let mut shape = Vec::with_capacity(count as usize);
        for _ in 0..count {
            shape.push(self.u64()?);
        }
        let (number, offset) = (self.u32()?, self.u64()?);
        let kind = kinds::kind(number)
            .ok_or_else(|| Error::data(format!("type {number} of ggml is not known here")))?;
        let (values, bytes) = (kind.values as u64, kind.bytes as u64);
        if shape[0] % values != 0 {
            let name = kind.name;
            return Err(Error::data(format!("rows of {}, {name} has blocks of {values}", shape[0])));
        }
        let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).filter(|n| *n > 0);
        let size = elements.and_then(|n| (n / values).checked_mul(bytes));
        let size = size.ok_or_else(|| Error::data(format!("dimensions {shape:?}")))?;
        let shape = shape.iter().rev().map(|d| *d as usize).collect();
        Ok(Announced { shape, kind: number, offset, bytes: size })
    }
}

#[cfg(test)]
mod tests;
