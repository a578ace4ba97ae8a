//! How many rows of a kind there were, and where the first of them stand.

/// Places kept per count.
const PLACES: usize = 5;

/// A count and where it was met first.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// How many.
    pub count: u64,
    /// The first five places, `name:line`.
    pub first: Vec<String>,
}

impl Tally {
    /// Counts one more.
    pub fn note(&mut self, place: &str) {
        self.count += 1;
        if self.first.len() < PLACES {
            self.first.push(place.into());
        }
    }

    /// Returns the places for a message; dots say that there are more.
    pub fn places(&self) -> String {
        let more = if self.count > self.first.len() as u64 { ", …" } else { "" };
        format!("{}{more}", self.first.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_counted_and_the_first_named() {
        let mut tally = Tally::default();
        (1..=5).for_each(|line| tally.note(&format!("f:{line}")));
        assert_eq!(tally.places(), "f:1, f:2, f:3, f:4, f:5");
        tally.note("f:6");
        assert_eq!((tally.count, tally.places().as_str()), (6, "f:1, f:2, f:3, f:4, f:5, …"));
    }
}
