//! When a run saves and pauses. None of it changes a number of the run: it may be other than before on `--resume`.

use kto_cli::number;
use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// Something that comes again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Every {
    /// After so many steps.
    Steps(u64),
    /// After so much time.
    Time(Duration),
}

impl Every {
    /// Parses a number of steps, or a duration.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return match text.parse() {
                Ok(n) if n > 0 => Ok(Self::Steps(n)),
                _ => Err("must be a number of steps above 0, or a duration such as 10m".into()),
            };
        }
        number::duration(text).map(Self::Time)
    }
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// The newest so many.
    pub last: usize,
    /// Those of steps that are multiples of this.
    pub every: Option<u64>,
}

impl Keep {
    /// Returns which of `steps` go, once a checkpoint of `newest` is complete. Later ones are of a future that was given up; `newest`
    /// always stays.
    pub fn outdated(&self, mut steps: Vec<u64>, newest: u64) -> Vec<u64> {
        steps.sort_unstable_by_key(|step| std::cmp::Reverse(*step));
        let (later, mut rest): (Vec<u64>, Vec<u64>) = steps.into_iter().partition(|step| *step > newest);
        let old = rest.split_off(rest.len().min(self.last.max(1)));
        let stays = |step: &u64| self.every.is_some_and(|n| step.is_multiple_of(n));
        later.into_iter().chain(old.into_iter().filter(|step| !stays(step))).collect()
    }
}

/// How a run is kept and ended.
#[derive(Debug)]
pub struct Cadence {
    every: Option<Every>,
    /// Which checkpoints stay.
    pub keep: Keep,
    deadline: Option<Instant>,
    saved_at: Cell<Instant>,
    saved_step: Cell<u64>,
}

impl Cadence {
    /// Describes a run that began `began`.
    pub fn new(every: Option<Every>, keep: Keep, began: Instant, max_time: Option<Duration>) -> Self {
        // A deadline that no clock can hold never comes.
        let deadline = max_time.and_then(|time| began.checked_add(time));
        Self { every, keep, deadline, saved_at: Cell::new(began), saved_step: Cell::new(0) }
    }

    /// Notes that the state after `step` is on the disk, or, at the start, in no need of it.
    pub fn saved(&self, step: u64) {
        self.saved_step.set(step);
        self.saved_at.set(Instant::now());
    }

    /// Returns whether the state after `step` is on the disk.
    pub fn is_saved(&self, step: u64) -> bool {
        self.saved_step.get() == step
    }

    /// Returns whether the state after `step` should be saved now.
    pub fn is_due(&self, step: u64) -> bool {
        !self.is_saved(step)
            && match self.every {
                None => false,
                Some(Every::Steps(n)) => step.is_multiple_of(n),
                Some(Every::Time(time)) => self.saved_at.get().elapsed() >= time,
            }
    }

    /// Puts off the next save by the clock, after one that failed.
    pub fn put_off(&self) {
        self.saved_at.set(Instant::now());
    }

    /// Returns whether the run has had its time.
    pub fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_or_time() {
        assert_eq!(Every::parse("50"), Ok(Every::Steps(50)));
        assert_eq!(Every::parse("10m"), Ok(Every::Time(Duration::from_secs(600))));
        for text in ["0", "", "-1", "x", "10 m", "99999999999999999999", "1.5"] {
            assert!(Every::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_newest_and_the_multiples_stay() {
        let keep = |last, every| Keep { last, every };
        let steps = || vec![10, 20, 25, 30, 35, 40];
        assert_eq!(keep(2, None).outdated(steps(), 40), [30, 25, 20, 10]);
        assert_eq!(keep(1, Some(20)).outdated(steps(), 40), [35, 30, 25, 10]);
        assert_eq!(keep(9, None).outdated(steps(), 40), [0; 0]);
        // 35 and 40 were damaged: the run went back to 25 and has saved 30 again.
        assert_eq!(keep(1, None).outdated(steps(), 30), [40, 35, 25, 20, 10]);
        assert_eq!(keep(0, None).outdated(vec![5], 5), [0; 0]);
    }

    #[test]
    fn a_saved_step_is_not_saved_again() {
        let keep = Keep { last: 2, every: None };
        let cadence = Cadence::new(Some(Every::Steps(5)), keep, Instant::now(), None);
        assert!(cadence.is_due(5) && !cadence.is_due(6) && !cadence.is_due(0));
        cadence.saved(5);
        assert!(!cadence.is_due(5) && cadence.is_due(10) && !cadence.is_over());
        let never = Cadence::new(None, keep, Instant::now(), Some(Duration::from_secs(1 << 62)));
        assert!(!never.is_due(5) && !never.is_over());
        let over = Cadence::new(None, keep, Instant::now(), Some(Duration::ZERO));
        assert!(over.is_over());
    }
}
