//! The numbers of a step under TRL's names, and the ones that users miss there.

use kto_model::{
    loss::{RowLoss, ScoredRow},
    sweep::BranchStats,
};
use serde_json::{Map, Value, json};

/// Means over the rows of one class of one block.
#[derive(Clone, Copy, Debug, Default)]
struct ClassMetrics {
    rows: usize,
    tokens: usize,
    reward: f64,
    logps: f64,
    logits: f64,
    right: usize,
}

/// One block's metrics: TRL's micro-batch, or the whole step.
#[derive(Clone, Copy, Debug)]
pub struct BlockMetrics {
    kl_raw: f64,
    entropy: f64,
    chosen: ClassMetrics,
    rejected: ClassMetrics,
}

impl BlockMetrics {
    /// Sums a block up. All slices have one entry for each row.
    pub fn new(rows: &[ScoredRow], losses: &[RowLoss], stats: &[BranchStats], kl_raw: f64) -> Self {
        let (mut chosen, mut rejected) = (ClassMetrics::default(), ClassMetrics::default());
        let (mut entropy, mut tokens) = (0.0, 0);
        for ((row, loss), s) in rows.iter().zip(losses).zip(stats) {
            let class = if row.label { &mut chosen } else { &mut rejected };
            class.rows += 1;
            class.tokens += s.tokens;
            class.reward += loss.reward;
            class.logps += row.policy_logps;
            class.logits += s.mean_logits;
            class.right += usize::from((loss.reward > 0.0) == row.label);
            entropy += s.entropy;
            tokens += s.tokens;
        }
        Self { kl_raw, entropy: entropy / tokens.max(1) as f64, chosen, rejected }
    }
}

/// What is known about a step beside its blocks.
#[derive(Clone, Copy, Debug)]
pub struct StepFacts {
    /// Counted from 1.
    pub step: u64,
    /// Loss of the step.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate that was applied.
    pub learning_rate: f64,
    /// Tokens of prompts and completions so far, KL completions not counted.
    pub num_tokens: u64,
    /// How far into the data the step leads.
    pub epoch: f64,
}

/// Returns one line of metrics.jsonl. Every block weighs the same, as in TRL; a class that is absent has no key.
pub fn line(facts: StepFacts, blocks: &[BlockMetrics], needs_kl: bool) -> Value {
    let mut out = Map::new();
    let mut put = |key: &str, value: f64| {
        out.insert(key.into(), json!(value));
    };
    put("loss", facts.loss);
    put("grad_norm", facts.grad_norm);
    put("learning_rate", facts.learning_rate);
    put("kl", if needs_kl { mean(blocks.iter().map(|b| b.kl_raw.max(0.0))) } else { 0.0 });
    put("kl_raw", mean(blocks.iter().map(|b| b.kl_raw)));
    put("entropy", mean(blocks.iter().map(|b| b.entropy)));
    for (name, class) in
        [("chosen", (|b| b.chosen) as fn(&BlockMetrics) -> ClassMetrics), ("rejected", |b| b.rejected)]
    {
        let present = || blocks.iter().map(class).filter(|c| c.rows > 0);
        if present().next().is_some() {
            put(&format!("rewards/{name}"), mean(present().map(|c| c.reward / c.rows as f64)));
            put(&format!("logps/{name}"), mean(present().map(|c| c.logps / c.rows as f64)));
            put(&format!("logits/{name}"), mean(present().map(|c| c.logits / c.tokens.max(1) as f64)));
        }
    }
    let both: Vec<&BlockMetrics> =
        blocks.iter().filter(|b| b.chosen.rows > 0 && b.rejected.rows > 0).collect();
    if !both.is_empty() {
        let margin = |b: &&BlockMetrics| {
            b.chosen.reward / b.chosen.rows as f64 - b.rejected.reward / b.rejected.rows as f64
        };
        put("rewards/margins", mean(both.iter().map(margin)));
    }
    let count = |f: fn(&BlockMetrics) -> usize| blocks.iter().map(f).sum::<usize>();
    let (chosen, rejected) = (count(|b| b.chosen.rows), count(|b| b.rejected.rows));
    let right = count(|b| b.chosen.right + b.rejected.right);
    put("rewards/accuracies", right as f64 / (chosen + rejected).max(1) as f64);
    put("epoch", facts.epoch);
    let mut line = Map::from_iter([("step".to_string(), json!(facts.step))]);
    line.extend(out);
    line.insert("num_tokens".into(), json!(facts.num_tokens));
    line.insert("count/chosen".into(), json!(chosen));
    line.insert("count/rejected".into(), json!(rejected));
    Value::Object(line)
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0usize), |(s, n), v| (s + v, n + 1));
    sum / n.max(1) as f64
}
