//! A frozen matrix: in memory as a tensor, or as its file holds it.

use crate::{
    parallel::for_rows,
    real::Real,
    rows::gather_rows_into,
    stored::Stored,
    tensor::{with_type, write},
};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::sync::Arc;

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
