//! Finds records that were seen before, and completions that were called both good and bad.
//!
//! Keeps a 64-bit hash of prompt and completion per record; two different records share one with a probability below
//! n²/2⁶⁵ (3·10⁻⁶ for ten million), which is good enough to count by and never drops anything.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{DefaultHasher, Hasher},
};

/// What is known of a record's prompt and completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing yet.
    New,
    /// It came with the same label before.
    Duplicate,
    /// It came with the other label before.
    Conflict,
}

/// The records seen so far.
#[derive(Default)]
pub struct Duplicates {
    /// Bit 0: seen as undesirable; bit 1: seen as desirable.
    labels: HashMap<u64, u8>,
}

impl Duplicates {
    /// Notes a record by the text of its prompt and completion.
    pub fn note(&mut self, said: &[u8], label: bool) -> Seen {
        let mut hasher = DefaultHasher::new();
        hasher.write(said);
        let bit = 1 << u8::from(label);
        match self.labels.entry(hasher.finish()) {
            Entry::Vacant(entry) => {
                entry.insert(bit);
                Seen::New
            }
            Entry::Occupied(mut entry) => {
                let before = *entry.get();
                *entry.get_mut() |= bit;
                if before & bit != 0 { Seen::Duplicate } else { Seen::Conflict }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_tell_duplicates_from_conflicts() {
        let mut seen = Duplicates::default();
        assert_eq!(seen.note(b"a", true), Seen::New);
        assert_eq!(seen.note(b"b", true), Seen::New);
        assert_eq!(seen.note(b"a", true), Seen::Duplicate);
        assert_eq!(seen.note(b"a", false), Seen::Conflict);
        assert_eq!(seen.note(b"a", false), Seen::Duplicate);
    }
}
