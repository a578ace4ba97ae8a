//! Causal attention over packs with shared prompts, forward and backward, in query blocks.
//!
//! A query row sees a prefix (its prompt) whole and its own segment up to itself. Scores of a block of queries against its keys
//! are the only large buffer (block × keys), so memory never grows with T². Heads are read in place from the (T, H·D) layout of
//! the projections by strides, and grouped key-value heads are shared, not copied.

use crate::{
    parallel::Shared,
    real::{Operand, Real, Sizes, product},
    simd::simd,
    tensor::{matrix, read, same_type, with_type},
};
use candle_core::{Result, Tensor, bail};
use gemm::Parallelism;
use rayon::prelude::*;
use std::ops::Range;

/// Queries of one block. Larger blocks waste work above the causal diagonal, smaller ones starve the matrix product.
const BLOCK: usize = 64;

/// A run of query rows and the keys that they see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row of the queries.
    pub query: usize,
    /// Number of query rows.
    pub queries: usize,
    /// First key row of the prefix, seen whole by every query.
    pub prefix: usize,
    /// Number of prefix rows; 0 for none.
    pub prefix_len: usize,
    /// First key row of the own segment.
    pub own: usize,
    /// Place of the first query in the own segment: query `i` sees the own keys `0..=offset + i`.
    pub offset: usize,
}

/// Which queries see which keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttentionLayout {
    /// The segments; their query rows do not overlap.
    pub segments: Vec<Segment>,
    /// Ranges of `segments` that share no key with another range (a prompt and its branches make one).
    pub groups: Vec<Range<usize>>,
}

/// Sizes of the heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads H.
    pub heads: usize,
    /// Key-value heads Hkv, a divisor of H.
    pub kv_heads: usize,
    /// Head size D.
    pub dim: usize,
}

/// Returns the attention output. Shapes: q (Tq, H·D), k and v (Tk, Hkv·D), result (Tq, H·D).
/// Formula: `softmax(q·kᵀ/√D + mask)·v` per head; query head h uses key-value head h / (H/Hkv).
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    shape: HeadShape,
) -> Result<Tensor> {
    let (tq, _) = check(q, k, v, layout, shape)?;
    with_type!(q, T => {
        let (rq, rk, rv) = (read(q), read(k), read(v));
        let heads = Heads::<T> { q: rq.slice()?, k: rk.slice()?, v: rv.slice()?, shape };
        let mut out = vec![T::ZERO; tq * shape.heads * shape.dim];
        let target = Shared(out.as_mut_ptr());
        let tasks: Vec<(Segment, usize)> = layout
            .segments
            .iter()
            .flat_map(|s| blocks(s).flat_map(move |b| (0..shape.heads).map(move |h| (b, h))))
            .collect();
        // Each task writes the rows of its block in the columns of its head: no two overlap.
        tasks.into_par_iter().for_each_init(Vec::new, |scores, (block, head)| {
            heads.probabilities(&block, head, scores);
            heads.weighted_values(&block, head, scores, target);
        });
        matrix(out, tq, shape.heads * shape.dim, q)
    })
}

/// Returns the gradients (dq, dk, dv) for the gradient `dout` of the result. Shapes as in [`attention`].
/// Formula, with probabilities P and `dP = dout·vᵀ`: `dS = P∘(dP − rowsum(dP∘P))/√D; dq = dS·k; dk = dSᵀ·q; dv = Pᵀ·dout`.
pub fn attention_backward(
    dout: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    shape: HeadShape,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (tq, tk) = check(q, k, v, layout, shape)?;
    same_type(dout, q)?;
    if dout.dims2()? != q.dims2()? {
        bail!("attention_backward: gradient {:?} for an output {:?}", dout.shape(), q.shape());
    }
    let (cq, ck) = (shape.heads * shape.dim, shape.kv_heads * shape.dim);
    with_type!(q, T => {
        let (rd, rq, rk, rv) = (read(dout), read(q), read(k), read(v));
        let heads = Heads::<T> { q: rq.slice()?, k: rk.slice()?, v: rv.slice()?, shape };
        let dout_ = rd.slice::<T>()?;
        let (mut dq, mut dk, mut dv) = (vec![T::ZERO; tq * cq], vec![T::ZERO; tk * ck], vec![T::ZERO; tk * ck]);
        let out = Gradients { dq: Shared(dq.as_mut_ptr()), dk: Shared(dk.as_mut_ptr()), dv: Shared(dv.as_mut_ptr()) };
        let tasks: Vec<(Range<usize>, usize)> =
            layout.groups.iter().flat_map(|g| (0..shape.kv_heads).map(move |j| (g.clone(), j))).collect();
        // A task owns one key-value head of one group: its keys, values and query heads are nobody else's,
        // and inside it the order of the sums is fixed.
        let per_kv = shape.heads / shape.kv_heads;
        tasks.into_par_iter().for_each_init(|| (Vec::new(), Vec::new()), |(scores, other), (group, j)| {
            for segment in &layout.segments[group] {
                for block in blocks(segment) {
                    for head in j * per_kv..(j + 1) * per_kv {
                        heads.probabilities(&block, head, scores);
                        heads.backward(&block, head, scores, other, dout_, out);
                    }
                }
            }
        });
        Ok((matrix(dq, tq, cq, q)?, matrix(dk, tk, ck, q)?, matrix(dv, tk, ck, q)?))
    })
}

/// Cuts a segment into blocks of at most [`BLOCK`] queries.
fn blocks(s: &Segment) -> impl Iterator<Item = Segment> + use<> {
    let s = *s;
    (0..s.queries).step_by(BLOCK).map(move |at| Segment {
        query: s.query + at,
        queries: BLOCK.min(s.queries - at),
        offset: s.offset + at,
        ..s
    })
}

impl Segment {
    /// Own keys that the last query sees.
    fn own_len(&self) -> usize {
        self.offset + self.queries
    }
    /// Keys of the block: prefix, then own.
    fn keys(&self) -> usize {
        self.prefix_len + self.own_len()
    }
    /// The two runs of keys as (first key row, number, first column of the scores).
    fn runs(&self) -> [(usize, usize, usize); 2] {
        [(self.prefix, self.prefix_len, 0), (self.own, self.own_len(), self.prefix_len)]
    }
}

#[derive(Clone, Copy)]
struct Gradients<T> {
    dq: Shared<T>,
    dk: Shared<T>,
    dv: Shared<T>,
}

struct Heads<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    shape: HeadShape,
}

impl<T: Real> Heads<'_, T> {
    /// Returns head `head` of `rows` rows from `first` of a (T, heads·D) matrix.
    fn operand(&self, data: &[T], heads: usize, head: usize, first: usize) -> Operand<T> {
        let row = heads * self.shape.dim;
        Operand { at: data[first * row + head * self.shape.dim..].as_ptr(), row: row as isize, column: 1 }
    }
    fn query(&self, data: &[T], b: &Segment, head: usize) -> Operand<T> {
        self.operand(data, self.shape.heads, head, b.query)
    }
    fn kv(&self, data: &[T], first: usize, head: usize) -> Operand<T> {
        let j = head / (self.shape.heads / self.shape.kv_heads);
        self.operand(data, self.shape.kv_heads, j, first)
    }
    fn kv_offset(&self, first: usize, head: usize) -> usize {
        let j = head / (self.shape.heads / self.shape.kv_heads);
        (first * self.shape.kv_heads + j) * self.shape.dim
    }

    /// Writes the softmax of the block's scores into `p` (queries × keys, row-major); masked places are zero.
    fn probabilities(&self, b: &Segment, head: usize, p: &mut Vec<T>) {
        let keys = b.keys();
        p.clear();
        p.resize(b.queries * keys, T::ZERO);
        let scale = T::of(1.0 / (self.shape.dim as f64).sqrt());
        self.scores(b, self.query(self.q, b, head), self.k, head, scale, p);
        for (i, row) in p.chunks_mut(keys).enumerate() {
            let seen = b.prefix_len + b.offset + i + 1;
            softmax(&mut row[..seen]);
            row[seen..].fill(T::ZERO);
        }
    }

    /// `s = scale · x · keysᵀ` over both runs of keys.
    fn scores(&self, b: &Segment, x: Operand<T>, keys: &[T], head: usize, scale: T, s: &mut [T]) {
        for (first, n, column) in b.runs() {
            if n > 0 {
                let kt = transpose(self.kv(keys, first, head));
                let sizes = Sizes { m: b.queries, n, k: self.shape.dim };
                // SAFETY: `check` proved that the block's rows and runs lie inside the tensors; `s` has queries × keys elements.
                unsafe {
                    product(
                        sizes,
                        s[column..].as_mut_ptr(),
                        b.keys() as isize,
                        T::ZERO,
                        x,
                        kt,
                        scale,
                        Parallelism::None,
                    )
                }
            }
        }
    }

    /// Adds `p · v` of the block into the zeroed output.
    fn weighted_values(&self, b: &Segment, head: usize, p: &[T], out: Shared<T>) {
        let row = self.shape.heads * self.shape.dim;
        let target = out.at(b.query * row + head * self.shape.dim);
        self.add_weighted(b, head, p, self.v, target, T::ONE);
    }

    /// `target += scale · p · keys` over both runs of keys; `target` has the row stride of the query heads.
    fn add_weighted(&self, b: &Segment, head: usize, p: &[T], keys: &[T], target: *mut T, scale: T) {
        let row = (self.shape.heads * self.shape.dim) as isize;
        for (first, n, column) in b.runs() {
            if n > 0 {
                let a = Operand { at: p[column..].as_ptr(), row: b.keys() as isize, column: 1 };
                let sizes = Sizes { m: b.queries, n: self.shape.dim, k: n };
                // SAFETY: as in `scores`; the caller owns these rows and columns of the output alone.
                unsafe {
                    product(
                        sizes,
                        target,
                        row,
                        T::ONE,
                        a,
                        self.kv(keys, first, head),
                        scale,
                        Parallelism::None,
                    )
                }
            }
        }
    }

    /// Adds the block's share to all three gradients. `p` holds the probabilities; `ds` is scratch.
    fn backward(&self, b: &Segment, head: usize, p: &[T], ds: &mut Vec<T>, dout: &[T], out: Gradients<T>) {
        let keys = b.keys();
        ds.clear();
        ds.resize(b.queries * keys, T::ZERO);
        let dout = self.query(dout, b, head);
        self.scores(b, dout, self.v, head, T::ONE, ds);
        for (i, (ds, p)) in ds.chunks_mut(keys).zip(p.chunks(keys)).enumerate() {
            let seen = b.prefix_len + b.offset + i + 1;
            let mut dot = T::ZERO;
            for (d, p) in ds[..seen].iter().zip(p) {
                dot += *d * *p;
            }
            for (d, p) in ds[..seen].iter_mut().zip(p) {
                *d = *p * (*d - dot);
            }
            ds[seen..].fill(T::ZERO);
        }
        let scale = T::of(1.0 / (self.shape.dim as f64).sqrt());
        let row = self.shape.heads * self.shape.dim;
        self.add_weighted(b, head, ds, self.k, out.dq.at(b.query * row + head * self.shape.dim), scale);
        self.add_transposed(b, head, ds, self.query(self.q, b, head), out.dk, scale);
        self.add_transposed(b, head, p, dout, out.dv, T::ONE);
    }

    /// `target[keys] += scale · pᵀ · x` over both runs of keys.
    fn add_transposed(&self, b: &Segment, head: usize, p: &[T], x: Operand<T>, target: Shared<T>, scale: T) {
        let row = (self.shape.kv_heads * self.shape.dim) as isize;
        for (first, n, column) in b.runs() {
            if n > 0 {
                let a = transpose(Operand { at: p[column..].as_ptr(), row: b.keys() as isize, column: 1 });
                let sizes = Sizes { m: n, n: self.shape.dim, k: b.queries };
                let at = target.at(self.kv_offset(first, head));
                // SAFETY: as in `scores`; the task owns this head of the group's key rows alone.
                unsafe { product(sizes, at, row, T::ONE, a, x, scale, Parallelism::None) }
            }
        }
    }
}

fn transpose<T>(x: Operand<T>) -> Operand<T> {
    Operand { at: x.at, row: x.column, column: x.row }
}

simd! {
    fn softmax<T: Real>(row: &mut [T]) {
        let mut max = T::NEG_INFINITY;
        for &v in row.iter() {
            max = if v > max { v } else { max };
        }
        for v in row.iter_mut() {
            *v = (*v - max).exp();
        }
        let mut sum = T::ZERO;
        for &v in row.iter() {
            sum += v;
        }
        let inverse = T::ONE / sum;
        row.iter_mut().for_each(|v| *v *= inverse);
    }
}

/// Returns (Tq, Tk) after proving every row that the layout names to be inside, and queries and groups to be disjoint.
fn check(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    shape: HeadShape,
) -> Result<(usize, usize)> {
    same_type(q, k)?;
    same_type(q, v)?;
    let HeadShape { heads, kv_heads, dim } = shape;
    let ((tq, cq), (tk, ck)) = (q.dims2()?, k.dims2()?);
    if kv_heads == 0
        || dim == 0
        || heads % kv_heads != 0
        || heads.checked_mul(dim) != Some(cq)
        || kv_heads.checked_mul(dim) != Some(ck)
        || v.dims2()? != (tk, ck)
    {
        bail!("attention: q {:?}, k {:?}, v {:?} for {shape:?}", q.shape(), k.shape(), v.shape());
    }
    let mut taken = vec![false; tq];
    // Sums that wrap around would pass for small ones, and unsafe code relies on this check.
    let fits = |first: usize, n: usize, rows: usize| first.checked_add(n).is_some_and(|end| end <= rows);
    for s in &layout.segments {
        let own_fits = s.offset.checked_add(s.queries).is_some_and(|n| fits(s.own, n, tk));
        let inside = own_fits && fits(s.query, s.queries, tq) && fits(s.prefix, s.prefix_len, tk);
        if !inside || s.queries == 0 {
            bail!("attention: {s:?} is outside {tq} queries and {tk} keys");
        }
        for taken in &mut taken[s.query..][..s.queries] {
            if std::mem::replace(taken, true) {
                bail!("attention: two segments share a query row");
            }
        }
    }
    let mut owner = vec![usize::MAX; tk];
    let mut next = 0;
    for (g, group) in layout.groups.iter().enumerate() {
        if group.start != next || group.end < group.start || group.end > layout.segments.len() {
            bail!("attention: groups do not cover the segments");
        }
        next = group.end;
        for (first, n, _) in layout.segments[group.clone()].iter().flat_map(Segment::runs) {
            for owner in &mut owner[first..first + n] {
                if *owner != usize::MAX && *owner != g {
                    bail!("attention: two groups share a key row");
                }
                *owner = g;
            }
        }
    }
    if next != layout.segments.len() {
        bail!("attention: groups do not cover the segments");
    }
    Ok((tq, tk))
}
