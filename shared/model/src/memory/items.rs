//! The arithmetic of the plan: what each part of a run holds when a batch is at its largest.

use super::{BatchShape, Demand, Item, MemoryPlan, widths};

const F32: u64 = 4;
const MIB: u64 = 1 << 20;

/// Code and heap of the program itself: measured on a model of no size.
const PROGRAM: u64 = 16 * MIB;
/// Panels of a matrix product that all threads share, and those of one thread.
const SHARED_PANELS: u64 = 16 * MIB;
const THREAD_PANELS: u64 = MIB;
/// Stacked query rows of a block of attention (`kto_kernels::attention`), whose scores a thread holds twice in a backward pass.
const ATTENTION_ROWS: u64 = 192;

/// Returns a plan of nothing.
pub(super) fn empty() -> MemoryPlan {
    MemoryPlan {
        kept_layers: 0,
        pack_rows: 0,
        head_rows: 0,
        reference_rows: 0,
        stream: false,
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
    let all = fixed(demand, choice.stream).into_iter().chain(buffers(demand, &choice, steps, reference));
    let items: Vec<Item> = all.filter(|item| item.bytes > 0).collect();
    let peak = items.iter().map(|item| item.bytes).fold(0, u64::saturating_add);
    MemoryPlan { peak, items, ..choice }
}

fn item(name: impl Into<String>, bytes: u64) -> Item {
    Item { name: name.into(), bytes }
}

/// What does not depend on the batches.
fn fixed(demand: &Demand, stream: bool) -> Vec<Item> {
    let a = demand.architecture;
    let parameters = demand.adapter.parameters.saturating_mul(F32);
    let norms = ((2 * a.layers + 1) * a.hidden) as u64 * F32;
    let rope = (demand.positions * a.shape.dim) as u64 * F32;
    let weights = if stream { "weights, two blocks at a time" } else { "weights as stored" };
    vec![
        item(weights, demand.weights.resident(stream)),
        item("adapter", parameters.saturating_mul(if demand.adapter_copy { 2 } else { 1 })),
        item("gradients", parameters),
        item("AdamW moments", parameters.saturating_mul(2)),
        item("norms and rotary tables", norms + rope),
        item("tokens", demand.token_bytes),
        item("matrix-product panels", SHARED_PANELS + demand.threads as u64 * THREAD_PANELS),
        item("program", PROGRAM),
    ]
}

/// The buffers of `Workspace::reserve`, each as large as the batch that needs most of it.
fn buffers(demand: &Demand, choice: &MemoryPlan, steps: BatchShape, reference: BatchShape) -> Vec<Item> {
    let (a, w) = (demand.architecture, widths(demand.architecture));
    let (lora, blocks) = (demand.adapter.width, demand.adapter.blocks(a));
    let both = steps.max(reference);
    let of = |rows: usize, width: usize| rows as u64 * width as u64 * F32;
    let trained = steps.all.gradient_rows;
    let work = of(both.largest.part_rows, w.activations(lora) + w.forward())
        + of(both.largest.rows, w.key_values())
        + of(steps.largest.gradient_rows, w.backward(lora));
    let kept = of(trained, w.activations(lora)) + of(steps.all.rows, w.key_values());
    let head_rows = choice.head_rows.min(both.largest.entries);
    let head = both.all.head_rows
        + both.largest.head_rows
        + steps.all.gradient_entries
        + steps.all.gradient_head_rows;
    let scores = demand.threads as u64 * ATTENTION_ROWS * 2 * of(both.largest.keys, 1);
    vec![
        item(format!("layer inputs of {blocks} blocks"), blocks as u64 * of(trained, w.hidden)),
        item(format!("kept activations of {} blocks", choice.kept_layers), choice.kept_layers as u64 * kept),
        item("streams up and down", of(both.all.rest_rows, w.hidden) + of(trained, w.hidden)),
        item("one block at work", work),
        item("attention scores", scores),
        item("rows of the head", of(head, w.hidden)),
        item(format!("logits of {head_rows} rows"), of(head_rows, a.vocab_size)),
    ]
}
