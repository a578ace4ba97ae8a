//! The numbers of a step under TRL's names, and the ones that users miss there.

use kto_model::{
    loss::{Loss, RowLoss, ScoredRow},
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

impl ClassMetrics {
    fn mean_reward(&self) -> f64 {
        self.reward / self.rows as f64
    }
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
            class.right += usize::from(if row.label { loss.reward > 0.0 } else { loss.reward < 0.0 });
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

/// Returns one line of metrics.jsonl. Every block weighs the same, as in TRL; a class that is absent has no key,
/// and a loss without a reference has no rewards. Times are left out: a resumed run ends with the same bytes.
pub fn line(facts: StepFacts, blocks: &[BlockMetrics], loss: Loss) -> Value {
    let mut line = Map::new();
    line.insert("step".into(), json!(facts.step));
    let mut put = |key: &str, value: f64| line.insert(key.into(), json!(value));
    put("loss", facts.loss);
    put("grad_norm", facts.grad_norm);
    put("learning_rate", facts.learning_rate);
    if loss.needs_reference() {
        // TRL logs a kl of 0 where the loss has none.
        put("kl", mean(blocks.iter().map(|b| b.kl_raw.max(0.0))));
        put("kl_raw", mean(blocks.iter().map(|b| b.kl_raw)));
    }
    put("entropy", mean(blocks.iter().map(|b| b.entropy)));
    put_class("chosen", blocks.iter().map(|b| b.chosen), loss, &mut put);
    put_class("rejected", blocks.iter().map(|b| b.rejected), loss, &mut put);
    if loss.needs_reference() {
        put_comparison(blocks, &mut put);
    }
    put("epoch", facts.epoch);
    line.insert("num_tokens".into(), json!(facts.num_tokens));
    line.insert("count/chosen".into(), json!(blocks.iter().map(|b| b.chosen.rows).sum::<usize>()));
    line.insert("count/rejected".into(), json!(blocks.iter().map(|b| b.rejected.rows).sum::<usize>()));
    Value::Object(line)
}

type Put<'a> = &'a mut dyn FnMut(&str, f64) -> Option<Value>;

/// Means over the blocks that have rows of the class.
fn put_class(name: &str, blocks: impl Iterator<Item = ClassMetrics>, loss: Loss, put: Put) {
    let present: Vec<ClassMetrics> = blocks.filter(|c| c.rows > 0).collect();
    if present.is_empty() {
        return;
    }
    let over = |f: fn(&ClassMetrics) -> f64| mean(present.iter().map(f));
    if loss.needs_reference() {
        put(&format!("rewards/{name}"), over(ClassMetrics::mean_reward));
    }
    put(&format!("logps/{name}"), over(|c| c.logps / c.rows as f64));
    put(&format!("logits/{name}"), over(|c| c.logits / c.tokens.max(1) as f64));
}

/// Margins over the blocks that have both classes, and the share of rows whose reward has the label's sign.
fn put_comparison(blocks: &[BlockMetrics], put: Put) {
    let both: Vec<&BlockMetrics> =
        blocks.iter().filter(|b| b.chosen.rows > 0 && b.rejected.rows > 0).collect();
    if !both.is_empty() {
        put("rewards/margins", mean(both.iter().map(|b| b.chosen.mean_reward() - b.rejected.mean_reward())));
    }
    let count = |f: fn(&BlockMetrics) -> usize| blocks.iter().map(f).sum::<usize>();
    let (right, rows) =
        (count(|b| b.chosen.right + b.rejected.right), count(|b| b.chosen.rows + b.rejected.rows));
    put("rewards/accuracies", right as f64 / rows.max(1) as f64);
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0usize), |(s, n), v| (s + v, n + 1));
    sum / n.max(1) as f64
}
