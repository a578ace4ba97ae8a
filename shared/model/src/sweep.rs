//! The layer-major sweep: all packs of a batch through block 1, then block 2, … and back.
//!
//! A block's weights are fetched once a sweep, whatever the number of packs. Kept between the two directions, in the
//! [`Workspace`]: each block's input rows that need a gradient, the head's unit gradients, and the activations of as many blocks
//! as the memory plan has room for. Everything else is computed again.

use crate::{
    base::{BaseModel, LayerWeights},
    block::{Block, BlockFactors, BlockGradient, Pass, Rows},
    buffers::{Activations, KeyValues, Workspace},
    dora::{self, BlockLengths},
    head,
    lora::Lora,
    numeric::Numeric,
    on_gpu::adapter::{self, Gradient},
    pack::{Entry, Pack, Part},
    weights::{EMBEDDING, HEAD},
    whole::{self, Policy, WholeGradient},
};
use kto_cli::{Error, Result};
use kto_kernels::{
    DropoutKey,
    device::{Device, Tensor, clear, gather_rows_into, scale_rows, scatter_add_rows},
    random, with_team,
};

/// A pass over a batch with one set of weights.
pub struct Sweep<'a> {
    /// The frozen base.
    pub base: &'a BaseModel,
    /// The adapter; `None` is the base itself.
    pub lora: Option<&'a Lora>,
    /// Adapter dropout of this step; packs must then hold one branch each.
    pub dropout: Option<DropoutKey>,
    /// Its memory, made for this decoder and adapter.
    pub workspace: &'a Workspace,
    /// Hears after every block what share of the direction is done: a sweep over a large model takes minutes.
    pub watch: Option<&'a dyn Fn(f64)>,
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

/// Result of the forward sweep. What the way back needs is in the workspace.
pub struct Forward {
    /// By pack, then by branch.
    pub branches: Vec<Vec<BranchStats>>,
    /// The adapter's factors where the sweep computes, by block.
    factors: Option<Vec<BlockFactors>>,
    /// What DoRA multiplies with, by block.
    lengths: Vec<BlockLengths>,
    /// Number of the sweep in its workspace.
    sweep: u64,
    kept: bool,
}

/// What is common to all packs in one block.
struct Layer<'a> {
    index: usize,
    weights: LayerWeights,
    factors: Option<&'a BlockFactors>,
    lengths: &'a BlockLengths,
}

/// Where a pack's rows begin in the buffers of a batch.
#[derive(Clone, Copy, Default)]
struct Place {
    all: usize,
    trained: usize,
    rest: usize,
    heads: usize,
    trained_heads: usize,
    unit: usize,
}

impl Sweep<'_> {
    /// Returns the weights that it goes through.
    fn policy(&self) -> Policy<'_> {
        Policy::new(self.base, self.lora)
    }

    /// Runs `packs` forward. With `keep`, [`Sweep::backward`] can follow, before any other sweep in the same workspace.
    pub fn forward(&self, packs: &[Pack], keep: bool) -> Result<Forward> {
        self.awake(|| self.run_forward(packs, keep))
    }

    /// Runs `f` with threads that stay awake where the processor computes.
    fn awake<R>(&self, f: impl FnOnce() -> R) -> R {
        match self.base.device() {
            Device::Host(_) => with_team(f),
            Device::Gpu(..) => f(),
        }
    }

    fn run_forward(&self, packs: &[Pack], keep: bool) -> Result<Forward> {
        let (w, layers) = (self.workspace, self.base.architecture.layers);
        w.reserve(packs, keep)?;
        w.sweeps.set(w.sweeps.get() + 1);
        let factors = self.lora.map(|lora| adapter::bring(self.base.device(), lora)).transpose()?;
        let mut lengths = Vec::with_capacity(layers);
        let places = places(packs);
        let embedding = self.policy().embedding()?;
        w.inputs.begin(0)?;
        for (pack, place) in packs.iter().zip(&places) {
            for (part, state) in self.states(0, pack, *place, keep)? {
                let ids = &pack.ids[part.rows.clone()];
                gather_rows_into(&state, &embedding, ids).numeric()?;
                self.base.scale_embedding(&state)?;
            }
        }
        self.base.release_embedding();
        for index in 0..layers {
            // The input of a block that the way back comes to is complete.
            let (input, next) = (self.input(index, keep), self.input(index + 1, keep));
            if keep && index >= w.first {
                w.inputs.keep(input)?;
            }
            if next != input {
                w.inputs.begin(next)?;
            }
            let (weights, factors) = (self.policy().layer(index)?, of(&factors, index));
            let own = dora::lengths(self.base, index, factors, &weights.linears)?;
            let layer = Layer { index, weights, factors, lengths: &own };
            for (pack, place) in packs.iter().zip(&places) {
                self.forward_layer(&layer, pack, *place, keep)?;
            }
            lengths.push(own);
            self.base.release(index)?;
            self.tell(index + 1, layers + 1);
        }
        let branches = match w.head_in_tiles {
            true => self.head_in_tiles(packs, &places, keep)?,
            false => {
                packs.iter().zip(&places).map(|(p, at)| self.head(p, *at, keep)).collect::<Result<_>>()?
            }
        };
        self.base.release_head();
        Ok(Forward { branches, factors, lengths, sweep: w.sweeps.get(), kept: keep })
    }

    /// Returns the parts of a pack that have rows, each with its state before block `layer`.
    fn states<'p>(
        &self,
        layer: usize,
        pack: &'p Pack,
        place: Place,
        keep: bool,
    ) -> Result<Vec<(&'p Part, Tensor)>> {
        let w = self.workspace;
        let mut states = Vec::with_capacity(2);
        if !pack.trained.rows.is_empty() {
            let rows = w.inputs.rows(self.input(layer, keep), place.trained, pack.trained.rows.len())?;
            states.push((&pack.trained, rows));
        }
        if !pack.rest.rows.is_empty() {
            states.push((&pack.rest, w.rest.rows(place.rest, pack.rest.rows.len())?));
        }
        Ok(states)
    }

    /// Returns where in [`Workspace::inputs`] the trained rows are before block `layer`.
    fn input(&self, layer: usize, keep: bool) -> usize {
        let w = self.workspace;
        if keep { layer.saturating_sub(w.first).min(w.inputs.count() - 1) } else { 0 }
    }

    /// Runs one pack through one block.
    fn forward_layer(&self, layer: &Layer, pack: &Pack, place: Place, keep: bool) -> Result<()> {
        let (w, index) = (self.workspace, layer.index);
        let last = index + 1 == self.base.architecture.layers;
        let block = self.block(layer, pack);
        let kept = self.kept(index).filter(|_| keep);
        let key_values = match kept {
            Some((_, key_values)) => key_values.rows(place.all, pack.ids.len())?,
            None => w.key_values.rows(0, pack.ids.len())?,
        };
        let next = self.states(index + 1, pack, place, keep)?;
        for ((part, h), (_, next)) in self.states(index, pack, place, keep)?.iter().zip(&next) {
            let trained = std::ptr::eq(*part, &pack.trained);
            let rows = rows(pack, part, last);
            let (count, results) = (part.rows.len(), rows.results());
            let a = match kept.filter(|_| trained) {
                Some((activations, _)) => activations.rows(place.trained, count, results)?,
                None => w.activations.rows(0, count, results)?,
            };
            let a = a.fit(layer.factors)?;
            let scratch = w.scratch.forward(count, results)?;
            let new = key_values.rows(part.rows.start, count).numeric()?;
            let pass = Pass { h, rows: &rows, all: &key_values, a: &a };
            block.keys_and_values(pass, &new, &scratch).numeric()?;
            if !last {
                block.output(next, pass, &scratch).numeric()?;
            } else if results > 0 {
                let before = if trained { 0 } else { pack.trained.head_rows.len() };
                let out = w.last.0.rows(place.heads + before, results)?;
                block.output(&out, pass, &scratch).numeric()?;
            }
        }
        Ok(())
    }

    /// Scores a pack's entries from the output of the last block.
    fn head(&self, pack: &Pack, place: Place, keep: bool) -> Result<Vec<BranchStats>> {
        let (w, n) = (self.workspace, pack.head_rows());
        let (last, normed) = (w.last.0.rows(place.heads, n)?, w.last.1.rows(0, n)?);
        self.policy().final_norm()?.forward(&normed, &last, self.base.architecture.norm_eps).numeric()?;
        let unit = match keep && pack.gradient_entries > 0 {
            true => Some(w.unit.rows(place.unit, pack.gradient_entries)?),
            false => None,
        };
        let head = self.policy().head()?;
        let stats = head::run(&self.chunks(), &normed, &head, &pack.entries, unit.as_ref())?;
        Ok(branch_stats(pack, &stats))
    }

    fn chunks(&self) -> head::Chunks<'_> {
        let (w, cap) = (self.workspace, self.base.architecture.logit_cap);
        head::Chunks { device: self.base.device(), logits: &w.logits, rows: w.head_rows, cap }
    }

    /// As [`Sweep::head`] for all packs together.
    fn head_in_tiles(&self, packs: &[Pack], places: &[Place], keep: bool) -> Result<Vec<Vec<BranchStats>>> {
        let (w, a) = (self.workspace, &self.base.architecture);
        let trained_of = |pack: &Pack| if keep { pack.gradient_entries } else { 0 };
        let entry = |place: &Place, e: &Entry| (place.heads as u32 + e.head_row, e.target);
        let all = || packs.iter().zip(places);
        let mut entries: Vec<(u32, u32)> = Vec::new();
        for (pack, place) in all() {
            entries.extend(pack.entries[..trained_of(pack)].iter().map(|e| entry(place, e)));
        }
        let trained = entries.len();
        for (pack, place) in all() {
            entries.extend(pack.entries[trained_of(pack)..].iter().map(|e| entry(place, e)));
        }
        let unit = if trained > 0 { Some(w.unit.rows(0, trained)?) } else { None };
        let last = w.last.0.rows(0, packs.iter().map(Pack::head_rows).sum())?;
        let norm = |out: &Tensor, x: &Tensor| self.base.final_norm().forward(out, x, a.norm_eps);
        let head = (self.base.head()?, w.head_rows, a.logit_cap);
        let stats = head::run_in_tiles(head, &last, norm, &entries, unit.as_ref())?;
        let (mut trained, mut rest) = stats.split_at(trained);
        let mut take = |pack: &Pack| {
            let (own, others) = trained.split_at(trained_of(pack));
            let (more, left) = rest.split_at(pack.entries.len() - own.len());
            (trained, rest) = (others, left);
            branch_stats(pack, &[own, more].concat())
        };
        Ok(packs.iter().map(&mut take).collect())
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
        self.awake(|| self.run_backward(packs, forward, coefficients, gradients))
    }

    fn run_backward(
        &self,
        packs: &[Pack],
        forward: Forward,
        coefficients: &[Vec<f64>],
        gradients: &Lora,
    ) -> Result<()> {
        let w = self.workspace;
        if !forward.kept || forward.sweep != w.sweeps.get() || gradients.first_layer() != w.first {
            return Err(Error::internal("a backward sweep must follow its own forward sweep"));
        }
        let places = places(packs);
        for ((pack, place), coefficients) in packs.iter().zip(&places).zip(coefficients) {
            self.head_backward(pack, *place, coefficients, gradients)?;
        }
        let mut gradient = Gradient::new(self.base.device(), gradients, &w.gradient_memory)?;
        for index in (w.first..self.base.architecture.layers).rev() {
            w.inputs.fetch(index - w.first)?;
            let layer = Layer {
                index,
                weights: self.policy().layer(index)?,
                factors: of(&forward.factors, index),
                lengths: &forward.lengths[index],
            };
            let whole = WholeGradient::of(&self.base.architecture, &gradients.whole, index)?;
            let to = BlockGradient { factors: gradient.begin(index)?, whole };
            for (pack, place) in packs.iter().zip(&places).filter(|(p, _)| p.gradient_entries > 0) {
                self.backward_layer(&layer, pack, *place, &to)?;
            }
            gradient.end(index)?;
            self.base.release(index)?;
            self.tell(self.base.architecture.layers - index, self.base.architecture.layers - w.first);
        }
        if let Some(to) = gradients.whole.get(EMBEDDING) {
            let to = Tensor::Host(to.clone());
            for (pack, place) in packs.iter().zip(&places).filter(|(p, _)| p.gradient_entries > 0) {
                let (ids, dh) = (
                    &pack.ids[pack.trained.rows.clone()],
                    w.gradient.0.rows(place.trained, pack.trained.rows.len())?,
                );
                self.base.scale_embedding(&dh)?;
                scatter_add_rows(&to, &dh, ids).numeric()?;
            }
        }
        gradient.finish(w.first, &w.gradient_memory)
    }

    /// Writes the gradient of the last block's output for the trained head rows, and adds to those of a trained head and last norm.
    fn head_backward(&self, pack: &Pack, place: Place, coefficients: &[f64], gradients: &Lora) -> Result<()> {
        if pack.gradient_entries == 0 {
            return Ok(());
        }
        let (w, n) = (self.workspace, pack.trained.head_rows.len());
        let unit = w.unit.rows(place.unit, pack.gradient_entries)?;
        let (last, dnormed) = (w.last.0.rows(place.heads, n)?, w.last.1.rows(0, n)?);
        let d = w.gradient.1.rows(place.trained_heads, n)?;
        let entries = &pack.entries[..pack.gradient_entries];
        let factors: Vec<f64> = entries.iter().map(|e| coefficients[e.branch as usize]).collect();
        let rows: Vec<u32> = entries.iter().map(|e| e.head_row).collect();
        let (a, norm) = (&self.base.architecture, self.policy().final_norm()?);
        if let Some(to) = gradients.whole.get(HEAD) {
            norm.forward(&dnormed, &last, a.norm_eps).numeric()?;
            let (head, entries) = (self.policy().head()?, (entries, &factors[..]));
            head::add_weight_gradient(&self.chunks(), &dnormed, &head, entries, to)?;
        }
        let trained = whole::final_norm_gradient(a, &gradients.whole);
        let run = || {
            scale_rows(&unit, &factors)?;
            clear(&dnormed)?;
            scatter_add_rows(&dnormed, &unit, &rows)?;
            norm.add_gradient(&trained, &dnormed, &last, a.norm_eps)?;
            clear(&d)?;
            norm.backward(&d, &dnormed, &last, a.norm_eps)
        };
        run().numeric()
    }

    /// Takes one pack back through one block.
    fn backward_layer(
        &self,
        layer: &Layer,
        pack: &Pack,
        place: Place,
        gradient: &BlockGradient,
    ) -> Result<()> {
        let (w, part, index) = (self.workspace, &pack.trained, layer.index);
        let last = index + 1 == self.base.architecture.layers;
        let block = self.block(layer, pack);
        let rows = rows(pack, part, last);
        let (count, results) = (part.rows.len(), rows.results());
        let h = w.inputs.rows(index - w.first, place.trained, count)?;
        let dh = w.gradient.0.rows(place.trained, count)?;
        let d = if last { w.gradient.1.rows(place.trained_heads, results)? } else { dh.clone() };
        let kept = self.kept(index);
        let (a, key_values) = match kept {
            Some((a, key_values)) => {
                (a.rows(place.trained, count, results)?, key_values.rows(place.all, count)?)
            }
            None => (w.activations.rows(0, count, results)?, w.key_values.rows(0, count)?),
        };
        let a = a.fit(layer.factors)?;
        let pass = Pass { h: &h, rows: &rows, all: &key_values, a: &a };
        if kept.is_none() {
            block.recompute(pass, &w.scratch.forward(count, results)?).numeric()?;
        }
        let scratch = w.scratch.rows(count, results)?.fit(layer.factors)?;
        let below = index > w.first || self.policy().trains(EMBEDDING);
        block.backward((&dh, &d), pass, &scratch, gradient, below).numeric()
    }

    fn tell(&self, done: usize, of: usize) {
        if let Some(watch) = self.watch {
            watch(done as f64 / of as f64);
        }
    }

    /// Returns where block `layer` keeps its activations, if it does.
    fn kept(&self, layer: usize) -> Option<&(Activations, KeyValues)> {
        self.workspace.kept.get(self.base.architecture.layers - 1 - layer)
    }

    fn block<'b>(&'b self, layer: &'b Layer, pack: &Pack) -> Block<'b> {
        // KL branches estimate the policy itself: no mask where nothing is trained.
        let masked = self.dropout.filter(|d| d.p > 0.0 && !pack.trained.rows.is_empty());
        Block {
            architecture: &self.base.architecture,
            rule: self.base.architecture.rule(layer.index),
            rope: self.base.rope(layer.index),
            weights: &layer.weights,
            factors: layer.factors,
            lengths: layer.factors.map(|_| layer.lengths),
            dropout: masked.map(|d| DropoutKey { key: random::key(&[d.key, layer.index as u64]), ..d }),
        }
    }
}

fn of(factors: &Option<Vec<BlockFactors>>, index: usize) -> Option<&BlockFactors> {
    factors.as_ref().map(|f| &f[index])
}

fn rows<'a>(pack: &'a Pack, part: &'a Part, last: bool) -> Rows<'a> {
    Rows {
        positions: &pack.positions[part.rows.clone()],
        keys: &pack.keys[part.rows.clone()],
        selected: last.then_some(&part.head_rows),
        layout: if last { &part.head_layout } else { &part.layout },
    }
}

fn places(packs: &[Pack]) -> Vec<Place> {
    let mut next = Place::default();
    packs
        .iter()
        .map(|pack| {
            let place = next;
            next = Place {
                all: next.all + pack.ids.len(),
                trained: next.trained + pack.trained.rows.len(),
                rest: next.rest + pack.rest.rows.len(),
                heads: next.heads + pack.head_rows(),
                trained_heads: next.trained_heads + pack.trained.head_rows.len(),
                unit: next.unit + pack.gradient_entries,
            };
            place
        })
        .collect()
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
