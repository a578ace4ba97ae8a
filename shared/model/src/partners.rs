//! Mismatched completions for the KL estimate: which other row's completion is scored after a row's prompt.
//!
//! Called by kto-train for every epoch and by kto-eval. A choice is a pure function of the stream's key and the row.

use kto_formats::tokens::TokenSet;
use kto_kernels::random;
use std::collections::HashMap;

/// The rows of a token set by equal prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptGroups {
    /// Rows of each prompt, ascending; prompts in the order of their first row.
    pub groups: Vec<Vec<usize>>,
    /// The place in `groups` of every row.
    pub group_of: Vec<usize>,
}

impl PromptGroups {
    /// Groups the rows by their prompt's ids.
    pub fn new(tokens: &TokenSet) -> Self {
        let mut places: HashMap<&[u32], usize> = HashMap::new();
        let mut this = Self::default();
        for row in 0..tokens.len() {
            let place = *places.entry(tokens.row(row).prompt_ids).or_insert_with(|| {
                this.groups.push(Vec::new());
                this.groups.len() - 1
            });
            this.groups[place].push(row);
            this.group_of.push(place);
        }
        this
    }

    /// Returns a row of another prompt, every such row being equally likely; `None` when there is only one prompt.
    pub fn partner(&self, stream: u64, row: usize) -> Option<usize> {
        let own = &self.groups[self.group_of[row]];
        let others = self.group_of.len() - own.len();
        if others == 0 {
            return None;
        }
        // The n-th row that is not in this (sorted) group.
        let mut place = random::below(stream, 0, others as u64) as usize;
        for &row in own {
            if row <= place {
                place += 1;
            }
        }
        Some(place)
    }

    /// Returns the partner of every row for an evaluation, as kto-train and kto-eval draw it: for (seed, row), the same each time, so that
    /// numbers of different adapters can be compared. `None` when there is only one prompt.
    pub fn held_out(&self, seed: u64) -> Option<Vec<usize>> {
        let draw = |row: usize| self.partner(random::key(&[seed, purpose("eval"), row as u64]), row);
        (0..self.group_of.len()).map(draw).collect()
    }
}

/// Returns the key of a row's draw. kto-train counts epochs from 0.
pub fn stream(seed: u64, epoch: u64, row: usize) -> u64 {
    random::key(&[seed, purpose("kl"), epoch, row as u64])
}

/// Returns a number for what a stream of random numbers is for.
pub fn purpose(name: &str) -> u64 {
    name.bytes().fold(0, |n, b| n << 8 | b as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kto_formats::tokens::{TokenMeta, TokenRow};

    fn groups(prompts: &[u32]) -> PromptGroups {
        let mut set = TokenSet::new(TokenMeta::default());
        for p in prompts {
            set.push(TokenRow { prompt_ids: &[*p], completion_ids: &[1], label: true, prompt_hash: 0 });
        }
        PromptGroups::new(&set)
    }

    #[test]
    fn partners_have_another_prompt_and_cover_all_others() {
        let groups = groups(&[5, 6, 5, 7, 8, 8, 9, 5]);
        let drawn: std::collections::BTreeSet<usize> =
            (0..200).filter_map(|epoch| groups.partner(stream(9, epoch, 2), 2)).collect();
        assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [1, 3, 4, 5, 6]);
    }

    #[test]
    fn one_prompt_has_no_partner() {
        assert_eq!(groups(&[5, 5]).partner(stream(1, 0, 0), 0), None);
    }
}
