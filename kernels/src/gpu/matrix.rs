//! Row-major matrices in device memory.

use super::memory::{Gpu, Memory};
use crate::Dense;
use candle_core::{Result, bail};
use half::{bf16, f16};
use std::sync::Arc;

/// A (rows, columns) matrix, or its transpose. Clones share the memory.
#[derive(Clone, Debug)]
pub struct Matrix {
    memory: Arc<Memory>,
    /// Bytes before the first element.
    offset: usize,
    rows: usize,
    columns: usize,
    element: Dense,
    transposed: bool,
}

impl Matrix {
    /// Returns a matrix with arbitrary content.
    pub fn new(gpu: &Arc<Gpu>, rows: usize, columns: usize, element: Dense) -> Result<Self> {
        Ok(Self::in_memory(Arc::new(gpu.take(size(rows, columns, element)?)?), 0, rows, columns, element))
    }

    /// Returns a short-lived matrix with arbitrary content.
    pub fn short(gpu: &Arc<Gpu>, rows: usize, columns: usize, element: Dense) -> Result<Self> {
        Ok(Self::in_memory(Arc::new(gpu.borrow(size(rows, columns, element)?)?), 0, rows, columns, element))
    }

    /// Returns a matrix that lies `offset` bytes into some memory, which must hold it.
    pub fn in_memory(
        memory: Arc<Memory>,
        offset: usize,
        rows: usize,
        columns: usize,
        element: Dense,
    ) -> Self {
        debug_assert!(offset + rows * columns * element.size() <= memory.bytes());
        Self { memory, offset, rows, columns, element, transposed: false }
    }

    /// Returns a matrix with these values, rounded to `element`.
    pub fn of_floats(gpu: &Arc<Gpu>, v: &[f32], rows: usize, columns: usize, element: Dense) -> Result<Self> {
        let matrix = Self::new(gpu, rows, columns, element)?;
        matrix.write(v)?;
        Ok(matrix)
    }

    /// Overwrites it with these values, rounded.
    pub fn write(&self, v: &[f32]) -> Result<()> {
        if v.len() != self.elements() || self.transposed {
            bail!("{} values for a matrix of {} × {}", v.len(), self.rows, self.columns);
        }
        let mut bytes = vec![0; v.len() * self.element.size()];
        self.element.encode(v, &mut bytes);
        self.upload(&bytes)
    }

    fn upload(&self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() { Ok(()) } else { self.gpu().machine().upload(self.address(), bytes) }
    }

    /// Returns the values, row-major.
    pub fn to_floats(&self) -> Result<Vec<f32>> {
        if self.transposed {
            bail!("a transposed matrix is not read");
        }
        let mut bytes = vec![0; self.bytes()];
        if !bytes.is_empty() {
            self.gpu().machine().download(self.address(), &mut bytes)?;
        }
        let wide = |b: &[u8]| match self.element {
            Dense::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Dense::Bf16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Dense::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
        };
        Ok(bytes.chunks_exact(self.element.size()).map(wide).collect())
    }

    /// Returns `count` rows from `start` on.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        if self.transposed || start.checked_add(count).is_none_or(|end| end > self.rows) {
            bail!("rows {start} to {start} + {count} of {} rows", self.rows);
        }
        let offset = self.offset + start * self.columns * self.element.size();
        Ok(Self { offset, rows: count, ..self.clone() })
    }

    /// Returns the same elements in another shape.
    pub fn reshape(&self, rows: usize, columns: usize) -> Result<Self> {
        if self.transposed || rows * columns != self.elements() {
            bail!("{} × {} elements as {rows} × {columns}", self.rows, self.columns);
        }
        Ok(Self { rows, columns, ..self.clone() })
    }

    /// Returns its first elements as another matrix. Error: it has fewer.
    pub fn first(&self, rows: usize, columns: usize) -> Result<Self> {
        self.reshape(self.elements(), 1)?.narrow(0, rows * columns)?.reshape(rows, columns)
    }

    /// Returns its transpose, for products.
    pub fn t(&self) -> Self {
        Self { transposed: !self.transposed, rows: self.columns, columns: self.rows, ..self.clone() }
    }

    /// Sets every element to zero.
    pub fn clear(&self) -> Result<()> {
        if self.bytes() == 0 { Ok(()) } else { self.gpu().machine().clear(self.address(), self.bytes()) }
    }

    /// Overwrites it with another matrix of its shape and type.
    pub fn copy_from(&self, from: &Self) -> Result<()> {
        if (self.dims(), self.element, false, false)
            != (from.dims(), from.element, self.transposed, from.transposed)
        {
            bail!("copy of {:?} to {:?}", from.dims(), self.dims());
        }
        if self.bytes() == 0 {
            return Ok(());
        }
        self.gpu().machine().copy(from.address(), self.address(), self.bytes())
    }

    /// Returns (rows, columns).
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Returns its element type.
    pub fn element(&self) -> Dense {
        self.element
    }

    /// Returns whether its memory holds the transpose.
    pub fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// Returns the elements from one stored row to the next.
    pub fn stride(&self) -> usize {
        if self.transposed { self.rows } else { self.columns }
    }

    /// Returns the number of elements.
    pub fn elements(&self) -> usize {
        self.rows * self.columns
    }

    /// Returns its size.
    pub fn bytes(&self) -> usize {
        self.elements() * self.element.size()
    }

    /// Returns where its first element is.
    pub fn address(&self) -> u64 {
        self.memory.address() + self.offset as u64
    }

    /// Returns its device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        self.memory.gpu()
    }
}

fn size(rows: usize, columns: usize, element: Dense) -> Result<usize> {
    let bytes = rows.checked_mul(columns).and_then(|n| n.checked_mul(element.size()));
    match bytes.filter(|b| *b <= isize::MAX as usize) {
        Some(bytes) => Ok(bytes),
        None => bail!("a matrix of {rows} × {columns} is too large"),
    }
}
