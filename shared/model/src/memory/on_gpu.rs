//! The memory plan of a run on a GPU: what is on the device, and what page-locked memory the host adds.
//!
//! Most of the arithmetic is that of the host's plan with another element size. The device's limit is a hard one: the engine's
//! allocations are counted and refused beyond it ([`kto_kernels::gpu::Gpu`]).

use super::{
    BatchShape, Demand, Item, MemoryPlan,
    items::{self, item, total},
};
use crate::{
    architecture::{Architecture, Module},
    base::Placement,
    weights::{EMBEDDING, HEAD, weight_name},
};
use kto_formats::model_dir::ModelDir;
use kto_kernels::{
    Dense,
    gpu::{attention, products},
};
use safetensors::Dtype;
use std::cell::OnceCell;

/// What the device holds of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OnGpu {
    /// What of the base is there all the time.
    pub placement: Placement,
    /// Whether the inputs of blocks are kept in the host's memory.
    pub offload_inputs: bool,
    /// What is held at the peak.
    pub items: Vec<Item>,
    /// Their sum.
    pub peak: u64,
}

/// The blocks of a model on a GPU, from headers alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuWeights {
    /// All blocks, packed.
    pub blocks: u64,
    /// The largest block.
    pub block: u64,
    /// The places where the matrices of a block are widened.
    pub widened: u64,
    /// The largest of them.
    pub widest: u64,
    /// Norms and biases.
    pub vectors: u64,
    /// The head as stored, if it is quantized: it then lies there beside its widened form, and not in tiles.
    pub packed_head: u64,
}

const F32: u64 = 4;
const GRAIN: u64 = 256;

fn rounded(bytes: u64) -> u64 {
    bytes.next_multiple_of(GRAIN)
}

impl GpuWeights {
    /// Adds up the tensors of a model for computations in `element`.
    pub fn of(architecture: &Architecture, model: &ModelDir, element: Dense) -> Self {
        let size = element.size() as u64;
        let (mut blocks, mut this) = (vec![0u64; architecture.layers], Self::default());
        let mut widened = [0u64; Module::NAMED.len()];
        let is_float = |d: Dtype| matches!(d, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        for (layer, block) in blocks.iter_mut().enumerate() {
            for &module in architecture.modules() {
                let Ok(view) = model.tensors.require(&weight_name(module, layer)) else { continue };
                let (rows, columns) = architecture.weight_shape(module);
                let dense = (rows * columns) as u64 * size;
                if is_float(view.dtype) {
                    *block += rounded(dense);
                } else {
                    let place = &mut widened[module as usize];
                    *place = dense.max(*place);
                    *block += rounded(view.data.len() as u64);
                }
            }
        }
        // Scales and what else belongs to quantized matrices; norms and biases.
        for view in model.tensors.views() {
            let layer = view.name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
            let Some(block) = layer.and_then(|n| blocks.get_mut(n.parse::<usize>().ok()?)) else { continue };
            if ["norm.weight", "norm.bias", "_proj.bias"].iter().any(|end| view.name.ends_with(end)) {
                this.vectors += rounded(view.shape.iter().product::<usize>() as u64 * size);
            } else if !view.name.ends_with("_proj.weight") {
                *block += rounded(view.data.len() as u64);
            }
        }
        let head = if architecture.tied { EMBEDDING } else { HEAD };
        let own = head.trim_end_matches("weight");
        if model.tensors.require(head).is_ok_and(|view| !is_float(view.dtype)) {
            let parts = model.tensors.views().filter(|v| v.name.starts_with(own));
            this.packed_head = parts.map(|v| rounded(v.data.len() as u64)).sum();
        }
        this.blocks = blocks.iter().sum();
        this.block = blocks.into_iter().max().unwrap_or(0);
        this.widened = widened.into_iter().map(rounded).sum();
        this.widest = widened.into_iter().map(rounded).max().unwrap_or(0);
        this
    }
}

/// A GPU for the plan.
#[derive(Clone, Copy, Debug)]
pub struct GpuDemand {
    /// Element type of activations.
    pub element: Dense,
    /// The blocks there.
    pub weights: GpuWeights,
    /// Whether dropout makes copies of activations.
    pub dropout: bool,
    /// Longest row of tokens.
    pub longest: usize,
    /// Bytes that the machine holds itself.
    pub held: u64,
    /// Bytes that may be taken.
    pub limit: u64,
}

/// What the plan decides about a batch, from roomy to tight.
#[derive(Clone, Copy)]
struct Level {
    pack_rows: usize,
    logits: usize,
    reference_rows: usize,
}

const LEVELS: [Level; 7] = [
    Level { pack_rows: 8192, logits: 1 << 26, reference_rows: 65536 },
    Level { pack_rows: 4096, logits: 1 << 26, reference_rows: 65536 },
    Level { pack_rows: 2048, logits: 1 << 25, reference_rows: 32768 },
    Level { pack_rows: 1024, logits: 1 << 24, reference_rows: 16384 },
    Level { pack_rows: 512, logits: 1 << 23, reference_rows: 8192 },
    Level { pack_rows: 256, logits: 1 << 22, reference_rows: 4096 },
    Level { pack_rows: 128, logits: 1 << 21, reference_rows: 2048 },
];

/// Packs below which products leave a GPU idle.
const FULL: usize = 1024;
/// Elements of a tile of the head.
const TILE: usize = 1 << 24;

/// Returns the plan that keeps most on the device within its limit. It gives up, in this order: kept activations, packs beyond
/// [`FULL`], the head, inputs of blocks, places for widened weights, the other weights; then smaller packs. `Err` is the smallest plan,
/// when even that is too large.
pub fn plan_on_gpu(demand: &Demand, gpu: &GpuDemand) -> Result<MemoryPlan, Box<MemoryPlan>> {
    let a = demand.architecture;
    let rows = (TILE / a.hidden.max(1)).min(a.vocab_size.div_ceil(4)).max(1);
    let tile = Some(rows).filter(|_| gpu.weights.packed_head == 0);
    let at = |streamed, share_widened, head_tile| Placement { streamed, share_widened, head_tile };
    let places = [
        (at(false, false, None), false),
        (at(false, false, tile), false),
        (at(false, false, tile), true),
        (at(false, true, tile), true),
        (at(true, false, tile), true),
        (at(true, true, tile), true),
    ];
    let levels = LEVELS.map(|level| demand.pack_rows.map_or(level, |pack_rows| Level { pack_rows, ..level }));
    let sized: [OnceCell<(BatchShape, BatchShape)>; LEVELS.len()] = Default::default();
    let mut smallest: Option<MemoryPlan> = None;
    let (large, small): (Vec<usize>, Vec<usize>) =
        (0..levels.len()).partition(|l| LEVELS[*l].pack_rows >= FULL || demand.pack_rows.is_some());
    for wanted in [large, small] {
        for (placement, offload_inputs) in places {
            for &l in &wanted {
                let (steps, reference) = *sized[l].get_or_init(|| {
                    let steps = demand.batches.steps(levels[l].pack_rows);
                    (steps, demand.batches.reference(levels[l].pack_rows, levels[l].reference_rows))
                });
                let columns = placement.head_tile.unwrap_or(a.vocab_size).max(1);
                let at = |kept_layers: usize| {
                    let choice = MemoryPlan {
                        kept_layers,
                        pack_rows: levels[l].pack_rows,
                        head_rows: (levels[l].logits / columns).clamp(16, 4096),
                        reference_rows: levels[l].reference_rows,
                        steps,
                        reference,
                        ..items::empty()
                    };
                    with_items(demand, gpu, choice, placement, offload_inputs)
                };
                let without = at(0);
                if peak(&without) <= gpu.limit {
                    return Ok(most_kept(demand.adapter.blocks(demand.architecture), gpu.limit, without, at));
                }
                if smallest.as_ref().is_none_or(|s| peak(&without) < peak(s)) {
                    smallest = Some(without);
                }
            }
        }
    }
    smallest.map_or_else(|| Ok(items::empty()), |plan| Err(Box::new(plan)))
}

fn peak(plan: &MemoryPlan) -> u64 {
    plan.on_gpu.as_ref().map_or(0, |g| g.peak)
}

fn most_kept(blocks: usize, limit: u64, without: MemoryPlan, at: impl Fn(usize) -> MemoryPlan) -> MemoryPlan {
    let (mut best, mut above) = (without, blocks + 1);
    while above - best.kept_layers > 1 {
        let middle = at(best.kept_layers + (above - best.kept_layers) / 2);
        if peak(&middle) <= limit { best = middle } else { above = middle.kept_layers }
    }
    best
}

fn with_items(
    demand: &Demand,
    gpu: &GpuDemand,
    choice: MemoryPlan,
    placement: Placement,
    offload_inputs: bool,
) -> MemoryPlan {
    let mut items = fixed(demand, gpu, placement);
    items.extend(buffers(demand, gpu, &choice, placement, offload_inputs));
    items.extend(borrowed(demand, gpu, &choice, placement));
    items.retain(|item| item.bytes > 0);
    let peak = total(&items);
    let pinned = pinned(demand, gpu, &choice, placement, offload_inputs);
    let on_gpu = OnGpu { placement, offload_inputs, items, peak };
    items::host_of_gpu(demand, MemoryPlan { on_gpu: Some(on_gpu), ..choice }, pinned)
}

/// Parameters of the largest block of the adapter, about.
fn largest_block(demand: &Demand) -> u64 {
    let blocks = demand.adapter.blocks(demand.architecture).max(1) as u64;
    demand.adapter.parameters.div_ceil(blocks)
}

fn fixed(demand: &Demand, gpu: &GpuDemand, placement: Placement) -> Vec<Item> {
    let (a, w) = (demand.architecture, &gpu.weights);
    let size = gpu.element.size() as u64;
    let blocks = if placement.streamed { 2 * w.block } else { w.blocks };
    let head = if placement.head_tile.is_some() {
        0
    } else {
        (a.vocab_size * a.hidden) as u64 * size + w.packed_head
    };
    vec![
        item(if placement.streamed { "weights of two blocks" } else { "weights as stored" }, blocks),
        match placement.share_widened {
            false => item("widened weights of a block", w.widened),
            true => item("a widened weight", w.widest),
        },
        item("head", head),
        item("work space of products", gpu.held),
        item("gains of rows", gains(demand)),
        item("norms, biases and rotary tables", w.vectors + a.rope_elements(demand.positions) as u64 * F32),
    ]
}

/// DoRA's two numbers a row, and the products that they come from, of one matrix at a time.
fn gains(demand: &Demand) -> u64 {
    if demand.adapter.magnitudes == 0 {
        return 0;
    }
    let (a, rank) = (demand.architecture, demand.adapter.ranks.into_iter().max().unwrap_or(0));
    let widest = a.modules().iter().map(|m| a.weight_shape(*m).0).max().unwrap_or(0);
    let matrices = (a.layers * a.modules().len()) as u64;
    demand.adapter.magnitudes * 2 * F32 + 2 * matrices * GRAIN + (rank * (widest + rank)) as u64 * F32
}

fn buffers(
    demand: &Demand,
    gpu: &GpuDemand,
    choice: &MemoryPlan,
    placement: Placement,
    offload_inputs: bool,
) -> Vec<Item> {
    let (a, size) = (demand.architecture, gpu.element.size() as u64);
    let (w, blocks) = (items::widths(demand).on_gpu(), demand.adapter.blocks(a));
    let MemoryPlan { steps, reference, .. } = *choice;
    let both = steps.max(reference);
    let of = |rows: usize, width: usize| rows as u64 * width as u64 * size;
    let trained = steps.all.gradient_rows;
    let inputs = if offload_inputs { 2 } else { blocks.max(1) as u64 };
    let work = of(both.largest.part_rows, w.activations() + w.forward_scratch())
        + of(both.largest.rows, w.key_values())
        + of(steps.largest.gradient_rows, w.backward_on_gpu());
    let kept =
        choice.kept_layers as u64 * (of(trained, w.activations()) + of(steps.all.rows, w.key_values()));
    let head = both.all.head_rows
        + both.largest.head_rows
        + steps.all.gradient_entries
        + steps.all.gradient_head_rows;
    let logits = match placement.head_tile {
        None => (choice.head_rows.min(both.largest.entries), a.vocab_size),
        Some(tile) => (rows_of_tiles(choice), tile),
    };
    vec![
        item(
            if offload_inputs {
                "layer inputs of 2 blocks".into()
            } else {
                format!("layer inputs, {blocks} blocks")
            },
            inputs * of(trained, w.hidden),
        ),
        item(format!("kept activations, {} of {blocks} blocks", choice.kept_layers), kept),
        item("streams up and down", of(both.all.rest_rows, w.hidden) + of(trained, w.hidden)),
        item("one block at work", work),
        item("rows of the head", of(head, w.hidden)),
        item(format!("logits of {} rows", logits.0), logits.0 as u64 * logits.1 as u64 * F32),
    ]
}

/// Short-lived memory, whose parts are not in use together: the most of them.
fn borrowed(demand: &Demand, gpu: &GpuDemand, choice: &MemoryPlan, placement: Placement) -> Vec<Item> {
    let (a, size) = (demand.architecture, gpu.element.size() as u64);
    let w = items::widths(demand);
    let MemoryPlan { steps, reference, .. } = *choice;
    let both = steps.max(reference);
    let widest = w.hidden.max(w.queries).max(w.intermediate) as u64;
    let rows = both.largest.part_rows as u64;
    let segment = |rows: usize| gpu.longest.min(rows);
    let scores = |rows: usize, keys: usize, back: bool| {
        attention::scratch_bytes(a.shape, gpu.element, (segment(rows), segment(rows), keys), back) as u64
    };
    let attention = scores(both.largest.part_rows, both.largest.rows, false).max(scores(
        steps.largest.gradient_rows,
        steps.largest.gradient_rows,
        true,
    ));
    let head = match placement.head_tile {
        None => {
            let trained = choice.head_rows.min(steps.largest.gradient_entries) as u64;
            let picked = choice.head_rows.min(both.largest.entries) as u64;
            trained * a.vocab_size as u64 * size + picked * w.hidden as u64 * size
        }
        Some(tile) => {
            let trained = choice.head_rows.min(steps.all.gradient_entries) as u64;
            let picked = rows_of_tiles(choice) as u64;
            let statistics = (a.vocab_size.div_ceil(tile) as u64 + 1) * picked * 4 * F32;
            let of_trained = tile as u64 * size + w.hidden as u64 * F32;
            let weights = products::tile_bytes(tile, a.hidden, gpu.element) as u64;
            picked * 2 * w.hidden as u64 * size + trained * of_trained + weights + statistics
        }
    };
    // Of the last block only the selected rows get past keys and values: copies of both.
    let selected = both.largest.head_rows as u64 * (w.hidden + w.queries) as u64 * size;
    // Masked inputs and gradients; with DoRA also what comes past the gains of up to three layers, and its making.
    let copies = if demand.adapter.magnitudes > 0 { 6 } else { 2 };
    let dropped = if gpu.dropout { copies * rows * widest * size } else { 0 };
    vec![
        item("adapter", demand.adapter.parameters * size),
        item("gradients of two blocks", 2 * largest_block(demand) * F32),
        item("attention scores and the head's gradient", attention + head),
        item("rows picked, dropped and named", selected + dropped + rows * 16),
    ]
}

/// Rows of a chunk of a head in tiles: trained ones of all packs, then the others.
fn rows_of_tiles(choice: &MemoryPlan) -> usize {
    let both = choice.steps.max(choice.reference);
    choice.head_rows.min(both.all.gradient_entries.max(both.all.rest_entries))
}

fn pinned(
    demand: &Demand,
    gpu: &GpuDemand,
    choice: &MemoryPlan,
    placement: Placement,
    offload_inputs: bool,
) -> Vec<Item> {
    let a = demand.architecture;
    let blocks = demand.adapter.blocks(a) as u64;
    let inputs = (choice.steps.all.gradient_rows * a.hidden * gpu.element.size()) as u64;
    vec![
        item(
            "page-locked: weights of two blocks",
            if placement.streamed { 2 * gpu.weights.block } else { 0 },
        ),
        item("page-locked: layer inputs", if offload_inputs { blocks * inputs } else { 0 }),
        item("page-locked: gradients", demand.adapter.parameters * F32),
    ]
}
