//! The losses: from summed log-probabilities to a loss and to each row's gradient coefficient.

/// Which loss is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// arXiv 2402.01306 with the KL estimate of TRL.
    Kto,
    /// TRL's `apo_zero_unpaired`: no KL term.
    ApoZero,
    /// Mean negative log-likelihood of the completion tokens; labels and reference play no part.
    Sft,
}

impl Loss {
    /// Returns whether mismatched completions have to be scored.
    pub fn needs_kl(self) -> bool {
        self == Loss::Kto
    }
    /// Returns whether reference log-probabilities are used.
    pub fn needs_reference(self) -> bool {
        self != Loss::Sft
    }
}

/// A loss and its weights.
#[derive(Clone, Copy, Debug)]
pub struct LossSpec {
    /// Which one.
    pub loss: Loss,
    /// Strength of the pull towards the reference.
    pub beta: f64,
    /// Weight of rows with label true.
    pub desirable_weight: f64,
    /// Weight of rows with label false.
    pub undesirable_weight: f64,
}

/// One row, scored by policy and reference.
#[derive(Clone, Copy, Debug)]
pub struct ScoredRow {
    /// true = desirable
    pub label: bool,
    /// Σ log-probability under the policy, natural log.
    pub policy_logps: f64,
    /// Σ log-probability under the reference.
    pub reference_logps: f64,
    /// Number of completion tokens.
    pub tokens: usize,
}

/// What the loss says about one row, before division by the number of rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowLoss {
    /// The row's loss.
    pub loss: f64,
    /// dloss/dpolicy_logps.
    pub coefficient: f64,
    /// beta · (policy_logps − reference_logps).
    pub reward: f64,
}

/// Returns the raw KL estimate: the mean of policy − reference over mismatched pairs; 0 without pairs.
/// The loss uses its positive part. Source: arXiv 2402.01306 section 4.1; TRL 1.16.
pub fn kl_estimate(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (sum, n) =
        pairs.fold((0.0, 0usize), |(sum, n), (policy, reference)| (sum + policy - reference, n + 1));
    if n == 0 { 0.0 } else { sum / n as f64 }
}

impl LossSpec {
    /// Returns one row's loss for the KL estimate `kl` (≥ 0, without gradient).
    ///
    /// With `z = policy − reference`: kto is `w·(1 − σ(β(z − kl)))` for a desirable row and `w·(1 − σ(β(kl − z)))` for another;
    /// apo-zero is `1 − σ(βz)` and `σ(βz)` with the same weights; sft is `−policy`.
    pub fn row(&self, row: &ScoredRow, kl: f64) -> RowLoss {
        let z = row.policy_logps - row.reference_logps;
        let reward = self.beta * z;
        let (sign, weight) =
            if row.label { (1.0, self.desirable_weight) } else { (-1.0, self.undesirable_weight) };
        let shift = match self.loss {
            Loss::Kto => kl,
            Loss::ApoZero => 0.0,
            Loss::Sft => return RowLoss { loss: -row.policy_logps, coefficient: -1.0, reward },
        };
        let s = sigmoid(sign * self.beta * (z - shift));
        RowLoss { loss: weight * (1.0 - s), coefficient: -weight * sign * self.beta * s * (1.0 - s), reward }
    }

    /// Returns what the rows' losses are divided by: their number, or for sft their tokens.
    pub fn divisor<'a>(&self, rows: impl Iterator<Item = &'a ScoredRow>) -> f64 {
        let (n, tokens) = rows.fold((0, 0), |(n, t), r| (n + 1, t + r.tokens));
        (if self.loss == Loss::Sft { tokens } else { n }).max(1) as f64
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(loss: Loss) -> LossSpec {
        LossSpec { loss, beta: 0.3, desirable_weight: 1.5, undesirable_weight: 0.7 }
    }

    #[test]
    fn coefficients_are_derivatives() {
        for loss in [Loss::Kto, Loss::ApoZero, Loss::Sft] {
            for label in [true, false] {
                let at = |p: f64| {
                    let row = ScoredRow { label, policy_logps: p, reference_logps: -11.0, tokens: 4 };
                    spec(loss).row(&row, 0.8)
                };
                let h = 1e-5;
                let numeric = (at(-10.0 + h).loss - at(-10.0 - h).loss) / (2.0 * h);
                assert!((numeric - at(-10.0).coefficient).abs() < 1e-9, "{loss:?} {label}");
            }
        }
    }

    #[test]
    fn extreme_rewards_stay_finite() {
        let row = ScoredRow { label: true, policy_logps: -1e6, reference_logps: 0.0, tokens: 1 };
        let r = spec(Loss::Kto).row(&row, 0.0);
        assert!(r.loss == 1.5 && r.coefficient.abs() < 1e-300);
    }

    #[test]
    fn no_pairs_no_kl() {
        assert_eq!(kl_estimate(std::iter::empty()), 0.0);
        assert_eq!(kl_estimate([(1.0, 3.0), (2.0, 1.0)].into_iter()), -0.5);
    }
}
