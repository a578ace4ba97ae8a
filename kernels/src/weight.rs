//! A frozen matrix: in memory as a tensor, or as its file holds it.

use crate::{
    parallel::{Pieces, SMALL, each, for_rows},
    real::Real,
    rows::gather_rows_into,
    stored::Stored,
    tensor::{read, with_type, write},
};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::sync::Arc;

/// Rows that a task of [`Weight::row_squares`] takes.
const ROWS: usize = 16;

/// A frozen (rows, columns) matrix.
#[derive(Clone, Debug)]
pub enum Weight {
    /// In the element type of the computation.
    Dense(Tensor),
    /// As stored; widened piece by piece when it is used.
    Stored(Arc<Stored>),
}

impl Weight {
    /// Returns (rows, columns).
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(tensor) => tensor.dims2(),
            Self::Stored(stored) => Ok((stored.rows(), stored.columns())),
        }
    }

    /// Writes the rows `index` to `out`. Shape: out (index.len(), columns).
    pub fn gather_into(&self, out: &Tensor, index: &[u32]) -> Result<()> {
        let stored = match self {
            Self::Dense(tensor) => return gather_rows_into(out, tensor, index),
            Self::Stored(stored) => stored,
        };
        let (rows, columns) = (stored.rows(), stored.columns());
        if let Some(i) = index.iter().find(|i| **i as usize >= rows) {
            bail!("row {i} of a matrix with {rows} rows");
        }
        if out.dims2()? != (index.len(), columns) {
            bail!("gather: {} rows of {columns} into {:?}", index.len(), out.shape());
        }
        with_type!(out, T => write::<T>(out, |out| {
            for_rows(out, columns, |i, row| T::widen(stored, index[i] as usize, 0, row));
            Ok(())
        }))
    }

    /// Returns the sum of the squares of each row (rows), in f64 in the order of the columns.
    pub fn row_squares(&self) -> Result<Vec<f64>> {
        let (rows, columns) = self.dims()?;
        let mut sums = vec![0.0; rows];
        let square = |row: &[f32]| row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
        match self {
            Self::Dense(tensor) => with_type!(tensor, T => {
                let values = read(tensor);
                let values = values.slice::<T>()?;
                let square = |row: &[T]| row.iter().map(|v| v.wide() * v.wide()).sum::<f64>();
                sums.iter_mut().zip(values.chunks(columns.max(1))).for_each(|(sum, row)| *sum = square(row));
            }),
            Self::Stored(stored) => {
                let pieces = Pieces::new(&mut sums, ROWS);
                each(rows.div_ceil(ROWS), rows * columns >= SMALL, |i| {
                    let mut row = vec![0.0f32; columns];
                    // SAFETY: every piece is asked for once.
                    for (j, sum) in unsafe { pieces.take(i) }.iter_mut().enumerate() {
                        f32::widen(stored, i * ROWS + j, 0, &mut row);
                        *sum = square(&row);
                    }
                });
            }
        }
        Ok(sums)
    }

    /// Returns all elements as a tensor in `dtype` (f32 or f64).
    pub fn to_dense(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Stored(stored) => {
                let all: Vec<u32> = (0..stored.rows() as u32).collect();
                let out = Tensor::zeros((stored.rows(), stored.columns()), dtype, &Device::Cpu)?;
                self.gather_into(&out, &all)?;
                Ok(out)
            }
        }
    }
}
