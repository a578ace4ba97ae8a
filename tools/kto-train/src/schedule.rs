//! Learning rate as a pure function of the step.

use crate::args::ScheduleKind;

/// A schedule with warm-up.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Peak learning rate.
    pub peak: f64,
    /// Steps over which it rises from 0.
    pub warmup: u64,
    /// Number of all steps.
    pub total: u64,
}

impl Schedule {
    /// Returns the learning rate of step `step`, counted from 0. Source: transformers' get_*_schedule_with_warmup.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step as f64 / self.warmup as f64);
        }
        let left = self.total.saturating_sub(step) as f64;
        let after = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.kind {
            ScheduleKind::Constant => self.peak,
            ScheduleKind::Linear => self.peak * (left / after),
            ScheduleKind::Cosine => {
                let progress = (step - self.warmup) as f64 / after;
                self.peak * (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        let at = |kind, step| Schedule { kind, peak: 2.0, warmup: 4, total: 12 }.at(step);
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine, ScheduleKind::Constant] {
            assert_eq!([at(kind, 0), at(kind, 2), at(kind, 4)], [0.0, 1.0, 2.0]);
        }
        assert_eq!(at(ScheduleKind::Linear, 8), 1.0);
        assert!((at(ScheduleKind::Cosine, 8) - 1.0).abs() < 1e-12);
        assert_eq!(at(ScheduleKind::Linear, 12), 0.0);
        assert_eq!(at(ScheduleKind::Constant, 12), 2.0);
    }
}
