//! The arithmetic of the plan: what each part of a run holds when a batch is at its largest.

use super::{BatchShape, Demand, Item, MemoryPlan, widths};

const F32: u64 = 4;
const MIB: u64 = 1 << 20;

/// Code and heap of the program itself: measured on a model of no size.
const PROGRAM: u64 = 16 * MIB;
/// Panels of a matrix product that all threads share, and those of one thread.
const SHARED_PANELS: u64 = 16 * MIB;
const THREAD_PANELS: u64 = MIB;
/// Queries of a block of attention (`kto_kernels::attention`), whose scores a thread holds twice in the backward pass.
const ATTENTION_QUERIES: u64 = 64;

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

/// Returns `choice` with the items of the batch that needs most.
pub(super) fn largest(
    demand: &Demand,
    choice: MemoryPlan,
    steps: &[BatchShape],
    reference: &[BatchShape],
) -> MemoryPlan {
    let fixed = fixed(demand, &choice);
    let most = |batches: &[BatchShape], of: &dyn Fn(&BatchShape) -> Vec<Item>| {
        batches.iter().map(of).max_by_key(|items| total(items)).unwrap_or_default()
    };
    let step = most(steps, &|b| step(demand, &choice, b));
    let reference = most(reference, &|b| forward(demand, &choice, b));
    let batch = if total(&reference) > total(&step) { reference } else { step };
    let items: Vec<Item> = fixed.into_iter().chain(batch).filter(|item| item.bytes > 0).collect();
    MemoryPlan { peak: total(&items), items, ..choice }
}

fn total(items: &[Item]) -> u64 {
    items.iter().map(|item| item.bytes).fold(0, u64::saturating_add)
}

fn item(name: impl Into<String>, bytes: u64) -> Item {
    Item { name: name.into(), bytes }
}

/// What is there during the whole run.
fn fixed(demand: &Demand, choice: &MemoryPlan) -> Vec<Item> {
    let a = demand.architecture;
    let parameters = demand.adapter.parameters.saturating_mul(F32);
    let norms = ((2 * a.layers + 1) * a.hidden) as u64 * F32;
    let rope = (demand.positions * a.shape.dim) as u64 * F32;
    let threads = demand.threads as u64;
    let weights = if choice.stream { "weights, two blocks at a time" } else { "weights as stored" };
    vec![
        item(weights, demand.weights.resident(choice.stream)),
        item("adapter", parameters * if demand.adapter_copy { 2 } else { 1 }),
        item("gradients", parameters),
        item("AdamW moments", 2 * parameters),
        item("norms and rotary tables", norms + rope),
        item("tokens", demand.token_bytes),
        item("matrix-product panels", SHARED_PANELS + threads * THREAD_PANELS),
        item("program", PROGRAM),
    ]
}

/// What a step holds on top.
fn step(demand: &Demand, choice: &MemoryPlan, batch: &BatchShape) -> Vec<Item> {
    let w = widths(demand.architecture);
    let blocks = demand.adapter.blocks(demand.architecture);
    let (gradient, all) = (batch.all.gradient_rows as u64, batch.all.rows as u64);
    let row = |width: usize| width as u64 * F32;
    let kept = choice.kept_layers as u64 * gradient * row(w.kept(demand.adapter.width));
    let mut items = vec![
        item(format!("layer inputs of {blocks} blocks"), blocks as u64 * gradient * row(w.hidden)),
        item(format!("kept activations of {} blocks", choice.kept_layers), kept),
        // The gradient rows of the stream going up are the next layer's input; coming down they are a gradient.
        item("residual stream", all * row(w.hidden)),
    ];
    items.extend(at_work(demand, choice, batch));
    items
}

/// What a sweep without gradient holds.
fn forward(demand: &Demand, choice: &MemoryPlan, batch: &BatchShape) -> Vec<Item> {
    let stream = batch.all.rows as u64 * widths(demand.architecture).hidden as u64 * F32;
    let mut items = vec![item("residual stream of the reference pass", stream)];
    items.extend(at_work(demand, choice, batch));
    items
}

/// The block and the head at work.
fn at_work(demand: &Demand, choice: &MemoryPlan, batch: &BatchShape) -> Vec<Item> {
    let (a, w) = (demand.architecture, widths(demand.architecture));
    let workspace = batch.largest.rows as u64 * w.workspace() as u64 * F32;
    let head_rows = choice.head_rows.min(batch.largest.entries) as u64;
    let logits = head_rows * a.vocab_size as u64 * F32;
    let unit = batch.all.gradient_entries as u64 * w.hidden as u64 * F32;
    let scores = demand.threads as u64 * 2 * ATTENTION_QUERIES * batch.largest.keys as u64 * F32;
    vec![
        item("one block's workspace", workspace),
        item(format!("logits of {head_rows} rows"), logits),
        item("unit gradients of the head", unit),
        item("attention scores", scores),
    ]
}
