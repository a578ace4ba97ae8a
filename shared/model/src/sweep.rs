//! The layer-major sweep: all packs of a batch through block 1, then block 2, … and back.
//!
//! A block's weights are fetched once a sweep, whatever the number of packs. Kept between the two directions:
//! each block's input rows that need a gradient, and the head's unit gradients. Everything else is computed again.

use crate::{
    base::BaseModel,
    block::{Block, Rows},
    head,
    lora::Lora,
    numeric::Numeric,
    pack::Pack,
};
use candle_core::Tensor;
use kto_cli::Result;
use kto_kernels::{
    DropoutKey, gather_rows, random, rms_norm, rms_norm_backward, scale_rows, scatter_add_rows,
};

/// A pass over a batch with one set of weights.
pub struct Sweep<'a> {
    /// The frozen base.
    pub base: &'a BaseModel,
    /// The adapter; `None` is the base itself.
    pub lora: Option<&'a Lora>,
    /// Adapter dropout of this step; packs must then hold one branch each.
    pub dropout: Option<DropoutKey>,
}

/// What the sweep says about one branch.
#[derive(Clone, Copy, Debug, Default)]
pub struct BranchStats {
    /// The caller's number of the branch.
    pub tag: usize,
    /// Whether it is trained.
    pub gradient: bool,
    /// Number of completion tokens.
    pub tokens: usize,
    /// Σ log-probability of the completion's tokens, natural log.
    pub logps: f64,
    /// Σ entropy in nats.
    pub entropy: f64,
    /// Σ mean logit.
    pub mean_logits: f64,
}

/// Result of the forward sweep.
pub struct Forward {
    /// By pack, then by branch.
    pub branches: Vec<Vec<BranchStats>>,
    saved: Vec<Saved>,
}

/// What one pack keeps for the way back.
struct Saved {
    /// Inputs (Tg, C) of the blocks from the lowest adapted one up.
    inputs: Vec<Tensor>,
    /// Output of the last block for the head rows that need a gradient.
    last: Tensor,
    /// Unit gradients of the trained entries with respect to the normed rows.
    unit: Option<Tensor>,
}

impl Sweep<'_> {
    /// Runs `packs` forward. With `keep`, [`Sweep::backward`] can follow.
    pub fn forward(&self, packs: &[Pack], keep: bool) -> Result<Forward> {
        let layers = self.base.architecture.layers;
        let first = self.lora.map_or(layers, Lora::first_layer);
        let mut inputs: Vec<Vec<Tensor>> = packs.iter().map(|_| Vec::new()).collect();
        let mut states = Vec::with_capacity(packs.len());
        for pack in packs {
            states.push(gather_rows(&self.base.embedding, &pack.ids).numeric()?);
        }
        for layer in 0..layers {
            let weights = self.base.layer(layer)?;
            let last = layer + 1 == layers;
            for ((pack, state), inputs) in packs.iter().zip(&mut states).zip(&mut inputs) {
                if keep && layer >= first && pack.gradient_rows > 0 {
                    inputs.push(gradient_part(state, pack).numeric()?);
                }
                let block = self.block(layer, &weights, pack);
                *state = block.forward(state, all_rows(pack, last)).numeric()?;
            }
        }
        let mut out = Forward { branches: Vec::new(), saved: Vec::new() };
        for ((pack, state), inputs) in packs.iter().zip(&states).zip(inputs) {
            let normed = rms_norm(state, &self.base.final_norm, self.base.architecture.rms_eps).numeric()?;
            let gradient = if keep { pack.gradient_entries } else { 0 };
            let result = head::run(&normed, &self.base.head, &pack.entries, gradient).numeric()?;
            out.branches.push(branch_stats(pack, &result.stats));
            if keep {
                let last = state.narrow(0, 0, pack.gradient_head_rows).numeric()?;
                out.saved.push(Saved { inputs, last, unit: result.unit });
            }
        }
        Ok(out)
    }

    /// Runs the batch backward: adds `coefficient · ∇Σlogp` of every trained branch to `gradients`.
    /// `coefficients[pack][branch]` is dLoss/dlogps. `packs` and `forward` as in the forward sweep.
    pub fn backward(
        &self,
        packs: &[Pack],
        forward: Forward,
        coefficients: &[Vec<f64>],
        gradients: &Lora,
    ) -> Result<()> {
        let layers = self.base.architecture.layers;
        let first = gradients.first_layer();
        let mut saved = forward.saved;
        let mut states = Vec::with_capacity(packs.len());
        for ((pack, saved), coefficients) in packs.iter().zip(&mut saved).zip(coefficients) {
            states.push(self.head_backward(pack, saved, coefficients)?);
        }
        for layer in (first..layers).rev() {
            let weights = self.base.layer(layer)?;
            for ((pack, state), saved) in packs.iter().zip(&mut states).zip(&mut saved) {
                let (Some(dout), Some(input)) = (state.take(), saved.inputs.pop()) else { continue };
                let block = self.block(layer, &weights, pack);
                let rows = gradient_rows(pack, layer + 1 == layers);
                *state =
                    block.backward(&input, &dout, rows, &gradients.layers[layer], layer > first).numeric()?;
            }
        }
        Ok(())
    }

    /// Returns the gradient of the last block's output for the head rows, or `None` when the pack trains nothing.
    fn head_backward(&self, pack: &Pack, saved: &mut Saved, coefficients: &[f64]) -> Result<Option<Tensor>> {
        let Some(unit) = saved.unit.take() else { return Ok(None) };
        let entries = &pack.entries[..pack.gradient_entries];
        let factors: Vec<f64> = entries.iter().map(|e| coefficients[e.branch as usize]).collect();
        let rows: Vec<u32> = entries.iter().map(|e| e.head_row).collect();
        let eps = self.base.architecture.rms_eps;
        let run = || {
            scale_rows(&unit, &factors)?;
            let dnormed = scatter_add_rows(&unit, &rows, pack.gradient_head_rows)?;
            rms_norm_backward(&dnormed, &saved.last, &self.base.final_norm, eps)
        };
        run().map(Some).numeric()
    }

    fn block<'b>(&'b self, layer: usize, weights: &'b crate::base::LayerWeights, pack: &Pack) -> Block<'b> {
        // KL branches estimate the policy itself: no mask where nothing is trained.
        let masked = self.dropout.filter(|d| d.p > 0.0 && pack.gradient_rows > 0);
        Block {
            architecture: &self.base.architecture,
            rope: &self.base.rope,
            weights,
            factors: self.lora.map(|l| (&l.layers[layer], l.scale)),
            dropout: masked.map(|d| DropoutKey { key: random::key(&[d.key, layer as u64]), ..d }),
        }
    }
}

fn all_rows(pack: &Pack, last: bool) -> Rows<'_> {
    Rows {
        positions: &pack.positions,
        keys: &pack.keys,
        selected: last.then_some(&pack.head_rows),
        layout: if last { &pack.head_layout } else { &pack.layout },
    }
}

fn gradient_rows(pack: &Pack, last: bool) -> Rows<'_> {
    Rows {
        positions: &pack.positions[..pack.gradient_rows],
        keys: &pack.keys[..pack.gradient_rows],
        selected: last.then_some(&pack.head_rows[..pack.gradient_head_rows]),
        layout: if last { &pack.gradient_head_layout } else { &pack.gradient_layout },
    }
}

/// Returns the rows that need a gradient, without keeping the others alive.
fn gradient_part(state: &Tensor, pack: &Pack) -> candle_core::Result<Tensor> {
    if pack.gradient_rows == pack.ids.len() {
        Ok(state.clone())
    } else {
        state.narrow(0, 0, pack.gradient_rows)?.copy()
    }
}

fn branch_stats(pack: &Pack, stats: &[kto_kernels::LogprobStats]) -> Vec<BranchStats> {
    let start =
        |b: &crate::pack::Branch| BranchStats { tag: b.tag, gradient: b.gradient, ..Default::default() };
    let mut out: Vec<BranchStats> = pack.branches.iter().map(start).collect();
    for (entry, s) in pack.entries.iter().zip(stats) {
        let b = &mut out[entry.branch as usize];
        b.tokens += 1;
        b.logps += s.logp;
        b.entropy += s.entropy;
        b.mean_logits += s.mean_logit;
    }
    out
}
