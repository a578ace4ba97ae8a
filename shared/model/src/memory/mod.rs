//! The memory plan: what a run will hold, decided before anything large is allocated and obeyed by the engine.
//!
//! Called by `kto-train`. Pure functions: sizes in, plan out; headers and token lengths are all that is read.
//! Invariants: the items of a plan add up to its peak; less memory never gives a larger plan; the widths by which the
//! engine allocates and the plan counts are the same functions ([`crate::buffers::Widths`]).
//! Deliberately absent: measuring (see `kto_cli::memory`), and any say in the numbers of a run: of all that a plan
//! decides only [`MemoryPlan::pack_rows`] can change their last bits.

mod items;
mod on_gpu;
mod shape;
#[cfg(test)]
mod tests;
mod weights;

pub use on_gpu::{GpuDemand, GpuWeights, OnGpu, plan_on_gpu};
pub use shape::{BatchShape, PackShape};
pub use weights::{AdapterSize, WeightSize};

use crate::architecture::Architecture;
use std::cell::OnceCell;

/// A named share of the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What it is, for the table.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// How a run uses memory: what the engine obeys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// How many blocks keep their activations for the way back, the last blocks first. The others compute them again.
    pub kept_layers: usize,
    /// Rows of a pack, about.
    pub pack_rows: usize,
    /// Rows of a chunk of logits.
    pub head_rows: usize,
    /// Rows of a sweep of the reference pass, about.
    pub reference_rows: usize,
    /// Whether the mapped pages of a block go back to the system after use.
    pub stream: bool,
    /// The largest of every count over the steps, for which buffers are reserved.
    pub steps: BatchShape,
    /// The same over the sweeps of the reference pass.
    pub reference: BatchShape,
    /// What a GPU holds, of a run on one.
    pub on_gpu: Option<OnGpu>,
    /// What the host holds at the peak, in the order of the table.
    pub items: Vec<Item>,
    /// Their sum.
    pub peak: u64,
}

/// What a run asks for.
pub struct Demand<'a> {
    /// The decoder.
    pub architecture: &'a Architecture,
    /// Its weights as stored.
    pub weights: WeightSize,
    /// The trained part.
    pub adapter: AdapterSize,
    /// How the optimizer's moments are held.
    pub moments: Moments,
    /// Whether a copy of the initial adapter is the reference.
    pub adapter_copy: bool,
    /// Length of the rotary tables.
    pub positions: usize,
    /// Worker threads.
    pub threads: usize,
    /// The token set in memory, with the reference log-probabilities of its pairs.
    pub token_bytes: u64,
    /// The rows of a pack, when an earlier part of the run has settled them.
    pub pack_rows: Option<usize>,
    /// The batches of the run.
    pub batches: &'a dyn Batches,
}

/// How AdamW's moments are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moments {
    /// In f32.
    F32,
    /// In 8 bits, those of small tensors in f32 ([`kto_kernels::adamw8`]).
    Bits8,
}

/// The batches of a run under a choice.
pub trait Batches {
    /// Returns the largest of every count over the steps.
    fn steps(&self, pack_rows: usize) -> BatchShape;
    /// Returns the same over the sweeps of the reference pass; nothing when there is no pass.
    fn reference(&self, pack_rows: usize, reference_rows: usize) -> BatchShape;
}

/// What the plan decides beside kept layers and streaming, from roomy to tight.
#[derive(Clone, Copy, Debug)]
struct Level {
    pack_rows: usize,
    /// Elements of the logits buffer.
    logits: usize,
    reference_rows: usize,
}

/// A pack widens and packs every weight once, so large packs are faster; below 128 rows the time is spent on reading weights.
const LEVELS: [Level; 6] = [
    Level { pack_rows: 4096, logits: 1 << 24, reference_rows: 32768 },
    Level { pack_rows: 2048, logits: 1 << 24, reference_rows: 16384 },
    Level { pack_rows: 1024, logits: 1 << 23, reference_rows: 16384 },
    Level { pack_rows: 512, logits: 1 << 22, reference_rows: 8192 },
    Level { pack_rows: 256, logits: 1 << 21, reference_rows: 4096 },
    Level { pack_rows: 128, logits: 1 << 20, reference_rows: 2048 },
];

/// Packs from which on keeping another block's activations saves more time than a larger pack.
const FULL: usize = 1024;

/// Returns the plan that does least again within `limit` bytes. It gives up, in this order: packs beyond [`FULL`], kept activations,
/// smaller packs and head chunks, weights that stay resident. `Err` is the smallest plan, when even that is too large.
pub fn plan(demand: &Demand, limit: u64) -> Result<MemoryPlan, Box<MemoryPlan>> {
    let levels = LEVELS.map(|level| demand.pack_rows.map_or(level, |pack_rows| Level { pack_rows, ..level }));
    let sized: [OnceCell<(BatchShape, BatchShape)>; LEVELS.len()] = Default::default();
    let mut smallest: Option<MemoryPlan> = None;
    for stream in [false, true] {
        let mut best: Option<MemoryPlan> = None;
        for (level, sized) in levels.iter().zip(&sized) {
            let (steps, reference) = *sized.get_or_init(|| {
                let steps = demand.batches.steps(level.pack_rows);
                (steps, demand.batches.reference(level.pack_rows, level.reference_rows))
            });
            let at = |kept_layers: usize| {
                items::with_items(demand, choice(demand, *level, kept_layers, stream), steps, reference)
            };
            if best.is_some() && level.pack_rows < FULL {
                break;
            }
            let without = at(0);
            if without.peak <= limit {
                let plan = most_kept(demand.adapter.blocks(demand.architecture), limit, without, at);
                if best.as_ref().is_none_or(|b| plan.kept_layers > b.kept_layers) {
                    best = Some(plan);
                }
            } else if smallest.as_ref().is_none_or(|s| without.peak < s.peak) {
                smallest = Some(without);
            }
        }
        if let Some(best) = best {
            return Ok(best);
        }
    }
    // Every level has been tried.
    smallest.map_or_else(|| Ok(items::empty()), |plan| Err(Box::new(plan)))
}

fn choice(demand: &Demand, level: Level, kept_layers: usize, stream: bool) -> MemoryPlan {
    MemoryPlan {
        kept_layers,
        pack_rows: level.pack_rows,
        head_rows: (level.logits / demand.architecture.vocab_size).clamp(16, 1024),
        reference_rows: level.reference_rows,
        stream,
        ..items::empty()
    }
}

/// Returns the plan with the most kept layers, up to `blocks`, that fits; `without` fits with none.
fn most_kept(blocks: usize, limit: u64, without: MemoryPlan, at: impl Fn(usize) -> MemoryPlan) -> MemoryPlan {
    // Peaks grow with the kept layers, so halving finds the last that fits.
    let (mut best, mut above) = (without, blocks + 1);
    while above - best.kept_layers > 1 {
        let middle = at(best.kept_layers + (above - best.kept_layers) / 2);
        if middle.peak <= limit { best = middle } else { above = middle.kept_layers }
    }
    best
}
