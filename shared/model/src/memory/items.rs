//! The arithmetic of the plan: what each part of a run holds when a batch is at its largest.

use super::{BatchShape, Demand, Item, MemoryPlan, Moments};
use crate::buffers::Widths;
use kto_kernels::attention_scratch;

const F32: u64 = 4;
const MIB: u64 = 1 << 20;

/// Code and heap of the program itself: measured on a model of no size.
const PROGRAM: u64 = 8 * MIB;
/// Packed panels of a matrix product, which all threads share (`kto_kernels`, gemm), and what a thread has of its own; less when
/// the largest weight is smaller.
const SHARED_PANELS: u64 = 4 * MIB;
const THREAD_PANELS: u64 = MIB / 2;
/// A part of the buffers that is lost at the ends of their pages and by small vectors of a step: measured, on the safe side.
const HOLES: u64 = 128;

/// Returns a plan of nothing.
pub(super) fn empty() -> MemoryPlan {
    MemoryPlan {
        kept_layers: 0,
        pack_rows: 0,
        head_rows: 0,
        reference_rows: 0,
        stream: false,
        steps: BatchShape::default(),
        reference: BatchShape::default(),
        on_gpu: None,
        items: Vec::new(),
        peak: 0,
    }
}

/// Returns `choice` with the items of a run whose batches are at most `steps` and `reference`.
pub(super) fn with_items(
    demand: &Demand,
    choice: MemoryPlan,
    steps: BatchShape,
    reference: BatchShape,
) -> MemoryPlan {
    let mut items = fixed(demand, choice.stream, steps.all.gradient_rows);
    let buffers = buffers(demand, &choice, steps, reference);
    let holes = total(&buffers) / HOLES;
    items.extend(buffers);
    items.push(item("holes between buffers", holes));
    // The whole embedding is read once, to be checked, before there is anything else.
    let early = demand.weights.embedding + PROGRAM + demand.token_bytes;
    let later = total(&items);
    items.push(item("embedding while it is checked", early.saturating_sub(later)));
    items.retain(|item| item.bytes > 0);
    let peak = total(&items);
    MemoryPlan { steps, reference, peak, items, ..choice }
}

pub(super) fn total(items: &[Item]) -> u64 {
    items.iter().map(|item| item.bytes).fold(0, u64::saturating_add)
}

pub(super) fn item(name: impl Into<String>, bytes: u64) -> Item {
    Item { name: name.into(), bytes }
}

/// Returns a plan for a GPU with what the host holds: page-locked memory, the trained part, the tokens.
pub(super) fn host_of_gpu(demand: &Demand, plan: MemoryPlan, pinned: Vec<Item>) -> MemoryPlan {
    let mut items = fixed(demand, true, usize::MAX);
    // The driver, cuBLAS and what they keep for a context: a figure of experience.
    items.push(item("driver", 512 * MIB));
    items.extend(pinned);
    items.retain(|item| item.bytes > 0);
    let peak = total(&items);
    MemoryPlan { items, peak, ..plan }
}

/// What a step's gradient of an embedding has in memory: it begins as zeros that nobody has written, and the step's `rows` of tokens write
/// to the pages of theirs.
fn embedding_gradient(demand: &Demand, rows: usize) -> u64 {
    const PAGE: u64 = 4096;
    let row = (demand.architecture.hidden as u64 * F32).div_ceil(PAGE) + 1;
    let all = demand.adapter.whole_embedding.saturating_mul(F32);
    (rows as u64).saturating_mul(row * PAGE).min(all)
}

/// What depends on nothing of the batches but the rows that a step trains on.
fn fixed(demand: &Demand, stream: bool, rows: usize) -> Vec<Item> {
    let a = demand.architecture;
    let parameters = demand.adapter.parameters.saturating_mul(F32);
    let (whole, copies) = (demand.adapter.whole.saturating_mul(F32), if demand.adapter_copy { 2 } else { 1 });
    let norms = ((2 * a.layers + 1) * a.hidden) as u64 * F32 * if a.norm_bias { 2 } else { 1 };
    let rope = a.rope_elements(demand.positions) as u64 * F32;
    let weight = (a.hidden * a.vocab_size.max(a.intermediate)) as u64 * F32;
    let weights = if stream { "weights, one block at a time" } else { "weights as stored" };
    vec![
        item(weights, demand.weights.resident(stream)),
        item("adapter", parameters.saturating_sub(whole).saturating_mul(copies)),
        item("modules trained whole", whole.saturating_mul(copies)),
        item(
            "gradients",
            parameters.saturating_sub(demand.adapter.whole_embedding.saturating_mul(F32))
                + embedding_gradient(demand, rows),
        ),
        match demand.moments {
            Moments::F32 => item("AdamW moments", parameters.saturating_mul(2)),
            Moments::Bits8 => item("AdamW moments in 8 bits", demand.adapter.moments8),
        },
        // Squared lengths of the base's rows in f64, and two numbers of each in a sweep.
        item("lengths of rows", demand.adapter.magnitudes * (8 + 2 * F32)),
        item("norms and rotary tables", norms + rope),
        item("tokens", demand.token_bytes),
        item(
            "matrix-product panels",
            SHARED_PANELS.min(weight) + demand.threads as u64 * THREAD_PANELS.min(weight),
        ),
        item("program", PROGRAM),
    ]
}

/// The widths of a workspace with the adapter.
pub(super) fn widths(demand: &Demand) -> Widths {
    let w = Widths::with_ranks(demand.architecture, demand.adapter.ranks);
    if demand.adapter.magnitudes > 0 { w.with_gains() } else { w }
}

/// The buffers of `Workspace::reserve`, each as large as the batch that needs most of it.
fn buffers(demand: &Demand, choice: &MemoryPlan, steps: BatchShape, reference: BatchShape) -> Vec<Item> {
    let a = demand.architecture;
    let (w, blocks) = (widths(demand), demand.adapter.blocks(a));
    let both = steps.max(reference);
    let of = |rows: usize, width: usize| rows as u64 * width as u64 * F32;
    let trained = steps.all.gradient_rows;
    let work = of(both.largest.part_rows, w.activations() + w.forward_scratch())
        + of(both.largest.rows, w.key_values())
        + of(steps.largest.gradient_rows, w.backward_scratch());
    // Of the last block only the head rows get past keys and values.
    let key_values = choice.kept_layers as u64 * of(steps.all.rows, w.key_values());
    let kept = match choice.kept_layers as u64 {
        0 => 0,
        n => (n - 1) * of(trained, w.activations()) + of(steps.all.gradient_head_rows, w.activations()),
    };
    let head_rows = choice.head_rows.min(both.largest.entries);
    let head = both.all.head_rows
        + both.largest.head_rows
        + steps.all.gradient_entries
        + steps.all.gradient_head_rows
        + head_rows;
    let scores = demand.threads as u64 * of(attention_scratch(a.shape), 1);
    vec![
        item(format!("layer inputs, {blocks} blocks"), blocks as u64 * of(trained, w.hidden)),
        item(format!("kept activations, {} of {blocks} blocks", choice.kept_layers), kept + key_values),
        item("streams up and down", of(both.all.rest_rows, w.hidden) + of(trained, w.hidden)),
        item("one block at work", work),
        item("attention scores", scores),
        item("rows of the head", of(head, w.hidden)),
        item(
            format!("logits of {head_rows} rows"),
            // Those that a cap has changed are kept beside their gradient.
            of(head_rows, a.vocab_size) * if a.logit_cap.is_some() { 2 } else { 1 },
        ),
    ]
}
