//! Causal attention over packs with shared prompts, forward and backward, in query blocks.
//!
//! A query row sees a prefix (its prompt) whole and its own segment up to itself. Scores of a block of queries against its keys
//! are the only large buffer (block × keys), so memory never grows with T². The query heads of one key-value head are stacked,
//! so that its keys and values are packed once for all of them.

mod layout;

pub use layout::{AttentionLayout, HeadShape, Segment};

use crate::{
    gemm::{Right, Start, Target, Term, product, with_scratch},
    parallel::{Shared, each, for_rows},
    real::{Operand, Real},
    simd::simd,
    tensor::{apart, read, same_type, with_type, write},
};
use candle_core::{Result, Tensor, bail};
use layout::check;
use std::ops::Range;

/// Writes the attention output to `out`. Shapes: q and out (Tq, H·D), k and v (Tk, Hkv·D).
/// Formula: `softmax(q·kᵀ/√D + mask)·v` per head; query head h uses key-value head h / (H/Hkv).
/// Rows of `out` that no segment names are left alone.
pub fn attention(
    out: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    shape: HeadShape,
) -> Result<()> {
    check(q, k, v, layout, shape)?;
    same_shape(out, q)?;
    for operand in [q, k, v] {
        apart(out, operand)?;
    }
    with_type!(q, T => {
        let (rq, rk, rv) = (read(q), read(k), read(v));
        let heads = Heads::<T> { q: rq.slice()?, k: rk.slice()?, v: rv.slice()?, shape };
        let tasks: Vec<(Segment, usize)> = layout
            .segments
            .iter()
            .flat_map(|s| blocks(s, shape).flat_map(move |b| (0..shape.kv_heads).map(move |j| (b, j))))
            .collect();
        write::<T>(out, |out| {
            let target = Shared(out.as_mut_ptr());
            // Each task writes the rows of its block in the columns of its heads: no two overlap.
            each(tasks.len(), true, |task| {
                let (block, j) = &tasks[task];
                heads.with_buffers(block, |buffers| {
                    heads.probabilities(block, *j, buffers);
                    heads.outputs(block, *j, buffers, target);
                });
            });
            Ok(())
        })
    })
}

/// Gradients of q (Tq, H·D), k and v (Tk, Hkv·D).
pub struct AttentionGradients<'a> {
    /// Of the queries.
    pub dq: &'a Tensor,
    /// Of the keys.
    pub dk: &'a Tensor,
    /// Of the values.
    pub dv: &'a Tensor,
}

/// Writes the gradients for the gradient `dout` of the output. Shapes as in [`attention`].
/// Keys that no query sees get zero; rows of dq that no segment names are left alone.
/// Formula, with probabilities P and `dP = dout·vᵀ`: `dS = P∘(dP − rowsum(dP∘P))/√D; dq = dS·k; dk = dSᵀ·q; dv = Pᵀ·dout`.
pub fn attention_backward(
    gradients: &AttentionGradients,
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    shape: HeadShape,
) -> Result<()> {
    let (_, tk) = check(q, k, v, layout, shape)?;
    let AttentionGradients { dq, dk, dv } = *gradients;
    for (a, b) in [(dout, q), (dq, q), (dk, k), (dv, v)] {
        same_shape(a, b)?;
    }
    for (i, gradient) in [dq, dk, dv].into_iter().enumerate() {
        for other in [dout, q, k, v].into_iter().chain([dq, dk, dv].into_iter().skip(i + 1)) {
            apart(gradient, other)?;
        }
    }
    with_type!(q, T => {
        let (rd, rq, rk, rv) = (read(dout), read(q), read(k), read(v));
        let heads = Heads::<T> { q: rq.slice()?, k: rk.slice()?, v: rv.slice()?, shape };
        let dout = rd.slice::<T>()?;
        let tasks: Vec<(Range<usize>, usize)> =
            layout.groups.iter().flat_map(|g| (0..shape.kv_heads).map(move |j| (g.clone(), j))).collect();
        // Sums over queries are kept transposed, (Hkv·D, Tk): the products that add to them then read P and dS by rows.
        let columns = shape.kv_heads * shape.dim;
        let (mut dkt, mut dvt) = (vec![T::ZERO; columns * tk], vec![T::ZERO; columns * tk]);
        let (dkt_at, dvt_at) = (Shared(dkt.as_mut_ptr()), Shared(dvt.as_mut_ptr()));
        write::<T>(dq, |dq| {
            let sums = Sums { dq: Shared(dq.as_mut_ptr()), dkt: dkt_at, dvt: dvt_at, tk };
            // A task owns one key-value head of one group: its keys, values and query heads are nobody else's,
            // and inside it the order of the sums is fixed.
            each(tasks.len(), true, |task| {
                let (group, j) = &tasks[task];
                for block in layout.segments[group.clone()].iter().flat_map(|s| blocks(s, shape)) {
                    heads.with_buffers(&block, |buffers| {
                        heads.probabilities(&block, *j, buffers);
                        heads.backward(&block, *j, buffers, dout, sums);
                    });
                }
            });
            Ok(())
        })?;
        write::<T>(dk, |dk| { transpose(&dkt, columns, tk, dk); Ok(()) })?;
        write::<T>(dv, |dv| { transpose(&dvt, columns, tk, dv); Ok(()) })
    })
}

fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    same_type(a, b)?;
    if a.dims2()? != b.dims2()? {
        bail!("attention: shapes {:?} and {:?}", a.shape(), b.shape());
    }
    Ok(())
}

/// Rows of stacked query heads in one block, about: enough to pay for packing the keys, few enough to waste little above
/// the causal diagonal.
const STACKED: usize = 192;

/// Cuts a segment into blocks of queries.
fn blocks(s: &Segment, shape: HeadShape) -> impl Iterator<Item = Segment> + use<> {
    let s = *s;
    let most = (STACKED * shape.kv_heads / shape.heads).clamp(32, STACKED);
    (0..s.queries).step_by(most).map(move |at| Segment {
        query: s.query + at,
        queries: most.min(s.queries - at),
        offset: s.offset + at,
        ..s
    })
}

/// Where the backward pass adds up: rows of dq by block, columns of the transposed dk and dv by group.
#[derive(Clone, Copy)]
struct Sums<T> {
    dq: Shared<T>,
    dkt: Shared<T>,
    dvt: Shared<T>,
    tk: usize,
}

/// The memory of a block at work, with arbitrary contents at first. Rows are its stacked (head, query) pairs.
struct Buffers<'a, T> {
    /// (rows, D): queries times 1/√D.
    q: &'a mut [T],
    /// (rows, D): gradient of the output, later of the queries; in the forward pass the output.
    o: &'a mut [T],
    /// (rows, padded keys)
    p: &'a mut [T],
    /// (rows, padded keys)
    ds: &'a mut [T],
}

struct Heads<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    shape: HeadShape,
}

impl<T: Real> Heads<'_, T> {
    /// Query heads of one key-value head.
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn scale(&self) -> T {
        T::of(1.0 / (self.shape.dim as f64).sqrt())
    }

    /// Calls `f` with this thread's memory for a block: that of a new task would be fresh pages.
    fn with_buffers(&self, b: &Segment, f: impl FnOnce(&mut Buffers<T>)) {
        let rows = b.queries * self.group();
        let (narrow, wide) = (rows * self.shape.dim, rows * padded(b.keys()));
        with_scratch(2 * (narrow + wide), |memory: &mut [T]| {
            let (q, memory) = memory.split_at_mut(narrow);
            let (o, memory) = memory.split_at_mut(narrow);
            let (p, ds) = memory.split_at_mut(wide);
            f(&mut Buffers { q, o, p, ds });
        });
    }

    /// Returns head `j` of the rows from `first` of keys or values.
    fn kv(&self, data: &[T], first: usize, j: usize) -> Operand<T> {
        let row = self.shape.kv_heads * self.shape.dim;
        Operand { at: data[first * row + j * self.shape.dim..].as_ptr(), row: row as isize, column: 1 }
    }

    /// Returns where the stacked row `r` of a block lies in a (Tq, H·D) matrix.
    fn place(&self, b: &Segment, j: usize, r: usize) -> usize {
        let head = j * self.group() + r / b.queries;
        ((b.query + r % b.queries) * self.shape.heads + head) * self.shape.dim
    }

    /// Copies the block's rows of a (Tq, H·D) matrix, times `factor`.
    fn stack(&self, b: &Segment, j: usize, data: &[T], factor: T, out: &mut [T]) {
        for (r, row) in out.chunks_mut(self.shape.dim).enumerate() {
            row.iter_mut().zip(&data[self.place(b, j, r)..]).for_each(|(to, v)| *to = *v * factor);
        }
    }

    /// Fills `q` and writes the softmax of the block's scores into `p`; masked places are zero.
    fn probabilities(&self, b: &Segment, j: usize, buffers: &mut Buffers<T>) {
        self.stack(b, j, self.q, self.scale(), buffers.q);
        self.against(b, j, buffers.q, self.k, buffers.p);
        for (r, row) in buffers.p.chunks_mut(padded(b.keys())).enumerate() {
            softmax(row, b.prefix_len + b.offset + r % b.queries + 1);
        }
    }

    /// `out = x · dataᵀ` over both runs of keys. Shapes: x (rows, D), out (rows, padded keys).
    fn against(&self, b: &Segment, j: usize, x: &[T], data: &[T], out: &mut [T]) {
        let (rows, row, dim) = (x.len() / self.shape.dim, padded(b.keys()), self.shape.dim);
        for (first, n, column) in b.runs() {
            if n > 0 {
                let term = Term {
                    a: row_major(x, dim),
                    b: Right::Matrix(self.kv(data, first, j).transposed()),
                    k: dim,
                    scale: T::ONE,
                };
                let target = Target { at: out[column..].as_mut_ptr(), row, column: 1 };
                // SAFETY: `check` proved that the block's rows and runs lie inside the tensors; `out` has that many rows.
                unsafe { product(target, rows, n, Start::Zero, &[term], false) }
            }
        }
    }

    /// `o = p · data` over both runs of keys. Shapes: p (rows, padded keys), o (rows, D).
    fn weighted(&self, b: &Segment, j: usize, p: &[T], data: &[T], o: &mut [T]) {
        let (row, dim) = (padded(b.keys()), self.shape.dim);
        let rows = p.len() / row;
        let term = |(first, n, column): (usize, usize, usize)| Term {
            a: row_major(&p[column..], row),
            b: Right::Matrix(self.kv(data, first, j)),
            k: n,
            scale: T::ONE,
        };
        let [prefix, own] = b.runs();
        let (both, target) = ([term(prefix), term(own)], Target { at: o.as_mut_ptr(), row: dim, column: 1 });
        let terms = if prefix.1 > 0 { &both[..] } else { &both[1..] };
        // SAFETY: as in `against`; `o` has rows × D elements.
        unsafe { product(target, rows, dim, Start::Zero, terms, false) }
    }

    /// Writes `p · v` to the block's rows and heads of `out`.
    fn outputs(&self, b: &Segment, j: usize, buffers: &mut Buffers<T>, out: Shared<T>) {
        self.weighted(b, j, buffers.p, self.v, buffers.o);
        self.unstack(b, j, buffers.o, T::ONE, out);
    }

    /// Writes the block's rows, times `factor`, into a (Tq, H·D) matrix.
    fn unstack(&self, b: &Segment, j: usize, rows: &[T], factor: T, out: Shared<T>) {
        for (r, row) in rows.chunks(self.shape.dim).enumerate() {
            // SAFETY: `check` proved the place to be inside, and only this task writes this block's rows of these heads.
            let to = unsafe { std::slice::from_raw_parts_mut(out.at(self.place(b, j, r)), self.shape.dim) };
            to.iter_mut().zip(row).for_each(|(to, v)| *to = *v * factor);
        }
    }

    /// Adds the block's share to all three gradients; `q` and `p` are filled.
    fn backward(&self, b: &Segment, j: usize, buffers: &mut Buffers<T>, dout: &[T], sums: Sums<T>) {
        let Buffers { q, o, p, ds } = buffers;
        self.stack(b, j, dout, T::ONE, o);
        self.add_transposed(b, j, o, p, sums.dvt, sums.tk);
        self.against(b, j, o, self.v, ds);
        let row = padded(b.keys());
        for (ds, p) in ds.chunks_mut(row).zip(p.chunks(row)) {
            ds[b.keys()..].fill(T::ZERO);
            softmax_backward(ds, p);
        }
        // `q` carries 1/√D already.
        self.add_transposed(b, j, q, ds, sums.dkt, sums.tk);
        self.weighted(b, j, ds, self.k, o);
        self.unstack(b, j, o, self.scale(), sums.dq);
    }

    /// `target[head j][keys] += xᵀ · p` over both runs of keys. Shapes: x (rows, D), p (rows, padded keys),
    /// target (Hkv·D, Tk).
    fn add_transposed(&self, b: &Segment, j: usize, x: &[T], p: &[T], target: Shared<T>, tk: usize) {
        let (row, dim) = (padded(b.keys()), self.shape.dim);
        for (first, n, column) in b.runs() {
            if n > 0 {
                let term = Term {
                    a: row_major(x, dim).transposed(),
                    b: Right::Matrix(row_major(&p[column..], row)),
                    k: x.len() / dim,
                    scale: T::ONE,
                };
                let target = Target { at: target.at(j * dim * tk + first), row: tk, column: 1 };
                // SAFETY: as in `against`; the task owns this head of the group's key rows alone.
                unsafe { product(target, dim, n, Start::Target, &[term], false) }
            }
        }
    }
}

fn row_major<T>(data: &[T], columns: usize) -> Operand<T> {
    Operand { at: data.as_ptr(), row: columns as isize, column: 1 }
}

/// Writes the (columns, rows) matrix `from` as (rows, columns).
fn transpose<T: Real>(from: &[T], columns: usize, rows: usize, to: &mut [T]) {
    for_rows(to, columns * 16, |block, to| {
        for c in 0..columns {
            let source = &from[c * rows + block * 16..];
            for (row, v) in to.chunks_mut(columns).zip(source) {
                row[c] = *v;
            }
        }
    });
}

/// Elements taken together, so that a loop over a row is SIMD; the order of all additions is fixed. Rows of scores are padded to
/// a multiple of it.
const LANES: usize = 16;

/// Returns the distance between rows of scores.
fn padded(keys: usize) -> usize {
    keys.next_multiple_of(LANES)
}

#[inline(always)]
fn total<T: Real>(lanes: [T; LANES]) -> T {
    let mut sum = T::ZERO;
    for lane in lanes {
        sum += lane;
    }
    sum
}

simd! {
    /// Turns the first `seen` scores of a padded row into probabilities and the others into zeros.
    fn softmax<T: Real>(row: &mut [T], seen: usize) {
        let (row, masked) = row.split_at_mut(padded(seen));
        for v in row[seen..].iter_mut() {
            *v = T::NEG_INFINITY;
        }
        for v in masked.iter_mut() {
            *v = T::ZERO;
        }
        let groups = row.as_chunks_mut::<LANES>().0;
        let mut lanes = [T::NEG_INFINITY; LANES];
        for group in groups.iter() {
            for l in 0..LANES {
                lanes[l] = if group[l] > lanes[l] { group[l] } else { lanes[l] };
            }
        }
        let mut max = T::NEG_INFINITY;
        for lane in lanes {
            max = if lane > max { lane } else { max };
        }
        let mut sums = [T::ZERO; LANES];
        for group in groups.iter_mut() {
            for l in 0..LANES {
                group[l] = (group[l] - max).exp::<FUSED>();
                sums[l] += group[l];
            }
        }
        let inverse = T::ONE / total(sums);
        for group in groups.iter_mut() {
            for v in group.iter_mut() {
                *v *= inverse;
            }
        }
    }
}

simd! {
    /// `ds ← p∘(ds − Σ ds∘p)` for padded rows; `p` is zero where nothing is seen.
    fn softmax_backward<T: Real>(ds: &mut [T], p: &[T]) {
        let (ds, p) = (ds.as_chunks_mut::<LANES>().0, p.as_chunks::<LANES>().0);
        let mut sums = [T::ZERO; LANES];
        for (d, p) in ds.iter().zip(p) {
            for l in 0..LANES {
                sums[l] += d[l] * p[l];
            }
        }
        let dot = total(sums);
        for (d, p) in ds.iter_mut().zip(p) {
            for l in 0..LANES {
                d[l] = p[l] * (d[l] - dot);
            }
        }
    }
}
