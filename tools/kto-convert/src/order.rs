//! The order in which records leave: as they come, as TRL unpairs, or shuffled.
//!
//! Memory: `interleave` holds nothing, `trl` a block of 1000 rows, `shuffle` all records as text.

use crate::{args::Order, plan::Plan};
use kto_cli::{Error, Kind, Result, output::Output};
use kto_formats::record;
use serde_json::json;

/// Rows in one batch of `datasets.map`, within which TRL puts all chosen before all rejected.
const TRL_BLOCK: u32 = 1000;

/// Where records go.
pub struct Sink {
    out: Output,
    order: Order,
    seed: u64,
    /// `trl`: first records of the block's rows. `shuffle`: all records.
    held: Vec<u8>,
    /// `trl`: second records of the block's rows.
    second: Vec<u8>,
    /// `shuffle`: where each record ends in `held`.
    ends: Vec<usize>,
    /// `trl`: rows in the block.
    rows: u32,
    /// Something has been given to the output.
    begun: bool,
}

impl Sink {
    /// Opens the output of the plan.
    pub fn create(plan: &Plan) -> Result<Self> {
        let out = Output::create(plan.output.as_deref())?.if_changed(plan.if_changed);
        let (held, second, ends) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { out, order: plan.order, seed: plan.seed, held, second, ends, rows: 0, begun: false })
    }

    /// Takes one record, a line of text. `rejected`: it is the second side of a pair.
    pub fn record(&mut self, line: &[u8], rejected: bool) -> Result<()> {
        match self.order {
            Order::Interleave => {
                self.begun = true;
                return self.out.write(line);
            }
            Order::Trl if rejected => self.second.extend_from_slice(line),
            Order::Trl => self.held.extend_from_slice(line),
            Order::Shuffle => {
                self.held.extend_from_slice(line);
                self.ends.push(self.held.len());
            }
        }
        Ok(())
    }

    /// Ends an input row.
    pub fn end_row(&mut self) -> Result<()> {
        self.rows += 1;
        if self.order == Order::Trl && self.rows == TRL_BLOCK { self.end_block() } else { Ok(()) }
    }

    /// Writes what is held and makes the output final.
    pub fn finish(mut self) -> Result<()> {
        match self.order {
            Order::Interleave => {}
            Order::Trl => self.end_block()?,
            Order::Shuffle => {
                for i in permutation(self.ends.len(), self.seed) {
                    let begin = if i == 0 { 0 } else { self.ends[i - 1] };
                    self.out.write(&self.held[begin..self.ends[i]])?;
                }
            }
        }
        self.out.finish()
    }

    /// Ends a run that failed. A file does not appear; a stream that has begun gets a last line that no reader of
    /// records accepts, so that the next tool in the pipe stops too instead of taking a part for the whole.
    pub fn abandon(mut self, error: &Error) {
        if self.begun && error.kind() != Kind::ClosedPipe && matches!(self.out, Output::Stdout(_)) {
            // Whatever goes wrong here, the error itself is reported and the exit code tells.
            let _ = self.out.write(format!("{}\n", json!({record::STOPPED: error.to_string()})).as_bytes());
            let _ = self.out.finish();
        }
    }

    fn end_block(&mut self) -> Result<()> {
        self.begun = true;
        self.out.write(&self.held)?;
        self.out.write(&self.second)?;
        self.held.clear();
        self.second.clear();
        self.rows = 0;
        Ok(())
    }
}

/// Returns a permutation of `0..n` that depends on `n` and `seed` only (Fisher–Yates over SplitMix64).
fn permutation(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut state = seed;
    for i in (1..n).rev() {
        order.swap(i, below(&mut state, i as u64 + 1) as usize);
    }
    order
}

/// Returns an unbiased number below `n`: draws again in the tail that does not divide evenly.
fn below(state: &mut u64, n: u64) -> u64 {
    let tail = n.wrapping_neg() % n;
    loop {
        let wide = u128::from(next(state)) * u128::from(n);
        if wide as u64 >= tail {
            return (wide >> 64) as u64;
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_is_one_and_depends_on_the_seed() {
        for n in [0, 1, 2, 7, 1000] {
            let mut sorted = permutation(n, 42);
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..n));
        }
        assert_eq!(permutation(100, 1), permutation(100, 1));
        assert_ne!(permutation(100, 1), permutation(100, 2));
    }

    #[test]
    fn the_generator_is_the_published_one() {
        let mut state = 1_234_567;
        let drawn: Vec<u64> = (0..3).map(|_| next(&mut state)).collect();
        assert_eq!(drawn, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }
}
