//! Frozen matrices on a device: several of them as their file holds them in one run of memory, widened there when they are used.
//!
//! Floats of another type than the computation's are rounded to it on the host, so that every part is either of that type or quantized.

use super::{Grid, matrix::Matrix, memory::Memory};
use crate::{
    Dense,
    stored::{Stored, Widening},
};
use candle_core::{Result, bail};
use rayon::prelude::*;
use std::{ops::Range, sync::Arc};

/// Distance between parts: what every access is aligned to.
const ALIGN: usize = 256;
/// Bytes or elements that a thread copies at a time.
const PIECE: usize = 1 << 18;

/// Where the parts of some matrices lie in a run of memory.
#[derive(Debug)]
pub struct Packed {
    element: Dense,
    matrices: Vec<Arc<Stored>>,
    /// By matrix, then by part.
    places: Vec<Vec<Range<usize>>>,
    bytes: usize,
}

impl Packed {
    /// Lays matrices out for computations in `element`.
    pub fn new(matrices: Vec<Arc<Stored>>, element: Dense) -> Self {
        let (mut places, mut at) = (Vec::with_capacity(matrices.len()), 0);
        for matrix in &matrices {
            let (widening, parts) = matrix.parts();
            let mut of = Vec::with_capacity(parts.len());
            for part in parts {
                let bytes = match widening {
                    Widening::Dense(from) => part.len() / from.size() * element.size(),
                    _ => part.len(),
                };
                of.push(at..at + bytes);
                at = (at + bytes).next_multiple_of(ALIGN);
            }
            places.push(of);
        }
        Self { element, matrices, places, bytes: at }
    }

    /// Returns the size of the run.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns (rows, columns) of a matrix.
    pub fn dims(&self, matrix: usize) -> (usize, usize) {
        (self.matrices[matrix].rows(), self.matrices[matrix].columns())
    }

    /// Returns whether a matrix has to be widened before it is used.
    pub fn is_quantized(&self, matrix: usize) -> bool {
        !matches!(self.matrices[matrix].parts().0, Widening::Dense(_))
    }

    /// Returns the size of a matrix in the computation's type.
    pub fn widened_bytes(&self, matrix: usize) -> usize {
        let (rows, columns) = self.dims(matrix);
        rows * columns * self.element.size()
    }

    /// Writes the run, on all cores.
    pub fn write(&self, run: &mut [u8]) {
        for (matrix, places) in self.matrices.iter().zip(&self.places) {
            let (widening, parts) = matrix.parts();
            for (part, place) in parts.into_iter().zip(places) {
                let to = &mut run[place.clone()];
                match widening {
                    Widening::Dense(from) if from != self.element => round(matrix, self.element, to),
                    _ => to
                        .par_chunks_mut(PIECE)
                        .zip(part.par_chunks(PIECE))
                        .for_each(|(t, f)| t.copy_from_slice(f)),
                }
            }
        }
    }

    /// Returns a matrix of the run that lies in `memory`: where it lies, if it is not quantized, else widened to the memory `to`.
    pub fn matrix(
        &self,
        memory: &Arc<Memory>,
        matrix: usize,
        to: impl FnOnce() -> Result<Arc<Memory>>,
    ) -> Result<Matrix> {
        let (places, (rows, columns)) = (&self.places[matrix], self.dims(matrix));
        let widening = self.matrices[matrix].parts().0;
        if let Widening::Dense(_) = widening {
            return Ok(Matrix::in_memory(memory.clone(), places[0].start, rows, columns, self.element));
        }
        let to = to()?;
        if to.bytes() < self.widened_bytes(matrix) {
            bail!("a matrix of {rows} × {columns} widened to {} bytes", to.bytes());
        }
        let out = Matrix::in_memory(to, 0, rows, columns, self.element);
        let at = |part: usize| memory.address() + places[part].start as u64;
        let (gpu, n) = (memory.gpu(), rows * columns);
        let (to, pairs) = (out.address(), Grid::elements(n.div_ceil(2)));
        match widening {
            Widening::Nf4(p) => {
                let buffers = [to, at(0), at(1), at(2), at(3)];
                gpu.launch("dequantize_nf4", self.element, pairs, &buffers, &p)
            }
            Widening::Int8(p) => {
                let grid = Grid::rows(rows, columns);
                gpu.launch("dequantize_int8", self.element, grid, &[to, at(0), at(1)], &p)
            }
            Widening::Affine(p) => {
                gpu.launch("dequantize_affine", self.element, pairs, &[to, at(0), at(1), at(2)], &p)
            }
            Widening::Micro => bail!("small floats are not widened on a GPU"),
            Widening::Dense(_) => Ok(()),
        }?;
        Ok(out)
    }
}

/// Writes the values of a matrix of floats, rounded to a type.
fn round(matrix: &Stored, element: Dense, to: &mut [u8]) {
    to.par_chunks_mut(PIECE * element.size()).enumerate().for_each(|(i, to)| {
        let mut values = vec![0.0; to.len() / element.size()];
        matrix.widen_flat(i * PIECE, &mut values);
        element.encode(&values, to);
    });
}
