//! The matrix products of a device against sums on the host in f64, with the error bound of f32 sums in any order.

use crate::support::{U32, decode, encode, noise, roundoff};
use candle_core::{Result, bail};
use kto_kernels::{
    Dense,
    gpu::{Gemm, Machine, Side},
};

/// Shapes (m, n, k): single elements, odd sizes, around the tiles of libraries.
pub const SMALL: [(usize, usize, usize); 4] = [(1, 1, 1), (7, 65, 33), (64, 33, 257), (31, 128, 64)];
/// More of them for a device, as a 1B model has them.
pub const LARGE: [(usize, usize, usize); 3] = [(1024, 768, 512), (129, 16, 4096), (16, 4096, 515)];

/// Element types of factors and result.
const TYPES: [(Dense, Dense); 5] = [
    (Dense::F32, Dense::F32),
    (Dense::Bf16, Dense::Bf16),
    (Dense::Bf16, Dense::F32),
    (Dense::F16, Dense::F16),
    (Dense::F16, Dense::F32),
];

/// A device's memory, given back when it is dropped.
struct There<'a>(&'a dyn Machine, u64);

impl<'a> There<'a> {
    fn new(machine: &'a dyn Machine, bytes: &[u8]) -> Result<Self> {
        let there = Self(machine, machine.allocate(bytes.len())?);
        machine.upload(there.1, bytes)?;
        Ok(there)
    }
}

impl Drop for There<'_> {
    fn drop(&mut self) {
        self.0.free(self.1);
    }
}

/// Matrices side by side in rows, as attention's heads are: `columns` of `batch` matrices, and a gap behind them.
struct Layout {
    rows: usize,
    columns: usize,
    batch: usize,
    transposed: bool,
}

const GAP: usize = 3;

impl Layout {
    fn new(rows: usize, columns: usize, batch: usize, transposed: bool) -> Self {
        let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
        Self { rows, columns, batch, transposed }
    }

    fn stride(&self) -> usize {
        self.batch * self.columns + GAP
    }

    fn elements(&self) -> usize {
        self.rows * self.stride()
    }

    fn side(&self, address: u64) -> Side {
        Side { address, stride: self.stride(), transposed: self.transposed, batch: self.columns }
    }

    /// Place of an element as the product sees it.
    fn at(&self, matrix: usize, row: usize, column: usize) -> usize {
        let (row, column) = if self.transposed { (column, row) } else { (row, column) };
        row * self.stride() + matrix * self.columns + column
    }
}

/// Checks products of these shapes in every type, transposition, scale and batch. Nothing beside a result may change.
pub fn check_products(machine: &dyn Machine, shapes: &[(usize, usize, usize)]) -> Result<()> {
    for (number, shape) in shapes.iter().enumerate() {
        for (types, (a, b)) in TYPES
            .iter()
            .flat_map(|t| [(false, false), (false, true), (true, false)].map(|turned| (t, turned)))
        {
            // A library may take another way for every one of these.
            let (alpha, beta, batch) = [(1.0, 0.0, 1), (0.37, 1.0, 1), (1.0, 1.0, 3)]
                [(number + usize::from(a) + usize::from(b)) % 3];
            one(machine, *shape, *types, (a, b), (alpha, beta, batch))?;
        }
    }
    Ok(())
}

fn one(
    machine: &dyn Machine,
    (m, n, k): (usize, usize, usize),
    (factors, result): (Dense, Dense),
    (a_turned, b_turned): (bool, bool),
    (alpha, beta, batch): (f32, f32, usize),
) -> Result<()> {
    let sides = [
        Layout::new(m, k, batch, a_turned),
        Layout::new(k, n, batch, b_turned),
        Layout::new(m, n, batch, false),
    ];
    let [a, b, c] = &sides;
    let values =
        [noise(factors, a.elements(), 1), noise(factors, b.elements(), 2), noise(result, c.elements(), 3)];
    let mut before = encode(result, &values[2]);
    if beta == 0.0 {
        // What is not read may be anything.
        before.fill(0xff);
    }
    let there = [
        There::new(machine, &encode(factors, &values[0]))?,
        There::new(machine, &encode(factors, &values[1]))?,
        There::new(machine, &before)?,
    ];
    let gemm = Gemm {
        m,
        n,
        k,
        a: a.side(there[0].1),
        b: b.side(there[1].1),
        c: c.side(there[2].1),
        factors,
        result,
        alpha,
        beta,
        batch,
    };
    machine.gemm(&gemm)?;
    let mut bytes = vec![0; before.len()];
    machine.download(there[2].1, &mut bytes)?;
    let found = decode(result, &bytes);
    let what = format!(
        "{m} × {k} × {n} in {factors:?} to {result:?}, turned {a_turned} {b_turned}, {batch} at once"
    );
    let mut expected = vec![None; c.elements()];
    for matrix in 0..batch {
        for i in 0..m {
            for j in 0..n {
                let (mut sum, mut size) = (0.0, 0.0);
                for l in 0..k {
                    let term =
                        f64::from(values[0][a.at(matrix, i, l)]) * f64::from(values[1][b.at(matrix, l, j)]);
                    (sum, size) = (sum + term, size + term.abs());
                }
                let at = c.at(matrix, i, j);
                let start = if beta == 0.0 { 0.0 } else { f64::from(beta) * f64::from(values[2][at]) };
                let (sum, size) = (f64::from(alpha) * sum + start, f64::from(alpha) * size + start.abs());
                // k products and sums, alpha and beta; then one rounding to the result's type.
                let bound = U32 * (k + 3) as f64 * size;
                expected[at] = Some((sum, bound + roundoff(result) * (sum.abs() + bound)));
            }
        }
    }
    let element = result.size();
    for (i, expected) in expected.iter().enumerate() {
        match expected {
            Some((value, allowed)) => {
                let difference = (f64::from(found[i]) - value).abs();
                if difference.is_nan() || difference > *allowed {
                    bail!("{what}: element {i} is {:e}, expected {value:e} within {allowed:e}", found[i]);
                }
            }
            None if bytes[i * element..][..element] != before[i * element..][..element] => {
                bail!("{what}: changed element {i}, which is beside the result");
            }
            None => {}
        }
    }
    Ok(())
}
