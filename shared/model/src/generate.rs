//! Generation with a cache of keys and values: greedy, or temperature and nucleus sampling from a seed.
//!
//! Several sequences go forward together, without padding: a step reads the weights once for all of them.

use crate::{
    base::BaseModel,
    block::{Block, BlockFactors, Pass, Rows},
    buffers::{DecodeBuffers, KeyValues},
    dora::{self, BlockLengths},
    lora::Lora,
    numeric::Numeric,
    on_gpu::adapter,
    whole::Policy,
};
use candle_core::{DType, Tensor as HostTensor};
use kto_cli::{Error, Result};
use kto_kernels::{
    AttentionLayout, Segment,
    device::{Factor, Onto, Product, Tensor, gather_rows, gather_rows_into, multiply, soft_cap},
    random,
};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    /// Smallest set of tokens with at least this probability is drawn from; 1 is all.
    pub top_p: f64,
    /// Draws are a pure function of the seed and the place.
    pub seed: u64,
}

/// Where a sequence's keys and values lie in the caches.
#[derive(Clone, Debug)]
struct Slot {
    start: usize,
    capacity: usize,
    past: usize,
    /// Row of the rotary tables of its first token.
    rotary: u32,
    /// Its tokens so far, where it turns otherwise when it is long.
    ids: Vec<u32>,
}

/// Sequences being generated together.
pub struct Generator<'a> {
    base: &'a BaseModel,
    lora: Option<&'a Lora>,
    /// The adapter's factors where the model computes, by block.
    factors: Option<Vec<BlockFactors>>,
    /// What DoRA multiplies with, by block, from the first use on.
    lengths: Vec<BlockLengths>,
    /// Keys and values of each block, (sum of the capacities, Hkv·D) each.
    cache: Vec<KeyValues<Tensor>>,
    slots: Vec<Slot>,
}

impl<'a> Generator<'a> {
    /// Starts one sequence of at most `capacity` tokens.
    pub fn new(base: &'a BaseModel, lora: Option<&'a Lora>, capacity: usize) -> Result<Self> {
        Self::batch(base, lora, &[capacity])
    }

    /// Starts sequences of at most so many tokens each.
    pub fn batch(base: &'a BaseModel, lora: Option<&'a Lora>, capacities: &[usize]) -> Result<Self> {
        let shape = base.architecture.shape;
        let mut rows = 0;
        let mut slot = |capacity: &usize| {
            let slot = Slot { start: rows, capacity: *capacity, past: 0, rotary: 0, ids: Vec::new() };
            rows += capacity;
            slot
        };
        let slots = capacities.iter().map(&mut slot).collect();
        let empty = || base.device().matrix(rows, shape.kv_heads * shape.dim).numeric();
        let mut cache = Vec::with_capacity(base.architecture.layers);
        for _ in 0..base.architecture.layers {
            cache.push(KeyValues { k: empty()?, v: empty()? });
        }
        let factors = lora.map(|lora| adapter::bring(base.device(), lora)).transpose()?;
        Ok(Self { base, lora, factors, lengths: Vec::new(), cache, slots })
    }

    /// Appends tokens to the first sequence and returns the logits (ids.len(), V) of every appended row when `all`,
    /// else of the last (1, V).
    pub fn feed(&mut self, ids: &[u32], all: bool) -> Result<HostTensor> {
        self.feed_batch(&[(0, ids)], all)
    }

    /// Appends tokens to several sequences, each named once, and returns the logits of every appended row when `all`,
    /// else of each sequence's last: (rows, V) in the order of `parts`.
    pub fn feed_batch(&mut self, parts: &[(usize, &[u32])], all: bool) -> Result<HostTensor> {
        self.check(parts)?;
        let limits = self.base.architecture.limits(usize::MAX);
        for &(i, ids) in parts {
            let slot = &mut self.slots[i];
            let (rotary, past) = (limits.rotary(slot.past + ids.len()), std::mem::take(&mut slot.past));
            if rotary == slot.rotary || past == 0 {
                (slot.rotary, slot.past) = (rotary, past);
            } else {
                // It has grown past the length up to which its keys were turned by the first table.
                slot.rotary = rotary;
                let all = std::mem::take(&mut slot.ids);
                self.feed_rows(&[(i, &all)], false)?;
            }
        }
        self.feed_rows(parts, all)
    }

    /// As [`Generator::feed_batch`], when the rotation of every sequence is settled.
    fn feed_rows(&mut self, parts: &[(usize, &[u32])], all: bool) -> Result<HostTensor> {
        let ids: Vec<u32> = parts.iter().flat_map(|p| p.1).copied().collect();
        let (layout, positions, last) = self.lay_out(parts);
        let architecture = &self.base.architecture;
        let device = self.base.device();
        let h = device.matrix(ids.len(), architecture.hidden).numeric()?;
        let policy = Policy::new(self.base, self.lora);
        let embedding = policy.embedding()?;
        gather_rows_into(&h, &embedding, &ids).numeric()?;
        self.base.scale_embedding(&h)?;
        let buffers = DecodeBuffers::new(architecture, self.lora, ids.len(), device)?;
        let rows = Rows { positions: &positions, keys: &[], selected: None, layout: &layout };
        for layer in 0..self.base.architecture.layers {
            let weights = policy.layer(layer)?;
            let factors = self.factors.as_ref().map(|f| &f[layer]);
            if self.lengths.len() == layer {
                self.lengths.push(dora::lengths(self.base, layer, factors, &weights.linears)?);
            }
            let block = Block {
                architecture,
                rule: architecture.rule(layer),
                rope: self.base.rope(layer),
                weights: &weights,
                factors,
                lengths: Some(&self.lengths[layer]),
                dropout: None,
            };
            let cache = &self.cache[layer];
            let a = buffers.activations.fit(factors)?;
            let decode = || {
                let DecodeBuffers { new, scratch, .. } = &buffers;
                let pass = Pass { h: &h, rows: &rows, all: cache, a: &a };
                block.keys_and_values(pass, new, scratch)?;
                for s in layout.segments.iter() {
                    let new = new.rows(s.query, s.queries)?;
                    cache.k.set_rows(s.own + s.offset, &new.k)?;
                    cache.v.set_rows(s.own + s.offset, &new.v)?;
                }
                block.output(&h, pass, scratch)
            };
            decode().numeric()?;
        }
        for (i, ids) in parts {
            self.slots[*i].past += ids.len();
            if architecture.original_length().is_some() {
                self.slots[*i].ids.extend_from_slice(ids);
            }
        }
        let (weight, norm) = (policy.head()?, policy.final_norm()?);
        let head = || {
            let h = if all || last.len() == ids.len() { h.clone() } else { gather_rows(&h, &last)? };
            let normed = h.zeros_like()?;
            norm.forward(&normed, &h, architecture.norm_eps)?;
            let logits = device.logits(h.dims2()?.0, architecture.vocab_size)?;
            multiply(&logits, Onto::Zero, &[Product::new(&normed, Factor::Linear(&weight))])?;
            architecture.logit_cap.map_or(Ok(()), |cap| soft_cap(&logits, cap))?;
            logits.to_host()
        };
        head().numeric()
    }

    fn check(&self, parts: &[(usize, &[u32])]) -> Result<()> {
        for (i, ids) in parts {
            let slot = &self.slots[*i];
            if ids.is_empty() || slot.past + ids.len() > slot.capacity {
                let (place, capacity) = (slot.past + ids.len(), slot.capacity);
                return Err(Error::internal(format!("{place} tokens in a generation cache for {capacity}")));
            }
        }
        Ok(())
    }

    /// Returns what the new rows see in the caches, their positions, and the last new row of every part.
    fn lay_out(&self, parts: &[(usize, &[u32])]) -> (AttentionLayout, Vec<u32>, Vec<u32>) {
        let (mut layout, mut positions, mut last) = (AttentionLayout::default(), Vec::new(), Vec::new());
        for (number, (i, ids)) in parts.iter().enumerate() {
            let Slot { start, past, rotary, .. } = self.slots[*i];
            let query = positions.len();
            positions.extend((past..past + ids.len()).map(|p| rotary + p as u32));
            last.push((positions.len() - 1) as u32);
            layout.segments.push(Segment {
                query,
                queries: ids.len(),
                prefix: 0,
                prefix_len: 0,
                own: start,
                offset: past,
            });
            layout.groups.push(number..number + 1);
        }
        (layout, positions, last)
    }
}

/// One sequence to generate.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Token ids, at least one.
    pub prompt: &'a [u32],
    /// Most tokens to make.
    pub limit: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Continues the prompts together. After each new token of sequence `i`, `stop(i, tokens so far)` says whether it ends;
/// an error from it ends the whole. Returns each sequence's new tokens, the stopping one included, and whether `stop` ended it.
/// What a sequence is batched with does not change it.
pub fn generate_batch(
    base: &BaseModel,
    lora: Option<&Lora>,
    requests: &[Request],
    mut stop: impl FnMut(usize, &[u32]) -> Result<bool>,
) -> Result<Vec<(Vec<u32>, bool)>> {
    let capacities: Vec<usize> = requests.iter().map(|r| r.prompt.len() + r.limit).collect();
    let mut generator = Generator::batch(base, lora, &capacities)?;
    let mut done: Vec<(Vec<u32>, bool)> = vec![(Vec::new(), false); requests.len()];
    let mut live = Vec::new();
    let mut next = |i: usize, logits: &[f64], done: &mut (Vec<u32>, bool)| -> Result<bool> {
        let (made, stopped) = done;
        made.push(pick(logits, requests[i].sampling, made.len() as u64));
        *stopped = stop(i, made)?;
        Ok(!*stopped && made.len() < requests[i].limit)
    };
    for (i, request) in requests.iter().enumerate().filter(|(_, r)| r.limit > 0) {
        let logits = rows(&generator.feed_batch(&[(i, request.prompt)], false)?)?;
        if next(i, &logits[0], &mut done[i])? {
            live.push(i);
        }
    }
    while !live.is_empty() {
        let last: Vec<[u32; 1]> = live.iter().map(|i| [done[*i].0.last().copied().unwrap_or(0)]).collect();
        let parts: Vec<(usize, &[u32])> = live.iter().zip(&last).map(|(i, id)| (*i, &id[..])).collect();
        let logits = rows(&generator.feed_batch(&parts, false)?)?;
        let mut still = Vec::with_capacity(live.len());
        for (&i, logits) in live.iter().zip(&logits) {
            if next(i, logits, &mut done[i])? {
                still.push(i);
            }
        }
        live = still;
    }
    Ok(done)
}

/// Continues `prompt` until `stop` says so or `limit` tokens were made. Returns the new tokens, the stopping one left out,
/// and whether it was `stop` that ended it.
pub fn generate(
    base: &BaseModel,
    lora: Option<&Lora>,
    prompt: &[u32],
    limit: usize,
    sampling: Sampling,
    stop: impl Fn(u32) -> bool,
) -> Result<(Vec<u32>, bool)> {
    let request = Request { prompt, limit, sampling };
    let last = |_: usize, made: &[u32]| Ok(made.last().is_some_and(|id| stop(*id)));
    let (mut made, stopped) = generate_batch(base, lora, &[request], last)?.pop().unwrap_or_default();
    if stopped {
        made.pop();
    }
    Ok((made, stopped))
}

fn rows(logits: &HostTensor) -> Result<Vec<Vec<f64>>> {
    logits.to_dtype(DType::F64).and_then(|t| t.to_vec2::<f64>()).numeric()
}

/// Chooses a token from logits (V).
fn pick(values: &[f64], sampling: Sampling, place: u64) -> u32 {
    let best = values.iter().enumerate().fold(0, |best, (i, v)| if *v > values[best] { i } else { best });
    if sampling.temperature <= 0.0 {
        return best as u32;
    }
    let weight = |v: f64| ((v - values[best]) / sampling.temperature).exp();
    let mut order: Vec<(usize, f64)> = values.iter().map(|v| weight(*v)).enumerate().collect();
    // Ties by token id, so that the order is total and the draw reproducible.
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let total: f64 = order.iter().map(|o| o.1).sum();
    let mut kept = 0.0;
    let mut n = 0;
    while n < order.len() && (n == 0 || kept < sampling.top_p * total) {
        kept += order[n].1;
        n += 1;
    }
    let mut left = random::uniform(sampling.seed, place) * kept;
    for (id, w) in &order[..n] {
        left -= w;
        if left < 0.0 {
            return *id as u32;
        }
    }
    order[n - 1].0 as u32
}
