//! What needs all records at once: duplicates left out, contradictions left out, balance, shuffling, splits.
//!
//! Records go to a [`Store`] as they come, with an index entry of fixed size each. When all are there, decisions are made by
//! sorting small entries ([`Sorter`]), so memory stays within `--memory` whatever their number; what does not fit is in temporary
//! files. Decisions depend on the records, their order and the seed only, never on memory or threads.

use crate::{
    args::{Balance, Conflicts, Dedup, Order},
    near::{self, Signature},
    plan::Plan,
    problem::Reason,
    report::Report,
    sink::Sink,
    spill::{Entry, Sorted, Sorter},
    store::Store,
    work::{Done, Meta},
};
use kto_cli::{Error, Result};

/// Earlier records of a band that a record is compared with.
const COMPARED: usize = 16;

/// Bytes of an index entry: offset, prompt, line, input, length and label.
const ENTRY: usize = 32;
/// The label in an entry's length.
const LABEL: u32 = 1 << 31;

/// All records of a run.
pub struct Whole<'a> {
    plan: &'a Plan,
    lines: Store,
    index: Store,
    count: u64,
    /// [hash, hash, number and label].
    same: Option<Sorter>,
    near: Option<Near>,
}

/// Signatures and the bands in which they meet.
struct Near {
    signatures: Store,
    /// [band, number, 0].
    bands: Sorter,
    /// From which similarity records are nearly the same.
    least: f64,
}

struct Indexed {
    offset: u64,
    length: usize,
    label: bool,
    prompt: u64,
    place: (u32, u64),
}

impl<'a> Whole<'a> {
    /// Starts with nothing. The memory is shared out among what will need it.
    pub fn new(plan: &'a Plan) -> Self {
        let part = plan.memory / 8;
        let rules = &plan.rows;
        let same = rules.dedup != Dedup::None || rules.conflicts == Conflicts::Drop;
        let near = || Near { signatures: Store::new(part), bands: Sorter::new(part), least: rules.near };
        Self {
            plan,
            lines: Store::new(2 * part),
            index: Store::new(part),
            count: 0,
            same: same.then(|| Sorter::new(part)),
            near: (rules.dedup == Dedup::Near).then(near),
        }
    }

    /// Takes the records of a chunk.
    pub fn take(&mut self, done: &Done) -> Result<()> {
        let mut start = 0;
        for meta in &done.metas {
            self.record(&done.bytes[start..meta.end], meta)?;
            start = meta.end;
        }
        Ok(())
    }

    fn record(&mut self, line: &[u8], meta: &Meta) -> Result<()> {
        if line.len() >= LABEL as usize {
            return Err(Error::data(format!(
                "a record of {} MiB is too large to be sorted",
                line.len() >> 20
            )));
        }
        let offset = self.lines.append(line)?;
        let mut entry = [0; ENTRY];
        let length = line.len() as u32 | if meta.label { LABEL } else { 0 };
        entry[..8].copy_from_slice(&offset.to_le_bytes());
        entry[8..16].copy_from_slice(&meta.prompt.to_le_bytes());
        entry[16..24].copy_from_slice(&meta.place.1.to_le_bytes());
        entry[24..28].copy_from_slice(&meta.place.0.to_le_bytes());
        entry[28..].copy_from_slice(&length.to_le_bytes());
        self.index.append(&entry)?;
        let number = self.count;
        self.count += 1;
        if let Some(same) = self.same.as_mut().filter(|_| meta.hash != 0) {
            same.push([(meta.hash >> 64) as u64, meta.hash as u64, number << 1 | u64::from(meta.label)])?;
        }
        if let (Some(near), Some(signature)) = (&mut self.near, &meta.near) {
            near.note(number, signature, meta.label)?;
        }
        Ok(())
    }

    /// Decides, writes what is left, and corrects the counts.
    pub fn finish(mut self, report: &mut Report, sink: &mut Sink) -> Result<()> {
        let part = self.plan.memory / 8;
        let mut out = Sorter::new(part);
        if let Some(same) = self.same.take() {
            self.same(same, &mut out)?;
        }
        if let Some(near) = self.near.take() {
            near.finish(&mut out)?;
        }
        let mut out = Dropped::new(out.sorted()?)?;
        // Without balance one pass is enough; with it the first one counts.
        let copies = match self.plan.rows.balance {
            Balance::None => Copies::default(),
            how => {
                let mut kept = Sorter::new(part);
                let mut counts = [0_u64; 2];
                let mut all = Sorter::new(part);
                for number in 0..self.count {
                    let reason = out.of(number)?;
                    match reason {
                        Some(reason) => all.push([number, reason, 0])?,
                        None => {
                            let label = usize::from(self.entry(number)?.label);
                            counts[label] += 1;
                            kept.push([label as u64, mixed(self.plan.seed, BALANCE, number), number])?;
                        }
                    }
                }
                let copies = balance(how, counts, kept.sorted()?, &mut all, part)?;
                out = Dropped::new(all.sorted()?)?;
                copies
            }
        };
        self.write(out, copies, report, sink)
    }

    /// Finds records that are the same as one before, and contradictions.
    fn same(&self, same: Sorter, out: &mut Sorter) -> Result<()> {
        let dedup = self.plan.rows.dedup != Dedup::None;
        let conflicts = self.plan.rows.conflicts == Conflicts::Drop;
        let mut sorted = same.sorted()?;
        let mut next = sorted.next()?;
        let mut group: Vec<(u64, bool)> = Vec::new();
        while let Some([high, low, tagged]) = next {
            group.push((tagged >> 1, tagged & 1 == 1));
            next = sorted.next()?;
            if next.is_some_and(|[h, l, _]| (h, l) == (high, low)) {
                continue;
            }
            let both = group.iter().any(|(_, label)| *label) && group.iter().any(|(_, label)| !label);
            let mut seen = [false; 2];
            for (number, label) in group.drain(..) {
                let before = std::mem::replace(&mut seen[usize::from(label)], true);
                if both && conflicts {
                    out.push([number, code(Reason::Conflict), 0])?;
                } else if before && dedup {
                    out.push([number, code(Reason::Duplicate), 0])?;
                }
            }
        }
        Ok(())
    }

    fn write(
        mut self,
        mut out: Dropped,
        mut copies: Copies,
        report: &mut Report,
        sink: &mut Sink,
    ) -> Result<()> {
        let shuffle = self.plan.order == Order::Shuffle;
        let mut order = Sorter::new(self.plan.memory / 8);
        let (mut labels, mut repeated) = ([0_u64; 2], 0);
        for number in 0..self.count {
            let entry = self.entry(number)?;
            if let Some(reason) = out.of(number)? {
                let place = report.place(entry.place);
                report.skipped_records.entry(reason_of(reason)).or_default().note(place);
                continue;
            }
            let times = copies.of(number, entry.label)?;
            labels[usize::from(entry.label)] += times;
            repeated += times - 1;
            for copy in 0..times {
                if shuffle {
                    order.push([mixed(self.plan.seed, SHUFFLE + copy, number), number, 0])?;
                } else {
                    sink.write(self.lines.read(entry.offset, entry.length)?, entry.prompt)?;
                }
            }
        }
        let mut order = order.sorted()?;
        while let Some([_, number, _]) = order.next()? {
            let entry = self.entry(number)?;
            sink.write(self.lines.read(entry.offset, entry.length)?, entry.prompt)?;
        }
        if report.pairs > 0 {
            report.pairs = labels[1];
            report.undesirable = labels[1];
        } else {
            report.undesirable = labels[0];
        }
        report.desirable = labels[1];
        report.repeated = repeated;
        Ok(())
    }

    fn entry(&mut self, number: u64) -> Result<Indexed> {
        let bytes = self.index.read(number * ENTRY as u64, ENTRY)?;
        let eight = |at: usize| {
            let mut eight = [0; 8];
            eight.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(eight)
        };
        let (tail, prompt) = (eight(24), split_hash(eight(8), self.plan.seed));
        let length = (tail >> 32) as u32;
        Ok(Indexed {
            offset: eight(0),
            length: (length & !LABEL) as usize,
            label: length & LABEL != 0,
            prompt,
            place: (tail as u32, eight(16)),
        })
    }
}

impl Near {
    fn note(&mut self, number: u64, signature: &Signature, label: bool) -> Result<()> {
        // Records without a signature, sides of equals, leave a gap.
        while self.signatures.len() < number * near::BYTES as u64 {
            self.signatures.append(&[0; near::BYTES])?;
        }
        let mut bytes = [0; near::BYTES];
        signature
            .iter()
            .zip(bytes.chunks_exact_mut(4))
            .for_each(|(n, out)| out.copy_from_slice(&n.to_le_bytes()));
        self.signatures.append(&bytes)?;
        near::bands(signature, label).try_for_each(|band| self.bands.push([band, number, 0]))
    }

    fn finish(self, out: &mut Sorter) -> Result<()> {
        let Self { mut signatures, bands, least } = self;
        let mut sorted = bands.sorted()?;
        let mut band = None;
        let mut before: Vec<(u64, Box<Signature>)> = Vec::new();
        let mut lone: Option<u64> = None;
        while let Some([key, number, _]) = sorted.next()? {
            if band != Some(key) {
                (band, lone) = (Some(key), Some(number));
                before.clear();
                continue;
            }
            // Most bands have one record, whose signature is not needed.
            if let Some(first) = lone.take() {
                before.push((first, signature(&mut signatures, first)?));
            }
            let signature = signature(&mut signatures, number)?;
            if before.iter().any(|(_, other)| near::similarity(other, &signature) >= least) {
                out.push([number, code(Reason::NearDuplicate), 0])?;
            } else if before.len() < COMPARED {
                before.push((number, signature));
            }
        }
        Ok(())
    }
}

fn signature(signatures: &mut Store, number: u64) -> Result<Box<Signature>> {
    let bytes = signatures.read(number * near::BYTES as u64, near::BYTES)?;
    let mut signature = Box::new([0; near::BYTES / 4]);
    signature.iter_mut().zip(bytes.chunks_exact(4)).for_each(|(n, b)| {
        *n = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    });
    Ok(signature)
}

/// Records that are left out, in order, with the reason; the first reason counts.
struct Dropped {
    sorted: Sorted,
    next: Option<Entry>,
}

impl Dropped {
    fn new(mut sorted: Sorted) -> Result<Self> {
        let next = sorted.next()?;
        Ok(Self { sorted, next })
    }

    /// Why a record is left out. Records are asked for in order, each once.
    fn of(&mut self, number: u64) -> Result<Option<u64>> {
        let mut reason = None;
        while let Some([dropped, why, _]) = self.next.filter(|e| e[0] <= number) {
            if dropped == number {
                reason = reason.or(Some(why));
            }
            self.next = self.sorted.next()?;
        }
        Ok(reason)
    }
}

/// How often records of the rare label are written.
#[derive(Default)]
struct Copies {
    /// Of that label every record, so often more.
    each: Option<(bool, u64)>,
    /// These once more.
    more: Option<Dropped>,
}

impl Copies {
    fn of(&mut self, number: u64, label: bool) -> Result<u64> {
        let each = self.each.map_or(0, |(rare, times)| if rare == label { times } else { 0 });
        let more = match &mut self.more {
            Some(more) => u64::from(more.of(number)?.is_some()),
            None => 0,
        };
        Ok(1 + each + more)
    }
}

/// Leaves out records of the frequent label, or says how often those of the rare one are repeated. `kept` has the records that are
/// left in a random order, by label.
fn balance(
    how: Balance,
    counts: [u64; 2],
    mut kept: Sorted,
    out: &mut Sorter,
    part: usize,
) -> Result<Copies> {
    let rare = counts[1] < counts[0];
    let (few, many) = (counts[usize::from(rare)], counts[usize::from(!rare)]);
    let mut copies = Copies::default();
    if few == 0 || few == many {
        return Ok(copies);
    }
    let mut more = Sorter::new(part);
    // Down: so many of the frequent label go. Up: so many of the rare label come once more than the others.
    let (wanted, mut left) =
        if how == Balance::Down { (!rare, many - few) } else { (rare, (many - few) % few) };
    while let Some([label, _, number]) = kept.next()? {
        if label != u64::from(wanted) || left == 0 {
            continue;
        }
        left -= 1;
        match how {
            Balance::Down => out.push([number, code(Reason::Balance), 0])?,
            _ => more.push([number, 1, 0])?,
        }
    }
    if how == Balance::Up {
        copies.each = Some((rare, (many - few) / few));
        copies.more = Some(Dropped::new(more.sorted()?)?);
    }
    Ok(copies)
}

/// Purposes of random numbers.
const BALANCE: u64 = 1 << 32;
const SHUFFLE: u64 = 2 << 32;

/// A random number for a record, a purpose and the seed.
fn mixed(seed: u64, purpose: u64, number: u64) -> u64 {
    near::mixed(near::mixed(near::mixed(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ purpose) ^ number)
}

/// The hash of a prompt by which a split is chosen.
fn split_hash(prompt: u64, seed: u64) -> u64 {
    near::mixed(prompt ^ near::mixed(seed))
}

const CODES: [Reason; 4] = [Reason::Conflict, Reason::Duplicate, Reason::NearDuplicate, Reason::Balance];

fn code(reason: Reason) -> u64 {
    CODES.iter().position(|r| *r == reason).unwrap_or_default() as u64
}

fn reason_of(code: u64) -> Reason {
    CODES.get(code as usize).copied().unwrap_or(Reason::Balance)
}
