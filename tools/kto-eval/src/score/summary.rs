//! The summary of all rows, under the names of kto-train's metrics.

use super::{number, scorer::Score};
use kto_model::{
    loss::{Loss, LossSpec, ScoredRow, kl_estimate},
    partners::PromptGroups,
};
use serde_json::{Map, Value, json};

/// Every key that a summary can have, in its order.
pub const KEYS: [&str; 22] = [
    "rows",
    "count/chosen",
    "count/rejected",
    "tokens",
    "beta",
    "loss",
    "kl",
    "kl_raw",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "pairs",
    "pairs/accuracies",
    "logps/chosen",
    "logps/rejected",
    "entropy",
    "perplexity",
    "perplexity/chosen",
    "perplexity/rejected",
    "reference_perplexity",
    "non_finite",
];

/// Collects scores. Memory: some dozens of bytes a row.
pub struct Summary<'a> {
    loss: LossSpec,
    groups: &'a PromptGroups,
    same_model: bool,
    rows: Vec<ScoredRow>,
    pairs: Vec<(f64, f64)>,
    entropy: f64,
}

/// Sums over the rows of one class.
#[derive(Default)]
struct Class {
    rows: usize,
    tokens: usize,
    reward: f64,
    logps: f64,
    reference_logps: f64,
    right: usize,
}

impl Class {
    fn of<'a>(rows: impl Iterator<Item = &'a ScoredRow>, beta: f64) -> Self {
        let mut this = Self::default();
        for row in rows {
            let reward = reward(row, beta);
            this.rows += 1;
            this.tokens += row.tokens;
            this.reward += reward;
            this.logps += row.policy_logps;
            this.reference_logps += row.reference_logps;
            this.right += usize::from(if row.label { reward > 0.0 } else { reward < 0.0 });
        }
        this
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.rows as f64
    }

    fn perplexity(&self, logps: f64) -> f64 {
        (-logps / self.tokens.max(1) as f64).exp()
    }
}

impl<'a> Summary<'a> {
    /// Starts a summary of rows that come in the order of the groups' token set.
    /// `same_model`: policy and reference are one, so the KL is 0 without any estimate.
    pub fn new(loss: LossSpec, groups: &'a PromptGroups, same_model: bool) -> Self {
        Self { loss, groups, same_model, rows: Vec::new(), pairs: Vec::new(), entropy: 0.0 }
    }

    /// Returns beta.
    pub fn beta(&self) -> f64 {
        self.loss.beta
    }

    /// Adds the next row.
    pub fn add(&mut self, score: &Score) {
        self.rows.push(ScoredRow {
            label: score.label,
            policy_logps: score.policy.logps,
            reference_logps: score.reference_logps,
            tokens: score.policy.tokens,
        });
        self.entropy += score.policy.entropy;
        self.pairs.extend(score.kl.map(|kl| (kl.logps, kl.reference_logps)));
    }

    /// Returns the summary; a number about no rows is left out.
    pub fn finish(&self) -> Map<String, Value> {
        let beta = self.loss.beta;
        let all = Class::of(self.rows.iter(), beta);
        let chosen = Class::of(self.rows.iter().filter(|r| r.label), beta);
        let rejected = Class::of(self.rows.iter().filter(|r| !r.label), beta);
        let mut out = Map::new();
        for (key, count) in
            [("rows", all.rows), ("count/chosen", chosen.rows), ("count/rejected", rejected.rows)]
        {
            out.insert(key.into(), json!(count));
        }
        out.insert("tokens".into(), json!(all.tokens));
        out.insert("beta".into(), number(beta));
        self.loss_and_kl(&mut out);
        let classes = [("chosen", &chosen), ("rejected", &rejected)];
        let present = || classes.iter().filter(|(_, class)| class.rows > 0);
        for (name, class) in present() {
            out.insert(format!("rewards/{name}"), number(class.mean(class.reward)));
        }
        if present().count() == 2 {
            let margin = chosen.mean(chosen.reward) - rejected.mean(rejected.reward);
            out.insert("rewards/margins".into(), number(margin));
        }
        out.insert("rewards/accuracies".into(), number(all.mean(all.right as f64)));
        self.ranking(&mut out);
        for (name, class) in present() {
            out.insert(format!("logps/{name}"), number(class.mean(class.logps)));
        }
        out.insert("entropy".into(), number(self.entropy / all.tokens.max(1) as f64));
        out.insert("perplexity".into(), number(all.perplexity(all.logps)));
        for (name, class) in present() {
            out.insert(format!("perplexity/{name}"), number(class.perplexity(class.logps)));
        }
        out.insert("reference_perplexity".into(), number(all.perplexity(all.reference_logps)));
        let finite = |r: &&ScoredRow| r.policy_logps.is_finite() && r.reference_logps.is_finite();
        out.insert("non_finite".into(), json!(self.rows.len() - self.rows.iter().filter(finite).count()));
        out
    }

    /// The KL is the mean over all rows; without an estimate the kto loss is not defined.
    fn loss_and_kl(&self, out: &mut Map<String, Value>) {
        let known = self.same_model || !self.pairs.is_empty();
        let kl_raw = kl_estimate(self.pairs.iter().copied());
        if known || self.loss.loss != Loss::Kto {
            let sum: f64 = self.rows.iter().map(|r| self.loss.row(r, kl_raw.max(0.0)).loss).sum();
            out.insert("loss".into(), number(sum / self.loss.divisor(self.rows.iter())));
        }
        if known {
            out.insert("kl".into(), number(kl_raw.max(0.0)));
            out.insert("kl_raw".into(), number(kl_raw));
        }
    }

    /// Of all pairs of a chosen and a rejected completion of one prompt, how many have the higher reward chosen.
    fn ranking(&self, out: &mut Map<String, Value>) {
        let (mut pairs, mut right) = (0u64, 0u64);
        for group in &self.groups.groups {
            let of = |label: bool| {
                let rows = group.iter().map(|i| &self.rows[*i]).filter(move |r| r.label == label);
                rows.map(|r| reward(r, self.loss.beta)).collect::<Vec<f64>>()
            };
            let (chosen, mut rejected) = (of(true), of(false));
            rejected.sort_by(f64::total_cmp);
            pairs += (chosen.len() * rejected.len()) as u64;
            right += chosen.iter().map(|c| rejected.partition_point(|r| r < c) as u64).sum::<u64>();
        }
        out.insert("pairs".into(), json!(pairs));
        if pairs > 0 {
            out.insert("pairs/accuracies".into(), number(right as f64 / pairs as f64));
        }
    }
}

fn reward(row: &ScoredRow, beta: f64) -> f64 {
    beta * (row.policy_logps - row.reference_logps)
}

/// Returns the summary as a few lines for people.
pub fn lines(summary: &Map<String, Value>) -> Vec<String> {
    let rows: [&[&str]; 5] = [&KEYS[..4], &KEYS[4..8], &KEYS[8..14], &KEYS[14..17], &KEYS[17..21]];
    let item = |key: &&str| {
        let value = summary.get(*key)?;
        Some(match value.as_f64().filter(|_| value.is_f64() && *key != "beta") {
            Some(x) => format!("{key} {x:.4}"),
            None => format!("{key} {value}"),
        })
    };
    let line = |keys: &&[&str]| keys.iter().filter_map(item).collect::<Vec<_>>().join(", ");
    rows.iter().map(line).filter(|l| !l.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::scorer::KlScore;
    use kto_model::sweep::BranchStats;

    fn score(row: usize, label: bool, logps: f64, kl: Option<(f64, f64)>) -> Score {
        let policy = BranchStats { tokens: 2, logps, entropy: 1.0, ..Default::default() };
        let kl = kl.map(|(logps, reference_logps)| KlScore { partner: 0, logps, reference_logps });
        Score { row, label, policy, reference_logps: -10.0, kl }
    }

    fn spec(loss: Loss) -> LossSpec {
        LossSpec { loss, beta: 0.5, desirable_weight: 1.0, undesirable_weight: 1.0 }
    }

    #[test]
    fn the_numbers_are_what_their_names_say() {
        let groups = PromptGroups { groups: vec![vec![0, 1, 3], vec![2]], group_of: vec![0, 0, 1, 0] };
        let mut summary = Summary::new(spec(Loss::Kto), &groups, false);
        for (row, label, logps) in [(0, true, -8.0), (1, false, -9.0), (2, false, -14.0), (3, true, -9.5)] {
            summary.add(&score(row, label, logps, Some((-3.0, -2.0))));
        }
        let out = summary.finish();
        let get = |key: &str| out[key].as_f64().unwrap();
        assert_eq!((get("kl"), get("kl_raw"), get("tokens")), (0.0, -1.0, 8.0));
        assert_eq!(
            (get("rewards/chosen"), get("rewards/rejected"), get("rewards/margins")),
            (0.625, -0.75, 1.375)
        );
        assert_eq!(get("rewards/accuracies"), 0.75);
        assert_eq!((get("pairs"), get("pairs/accuracies")), (2.0, 0.5));
        assert!((get("perplexity/chosen") - (17.5f64 / 4.0).exp()).abs() < 1e-9);
        assert!((get("reference_perplexity") - 5f64.exp()).abs() < 1e-9);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let loss =
            [1.0 - sigmoid(1.0), sigmoid(0.5), sigmoid(-2.0), 1.0 - sigmoid(0.25)].iter().sum::<f64>() / 4.0;
        assert!((get("loss") - loss).abs() < 1e-12);
        assert!(out.keys().all(|k| KEYS.contains(&k.as_str())) && out.len() == KEYS.len());
        assert_eq!(out.keys().map(String::as_str).collect::<Vec<_>>(), KEYS);
    }

    #[test]
    fn what_is_not_there_has_no_number() {
        let groups = PromptGroups { groups: vec![vec![0]], group_of: vec![0] };
        let mut summary = Summary::new(spec(Loss::Kto), &groups, false);
        summary.add(&score(0, true, f64::NAN, None));
        let out = summary.finish();
        for key in
            ["loss", "kl", "rewards/rejected", "rewards/margins", "pairs/accuracies", "perplexity/rejected"]
        {
            assert!(!out.contains_key(key), "{key}");
        }
        let mut untrained = Vec::new();
        for label in [true, false] {
            let mut summary = Summary::new(spec(Loss::Sft), &groups, true);
            summary.add(&score(0, label, -10.0, None));
            untrained.push(summary.finish()["rewards/accuracies"].clone());
        }
        assert_eq!(untrained, [json!(0.0), json!(0.0)], "a reward of 0 is not right");
        assert_eq!((&out["rewards/chosen"], &out["non_finite"]), (&Value::Null, &json!(1)));
    }
}
