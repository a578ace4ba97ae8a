//! What room a prompt leaves for its answer, and what is told of those that leave little or none.
//!
//! As in kto-tokenize, a row that is too long is no error: it is counted, named and passed over, and the others go on.

use kto_cli::{Error, Result, Ui, tally::Tally};

/// Counts prompts by the room that they leave.
pub struct Room {
    /// Tokens of prompt and answer that the model is made for.
    positions: usize,
    /// What an answer may have where there is room.
    wanted: usize,
    rows: u64,
    little: Tally,
    none: Tally,
}

impl Room {
    /// Begins to count. `wanted`: tokens of an answer, at most.
    pub fn new(positions: usize, wanted: usize) -> Self {
        Self { positions, wanted, rows: 0, little: Tally::default(), none: Tally::default() }
    }

    /// Counts a prompt of `tokens` tokens and returns how many its answer may have; 0: it gets none.
    pub fn of(&mut self, tokens: usize, place: &str) -> usize {
        self.rows += 1;
        let room = self.positions.saturating_sub(tokens);
        if room == 0 {
            self.none.note(place);
        } else if room < self.wanted {
            self.little.note(place);
        }
        room.min(self.wanted)
    }

    /// Warns of what was short.
    pub fn print(&self, ui: &Ui) {
        let (positions, wanted) = (self.positions, self.wanted);
        if self.none.count > 0 {
            let (n, places) = (self.none.count, self.none.places());
            ui.warn(format_args!(
                "{n} prompts not answered, because they reach the {positions} tokens that the model is made for: {places}"
            ));
        }
        if self.little.count > 0 {
            let (n, places) = (self.little.count, self.little.places());
            ui.warn(format_args!(
                "{n} prompts leave less than {wanted} of the {positions} tokens that the model is made for; their \
                 answers are shorter: {places}"
            ));
        }
    }

    /// Fails (65) when there were prompts and none was answered.
    pub fn check(&self) -> Result<()> {
        if self.rows == 0 || self.none.count < self.rows {
            return Ok(());
        }
        let (rows, positions) = (self.rows, self.positions);
        Err(Error::data(format!(
            "no prompt of {rows} is shorter than the {positions} tokens that the model is made for"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_what_the_prompt_leaves() {
        let mut room = Room::new(10, 4);
        assert_eq!([1, 6, 7, 9, 10, 11].map(|n| room.of(n, "f:1")), [4, 4, 3, 1, 0, 0]);
        assert_eq!((room.little.count, room.none.count), (2, 2));
        assert!(room.check().is_ok());
        let mut room = Room::new(10, 4);
        assert!(room.check().is_ok(), "an empty input is no fault");
        room.of(10, "f:1");
        assert!(room.check().is_err());
    }
}
