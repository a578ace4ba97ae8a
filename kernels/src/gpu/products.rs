//! Matrix products on a device: terms added onto a start, each one product of the vendor's library.
//!
//! Factors have the computation's type; sums are in f32 and rounded when a term is stored, so a result of a 16-bit type is
//! rounded once a term.

use super::{
    machine::{Gemm, Side},
    matrix::Matrix,
    memory::Memory,
    operations::add_bias,
    packed::Packed,
};
use crate::Dense;
use candle_core::{Result, bail};
use std::{ops::Range, sync::Arc};

/// A frozen matrix on a device.
#[derive(Clone, Debug)]
pub enum Frozen {
    /// Whole, in the computation's type.
    Whole(Matrix),
    /// As stored, widened for every product.
    Shared(SharedPlace),
    /// On the host; its rows come in tiles when they are used.
    Tiles(Arc<Tiles>),
}

/// A matrix of a packed run whose widened form has a place in common with others: it is good until another one is widened.
#[derive(Clone, Debug)]
pub struct SharedPlace {
    /// The run's layout.
    pub packed: Arc<Packed>,
    /// The run.
    pub run: Arc<Memory>,
    /// Number of the matrix in the run.
    pub matrix: usize,
    /// The rows of it that this is.
    pub rows: Range<usize>,
    /// Where it is widened.
    pub place: Arc<Memory>,
}

/// A matrix on the host, in runs of rows that are uploaded one after the other.
#[derive(Debug)]
pub struct Tiles {
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub columns: usize,
    /// Every tile as a run of its own with one matrix in it.
    pub tiles: Vec<Packed>,
    /// Rows of a tile; the last one has what is left.
    pub tile_rows: usize,
}

/// `scale · a · b`. Shapes: a (m, k), b (k, n).
#[derive(Clone)]
pub struct Term<'a> {
    /// First factor.
    pub a: &'a Matrix,
    /// Second factor.
    pub b: Matrix,
    /// Factor of the whole.
    pub scale: f64,
}

/// What terms are added to; as [`crate::Onto`].
#[derive(Clone, Copy)]
pub enum Base<'a> {
    /// Nothing.
    Zero,
    /// The target.
    Itself,
    /// A row (1, n).
    Row(&'a Matrix),
    /// A matrix (m, n).
    Matrix(&'a Matrix),
}

/// Computes `out = base + Σ terms`. A term is asked for when the one before it is queued: their factors may share a place.
pub fn multiply<'a>(
    out: &Matrix,
    base: Base,
    terms: impl IntoIterator<Item = Result<Term<'a>>>,
) -> Result<()> {
    let (m, n) = out.dims();
    if m == 0 || n == 0 {
        return Ok(());
    }
    if let Base::Matrix(matrix) = base {
        out.copy_from(matrix)?;
    }
    let mut written = matches!(base, Base::Itself | Base::Matrix(_));
    for term in terms {
        written |= one(out, &term?, written)?;
    }
    if !written {
        out.clear()?;
    }
    match base {
        Base::Row(row) => add_bias(out, row),
        _ => Ok(()),
    }
}

/// Queues one term and returns whether it has written the target.
fn one(out: &Matrix, term: &Term, onto: bool) -> Result<bool> {
    let (a, b) = (term.a, &term.b);
    let ((m, n), k) = (out.dims(), a.dims().1);
    let types_fit =
        a.element() == b.element() && (out.element() == a.element() || out.element() == Dense::F32);
    if a.dims() != (m, k) || b.dims() != (k, n) || !types_fit || out.is_transposed() {
        let of = |m: &Matrix| format!("{:?} {:?}", m.dims(), m.element());
        bail!("product of {} and {} for {}", of(a), of(b), of(out));
    }
    if k == 0 {
        return Ok(false);
    }
    let side = |m: &Matrix| Side {
        address: m.address(),
        stride: m.stride(),
        transposed: m.is_transposed(),
        batch: 0,
    };
    let gemm = Gemm {
        m,
        n,
        k,
        a: side(a),
        b: side(b),
        c: side(out),
        factors: a.element(),
        result: out.element(),
        alpha: term.scale as f32,
        beta: if onto { 1.0 } else { 0.0 },
        batch: 1,
    };
    out.gpu().machine().gemm(&gemm)?;
    Ok(true)
}

impl Frozen {
    /// Returns (rows, columns).
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Self::Whole(matrix) => matrix.dims(),
            Self::Shared(shared) => (shared.rows.len(), shared.packed.dims(shared.matrix).1),
            Self::Tiles(tiles) => (tiles.rows, tiles.columns),
        }
    }

    /// Returns it as one matrix for the product that is queued next.
    pub fn whole(&self) -> Result<Matrix> {
        match self {
            Self::Whole(matrix) => Ok(matrix.clone()),
            Self::Shared(shared) => {
                let whole = shared.packed.matrix(&shared.run, shared.matrix, || Ok(shared.place.clone()))?;
                whole.narrow(shared.rows.start, shared.rows.len())
            }
            Self::Tiles(_) => bail!("a matrix in tiles where a whole one is needed"),
        }
    }
}

/// Returns the bytes that a tile of a matrix borrows.
pub fn tile_bytes(rows: usize, columns: usize, element: Dense) -> usize {
    rows * columns * element.size()
}

impl Tiles {
    /// Computes `out = x · Wᵀ`. Shapes: x (m, columns), out (m, rows) in f32.
    pub fn linear(&self, out: &Matrix, x: &Matrix) -> Result<()> {
        let (m, n) = (x.dims().0, self.rows);
        if out.dims() != (m, n) || x.dims().1 != self.columns {
            bail!("product of {:?} and ({n}, {}) for {:?}", x.dims(), self.columns, out.dims());
        }
        self.each(x, |start, tile| {
            let rows = tile.dims().0;
            let c = Side {
                address: out.address() + (start * out.element().size()) as u64,
                stride: n,
                transposed: false,
                batch: 0,
            };
            let side = |m: &Matrix, transposed| Side {
                address: m.address(),
                stride: m.stride(),
                transposed,
                batch: 0,
            };
            let gemm = Gemm {
                m,
                n: rows,
                k: self.columns,
                a: side(x, false),
                b: side(&tile, true),
                c,
                factors: x.element(),
                result: out.element(),
                alpha: 1.0,
                beta: 0.0,
                batch: 1,
            };
            out.gpu().machine().gemm(&gemm)
        })
    }

    /// Returns the rows of a tile.
    pub(super) fn rows_of(&self, tile: usize) -> usize {
        self.tile_rows.min(self.rows - tile * self.tile_rows)
    }

    /// Runs `f` with the first row of every tile and the tile.
    pub(super) fn each(&self, like: &Matrix, mut f: impl FnMut(usize, Matrix) -> Result<()>) -> Result<()> {
        let gpu = like.gpu();
        let mut staged = vec![0u8; self.tiles.iter().map(Packed::bytes).max().unwrap_or(0)];
        for (i, tile) in self.tiles.iter().enumerate() {
            let memory = Arc::new(gpu.borrow(tile.bytes())?);
            tile.write(&mut staged[..tile.bytes()]);
            gpu.machine().upload(memory.address(), &staged[..tile.bytes()])?;
            let whole = tile.matrix(&memory, 0, || Ok(Arc::new(gpu.borrow(tile.widened_bytes(0))?)))?;
            f(i * self.tile_rows, whole)?;
        }
        Ok(())
    }
}
