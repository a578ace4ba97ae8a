//! The work of one block of queries on one key-value head, tile by tile.

use super::{
    layout::{HeadShape, ScoreRule, Segment},
    softmax::{self, LANES, State},
    tiles::{KEYS, Tile, tiles},
};
use crate::{
    gemm::{Right, Start, Target, Term, product, with_scratch},
    parallel::Shared,
    real::{Operand, Real},
};

/// Distance between rows of scores: not a power of two, whose rows would share few lines of the first cache.
const ROW: usize = KEYS + LANES;

/// Returns the elements of the buffers of a block of `rows` stacked rows.
pub(super) fn scratch(rows: usize, dim: usize) -> usize {
    rows * (3 * dim + 2 * ROW)
}

/// The operands of attention.
pub(super) struct Heads<'a, T> {
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub shape: HeadShape,
    pub rule: ScoreRule,
}

/// Where the forward pass writes: (Tq, H·D) and (Tq, 2·H).
#[derive(Clone, Copy)]
pub(super) struct Outputs<T> {
    pub out: Shared<T>,
    pub stats: Shared<T>,
}

/// What the way back knows of the way up, and the gradient of the output.
#[derive(Clone, Copy)]
pub(super) struct Known<'a, T> {
    pub dout: &'a [T],
    pub out: &'a [T],
    pub stats: &'a [T],
}

/// Where the backward pass adds up: rows of dq, and one key-value head's (D, Tk) of the transposed dk and dv.
#[derive(Clone, Copy)]
pub(super) struct Sums<T> {
    pub dq: Shared<T>,
    pub dkt: Shared<T>,
    pub dvt: Shared<T>,
    pub tk: usize,
}

impl<T: Real> Heads<'_, T> {
    /// Writes the output and the statistics of the block's rows.
    pub fn forward(&self, b: &Segment, j: usize, targets: Outputs<T>) {
        let (rows, dim) = (b.queries * self.group(), self.shape.dim);
        let mut states = vec![State::<T>::NONE; rows];
        self.with_buffers(rows, |[q, o, _], [p, _]| {
            self.stack(b, j, self.q, self.scale(), q);
            let mut start = Start::Zero;
            for tile in tiles(b, self.rule.window) {
                self.against(tile, j, q, self.k, p);
                let used = tile.keys.next_multiple_of(LANES);
                for (r, (row, state)) in p.chunks_mut(ROW).zip(&mut states).enumerate() {
                    self.cap(&mut row[..tile.keys]);
                    let visible = tile.visible(b, r % b.queries, self.rule.window);
                    let factor = softmax::weigh(&mut row[..used], visible, state);
                    if matches!(start, Start::Target) && factor != T::ONE {
                        o[r * dim..][..dim].iter_mut().for_each(|o| *o *= factor);
                    }
                }
                self.weighted(tile, j, p, self.v, (o, start));
                start = Start::Target;
            }
            for (r, state) in states.iter().enumerate() {
                let inverse = T::ONE / state.sum;
                let (row, head) = self.place(b, j, r);
                // SAFETY: `check` proved the place to be inside, and only this task writes this block's rows of these heads.
                let (out, stats) = unsafe {
                    let at = row * self.shape.heads + head;
                    let out = std::slice::from_raw_parts_mut(targets.out.at(at * dim), dim);
                    (out, std::slice::from_raw_parts_mut(targets.stats.at(at * 2), 2))
                };
                out.iter_mut().zip(&o[r * dim..]).for_each(|(out, o)| *out = *o * inverse);
                stats.copy_from_slice(&[state.max, inverse]);
            }
        });
    }

    /// Writes the block's rows of dq and adds its share to dk and dv.
    pub fn backward(&self, b: &Segment, j: usize, known: Known<T>, sums: Sums<T>) {
        let (rows, dim, heads) = (b.queries * self.group(), self.shape.dim, self.shape.heads);
        let places = (0..rows).map(|r| self.place(b, j, r)).map(|(row, head)| row * heads + head);
        // Largest score, 1/sum, and the sum of the products of probabilities and their gradients.
        let facts: Vec<[T; 3]> = places
            .map(|at| {
                let [d, o] = [known.dout, known.out].map(|data| &data[at * dim..][..dim]);
                [known.stats[2 * at], known.stats[2 * at + 1], softmax::dot(d, o)]
            })
            .collect();
        self.with_buffers(rows, |[q, d, dq], [p, ds]| {
            self.stack(b, j, self.q, self.scale(), q);
            self.stack(b, j, known.dout, T::ONE, d);
            let mut start = Start::Zero;
            for tile in tiles(b, self.rule.window) {
                let used = tile.keys.next_multiple_of(LANES);
                self.against(tile, j, q, self.k, p);
                for (r, (row, [max, inverse, _])) in p.chunks_mut(ROW).zip(&facts).enumerate() {
                    self.cap(&mut row[..tile.keys]);
                    let visible = tile.visible(b, r % b.queries, self.rule.window);
                    softmax::probabilities(&mut row[..used], visible, *max, *inverse);
                }
                self.add_transposed(tile, d, p, sums.dvt, sums.tk);
                self.against(tile, j, d, self.v, ds);
                for ((ds, p), [_, _, dot]) in ds.chunks_mut(ROW).zip(p.chunks(ROW)).zip(&facts) {
                    softmax::backward(&mut ds[..tile.keys], &p[..tile.keys], *dot);
                }
                if let Some(cap) = self.rule.cap {
                    // The scores once more: their place was the probabilities'.
                    self.against(tile, j, q, self.k, p);
                    for (ds, s) in ds.chunks_mut(ROW).zip(p.chunks(ROW)) {
                        softmax::uncap(&mut ds[..tile.keys], &s[..tile.keys], T::of(cap));
                    }
                }
                // `q` carries the scale already.
                self.add_transposed(tile, q, ds, sums.dkt, sums.tk);
                self.weighted(tile, j, ds, self.k, (dq, start));
                start = Start::Target;
            }
            let scale = self.scale();
            for (r, dq) in dq.chunks(dim).enumerate() {
                let (row, head) = self.place(b, j, r);
                // SAFETY: as in `forward`.
                let to =
                    unsafe { std::slice::from_raw_parts_mut(sums.dq.at((row * heads + head) * dim), dim) };
                to.iter_mut().zip(dq).for_each(|(to, v)| *to = *v * scale);
            }
        });
    }

    /// Query heads of one key-value head.
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn scale(&self) -> T {
        T::of(self.rule.scale)
    }

    fn cap(&self, scores: &mut [T]) {
        if let Some(cap) = self.rule.cap {
            softmax::cap(scores, T::of(cap));
        }
    }

    /// Calls `f` with this thread's memory, that of a new task would be fresh pages: three times (rows, D), twice (rows, [`ROW`]).
    /// Contents are arbitrary.
    fn with_buffers(&self, rows: usize, f: impl FnOnce([&mut [T]; 3], [&mut [T]; 2])) {
        let (narrow, wide) = (rows * self.shape.dim, rows * ROW);
        with_scratch(scratch(rows, self.shape.dim), |memory: &mut [T]| {
            let (a, memory) = memory.split_at_mut(narrow);
            let (b, memory) = memory.split_at_mut(narrow);
            let (c, memory) = memory.split_at_mut(narrow);
            let (p, ds) = memory.split_at_mut(wide);
            f([a, b, c], [p, ds]);
        });
    }

    /// Returns query row and head of the stacked row `r` of a block.
    fn place(&self, b: &Segment, j: usize, r: usize) -> (usize, usize) {
        (b.query + r % b.queries, j * self.group() + r / b.queries)
    }

    /// Copies the block's rows of a (Tq, H·D) matrix, times `factor`.
    fn stack(&self, b: &Segment, j: usize, data: &[T], factor: T, out: &mut [T]) {
        for (r, to) in out.chunks_mut(self.shape.dim).enumerate() {
            let (row, head) = self.place(b, j, r);
            let from = &data[(row * self.shape.heads + head) * self.shape.dim..];
            to.iter_mut().zip(from).for_each(|(to, v)| *to = *v * factor);
        }
    }

    /// Returns head `j` of a tile's rows of keys or values.
    fn kv(&self, data: &[T], tile: Tile, j: usize) -> Operand<T> {
        let row = self.shape.kv_heads * self.shape.dim;
        Operand { at: data[tile.key * row + j * self.shape.dim..].as_ptr(), row: row as isize, column: 1 }
    }

    /// `out = x · dataᵀ`. Shapes: x (rows, D), out (rows, keys) at distance [`ROW`].
    fn against(&self, tile: Tile, j: usize, x: &[T], data: &[T], out: &mut [T]) {
        let dim = self.shape.dim;
        let b = Right::Matrix(self.kv(data, tile, j).transposed());
        let term = Term { a: row_major(x, dim), b, k: dim, scale: T::ONE };
        let target = Target { at: out.as_mut_ptr(), row: ROW, column: 1 };
        // SAFETY: `check` proved that the tile's rows lie inside the tensors; `out` has as many rows as `x`.
        unsafe { product(target, x.len() / dim, tile.keys, Start::Zero, &[term], false) }
    }

    /// `o = start + p · data`. Shapes: p (rows, keys) at distance [`ROW`], o (rows, D).
    fn weighted(&self, tile: Tile, j: usize, p: &[T], data: &[T], (o, start): (&mut [T], Start<T>)) {
        let dim = self.shape.dim;
        let b = Right::Matrix(self.kv(data, tile, j));
        let term = Term { a: row_major(p, ROW), b, k: tile.keys, scale: T::ONE };
        let target = Target { at: o.as_mut_ptr(), row: dim, column: 1 };
        // SAFETY: as in `against`; `o` has as many rows as `p`.
        unsafe { product(target, o.len() / dim, dim, start, &[term], false) }
    }

    /// `target[.., tile] += xᵀ · p`. Shapes: x (rows, D), p (rows, keys) at distance [`ROW`], target (D, Tk).
    fn add_transposed(&self, tile: Tile, x: &[T], p: &[T], target: Shared<T>, tk: usize) {
        let dim = self.shape.dim;
        let a = row_major(x, dim).transposed();
        let term = Term { a, b: Right::Matrix(row_major(p, ROW)), k: x.len() / dim, scale: T::ONE };
        let target = Target { at: target.at(tile.key), row: tk, column: 1 };
        // SAFETY: as in `against`; the task owns this head of this part's sums alone.
        unsafe { product(target, dim, tile.keys, Start::Target, &[term], false) }
    }
}

fn row_major<T>(data: &[T], columns: usize) -> Operand<T> {
    Operand { at: data.as_ptr(), row: columns as isize, column: 1 }
}
