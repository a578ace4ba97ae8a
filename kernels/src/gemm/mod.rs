//! The matrix product: `out = start + Σ scale·a·b`, the work of nearly all of training.
//!
//! Called by [`crate::matmul`] and attention. A product may have several terms (a frozen weight and its LoRA factors), may start from
//! another matrix (a residual) or a repeated row (a bias), and reads frozen weights as they are stored.
//! Invariant: the bits of an element depend on its row of a, its column of b and its start only; sums over k run in order, in chunks
//! whose size depends on k alone. So results are equal on any number of threads and in any batch.
//! Design: packed panels of b shared by all threads, tiles in registers (after BLIS, doi:10.1145/2764454).

mod pack;
#[cfg(test)]
mod tests;
mod tile;

pub(crate) use pack::{TransposeSquare, transpose_square, transpose_square_f32, with_scratch};
pub use tile::Tiles;
pub(crate) use tile::{fastest_f32, fastest_f64};

use crate::{
    parallel::{Shared, each},
    real::{Operand, Real},
    stored::Stored,
};
use pack::Panels;
use std::ops::Range;

/// The second operand of a term, (k, n).
#[derive(Clone, Copy)]
pub(crate) enum Right<'a, T> {
    /// A matrix in memory.
    Matrix(Operand<T>),
    /// A frozen weight (k, n).
    Rows(&'a Stored),
    /// A frozen weight (n, k), transposed.
    Columns(&'a Stored),
}

/// `scale · a · b` with a (m, k) and b (k, n).
#[derive(Clone, Copy)]
pub(crate) struct Term<'a, T> {
    pub a: Operand<T>,
    pub b: Right<'a, T>,
    pub k: usize,
    pub scale: T,
}

/// What the terms are added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<T> {
    /// Nothing; the target may hold anything.
    Zero,
    /// The target itself.
    Target,
    /// Another matrix with unit column stride; a row stride of 0 repeats one row.
    Matrix(Operand<T>),
}

/// Where the result goes: (m, n) with any strides.
#[derive(Clone, Copy)]
pub(crate) struct Target<T> {
    pub at: *mut T,
    pub row: usize,
    pub column: usize,
}

/// Longest run of k whose panel stays in the first cache.
const CHUNK: usize = 320;
/// Elements of packed panels that exist at once: they stay in the last cache.
const SLAB: usize = 1 << 20;
/// Rows of packed panels that are worth a slab of their own.
const SLAB_ROWS: usize = 1024;
/// Rows of a task: its part of a stays in the second cache.
const TASK_ROWS: usize = 48;
/// Elements of panels that one thread packs sooner than it wakes another.
const SMALL_SLAB: usize = 1 << 14;
/// Rows up to which b is read where it lies.
const DIRECT: usize = 24;
/// Panels that one task packs, at most.
const WIDE: usize = 16;
/// Multiply-adds below which one thread is faster than several.
const SMALL: usize = 1 << 17;

/// Computes `target = start + Σ terms`.
///
/// # Safety
/// Operands, start and target must be valid for the sizes, and the target must overlap none of them. The terms' k must have a sum.
pub(crate) unsafe fn product<T: Real>(
    target: Target<T>,
    m: usize,
    n: usize,
    start: Start<T>,
    terms: &[Term<T>],
    parallel: bool,
) {
    // SAFETY: the caller's promise; these tiles are for this processor.
    unsafe { product_with(T::tiles(), target, m, n, start, terms, parallel) }
}

/// As [`product`], with chosen tiles.
///
/// # Safety
/// As [`product`], and the processor must have the tiles' instructions.
unsafe fn product_with<T: Real>(
    tiles: &'static Tiles<T>,
    target: Target<T>,
    m: usize,
    n: usize,
    start: Start<T>,
    terms: &[Term<T>],
    parallel: bool,
) {
    let depth: usize = terms.iter().map(|t| t.k).sum();
    if m == 0 || n == 0 {
        return;
    }
    let threads = if parallel && m * n * depth >= SMALL { rayon::current_num_threads() } else { 1 };
    if depth == 0 {
        // SAFETY: the caller's promise.
        return unsafe { copy_start(target, m, n, start) };
    }
    let work = Work { tiles, target, m, n, terms, threads };
    let columns = tiles.columns;
    let panels = (SLAB / (depth.min(SLAB_ROWS) * columns)).clamp(1, n.div_ceil(columns));
    let most = (SLAB / (panels * columns)).max(CHUNK);
    pack::with_scratch(most.min(depth) * panels * columns, |memory: &mut [T]| {
        for first in (0..n.div_ceil(columns)).step_by(panels) {
            let count = panels.min(n.div_ceil(columns) - first);
            let (mut pieces, mut start) = (pieces(terms).peekable(), start);
            while let Some(group) = group(&mut pieces, most) {
                let depth = group.iter().map(|p| p.k).sum();
                let slab = Slab { at: Shared(memory.as_mut_ptr()), first, count, depth };
                // SAFETY: the caller's promise; the memory holds `count` panels of `depth` rows.
                unsafe {
                    work.fill(&slab, &group);
                    work.multiply(&slab, &group, start);
                }
                start = Start::Target;
            }
        }
    });
}

/// A run of k of one term.
#[derive(Clone, Copy)]
struct Piece {
    term: usize,
    at: usize,
    k: usize,
    /// Its first row in the slab.
    below: usize,
}

/// Cuts every term into equal runs of at most [`CHUNK`].
fn pieces<'a, T>(terms: &'a [Term<T>]) -> impl Iterator<Item = Piece> + use<'a, T> {
    terms.iter().enumerate().flat_map(|(term, t)| {
        let k = t.k.div_ceil(t.k.div_ceil(CHUNK).max(1)).max(1);
        (0..t.k).step_by(k).map(move |at| Piece { term, at, k: k.min(t.k - at), below: 0 })
    })
}

/// Takes pieces of at most `most` rows together.
fn group(pieces: &mut std::iter::Peekable<impl Iterator<Item = Piece>>, most: usize) -> Option<Vec<Piece>> {
    let (mut group, mut rows) = (Vec::new(), 0);
    while let Some(piece) = pieces.next_if(|p| rows + p.k <= most) {
        group.push(Piece { below: rows, ..piece });
        rows += piece.k;
    }
    (!group.is_empty()).then_some(group)
}

/// Panels of a group of pieces: panel p is `[depth][columns]`.
struct Slab<T> {
    at: Shared<T>,
    /// First panel and number of panels.
    first: usize,
    count: usize,
    depth: usize,
}

impl<T> Slab<T> {
    /// Returns row `row` of panel `panel` (counted in the slab).
    fn row(&self, panel: usize, row: usize, columns: usize) -> *mut T {
        self.at.at((panel * self.depth + row) * columns)
    }
}

/// A product as its tasks see it.
struct Work<'a, T: 'static> {
    tiles: &'static Tiles<T>,
    target: Target<T>,
    m: usize,
    n: usize,
    terms: &'a [Term<'a, T>],
    threads: usize,
}
// SAFETY: operands are only read while a product runs, and tasks write disjoint blocks of the target.
unsafe impl<T> Sync for Work<'_, T> {}

/// A block of the result: rows of the matrix, panels of the slab.
struct Block {
    rows: Range<usize>,
    panels: Range<usize>,
}

impl<T: Real> Work<'_, T> {
    /// Packs the slab's panels.
    ///
    /// # Safety
    /// As [`product`].
    unsafe fn fill(&self, slab: &Slab<T>, group: &[Piece]) {
        let columns = self.tiles.columns;
        // Several panels a task: rows of b are then read in long runs.
        let wide = (slab.count * group.len() / (4 * self.threads)).clamp(1, WIDE);
        let tasks = slab.count.div_ceil(wide);
        let threads = if slab.count * slab.depth * columns < SMALL_SLAB { 1 } else { self.threads };
        each(tasks * group.len(), threads > 1, |task| {
            let (panel, piece) = (task / group.len() * wide, group[task % group.len()]);
            let first = (slab.first + panel) * columns;
            let width = (wide.min(slab.count - panel) * columns).min(self.n - first);
            let to =
                Panels { at: slab.row(panel, piece.below, columns), columns, step: slab.depth * columns };
            let b = &self.terms[piece.term].b;
            let (mut at, mut to) = (first, to);
            if self.direct(piece.term).is_some() {
                // Only a panel that the matrix does not fill.
                let whole = width / columns;
                at += whole * columns;
                to.at = slab.row(panel + whole, piece.below, columns);
            }
            if at < first + width {
                // SAFETY: the caller's promise; every task writes the rows of its own panels and piece.
                unsafe { pack::panels(b, piece.at..piece.at + piece.k, at, first + width - at, to) };
            }
        });
    }

    /// Returns the second factor of a term if tiles read it where it lies: few rows would not pay for packing it.
    fn direct(&self, term: usize) -> Option<Operand<T>> {
        match self.terms[term].b {
            Right::Matrix(b)
                if self.m <= DIRECT && b.column == 1 && b.row > 0 && !crowded::<T>(b.row as usize) =>
            {
                Some(b)
            }
            _ => None,
        }
    }

    /// Multiplies all rows of a by the slab's panels.
    ///
    /// # Safety
    /// As [`product`]; the slab must be filled.
    unsafe fn multiply(&self, slab: &Slab<T>, group: &[Piece], start: Start<T>) {
        // Equal tasks, as many for every thread.
        let tall = self.tiles.by_rows.len();
        let down = self.m.div_ceil(TASK_ROWS);
        let down = if down > 1 { down.next_multiple_of(self.threads) } else { 1 };
        let height = self.m.div_ceil(down).next_multiple_of(tall);
        let down = self.m.div_ceil(height);
        // Few rows: cut the panels as well, so that every thread has some tasks.
        let across = if self.threads == 1 { 1 } else { (4 * self.threads).div_ceil(down).min(slab.count) };
        let width = slab.count.div_ceil(across);
        let start = Fixed(start);
        each(down * across, self.threads > 1, |task| {
            let (row, panel) = (task % down * height, task / down * width);
            let block = Block {
                rows: row..(row + height).min(self.m),
                panels: panel.min(slab.count)..(panel + width).min(slab.count),
            };
            let mut start = start.get();
            for piece in group {
                // SAFETY: the caller's promise; tasks write disjoint blocks of the target.
                unsafe { self.add_piece(slab, &block, piece, start) };
                start = Start::Target;
            }
        });
    }

    /// # Safety
    /// As [`Work::multiply`], for one block.
    unsafe fn add_piece(&self, slab: &Slab<T>, block: &Block, piece: &Piece, start: Start<T>) {
        let (m, k, a) = (block.rows.len(), piece.k, self.terms[piece.term].a);
        // SAFETY: the caller's promise.
        unsafe {
            let a = Operand { at: a.at.offset(block.rows.start as isize * a.row), ..a };
            if a.column == 1 && a.row >= 0 && !crowded::<T>(a.row as usize) {
                self.add_block(slab, block, piece, start, (a.at.add(piece.at), a.row as usize));
            } else {
                pack::with_scratch(m * k, |rows: &mut [T]| {
                    pack::rows(a, m, piece.at, k, rows.as_mut_ptr());
                    self.add_block(slab, block, piece, start, (rows.as_ptr(), k));
                });
            }
        }
    }

    /// # Safety
    /// As [`Work::multiply`]; `a` is the block's first row and the distance of its rows.
    unsafe fn add_block(
        &self,
        slab: &Slab<T>,
        block: &Block,
        piece: &Piece,
        start: Start<T>,
        (a, a_row): (*const T, usize),
    ) {
        let (tiles, target, scale) = (self.tiles, self.target, self.terms[piece.term].scale);
        let (columns, tall) = (tiles.columns, tiles.by_rows.len());
        let zeros = [T::ZERO; tile::LARGEST];
        let direct = self.direct(piece.term);
        for panel in block.panels.clone() {
            let column = (slab.first + panel) * columns;
            let width = columns.min(self.n - column);
            let packed = (slab.row(panel, piece.below, columns).cast_const(), columns);
            let (b, b_row) = match direct {
                Some(b) if width == columns => {
                    let at = b.at.wrapping_offset(piece.at as isize * b.row).wrapping_add(column);
                    (at, b.row as usize)
                }
                _ => packed,
            };
            for i in (0..block.rows.len()).step_by(tall) {
                let height = tall.min(block.rows.len() - i);
                let row = block.rows.start + i;
                // SAFETY: the caller's promise; a tile that reaches past the matrix or has strided columns goes through `edge`.
                unsafe {
                    let a = a.add(i * a_row);
                    let c = target.at.add(row * target.row + column * target.column);
                    let from = match start {
                        Start::Zero => Place { at: zeros.as_ptr(), row: 0, column: 1 },
                        Start::Target => Place { at: c.cast_const(), row: target.row, column: target.column },
                        Start::Matrix(s) => {
                            let at = s.at.offset(row as isize * s.row).add(column);
                            Place { at, row: s.row as usize, column: 1 }
                        }
                    };
                    if width == columns && target.column == 1 {
                        tiles.by_rows[height - 1](
                            piece.k, a, a_row, b, b_row, scale, from.at, from.row, c, target.row,
                        );
                    } else {
                        let to = Target { at: c, ..target };
                        edge(tiles, (height, width), piece.k, (a, a_row), (b, b_row), scale, from, to);
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`product`].
unsafe fn copy_start<T: Real>(target: Target<T>, m: usize, n: usize, start: Start<T>) {
    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
        // SAFETY: the caller's promise.
        unsafe {
            let c = target.at.add(i * target.row + j * target.column);
            match start {
                Start::Zero => *c = T::ZERO,
                Start::Target => {}
                Start::Matrix(s) => *c = *s.at.offset(i as isize * s.row).add(j),
            }
        }
    }
}

/// A block that is only read.
struct Place<T> {
    at: *const T,
    row: usize,
    column: usize,
}

/// Computes a tile in a buffer and copies the part of it that exists.
///
/// # Safety
/// As [`product`], for `height` rows and `width` columns.
#[allow(clippy::too_many_arguments)]
unsafe fn edge<T: Real>(
    tiles: &Tiles<T>,
    (height, width): (usize, usize),
    k: usize,
    (a, a_row): (*const T, usize),
    (b, b_row): (*const T, usize),
    scale: T,
    from: Place<T>,
    to: Target<T>,
) {
    let mut buffer = [T::ZERO; tile::LARGEST];
    let columns = tiles.columns;
    // SAFETY: the caller's promise; the buffer holds the largest tile.
    unsafe {
        for (i, row) in buffer.chunks_mut(columns).take(height).enumerate() {
            for (j, v) in row[..width].iter_mut().enumerate() {
                *v = *from.at.add(i * from.row + j * from.column);
            }
        }
        let c = buffer.as_mut_ptr();
        tiles.by_rows[height - 1](k, a, a_row, b, b_row, scale, c.cast_const(), columns, c, columns);
        for (i, row) in buffer.chunks(columns).take(height).enumerate() {
            for (j, v) in row[..width].iter().enumerate() {
                *to.at.add(i * to.row + j * to.column) = *v;
            }
        }
    }
}

/// Whether rows at this distance compete for the same few places of a cache.
fn crowded<T>(row: usize) -> bool {
    (row * size_of::<T>()).is_multiple_of(4096)
}

/// A start that may be read from several threads.
struct Fixed<T>(Start<T>);
// SAFETY: tasks read the start only where they write.
unsafe impl<T> Sync for Fixed<T> {}
impl<T: Copy> Fixed<T> {
    fn get(&self) -> Start<T> {
        self.0
    }
}
