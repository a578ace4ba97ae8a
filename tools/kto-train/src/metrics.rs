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

/// What is known about an evaluation beside its blocks.
#[derive(Clone, Copy, Debug)]
pub struct EvalFacts {
    /// Steps done.
    pub step: u64,
    /// How far into the data they lead.
    pub epoch: f64,
    /// Loss of the held-out rows.
    pub loss: f64,
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
    put_scores(blocks, loss, &mut put);
    put("epoch", facts.epoch);
    line.insert("num_tokens".into(), json!(facts.num_tokens));
    put_counts(blocks, "", &mut line);
    Value::Object(line)
}

/// Returns the line of a step that had no effect, because of `rows` rows: what was not finite is null.
pub fn skipped_line(facts: StepFacts, blocks: &[BlockMetrics], loss: Loss, rows: usize) -> Value {
    let mut line = line(facts, blocks, loss);
    line["count/nonfinite"] = json!(rows);
    line
}

/// Returns one line of eval.jsonl: the same scores of the held-out rows under TRL's names for them.
pub fn eval_line(facts: EvalFacts, blocks: &[BlockMetrics], loss: Loss) -> Value {
    let mut line = Map::new();
    line.insert("step".into(), json!(facts.step));
    line.insert("epoch".into(), json!(facts.epoch));
    line.insert("eval_loss".into(), json!(facts.loss));
    put_scores(blocks, loss, &mut |key, value| line.insert(format!("eval_{key}"), json!(value)));
    put_counts(blocks, "eval_", &mut line);
    Value::Object(line)
}

fn put_scores(blocks: &[BlockMetrics], loss: Loss, put: Put) {
    if loss.needs_reference() {
        // TRL logs a kl of 0 where the loss has none. The larger of a NaN and 0 would be 0.
        put("kl", mean(blocks.iter().map(|b| if b.kl_raw.is_nan() { b.kl_raw } else { b.kl_raw.max(0.0) })));
        put("kl_raw", mean(blocks.iter().map(|b| b.kl_raw)));
    }
    put("entropy", mean(blocks.iter().map(|b| b.entropy)));
    put_class("chosen", blocks.iter().map(|b| b.chosen), loss, put);
    put_class("rejected", blocks.iter().map(|b| b.rejected), loss, put);
    if loss.needs_reference() {
        put_comparison(blocks, put);
    }
}

fn put_counts(blocks: &[BlockMetrics], prefix: &str, line: &mut Map<String, Value>) {
    let mut put = |key: &str, count: fn(&BlockMetrics) -> usize| {
        line.insert(format!("{prefix}count/{key}"), json!(blocks.iter().map(count).sum::<usize>()))
    };
    put("chosen", |b| b.chosen.rows);
    put("rejected", |b| b.rejected.rows);
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
