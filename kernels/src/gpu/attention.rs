//! Attention on a device, in blocks of queries: products of the vendor's library around the softmax kernels.
//!
//! The keys and values that a segment sees lie together (a branch's prompt and its own are copied), so a block needs two products
//! forward and five back. Query heads of one key-value head lie side by side in a row; one call serves the j-th head of every group.
//! Probabilities are computed again on the way back: nothing is kept.

use super::{
    Grid, Softmax,
    machine::{Gemm, Side},
    matrix::Matrix,
    operations::{add, cast},
};
use crate::{AttentionLayout, Dense, HeadShape, ScoreRule, Segment};
use candle_core::{Result, bail};

/// Scores that exist at a time, over all heads.
pub const SCORES: usize = 1 << 23;
/// Fewest queries of a block, unless the segment has fewer.
const FEWEST: usize = 16;

/// What attention reads: q (Tq, H·D), k and v (Tk, Hkv·D).
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries.
    pub q: &'a Matrix,
    /// Keys.
    pub k: &'a Matrix,
    /// Values.
    pub v: &'a Matrix,
    /// Which queries see which keys.
    pub layout: &'a AttentionLayout,
    /// Sizes of the heads.
    pub shape: HeadShape,
    /// How scores are made.
    pub rule: ScoreRule,
}

/// Returns the elements from one row of scores to the next: the tensor cores want their rows aligned to 16 bytes.
fn padded(keys: usize) -> usize {
    keys.next_multiple_of(8)
}

/// Returns the queries of a block that see `keys` keys.
pub fn block_queries(shape: HeadShape, keys: usize) -> usize {
    (SCORES / (shape.heads * keys).max(1)).clamp(FEWEST, 1024)
}

/// Returns the bytes that attention borrows for segments of at most `queries` queries and `keys` keys. Shape: keys and values of
/// a pack have `all_keys` rows.
pub fn scratch_bytes(
    shape: HeadShape,
    element: Dense,
    (queries, keys, all_keys): (usize, usize, usize),
    back: bool,
) -> usize {
    let block = block_queries(shape, keys).min(queries);
    let scores = shape.heads * block * padded(keys);
    let of_keys = shape.kv_heads * shape.dim;
    let size = element.size();
    let forward = scores * (4 + size) + 2 * keys * of_keys * size;
    // One more matrix in either type, and sums in f32 for the segment and for the pack.
    if back { forward + scores * (4 + size) + 8 * keys * of_keys + 8 * all_keys * of_keys } else { forward }
}

/// One segment's keys, values and sizes.
struct Part {
    segment: Segment,
    keys: usize,
    k: Matrix,
    v: Matrix,
    shape: HeadShape,
    rule: ScoreRule,
}

impl Part {
    fn of(inputs: Inputs, segment: Segment) -> Result<Self> {
        let keys = segment.prefix_len + segment.offset + segment.queries;
        let own = segment.offset + segment.queries;
        let joined = |all: &Matrix| {
            if segment.prefix_len == 0 {
                return all.narrow(segment.own, own);
            }
            if segment.prefix + segment.prefix_len == segment.own {
                return all.narrow(segment.prefix, keys);
            }
            let both = Matrix::short(all.gpu(), keys, all.dims().1, all.element())?;
            both.narrow(0, segment.prefix_len)?
                .copy_from(&all.narrow(segment.prefix, segment.prefix_len)?)?;
            both.narrow(segment.prefix_len, own)?.copy_from(&all.narrow(segment.own, own)?)?;
            Ok(both)
        };
        Ok(Self {
            segment,
            keys,
            k: joined(inputs.k)?,
            v: joined(inputs.v)?,
            shape: inputs.shape,
            rule: inputs.rule,
        })
    }

    /// The blocks of queries: (first query in the segment, number, keys that the last one sees).
    fn blocks(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let (queries, before) = (self.segment.queries, self.segment.prefix_len + self.segment.offset);
        let step = block_queries(self.shape, self.keys);
        (0..queries).step_by(step).map(move |first| {
            let n = step.min(queries - first);
            (first, n, before + first + n)
        })
    }

    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Rows of a block in a (T, H·D) matrix, for the j-th head of every group.
    fn queries(&self, of: &Matrix, first: usize, j: usize) -> Side {
        let stride = self.shape.heads * self.shape.dim;
        let at = (self.segment.query + first) * stride + j * self.shape.dim;
        side(of, at, stride, self.group() * self.shape.dim)
    }

    /// Keys or values (keys, Hkv·D).
    fn keys(&self, of: &Matrix) -> Side {
        side(of, 0, self.shape.kv_heads * self.shape.dim, self.shape.dim)
    }

    /// Scores (H·n, seen) of the j-th head of every group; heads are in the order of the groups.
    fn scores(&self, of: &Matrix, n: usize, seen: usize, j: usize) -> Side {
        let stride = padded(seen);
        side(of, j * n * stride, stride, self.group() * n * stride)
    }

    fn softmax(&self, first: usize, n: usize, seen: usize) -> Result<(Softmax, Grid)> {
        let rows = self.shape.heads * n;
        let narrow = |v: usize| u32::try_from(v).map_err(candle_core::Error::wrap);
        let before = self.segment.prefix_len + self.segment.offset + first;
        let p = Softmax {
            rows: rows as u64,
            columns: narrow(seen)?,
            queries: narrow(n)?,
            first: narrow(before + 1)?,
            in_stride: narrow(padded(seen))?,
            out_stride: narrow(padded(seen))?,
            scale: self.rule.scale as f32,
            window: self.rule.window.map_or(0, |w| u32::try_from(w).unwrap_or(0)),
            cap: self.rule.cap.map_or(0.0, |cap| cap as f32),
        };
        Ok((p, Grid::rows(rows, seen)))
    }

    /// Returns the probabilities of a block (H·n, seen), and the products that they come from.
    fn probabilities(&self, q: &Matrix, (first, n, seen): (usize, usize, usize)) -> Result<(Matrix, Matrix)> {
        let (gpu, rows, element) = (q.gpu(), self.shape.heads * n, q.element());
        let scores = Matrix::short(gpu, rows, padded(seen), Dense::F32)?;
        for j in 0..self.group() {
            let sides =
                (self.queries(q, first, j), self.keys(&self.k).turned(), self.scores(&scores, n, seen, j));
            self.product((n, seen, self.shape.dim), sides, Dense::F32, 0.0)?;
        }
        let probabilities = Matrix::short(gpu, rows, padded(seen), element)?;
        let (p, grid) = self.softmax(first, n, seen)?;
        gpu.launch("softmax_of_f32", element, grid, &[probabilities.address(), scores.address()], &p)?;
        Ok((probabilities, scores))
    }

    /// Queues a product for every group. Its sides are a, b and c; `result` is the type of c.
    fn product(
        &self,
        (m, n, k): (usize, usize, usize),
        (a, b, c): (Side, Side, Side),
        result: Dense,
        beta: f32,
    ) -> Result<()> {
        let (factors, batch) = (self.k.element(), self.shape.kv_heads);
        let gemm = Gemm { m, n, k, a, b, c, factors, result, alpha: 1.0, beta, batch };
        self.k.gpu().machine().gemm(&gemm)
    }
}

impl Side {
    fn turned(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }
}

fn side(of: &Matrix, start: usize, stride: usize, batch: usize) -> Side {
    Side { address: of.address() + (start * of.element().size()) as u64, stride, transposed: false, batch }
}

fn check(inputs: Inputs) -> Result<()> {
    let Inputs { q, k, v, layout, shape, .. } = inputs;
    let (of_queries, of_keys) = (shape.heads * shape.dim, shape.kv_heads * shape.dim);
    let ((tq, cq), (tk, ck)) = (q.dims(), k.dims());
    let types = q.element() == k.element() && q.element() == v.element();
    if shape.kv_heads == 0
        || shape.heads % shape.kv_heads != 0
        || !types
        || (cq, ck) != (of_queries, of_keys)
        || v.dims() != (tk, ck)
    {
        bail!("attention: q {:?}, k {:?}, v {:?} for {shape:?}", q.dims(), k.dims(), v.dims());
    }
    for s in &layout.segments {
        let inside = s.query + s.queries <= tq && s.own + s.offset + s.queries <= tk;
        if !inside || (s.prefix_len > 0 && s.prefix + s.prefix_len > tk) || s.queries == 0 {
            bail!("attention: {s:?} is outside {tq} queries and {tk} keys");
        }
    }
    Ok(())
}

/// As [`crate::attention`].
pub fn attention(out: &Matrix, inputs: Inputs) -> Result<()> {
    check(inputs)?;
    let (q, element) = (inputs.q, inputs.q.element());
    if out.dims() != q.dims() || out.element() != element {
        bail!("attention: output {:?} for {:?}", out.dims(), q.dims());
    }
    for segment in &inputs.layout.segments {
        let part = Part::of(inputs, *segment)?;
        for block in part.blocks() {
            let (first, n, seen) = block;
            let (p, _) = part.probabilities(q, block)?;
            for j in 0..part.group() {
                let sides = (part.scores(&p, n, seen, j), part.keys(&part.v), part.queries(out, first, j));
                part.product((n, part.shape.dim, seen), sides, element, 0.0)?;
            }
        }
    }
    Ok(())
}

/// As [`crate::attention_backward`]; nothing of the forward pass is needed.
pub fn attention_backward(
    (dq, dk, dv): (&Matrix, &Matrix, &Matrix),
    dout: &Matrix,
    inputs: Inputs,
) -> Result<()> {
    check(inputs)?;
    let (q, element, dim) = (inputs.q, inputs.q.element(), inputs.shape.dim);
    for (d, of) in [(dq, q), (dout, q), (dk, inputs.k), (dv, inputs.v)] {
        if d.dims() != of.dims() || d.element() != element {
            bail!("attention: gradient {:?} of {:?}", d.dims(), of.dims());
        }
    }
    let gpu = q.gpu();
    let (tk, ck) = dk.dims();
    let sums = [(); 2].map(|()| Matrix::short(gpu, tk, ck, Dense::F32));
    let [sum_k, sum_v] = sums;
    let (sum_k, sum_v) = (sum_k?, sum_v?);
    sum_k.clear()?;
    sum_v.clear()?;
    for segment in &inputs.layout.segments {
        let part = Part::of(inputs, *segment)?;
        let (own_k, own_v) =
            (Matrix::short(gpu, part.keys, ck, Dense::F32)?, Matrix::short(gpu, part.keys, ck, Dense::F32)?);
        own_k.clear()?;
        own_v.clear()?;
        for block in part.blocks() {
            let (first, n, seen) = block;
            let (p, scores) = part.probabilities(q, block)?;
            // Read with a cap alone; else its place is free for the next.
            let scores = part.rule.cap.map(|_| scores);
            let rows = part.shape.heads * n;
            let dp = Matrix::short(gpu, rows, padded(seen), Dense::F32)?;
            for j in 0..part.group() {
                let d = part.queries(dout, first, j);
                let sides = (part.scores(&p, n, seen, j).turned(), d, part.keys(&own_v));
                part.product((seen, dim, n), sides, Dense::F32, 1.0)?;
                let sides = (d, part.keys(&part.v).turned(), part.scores(&dp, n, seen, j));
                part.product((n, seen, dim), sides, Dense::F32, 0.0)?;
            }
            let ds = Matrix::short(gpu, rows, padded(seen), element)?;
            let (params, grid) = part.softmax(first, n, seen)?;
            let read = scores.as_ref().map_or(dp.address(), Matrix::address);
            let at = [ds.address(), dp.address(), p.address(), read];
            gpu.launch("softmax_backward_of_f32", element, grid, &at, &params)?;
            for j in 0..part.group() {
                let s = part.scores(&ds, n, seen, j);
                let sides = (s, part.keys(&part.k), part.queries(dq, first, j));
                part.product((n, dim, seen), sides, element, 0.0)?;
                let sides = (s.turned(), part.queries(q, first, j), part.keys(&own_k));
                part.product((seen, dim, n), sides, Dense::F32, 1.0)?;
            }
        }
        let (before, own) = (segment.prefix_len, segment.offset + segment.queries);
        for (sum, part) in [(&sum_k, &own_k), (&sum_v, &own_v)] {
            if before > 0 {
                add(&sum.narrow(segment.prefix, before)?, &part.narrow(0, before)?)?;
            }
            add(&sum.narrow(segment.own, own)?, &part.narrow(before, own)?)?;
        }
    }
    cast(dk, &sum_k)?;
    cast(dv, &sum_v)
}
