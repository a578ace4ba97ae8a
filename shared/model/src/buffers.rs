//! The memory that a sweep works in, kept from sweep to sweep: fresh pages cost more than most element-wise work on them.
//!
//! Called by [`crate::sweep`] and generation. Invariant: every large block of memory of a step is one of these buffers, so the
//! memory plan can add them up. A buffer grows to the largest number of rows asked for and is never given back.

use crate::{
    architecture::{Architecture, Module},
    block::BlockFactors,
    inputs::Inputs,
    lora::Lora,
    memory::BatchShape,
    numeric::Numeric,
    on_gpu::adapter::GradientMemory,
    pack::Pack,
};
use kto_cli::{Error, Result};
use kto_kernels::{
    ATTENTION_PARTS,
    device::{Device, Tensor},
};
use std::cell::{Cell, RefCell};

/// Rows of one width.
pub(crate) struct Buffer {
    width: usize,
    device: Device,
    /// Whether it is for logits, which may have another element type.
    logits: bool,
    memory: RefCell<Option<(usize, Tensor)>>,
}

impl Buffer {
    pub fn new(width: usize, device: &Device) -> Self {
        Self { width, device: device.clone(), logits: false, memory: RefCell::new(None) }
    }

    pub fn of_logits(width: usize, device: &Device) -> Self {
        Self { logits: true, ..Self::new(width, device) }
    }

    /// Makes room for `rows` rows. What the buffer held is lost when it grows.
    pub fn reserve(&self, rows: usize) -> Result<()> {
        let mut memory = self.memory.borrow_mut();
        let room = memory.as_ref().map_or(0, |(rows, _)| *rows);
        if room < rows || memory.is_none() {
            // The old memory goes first, so that both never exist together.
            *memory = None;
            let new = match self.logits {
                true => self.device.logits(rows, self.width),
                false => self.device.matrix(rows, self.width),
            };
            *memory = Some((rows, new.numeric()?));
        }
        Ok(())
    }

    /// Returns rows `start..start + count`, which must have been reserved.
    pub fn rows(&self, start: usize, count: usize) -> Result<Tensor> {
        let memory = self.memory.borrow();
        let (_, memory) =
            memory.as_ref().ok_or_else(|| Error::internal("a buffer is used before its reservation"))?;
        memory.narrow(start, count).numeric()
    }
}

/// What a block computes between its input and its output, for the rows of one part of a pack.
#[derive(Clone)]
pub(crate) struct Activations<B = Buffer> {
    /// Rotated queries (T, H·D).
    pub q: B,
    /// Queries and keys before their norms (T, H·D) and (T, Hkv·D), where heads are normed.
    pub raw: (B, B),
    /// Outputs of attention and MLP before their norms (T, C), where those are normed.
    pub sums: (B, B),
    /// Attention's output (T, H·D).
    pub attended: B,
    /// What attention's way back needs of its softmax (T, 2·H).
    pub stats: B,
    /// Residual stream after attention (T, C).
    pub h2: B,
    /// (T, I)
    pub gate: B,
    /// (T, I)
    pub up: B,
    /// LoRA's inner values `drop(x)·Aᵀ` (T, r), by [`Module`].
    pub inner: [B; 7],
}

/// Keys and values of a pack (T, Hkv·D).
pub(crate) struct KeyValues<B = Buffer> {
    pub k: B,
    pub v: B,
}

/// A block's work space that nothing outlives.
pub(crate) struct Scratch<B = Buffer> {
    /// Normed rows (T, C).
    pub normed: B,
    /// Gradients of normed rows (T, C), and of attention's output (T, H·D).
    pub flow: (B, B),
    /// (T, I)
    pub wide: B,
    /// Gradient of the queries (T, H·D).
    pub dq: B,
    /// Gradients of the keys before their norm (T, Hkv·D), and of normed outputs before theirs (T, C), where there are such.
    pub before: (B, B),
    /// Gradients of keys and values (T, Hkv·D).
    pub dkv: KeyValues<B>,
    /// Gradient of an output of width C before DoRA's gains (T, C), and an output without them (T, its width), where there is DoRA.
    pub before_gains: B,
    pub gained: B,
    /// Gradients of LoRA's inner values (T, r), by [`Module`].
    pub inner: [B; 7],
}

/// Elements a row of everything that has rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// C
    pub hidden: usize,
    /// H·D
    pub queries: usize,
    /// 2·H
    pub stats: usize,
    /// Hkv·D
    pub keys: usize,
    /// I
    pub intermediate: usize,
    /// H·D and Hkv·D where heads are normed, else 0.
    pub raw: (usize, usize),
    /// C where the outputs of attention and MLP are normed, else 0.
    pub sums: usize,
    /// Ranks of LoRA, by [`Module`]; 0 where there is none.
    pub ranks: [usize; 7],
    /// C and the widest output where there is DoRA, else 0.
    pub gains: (usize, usize),
}

impl Widths {
    /// Returns the sizes of a decoder with an adapter on it.
    pub fn new(architecture: &Architecture, lora: Option<&Lora>) -> Self {
        let rank = |m: Module| lora.map_or(0, |lora| lora.rank_of(m));
        let this = Self::with_ranks(architecture, Module::ALL.map(rank));
        if lora.is_some_and(Lora::has_magnitudes) { this.with_gains() } else { this }
    }

    /// Returns the same with DoRA.
    pub fn with_gains(self) -> Self {
        let widest = self.hidden.max(self.queries).max(self.keys).max(self.intermediate);
        Self { gains: (self.hidden, widest), ..self }
    }

    /// Returns the same for an adapter that does not exist yet.
    pub fn with_ranks(architecture: &Architecture, ranks: [usize; 7]) -> Self {
        let shape = architecture.shape;
        Self {
            hidden: architecture.hidden,
            queries: shape.heads * shape.dim,
            stats: 2 * shape.heads,
            keys: shape.kv_heads * shape.dim,
            intermediate: architecture.intermediate,
            raw: if architecture.qk_norm {
                (shape.heads * shape.dim, shape.kv_heads * shape.dim)
            } else {
                (0, 0)
            },
            sums: if architecture.post_norms { architecture.hidden } else { 0 },
            ranks,
            gains: (0, 0),
        }
    }

    fn rank_sum(&self) -> usize {
        self.ranks.iter().sum()
    }

    /// Returns the elements a row of what a block keeps for the way back (keys and values apart).
    pub fn activations(&self) -> usize {
        let extra = self.raw.0 + self.raw.1 + 2 * self.sums;
        2 * self.queries + self.stats + self.hidden + 2 * self.intermediate + extra + self.rank_sum()
    }

    /// Returns the elements a row of keys and values.
    pub fn key_values(&self) -> usize {
        2 * self.keys
    }

    /// Returns the elements a row of the work space of a forward pass.
    pub fn forward_scratch(&self) -> usize {
        self.hidden + self.intermediate
    }

    /// Returns the same on a GPU, where attention's way back needs nothing of its way up.
    pub fn on_gpu(self) -> Self {
        Self { stats: 0, ..self }
    }

    /// Returns the elements a row that a backward pass on a GPU needs beyond [`Widths::forward_scratch`]; attention borrows its sums.
    pub fn backward_on_gpu(&self) -> usize {
        let extra = self.raw.1 + self.sums + self.gains.0 + self.gains.1;
        self.hidden + 2 * self.queries + 2 * self.keys + extra + self.rank_sum()
    }

    /// Returns the elements a row that a backward pass needs beyond [`Widths::forward_scratch`]. Attention sums the gradients of keys
    /// and values in parts.
    pub fn backward_scratch(&self) -> usize {
        let extra = self.raw.1 + self.sums + self.gains.0 + self.gains.1;
        self.hidden + 2 * self.queries + (2 + 2 * ATTENTION_PARTS) * self.keys + extra + self.rank_sum()
    }
}

/// Buffers of a run. One sweep uses them at a time.
pub struct Workspace {
    pub(crate) scratch: Scratch,
    pub(crate) activations: Activations,
    pub(crate) key_values: KeyValues,
    /// Inputs of the trained rows, by block from the lowest adapted one up; the first is also the running state below it.
    pub(crate) inputs: Inputs,
    /// Running state of the rows without gradient.
    pub(crate) rest: Buffer,
    /// Output of the last block for the head rows, and the same rows normed.
    pub(crate) last: (Buffer, Buffer),
    /// Unit gradients of the trained entries.
    pub(crate) unit: Buffer,
    /// Running gradient of the trained rows, and of the head rows in the last block.
    pub(crate) gradient: (Buffer, Buffer),
    /// What blocks keep for the way back, the last block's first.
    pub(crate) kept: Vec<(Activations, KeyValues)>,
    /// Rows of a chunk of the head.
    pub(crate) head_rows: usize,
    /// Whether the head is on the device a tile at a time.
    pub(crate) head_in_tiles: bool,
    /// Logits of a chunk of the head, unless it is in tiles.
    pub(crate) logits: Buffer,
    /// Lowest adapted block.
    pub(crate) first: usize,
    /// Of a gradient on its way from a GPU.
    pub(crate) gradient_memory: RefCell<Option<GradientMemory>>,
    /// Counts forward sweeps, so that a backward sweep of another one is noticed.
    pub(crate) sweeps: Cell<u64>,
}

/// What the memory plan decides about a workspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkspaceSpec {
    /// Blocks that keep their activations from the forward to the backward sweep, the last ones first.
    pub kept_layers: usize,
    /// Rows of a chunk of logits.
    pub head_rows: usize,
    /// Whether the head is on the device a tile at a time.
    pub head_in_tiles: bool,
    /// Whether the inputs of blocks are kept in the host's memory, of a sweep on a GPU.
    pub offload_inputs: bool,
}

impl Workspace {
    /// Describes the buffers of a decoder with an adapter; no memory is taken yet.
    pub fn new(
        architecture: &Architecture,
        lora: Option<&Lora>,
        spec: WorkspaceSpec,
        device: &Device,
    ) -> Self {
        let widths = Widths::new(architecture, lora);
        let widths = if matches!(device, Device::Gpu(..)) { widths.on_gpu() } else { widths };
        let Widths { hidden, queries, stats, keys, intermediate, raw, sums, ranks, gains } = widths;
        let buffer = |width: usize| Buffer::new(width, device);
        let inner = || ranks.map(buffer);
        let key_values = || KeyValues { k: buffer(keys), v: buffer(keys) };
        let activations = || Activations {
            q: buffer(queries),
            raw: (buffer(raw.0), buffer(raw.1)),
            sums: (buffer(sums), buffer(sums)),
            attended: buffer(queries),
            stats: buffer(stats),
            h2: buffer(hidden),
            gate: buffer(intermediate),
            up: buffer(intermediate),
            inner: inner(),
        };
        let first = lora.map_or(architecture.layers, Lora::first_layer);
        let above = architecture.layers - first;
        Self {
            scratch: Scratch {
                normed: buffer(hidden),
                flow: (buffer(hidden), buffer(queries)),
                wide: buffer(intermediate),
                dq: buffer(queries),
                before: (buffer(raw.1), buffer(sums)),
                dkv: key_values(),
                before_gains: buffer(gains.0),
                gained: buffer(gains.1),
                inner: inner(),
            },
            activations: activations(),
            key_values: key_values(),
            inputs: Inputs::new(above.max(1), hidden, device, spec.offload_inputs),
            rest: buffer(hidden),
            last: (buffer(hidden), buffer(hidden)),
            unit: buffer(hidden),
            gradient: (buffer(hidden), buffer(hidden)),
            kept: (0..spec.kept_layers.min(above)).map(|_| (activations(), key_values())).collect(),
            head_rows: spec.head_rows.max(1),
            head_in_tiles: spec.head_in_tiles,
            logits: Buffer::of_logits(architecture.vocab_size, device),
            first,
            gradient_memory: RefCell::new(None),
            sweeps: Cell::new(0),
        }
    }

    /// Takes the memory that sweeps over `packs` need; with `keep` for both directions.
    pub fn reserve(&self, packs: &[Pack], keep: bool) -> Result<()> {
        self.reserve_shape(&BatchShape::of_packs(packs), keep)
    }

    /// Takes the memory of the largest batch before the first: buffers that grow from step to step leave holes.
    pub fn reserve_shape(&self, batch: &BatchShape, keep: bool) -> Result<()> {
        let (all, largest) = (&batch.all, &batch.largest);
        self.activations.reserve(largest.part_rows)?;
        self.scratch.normed.reserve(largest.part_rows)?;
        self.scratch.wide.reserve(largest.part_rows)?;
        self.key_values.reserve(largest.rows)?;
        self.inputs.reserve(all.gradient_rows, keep)?;
        self.rest.reserve(all.rest_rows)?;
        self.last.0.reserve(all.head_rows)?;
        self.last.1.reserve(largest.head_rows)?;
        if !self.head_in_tiles {
            self.logits.reserve(self.head_rows.min(largest.entries))?;
        }
        if !keep {
            return Ok(());
        }
        self.scratch.reserve_backward(largest.gradient_rows)?;
        self.unit.reserve(all.gradient_entries)?;
        self.gradient.0.reserve(all.gradient_rows)?;
        self.gradient.1.reserve(all.gradient_head_rows)?;
        for (activations, key_values) in &self.kept {
            activations.reserve(all.gradient_rows)?;
            key_values.reserve(all.rows)?;
        }
        Ok(())
    }
}

impl Activations {
    fn reserve(&self, rows: usize) -> Result<()> {
        let own = [&self.q, &self.attended, &self.stats, &self.h2, &self.gate, &self.up];
        let all = own.into_iter().chain([&self.raw.0, &self.raw.1, &self.sums.0, &self.sums.1]);
        all.chain(&self.inner).try_for_each(|b| b.reserve(rows))
    }

    /// Returns rows `start..start + count` of everything; of queries, attention and what follows only `selected` rows.
    pub fn rows(&self, start: usize, count: usize, selected: usize) -> Result<Activations<Tensor>> {
        let inner = |m: Module| {
            let rows = if matches!(m, Module::K | Module::V) { count } else { selected };
            self.inner[m as usize].rows(start, rows)
        };
        Ok(Activations {
            q: self.q.rows(start, selected)?,
            raw: (self.raw.0.rows(start, selected)?, self.raw.1.rows(start, count)?),
            sums: (self.sums.0.rows(start, selected)?, self.sums.1.rows(start, selected)?),
            attended: self.attended.rows(start, selected)?,
            stats: self.stats.rows(start, selected)?,
            h2: self.h2.rows(start, selected)?,
            gate: self.gate.rows(start, selected)?,
            up: self.up.rows(start, selected)?,
            inner: by_module(inner)?,
        })
    }
}

impl Activations<Tensor> {
    /// Returns the same with inner values as wide as this block's ranks.
    pub fn fit(&self, factors: Option<&BlockFactors>) -> Result<Self> {
        let mut this = self.clone();
        fit(&mut this.inner, factors)?;
        Ok(this)
    }
}

impl Scratch<Tensor> {
    /// Makes inner values as wide as this block's ranks.
    pub fn fit(mut self, factors: Option<&BlockFactors>) -> Result<Self> {
        fit(&mut self.inner, factors)?;
        Ok(self)
    }
}

/// Buffers are as wide as the largest rank of a module in any block.
fn fit(inner: &mut [Tensor; 7], factors: Option<&BlockFactors>) -> Result<()> {
    for (inner, factors) in inner.iter_mut().zip(factors.into_iter().flatten()) {
        let Some(f) = factors else { continue };
        let ((rows, width), (rank, _)) = (inner.dims2().numeric()?, f.a.dims2().numeric()?);
        if width != rank {
            *inner = inner.first(rows, rank).numeric()?;
        }
    }
    Ok(())
}

impl KeyValues {
    fn reserve(&self, rows: usize) -> Result<()> {
        self.k.reserve(rows)?;
        self.v.reserve(rows)
    }

    pub fn rows(&self, start: usize, count: usize) -> Result<KeyValues<Tensor>> {
        Ok(KeyValues { k: self.k.rows(start, count)?, v: self.v.rows(start, count)? })
    }
}

impl KeyValues<Tensor> {
    pub fn rows(&self, start: usize, count: usize) -> candle_core::Result<Self> {
        Ok(Self { k: self.k.narrow(start, count)?, v: self.v.narrow(start, count)? })
    }
}

impl Scratch {
    fn reserve_backward(&self, rows: usize) -> Result<()> {
        let own = [&self.flow.0, &self.flow.1, &self.dq, &self.before.0, &self.before.1];
        let all = own.into_iter().chain([&self.before_gains, &self.gained]);
        all.chain(&self.inner).try_for_each(|b| b.reserve(rows))?;
        self.dkv.reserve(rows)
    }

    /// Returns `count` rows of what a forward pass uses; of the wide part only `selected`.
    pub fn forward(&self, count: usize, selected: usize) -> Result<ForwardScratch> {
        Ok(ForwardScratch { normed: self.normed.rows(0, count)?, wide: self.wide.rows(0, selected)? })
    }

    /// Returns `count` rows of everything; of what only `selected` rows have, only those.
    pub fn rows(&self, count: usize, selected: usize) -> Result<Scratch<Tensor>> {
        let inner = |m: Module| {
            let rows = if matches!(m, Module::K | Module::V) { count } else { selected };
            self.inner[m as usize].rows(0, rows)
        };
        Ok(Scratch {
            normed: self.normed.rows(0, count)?,
            flow: (self.flow.0.rows(0, count)?, self.flow.1.rows(0, selected)?),
            wide: self.wide.rows(0, selected)?,
            dq: self.dq.rows(0, selected)?,
            before: (self.before.0.rows(0, count)?, self.before.1.rows(0, selected)?),
            dkv: self.dkv.rows(0, count)?,
            before_gains: self.before_gains.rows(0, selected)?,
            gained: self.gained.rows(0, count)?,
            inner: by_module(inner)?,
        })
    }
}

/// Buffers of a decoding step, for all its new rows.
pub(crate) struct DecodeBuffers {
    pub activations: Activations<Tensor>,
    pub new: KeyValues<Tensor>,
    pub scratch: ForwardScratch,
}

impl DecodeBuffers {
    pub fn new(
        architecture: &Architecture,
        lora: Option<&Lora>,
        rows: usize,
        device: &Device,
    ) -> Result<Self> {
        let w =
            Workspace::new(architecture, lora, WorkspaceSpec { head_rows: 1, ..Default::default() }, device);
        w.activations.reserve(rows)?;
        w.key_values.reserve(rows)?;
        w.scratch.normed.reserve(rows)?;
        w.scratch.wide.reserve(rows)?;
        Ok(Self {
            activations: w.activations.rows(0, rows, rows)?,
            new: w.key_values.rows(0, rows)?,
            scratch: w.scratch.forward(rows, rows)?,
        })
    }
}

/// What a forward pass of a block uses beside its activations.
pub(crate) struct ForwardScratch {
    /// (T, C)
    pub normed: Tensor,
    /// (selected, I)
    pub wide: Tensor,
}

fn by_module(f: impl Fn(Module) -> Result<Tensor>) -> Result<[Tensor; 7]> {
    let all: Vec<Tensor> = Module::ALL.into_iter().map(f).collect::<Result<_>>()?;
    all.try_into().map_err(|_| Error::internal("a block has seven linear layers"))
}
