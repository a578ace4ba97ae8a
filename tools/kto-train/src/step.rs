//! One optimizer step's gradient: score the batch, estimate the KL, weigh every row, go back.

use crate::{
    metrics::BlockMetrics,
    order::{Block, jobs},
};
use kto_cli::{Error, Result};
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
        let batch = Batch::new(self.tokens, self.max_length, &jobs, self.packing);
        let forward = sweep.forward(&batch.packs, true)?;
        let scores = self.scores(blocks, &batch.by_job(&forward.branches))?;
        let (mut loss, mut metrics, mut losses) = (0.0, Vec::new(), Vec::new());
        for (block, scores) in blocks.iter().zip(&scores) {
            let (mean, block_losses, block_metrics) = self.block_loss(block, scores)?;
            loss += mean / blocks.len() as f64;
            metrics.push(block_metrics);
            // d(step loss)/dlogps: the row's share of its block's mean, the block's share of the step's.
            let share = 1.0 / self.loss.divisor(scores.rows.iter()) / blocks.len() as f64;
            losses.extend(block_losses.iter().map(|l| l.coefficient * share));
        }
        let weight = |b: &BranchStats| if b.gradient { losses[b.tag] } else { 0.0 };
        let coefficients: Vec<Vec<f64>> =
            forward.branches.iter().map(|p| p.iter().map(weight).collect()).collect();
        let sweep = Sweep { watch: Some(&down), ..sweep };
        sweep.backward(&batch.packs, forward, &coefficients, gradients)?;
        Ok(StepOutput { loss, blocks: metrics })
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

    fn block_loss(&self, block: &Block, scores: &BlockScores) -> Result<(f64, Vec<RowLoss>, BlockMetrics)> {
        let kl_raw = if self.loss.loss.needs_kl() {
            let pairs = block
                .iter()
                .zip(&scores.kl_policy)
                .map(|(m, p)| Ok((*p, self.reference.get(m.row, m.partner)?)));
            kl_estimate(pairs.collect::<Result<Vec<_>>>()?.into_iter())
        } else {
            0.0
        };
        let losses: Vec<RowLoss> = scores.rows.iter().map(|r| self.loss.row(r, kl_raw.max(0.0))).collect();
        if let Some(at) = losses.iter().position(|l| !l.loss.is_finite()) {
            return Err(Error::data(format!("row {}: the loss is not finite", block[at].row + 1)));
        }
        let mean = losses.iter().map(|l| l.loss).sum::<f64>() / self.loss.divisor(scores.rows.iter());
        let metrics = BlockMetrics::new(&scores.rows, &losses, &scores.stats, kl_raw);
        Ok((mean, losses, metrics))
    }
}
