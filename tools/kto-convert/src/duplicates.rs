//! Finds records that were seen before, and completions that were called both good and bad.
//!
//! A record is told by 128 bits of its prompt and completion; that two different ones share them is out of the question. What
//! does not fit into the memory goes to a temporary file, so the counts are exact for any number of records.

use crate::spill::Sorter;
use kto_cli::Result;

/// Bytes for the check when nothing is left out: a million records.
pub const BUDGET: usize = 24 << 20;

/// Places that are kept.
const PLACES: usize = 5;

/// The records seen so far.
pub struct Duplicates {
    seen: Sorter,
}

/// Repeated records: how many, and the first ones.
#[derive(Debug, Default, PartialEq)]
pub struct Repeated {
    pub count: u64,
    /// Number of the input and line.
    pub first: Vec<(u32, u64)>,
}

/// Bits of a packed place.
const LINE: u32 = 44;
const COUNTER: u32 = 3;

impl Duplicates {
    /// Starts with nothing seen.
    pub fn new(budget: usize) -> Self {
        Self { seen: Sorter::new(budget) }
    }

    /// Notes a record. `nth` is its number in its row.
    pub fn note(&mut self, hash: u128, label: bool, (input, line): (u32, u64), nth: usize) -> Result<()> {
        let input = u64::from(input.min(u32::from(u16::MAX)));
        let line = line.min((1 << LINE) - 1);
        let nth = (nth as u64).min((1 << COUNTER) - 1);
        let place = (((input << LINE) | line) << COUNTER | nth) << 1 | u64::from(label);
        self.seen.push([(hash >> 64) as u64, hash as u64, place])
    }

    /// Returns the duplicates (same label before) and the conflicts (only the other label before).
    pub fn finish(self) -> Result<(Repeated, Repeated)> {
        let mut sorted = self.seen.sorted()?;
        let (mut duplicates, mut conflicts) = (Repeated::default(), Repeated::default());
        let mut last = None;
        let mut labels = 0_u8;
        while let Some([high, low, place]) = sorted.next()? {
            let bit = 1 << (place & 1);
            if last != Some((high, low)) {
                (last, labels) = (Some((high, low)), bit);
                continue;
            }
            let repeated = if labels & bit != 0 { &mut duplicates } else { &mut conflicts };
            labels |= bit;
            repeated.note(place >> (1 + COUNTER));
        }
        Ok((duplicates, conflicts))
    }
}

impl Repeated {
    fn note(&mut self, place: u64) {
        self.count += 1;
        let place = ((place >> LINE) as u32, place & ((1 << LINE) - 1));
        // Hashes come in no order: the smallest places stay.
        let at = self.first.partition_point(|p| *p <= place);
        if at < PLACES {
            self.first.insert(at, place);
            self.first.truncate(PLACES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_tell_duplicates_from_conflicts() {
        for budget in [1, 1 << 20] {
            let mut seen = Duplicates::new(budget);
            for i in 0..5000 {
                seen.note(1000 + i, true, (0, i as u64), 0).unwrap();
            }
            let rows = [(1, true), (2, true), (1, true), (1, false), (1, false), (3, true), (3, true)];
            for (i, (hash, label)) in rows.into_iter().enumerate() {
                seen.note(hash, label, (i as u32 / 3, 7 + i as u64), 0).unwrap();
            }
            let (duplicates, conflicts) = seen.finish().unwrap();
            assert_eq!(duplicates, Repeated { count: 3, first: vec![(0, 9), (1, 11), (2, 13)] });
            assert_eq!(conflicts, Repeated { count: 1, first: vec![(1, 10)] });
        }
    }
}
