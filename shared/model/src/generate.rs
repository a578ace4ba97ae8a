//! Generation with a cache of keys and values: greedy, or temperature and nucleus sampling from a seed.

use crate::{base::BaseModel, block::Block, lora::Lora, numeric::Numeric};
use candle_core::{DType, Device, Tensor};
use kto_cli::{Error, Result};
use kto_kernels::{AttentionLayout, Segment, gather_rows, matmul, random, rms_norm};

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

/// One sequence being generated.
pub struct Generator<'a> {
    base: &'a BaseModel,
    lora: Option<&'a Lora>,
    /// Keys and values of each block, (capacity, Hkv·D) each.
    cache: Vec<(Tensor, Tensor)>,
    capacity: usize,
    past: usize,
}

impl<'a> Generator<'a> {
    /// Starts a sequence of at most `capacity` tokens.
    pub fn new(base: &'a BaseModel, lora: Option<&'a Lora>, capacity: usize) -> Result<Self> {
        let shape = base.architecture.shape;
        let empty =
            || Tensor::zeros((capacity, shape.kv_heads * shape.dim), base.dtype(), &Device::Cpu).numeric();
        let mut cache = Vec::with_capacity(base.architecture.layers);
        for _ in 0..base.architecture.layers {
            cache.push((empty()?, empty()?));
        }
        Ok(Self { base, lora, cache, capacity, past: 0 })
    }

    /// Appends tokens and returns the logits (ids.len(), V) of every appended row when `all`, else of the last (1, V).
    pub fn feed(&mut self, ids: &[u32], all: bool) -> Result<Tensor> {
        let n = ids.len();
        if n == 0 || self.past + n > self.capacity {
            let place = self.past + n;
            return Err(Error::internal(format!(
                "{place} tokens in a generation cache for {}",
                self.capacity
            )));
        }
        let positions: Vec<u32> = (self.past..self.past + n).map(|p| p as u32).collect();
        let segment = Segment { query: 0, queries: n, prefix: 0, prefix_len: 0, own: 0, offset: self.past };
        let layout = AttentionLayout { segments: vec![segment], groups: std::iter::once(0..1).collect() };
        let mut h = gather_rows(&self.base.embedding, ids).numeric()?;
        for layer in 0..self.base.architecture.layers {
            let weights = self.base.layer(layer)?;
            let block = Block {
                architecture: &self.base.architecture,
                rope: &self.base.rope,
                weights: &weights,
                factors: self.lora.map(|l| (&l.layers[layer], l.scale)),
                dropout: None,
            };
            let (keys, values) = &self.cache[layer];
            let past = self.past;
            let cache = |k: &Tensor, v: &Tensor| {
                keys.slice_set(k, 0, past)?;
                values.slice_set(v, 0, past)?;
                Ok((keys.narrow(0, 0, past + n)?, values.narrow(0, 0, past + n)?))
            };
            h = block.decode(&h, &positions, &layout, cache).numeric()?;
        }
        self.past += n;
        let head = || {
            let h = if all { h.clone() } else { h.narrow(0, n - 1, 1)? };
            matmul(
                &rms_norm(&h, &self.base.final_norm, self.base.architecture.rms_eps)?,
                &self.base.head.t()?,
            )
        };
        head().numeric()
    }
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
    let mut generator = Generator::new(base, lora, prompt.len() + limit)?;
    let mut logits = generator.feed(prompt, false)?;
    let mut made = Vec::new();
    while made.len() < limit {
        let next = pick(&logits, sampling, made.len() as u64)?;
        if stop(next) {
            return Ok((made, true));
        }
        made.push(next);
        if made.len() < limit {
            logits = generator.feed(&[next], false)?;
        }
    }
    Ok((made, false))
}

/// Chooses a token from logits (1, V).
fn pick(logits: &Tensor, sampling: Sampling, place: u64) -> Result<u32> {
    let values = logits
        .flatten_all()
        .and_then(|t| t.to_dtype(DType::F64))
        .and_then(|t| t.to_vec1::<f64>())
        .numeric()?;
    let best = values.iter().enumerate().fold(0, |best, (i, v)| if *v > values[best] { i } else { best });
    if sampling.temperature <= 0.0 {
        return Ok(best as u32);
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
            return Ok(*id as u32);
        }
    }
    Ok(order[n - 1].0 as u32)
}
