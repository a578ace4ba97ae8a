//! One optimizer step's gradient: score the batch, estimate the KL, weigh every row, go back.

use crate::{
    metrics::BlockMetrics,
    order::{Block, jobs},
};
use kto_cli::Result;
use kto_formats::tokens::TokenSet;
use kto_kernels::DropoutKey;
use kto_model::{
    base::BaseModel,
    buffers::Workspace,
    lora::Lora,
    loss::{LossSpec, RowLoss, ScoredRow, kl_estimate},
    reference::Reference,
    rows::{Batch, Packing},
    sweep::{BranchStats, Sweep},
};

/// What does not change from step to step.
pub struct Trainer<'a> {
    /// The frozen base.
    pub base: &'a BaseModel,
    /// The rows.
    pub tokens: &'a TokenSet,
    /// Reference log-probabilities of every pair that the order can ask for.
    pub reference: &'a Reference,
    /// The loss.
    pub loss: LossSpec,
    /// Tokens after which a row is cut.
    pub max_length: usize,
    /// How rows become packs.
    pub packing: Packing,
    /// Memory of the sweeps.
    pub workspace: &'a Workspace,
}

/// A step's outcome.
pub struct StepOutput {
    /// Loss, averaged as the gradient is.
    pub loss: f64,
    /// One for each block.
    pub blocks: Vec<BlockMetrics>,
    /// One for each row, block by block.
    pub rows: Vec<RowScore>,
    /// Whether the losses and the KL estimates of all blocks are finite. If not, there is no gradient.
    pub finite: bool,
}

/// What the loss of one row is made from: summed log-probabilities, as far as the loss needs them.
#[derive(Clone, Copy, Debug)]
pub struct RowScore {
    /// The row.
    pub row: usize,
    /// Of its completion under the policy.
    pub policy: f64,
    /// Of its completion under the reference.
    pub reference: Option<f64>,
    /// The row whose completion estimates the KL.
    pub partner: Option<usize>,
    /// Of that completion under the policy.
    pub kl_policy: Option<f64>,
    /// Of that completion under the reference.
    pub kl_reference: Option<f64>,
}

impl RowScore {
    /// Returns whether all that is known is finite.
    pub fn is_finite(&self) -> bool {
        let known = [Some(self.policy), self.reference, self.kl_policy, self.kl_reference];
        known.into_iter().flatten().all(f64::is_finite)
    }
}

/// Scores of one block's rows, by place in the block.
struct BlockScores {
    rows: Vec<ScoredRow>,
    stats: Vec<BranchStats>,
    kl_policy: Vec<f64>,
}

/// Share of a step's time that its way up takes, about; for the progress line.
const FORWARD: f64 = 0.4;

impl Trainer<'_> {
    /// Adds the step's gradient to `gradients` and returns loss and metrics. `watch` hears what share is done.
    pub fn step(
        &self,
        lora: &Lora,
        blocks: &[Block],
        dropout: Option<DropoutKey>,
        gradients: &Lora,
        watch: &dyn Fn(f64),
    ) -> Result<StepOutput> {
        let (up, down) = (|x: f64| watch(FORWARD * x), |x: f64| watch(FORWARD + (1.0 - FORWARD) * x));
        let (base, workspace) = (self.base, self.workspace);
        let sweep = Sweep { base, lora: Some(lora), dropout, workspace, watch: Some(&up) };
        let jobs = jobs(blocks, self.loss.loss.needs_kl());
        let limits = base.architecture.limits(self.max_length);
        let batch = Batch::new(self.tokens, limits, &jobs, self.packing);
        let forward = sweep.forward(&batch.packs, true)?;
        let scores = self.scores(blocks, &batch.by_job(&forward.branches))?;
        let (mut out, mut losses) = (StepOutput::new(), Vec::new());
        for (block, scores) in blocks.iter().zip(&scores) {
            let scored = self.block_loss(block, scores)?;
            // d(step loss)/dlogps: the row's share of its block's mean, the block's share of the step's.
            let share = 1.0 / self.loss.divisor(scores.rows.iter()) / blocks.len() as f64;
            losses.extend(scored.losses.iter().map(|l| l.coefficient * share));
            out.add(scored, blocks.len() as f64);
        }
        if !out.finite {
            return Ok(out);
        }
        let weight = |b: &BranchStats| if b.gradient { losses[b.tag] } else { 0.0 };
        let coefficients: Vec<Vec<f64>> =
            forward.branches.iter().map(|p| p.iter().map(weight).collect()).collect();
        let sweep = Sweep { watch: Some(&down), ..sweep };
        sweep.backward(&batch.packs, forward, &coefficients, gradients)?;
        Ok(out)
    }

    /// Scores blocks without a gradient. `stats` has one entry for each of the blocks' [`jobs`]. A block weighs as many times as it has
    /// rows, as in an evaluation of transformers.
    pub fn score(&self, blocks: &[Block], stats: &[BranchStats]) -> Result<StepOutput> {
        let rows: usize = blocks.iter().map(Vec::len).sum();
        let mut out = StepOutput::new();
        for (block, scores) in blocks.iter().zip(&self.scores(blocks, stats)?) {
            out.add(self.block_loss(block, scores)?, rows as f64 / block.len() as f64);
        }
        Ok(out)
    }

    /// Sorts what the sweep says about the step's jobs back to blocks and rows.
    fn scores(&self, blocks: &[Block], jobs: &[BranchStats]) -> Result<Vec<BlockScores>> {
        let n = blocks.iter().map(Vec::len).sum();
        let (main, kl) = jobs.split_at(n);
        let mut start = 0;
        blocks
            .iter()
            .map(|block| {
                let range = start..start + block.len();
                start = range.end;
                let stats = main[range.clone()].to_vec();
                let rows = block.iter().zip(&stats).map(|(m, s)| {
                    let reference_logps = if self.loss.loss.needs_reference() {
                        self.reference.get(m.row, m.row)?
                    } else {
                        0.0
                    };
                    let label = self.tokens.row(m.row).label;
                    Ok(ScoredRow { label, policy_logps: s.logps, reference_logps, tokens: s.tokens })
                });
                Ok(BlockScores {
                    rows: rows.collect::<Result<_>>()?,
                    stats,
                    kl_policy: kl.iter().skip(range.start).take(range.len()).map(|s| s.logps).collect(),
                })
            })
            .collect()
    }

    fn block_loss(&self, block: &Block, scores: &BlockScores) -> Result<BlockLoss> {
        let (kl, reference) = (self.loss.loss.needs_kl(), self.loss.loss.needs_reference());
        let mut rows = Vec::with_capacity(block.len());
        for (i, (m, scored)) in block.iter().zip(&scores.rows).enumerate() {
            rows.push(RowScore {
                row: m.row,
                policy: scored.policy_logps,
                reference: reference.then_some(scored.reference_logps),
                partner: kl.then_some(m.partner),
                kl_policy: scores.kl_policy.get(i).copied(),
                kl_reference: if kl { Some(self.reference.get(m.row, m.partner)?) } else { None },
            });
        }
        let kl_raw = kl_estimate(rows.iter().filter_map(|r| r.kl_policy.zip(r.kl_reference)));
        let losses: Vec<RowLoss> = scores.rows.iter().map(|r| self.loss.row(r, kl_raw.max(0.0))).collect();
        let mean = losses.iter().map(|l| l.loss).sum::<f64>() / self.loss.divisor(scores.rows.iter());
        let metrics = BlockMetrics::new(&scores.rows, &losses, &scores.stats, kl_raw);
        // A maximum with a NaN is the other number, so the KL estimate is looked at by itself.
        let finite = mean.is_finite() && kl_raw.is_finite();
        Ok(BlockLoss { mean, losses, metrics, rows, finite })
    }
}

/// What the loss says about one block.
struct BlockLoss {
    mean: f64,
    losses: Vec<RowLoss>,
    metrics: BlockMetrics,
    rows: Vec<RowScore>,
    finite: bool,
}

impl StepOutput {
    fn new() -> Self {
        Self { loss: 0.0, blocks: Vec::new(), rows: Vec::new(), finite: true }
    }

    /// Adds a block, of whose like `count` make the whole.
    fn add(&mut self, block: BlockLoss, count: f64) {
        self.loss += block.mean / count;
        self.blocks.push(block.metrics);
        self.rows.extend(block.rows);
        self.finite &= block.finite;
    }
}
