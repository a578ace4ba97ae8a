//! Causal attention over packs with shared prompts, forward and backward.
//!
//! A query row sees a prefix (its prompt) whole and its own segment up to itself. Scores exist for a block of queries against a tile
//! of keys only (after FlashAttention, arXiv 2205.14135), so they stay in the second cache and memory does not grow with the keys. The
//! query heads of one key-value head are stacked, so that its keys and values are packed once for all of them.

mod block;
mod layout;
mod softmax;
mod tiles;

pub use layout::{AttentionLayout, HeadShape, ScoreRule, Segment};
pub(crate) use softmax::cap;

use crate::{
    gemm::with_scratch,
    parallel::{Shared, each, for_rows},
    real::Real,
    tensor::{apart, read, same_type, with_type, write},
};
use block::{Heads, Outputs, Sums};
use candle_core::{Result, Tensor, bail};
use layout::check;
use tiles::{blocks, shares};

/// What attention reads.
#[derive(Clone, Copy)]
pub struct AttentionInputs<'a> {
    /// (Tq, H·D)
    pub q: &'a Tensor,
    /// (Tk, Hkv·D)
    pub k: &'a Tensor,
    /// (Tk, Hkv·D)
    pub v: &'a Tensor,
    /// Which queries see which keys.
    pub layout: &'a AttentionLayout,
    /// Sizes of the heads.
    pub shape: HeadShape,
    /// How scores are made.
    pub rule: ScoreRule,
}

/// What attention writes, and its way back reads again.
#[derive(Clone, Copy)]
pub struct AttentionOutputs<'a> {
    /// (Tq, H·D)
    pub out: &'a Tensor,
    /// Largest score of a row and 1/Σe^(score − largest), by head: (Tq, 2·H).
    pub stats: &'a Tensor,
}

/// Writes the attention output. Rows that no segment names are left alone.
/// Formula: `softmax(cap(scale·q·kᵀ) + mask)·v` per head; query head h uses key-value head h / (H/Hkv).
pub fn attention(outputs: AttentionOutputs, inputs: AttentionInputs) -> Result<()> {
    let AttentionInputs { q, k, v, layout, shape, rule } = inputs;
    check(q, k, v, layout, shape)?;
    check_outputs(outputs, inputs)?;
    for operand in [q, k, v] {
        apart(outputs.out, operand)?;
        apart(outputs.stats, operand)?;
    }
    apart(outputs.out, outputs.stats)?;
    with_type!(q, T => {
        let (rq, rk, rv) = (read(q), read(k), read(v));
        let heads = Heads::<T> { q: rq.slice()?, k: rk.slice()?, v: rv.slice()?, shape, rule };
        let tasks: Vec<(Segment, usize)> = layout
            .segments
            .iter()
            .flat_map(|s| blocks(s, shape).flat_map(move |b| (0..shape.kv_heads).map(move |j| (b, j))))
            .collect();
        write::<T>(outputs.out, |out| {
            let out = Shared(out.as_mut_ptr());
            write::<T>(outputs.stats, |stats| {
                let targets = Outputs { out, stats: Shared(stats.as_mut_ptr()) };
                // Each task writes the rows of its block in the columns of its heads: no two overlap.
                each(tasks.len(), true, |task| heads.forward(&tasks[task].0, tasks[task].1, targets));
                Ok(())
            })
        })
    })
}

/// Gradients of q (Tq, H·D), k and v (Tk, Hkv·D).
#[derive(Clone, Copy)]
pub struct AttentionGradients<'a> {
    /// Of the queries.
    pub dq: &'a Tensor,
    /// Of the keys.
    pub dk: &'a Tensor,
    /// Of the values.
    pub dv: &'a Tensor,
}

/// Tasks that a backward pass is cut into at least, where there are so many blocks: threads that share few heads would wait for each
/// other. A constant, because sums over queries are cut with it.
const TASKS: usize = 16;
/// Parts of a group at most; each has sums of its own, as large as the gradients of keys and values.
pub const ATTENTION_PARTS: usize = 4;

/// Returns the elements that a thread holds while it works on attention.
pub fn attention_scratch(shape: HeadShape) -> usize {
    block::scratch(tiles::block_queries(shape) * shape.heads / shape.kv_heads, shape.dim)
}

/// Writes the gradients for the gradient `dout` (Tq, H·D) of the output; `outputs` are those of [`attention`] for the same inputs.
/// Keys that no query sees get zero; rows of dq that no segment names are left alone.
/// Formula, with probabilities P and `dP = dout·vᵀ`: `dS = scale·P∘(dP − rowsum(dout∘out))·(1 − tanh²); dq = dS·k; dk = dSᵀ·q; dv = Pᵀ·dout`.
pub fn attention_backward(
    gradients: AttentionGradients,
    dout: &Tensor,
    outputs: AttentionOutputs,
    inputs: AttentionInputs,
) -> Result<()> {
    let AttentionInputs { q, k, v, layout, shape, rule } = inputs;
    let (_, tk) = check(q, k, v, layout, shape)?;
    check_outputs(outputs, inputs)?;
    let AttentionGradients { dq, dk, dv } = gradients;
    for (a, b) in [(dout, q), (dq, q), (dk, k), (dv, v)] {
        same_shape(a, b)?;
    }
    let operands = [dout, q, k, v, outputs.out, outputs.stats];
    for (i, gradient) in [dq, dk, dv].into_iter().enumerate() {
        for other in operands.into_iter().chain([dq, dk, dv].into_iter().skip(i + 1)) {
            apart(gradient, other)?;
        }
    }
    // A task owns one key-value head of one part of a group: its query heads are nobody else's, and inside it the order of
    // the sums is fixed.
    let parts = (TASKS / (layout.groups.len() * shape.kv_heads).max(1)).clamp(1, ATTENTION_PARTS);
    let mut tasks = Vec::new();
    for group in &layout.groups {
        let blocks: Vec<Segment> =
            layout.segments[group.clone()].iter().flat_map(|s| blocks(s, shape)).collect();
        for (part, range) in shares(&blocks, parts).into_iter().enumerate() {
            tasks.extend((0..shape.kv_heads).map(|j| (part, j, blocks[range.clone()].to_vec())));
        }
    }
    with_type!(q, T => {
        let (rq, rk, rv) = (read(q), read(k), read(v));
        let (rd, ro, rs) = (read(dout), read(outputs.out), read(outputs.stats));
        let heads = Heads::<T> { q: rq.slice()?, k: rk.slice()?, v: rv.slice()?, shape, rule };
        let (dout, out, stats) = (rd.slice::<T>()?, ro.slice::<T>()?, rs.slice::<T>()?);
        // Sums over queries are kept transposed, (Hkv·D, Tk): the products that add to them then read P and dS by rows.
        let columns = shape.kv_heads * shape.dim;
        let size = columns * tk;
        with_scratch(2 * parts * size, |memory: &mut [T]| {
            memory.fill(T::ZERO);
            let (dkt, dvt) = memory.split_at_mut(parts * size);
            let (dkt_at, dvt_at) = (Shared(dkt.as_mut_ptr()), Shared(dvt.as_mut_ptr()));
            write::<T>(dq, |dq| {
                let dq = Shared(dq.as_mut_ptr());
                each(tasks.len(), true, |task| {
                    let (part, j, blocks) = &tasks[task];
                    let at = |sums: Shared<T>| Shared(sums.at(part * size + j * shape.dim * tk));
                    let sums = Sums { dq, dkt: at(dkt_at), dvt: at(dvt_at), tk };
                    for block in blocks {
                        heads.backward(block, *j, block::Known { dout, out, stats }, sums);
                    }
                });
                Ok(())
            })?;
            write::<T>(dk, |dk| { sum_transposed(dkt, columns, tk, dk); Ok(()) })?;
            write::<T>(dv, |dv| { sum_transposed(dvt, columns, tk, dv); Ok(()) })
        })
    })
}

fn check_outputs(outputs: AttentionOutputs, inputs: AttentionInputs) -> Result<()> {
    same_shape(outputs.out, inputs.q)?;
    same_type(outputs.stats, inputs.q)?;
    let expected = (inputs.q.dims2()?.0, 2 * inputs.shape.heads);
    if outputs.stats.dims2()? != expected {
        bail!("attention: stats {:?}, expected {expected:?}", outputs.stats.shape());
    }
    Ok(())
}

fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    same_type(a, b)?;
    if a.dims2()? != b.dims2()? {
        bail!("attention: shapes {:?} and {:?}", a.shape(), b.shape());
    }
    Ok(())
}

/// Writes the sum of the (columns, rows) matrices in `parts` as (rows, columns).
fn sum_transposed<T: Real>(parts: &[T], columns: usize, rows: usize, to: &mut [T]) {
    for_rows(to, columns * 16, |block, to| {
        for c in 0..columns {
            for (p, part) in parts.chunks(columns * rows).enumerate() {
                let source = &part[c * rows + block * 16..];
                for (row, v) in to.chunks_mut(columns).zip(source) {
                    row[c] = if p == 0 { *v } else { row[c] + *v };
                }
            }
        }
    });
}
