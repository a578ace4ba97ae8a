//! Which rows make a step, and which completion estimates the KL of which row: pure functions of seed, epoch and step.

use kto_cli::{Error, Result};
use kto_formats::tokens::TokenSet;
use kto_kernels::random;
use kto_model::{
    partners::{PromptGroups, purpose, stream},
    rows::Job,
};

/// A row of a step with its KL partner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Index of the row.
    pub row: usize,
    /// Row whose completion is scored after this row's prompt.
    pub partner: usize,
}

/// Rows that share one KL estimate: the whole step, or one micro-batch of TRL.
pub type Block = Vec<Member>;

/// The order of a run.
#[derive(Clone, Debug)]
pub struct Order {
    rows: usize,
    batch: usize,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// File order; +1 rotation of completions within blocks of `micro` rows, the same every epoch.
    Trl { micro: usize },
    /// Prompt groups shuffled each epoch; partners from other prompts.
    Shuffled { seed: u64, prompts: PromptGroups },
}

impl Order {
    /// TRL 1.16: sequential, blocks of `micro` rows, `batch / micro` blocks a step, each epoch by itself.
    pub fn trl(rows: usize, batch: usize, micro: usize) -> Self {
        Self { rows, batch, kind: Kind::Trl { micro } }
    }

    /// Prompt groups in an order drawn anew for every epoch; completions of one prompt stay together.
    /// Error (65) when `needs_partners` and all rows have one prompt.
    pub fn shuffled(tokens: &TokenSet, batch: usize, seed: u64, needs_partners: bool) -> Result<Self> {
        let prompts = PromptGroups::new(tokens);
        if needs_partners && prompts.groups.len() < 2 {
            return Err(Error::data(
                "all rows have the same prompt: the KL term needs completions of another prompt",
            )
            .with_hint("--loss apo-zero has no KL term"));
        }
        Ok(Self { rows: tokens.len(), batch, kind: Kind::Shuffled { seed, prompts } })
    }

    /// Returns the number of steps of one epoch; the last may hold fewer rows.
    pub fn steps_per_epoch(&self) -> u64 {
        match self.kind {
            Kind::Trl { micro } => self.rows.div_ceil(micro).div_ceil(self.batch / micro) as u64,
            Kind::Shuffled { .. } => self.rows.div_ceil(self.batch) as u64,
        }
    }

    /// Returns the rows in the order of `epoch`. Blocks of consecutive steps are cut from it.
    pub fn epoch(&self, epoch: u64) -> Vec<usize> {
        match &self.kind {
            Kind::Trl { .. } => (0..self.rows).collect(),
            Kind::Shuffled { seed, prompts } => {
                let mut order: Vec<usize> = (0..prompts.groups.len()).collect();
                let stream = random::key(&[*seed, purpose("order"), epoch]);
                order.sort_by_cached_key(|g| (random::mix(stream ^ random::mix(*g as u64)), *g));
                order.into_iter().flat_map(|g| prompts.groups[g].iter().copied()).collect()
            }
        }
    }

    /// Returns the blocks of step `step` (from 0) given the epoch's rows.
    pub fn step(&self, epoch: u64, rows: &[usize], step_in_epoch: u64) -> Vec<Block> {
        let start = step_in_epoch as usize * self.batch;
        let rows = &rows[start..rows.len().min(start + self.batch)];
        match &self.kind {
            Kind::Trl { micro } => rows.chunks(*micro).map(rotate).collect(),
            Kind::Shuffled { seed, prompts } => {
                // With one prompt only, which losses without KL allow, the partner is never scored.
                let partner = |row: usize| prompts.partner(stream(*seed, epoch, row), row).unwrap_or(row);
                vec![rows.iter().map(|&row| Member { row, partner: partner(row) }).collect()]
            }
        }
    }

    /// Returns the rows of the first `steps` steps of a run, with repetitions, as (whole passes over all rows, rows of
    /// the pass that is not whole).
    pub fn rows_of(&self, steps: u64) -> (u64, Vec<usize>) {
        let (epoch, rest) = (steps / self.steps_per_epoch(), steps % self.steps_per_epoch());
        if rest == 0 {
            return (epoch, Vec::new());
        }
        let mut rows = self.epoch(epoch);
        rows.truncate(rest as usize * self.batch);
        (epoch, rows)
    }

    /// Returns how far into the data a step leads, in epochs.
    pub fn epoch_after(&self, epoch: u64, step_in_epoch: u64) -> f64 {
        let done = ((step_in_epoch as usize + 1) * self.batch).min(self.rows);
        match self.kind {
            // transformers counts micro-batches.
            Kind::Trl { micro } => {
                epoch as f64 + done.div_ceil(micro) as f64 / self.rows.div_ceil(micro) as f64
            }
            Kind::Shuffled { .. } => epoch as f64 + done as f64 / self.rows as f64,
        }
    }
}

/// Returns the work of a step: one trained job a row, then, with `kl`, one KL job a row.
pub fn jobs(blocks: &[Block], kl: bool) -> Vec<Job> {
    let members = || blocks.iter().flatten();
    let main = members().map(|m| Job { prompt: m.row, completion: m.row, gradient: true });
    let kl_jobs = members().map(|m| Job { prompt: m.row, completion: m.partner, gradient: false });
    main.chain(kl_jobs.filter(|_| kl)).collect()
}

/// TRL's KL pairs: every prompt with the completion before it, the first with the last.
fn rotate(rows: &[usize]) -> Block {
    let n = rows.len();
    (0..n).map(|i| Member { row: rows[i], partner: rows[(i + n - 1) % n] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kto_formats::tokens::{TokenMeta, TokenRow};

    fn tokens(prompts: &[u32]) -> TokenSet {
        let mut set = TokenSet::new(TokenMeta { vocab_size: 100, max_length: 16, ..Default::default() });
        for p in prompts {
            set.push(TokenRow {
                prompt_ids: &[*p],
                completion_ids: &[1],
                label: true,
                prompt_hash: *p as u64,
            });
        }
        set
    }

    #[test]
    fn an_epoch_is_a_permutation_that_keeps_prompts_together() {
        let prompts = [5, 6, 5, 7, 8, 8, 9, 5];
        let order = Order::shuffled(&tokens(&prompts), 3, 1, true).unwrap();
        let (first, second) = (order.epoch(0), order.epoch(1));
        assert_ne!(first, second);
        for rows in [first, second] {
            let mut sorted = rows.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..8).collect::<Vec<_>>());
            let runs = rows.windows(2).filter(|w| prompts[w[0]] != prompts[w[1]]).count() + 1;
            assert_eq!(runs, 5);
        }
    }

    #[test]
    fn partners_have_another_prompt_and_cover_all_others() {
        let prompts = [5, 6, 5, 7, 8, 8, 9, 5];
        let order = Order::shuffled(&tokens(&prompts), 3, 9, true).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for epoch in 0..200 {
            for block in (0..3).flat_map(|s| order.step(epoch, &order.epoch(epoch), s)) {
                for m in block {
                    assert_ne!(prompts[m.row], prompts[m.partner]);
                    if m.row == 2 {
                        seen.insert(m.partner);
                    }
                }
            }
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [1, 3, 4, 5, 6]);
    }

    #[test]
    fn one_prompt_has_no_partner() {
        assert!(Order::shuffled(&tokens(&[5, 5]), 3, 9, true).is_err());
        assert!(Order::shuffled(&tokens(&[5, 5]), 3, 9, false).is_ok());
    }

    #[test]
    fn trl_rotates_inside_micro_batches_and_cuts_steps_at_the_epoch() {
        let order = Order::trl(20, 6, 3);
        assert_eq!(order.steps_per_epoch(), 4);
        let rows = order.epoch(0);
        let last = order.step(0, &rows, 3);
        assert_eq!(last, [vec![Member { row: 18, partner: 19 }, Member { row: 19, partner: 18 }]]);
        let first = order.step(1, &rows, 0);
        assert_eq!(first.len(), 2);
        assert_eq!(
            first[1],
            [Member { row: 3, partner: 5 }, Member { row: 4, partner: 3 }, Member { row: 5, partner: 4 }]
        );
        assert_eq!(order.epoch_after(0, 0), 2.0 / 7.0);
        assert_eq!((order.rows_of(8), order.rows_of(1)), ((2, vec![]), (0, (0..6).collect())));
    }
}
