//! Matrices of the engine, on the host or on a GPU.

use crate::{
    Dense, Weight,
    gpu::{Gpu, Matrix, products::Frozen},
};
use candle_core::{DType, Result, bail};
use std::sync::Arc;

/// Where a computation runs, and in which element type.
#[derive(Clone, Debug)]
pub enum Device {
    /// The processor; f32, or f64 as the oracle of tests.
    Host(DType),
    /// A GPU; activations in this type, sums in f32.
    Gpu(Arc<Gpu>, Dense),
}

/// A row-major matrix or a vector. Clones share the memory.
#[derive(Clone, Debug)]
pub enum Tensor {
    /// In the processor's memory.
    Host(candle_core::Tensor),
    /// In a GPU's memory; a vector is a matrix of one row.
    Gpu(Matrix),
}

/// A frozen matrix where the computation runs.
#[derive(Clone, Debug)]
pub enum FrozenWeight {
    /// On the processor.
    Host(Weight),
    /// On a GPU.
    Gpu(Frozen),
}

impl Device {
    /// Returns a matrix for activations. On the host it is zero, on a GPU arbitrary.
    pub fn matrix(&self, rows: usize, columns: usize) -> Result<Tensor> {
        Ok(match self {
            Self::Host(dtype) => {
                Tensor::Host(candle_core::Tensor::zeros((rows, columns), *dtype, &candle_core::Device::Cpu)?)
            }
            Self::Gpu(gpu, element) => Tensor::Gpu(Matrix::new(gpu, rows, columns, *element)?),
        })
    }

    /// As [`Device::matrix`] for logits, which have f32 on a GPU.
    pub fn logits(&self, rows: usize, columns: usize) -> Result<Tensor> {
        match self {
            Self::Host(_) => self.matrix(rows, columns),
            Self::Gpu(gpu, _) => Ok(Tensor::Gpu(Matrix::new(gpu, rows, columns, Dense::F32)?)),
        }
    }

    /// Returns a matrix of zeros for gradients of trained weights, which have f32 on a GPU.
    pub fn gradient(&self, rows: usize, columns: usize) -> Result<Tensor> {
        match self {
            Self::Host(_) => self.matrix(rows, columns),
            Self::Gpu(gpu, _) => {
                let matrix = Matrix::new(gpu, rows, columns, Dense::F32)?;
                matrix.clear()?;
                Ok(Tensor::Gpu(matrix))
            }
        }
    }

    /// Brings a matrix or a vector of the host here. On the host it is the same memory, on a GPU a rounded copy.
    pub fn bring(&self, tensor: &candle_core::Tensor) -> Result<Tensor> {
        match self {
            Self::Host(_) => Ok(Tensor::Host(tensor.clone())),
            Self::Gpu(gpu, element) => {
                let (rows, columns) = match tensor.dims() {
                    [columns] => (1, *columns),
                    [rows, columns] => (*rows, *columns),
                    dims => bail!("a tensor of shape {dims:?} is no matrix"),
                };
                let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                Ok(Tensor::Gpu(Matrix::of_floats(gpu, &values, rows, columns, *element)?))
            }
        }
    }

    /// Returns numbers (C) that multiply columns: on the host in the computation's type, on a GPU in f32.
    pub fn numbers(&self, values: &[f64]) -> Result<Tensor> {
        match self {
            Self::Host(dtype) => {
                let tensor = candle_core::Tensor::new(values, &candle_core::Device::Cpu)?;
                Ok(Tensor::Host(tensor.to_dtype(*dtype)?))
            }
            Self::Gpu(gpu, _) => {
                let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
                Ok(Tensor::Gpu(Matrix::of_floats(gpu, &values, 1, values.len(), Dense::F32)?))
            }
        }
    }

    /// Returns the most memory in bytes that was taken of a GPU at any time; nothing on the processor.
    pub fn peak_memory(&self) -> Option<u64> {
        match self {
            Self::Host(_) => None,
            Self::Gpu(gpu, _) => Some(gpu.used().1 as u64),
        }
    }

    /// Returns the bytes of an activation.
    pub fn element_bytes(&self) -> usize {
        match self {
            Self::Host(dtype) => dtype.size_in_bytes(),
            Self::Gpu(_, element) => element.size(),
        }
    }
}

impl Tensor {
    /// Returns `count` rows from `start` on.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        Ok(match self {
            Self::Host(t) => Self::Host(t.narrow(0, start, count)?),
            Self::Gpu(m) => Self::Gpu(m.narrow(start, count)?),
        })
    }

    /// Returns `count` elements of a vector from `start` on.
    pub fn part(&self, start: usize, count: usize) -> Result<Self> {
        Ok(match self {
            Self::Host(t) => Self::Host(t.narrow(0, start, count)?),
            Self::Gpu(m) => Self::Gpu(m.reshape(m.elements(), 1)?.narrow(start, count)?.reshape(1, count)?),
        })
    }

    /// Returns the same elements in rows of `columns`.
    pub fn in_rows_of(&self, columns: usize) -> Result<Self> {
        let (rows, wide) = self.dims2()?;
        if columns == 0 || wide % columns != 0 {
            bail!("rows of {wide} in rows of {columns}");
        }
        let shape = (rows * (wide / columns), columns);
        Ok(match self {
            Self::Host(t) => Self::Host(t.reshape(shape)?),
            Self::Gpu(m) => Self::Gpu(m.reshape(shape.0, shape.1)?),
        })
    }

    /// Returns the first elements of work space as a (rows, columns) matrix. Error: it is smaller.
    pub fn first(&self, rows: usize, columns: usize) -> Result<Self> {
        let (r, c) = self.dims2()?;
        if rows * columns > r * c {
            bail!("the first {rows} rows of {columns} of {r} rows of {c}");
        }
        Ok(match self {
            Self::Host(t) => {
                Self::Host(t.flatten_all()?.narrow(0, 0, rows * columns)?.reshape((rows, columns))?)
            }
            Self::Gpu(m) => Self::Gpu(m.first(rows, columns)?),
        })
    }

    /// Returns the transpose, for products.
    pub fn t(&self) -> Result<Self> {
        Ok(match self {
            Self::Host(t) => Self::Host(t.t()?),
            Self::Gpu(m) => Self::Gpu(m.t()),
        })
    }

    /// Returns (rows, columns).
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self {
            Self::Host(t) => t.dims2(),
            Self::Gpu(m) => Ok(m.dims()),
        }
    }

    /// Returns a short-lived matrix of zeros of this shape and type.
    pub fn zeros_like(&self) -> Result<Self> {
        let (rows, columns) = self.dims2()?;
        self.zeros_of(rows, columns)
    }

    /// Returns a short-lived matrix of zeros of this type.
    pub fn zeros_of(&self, rows: usize, columns: usize) -> Result<Self> {
        match self {
            Self::Host(t) => {
                Ok(Self::Host(candle_core::Tensor::zeros((rows, columns), t.dtype(), t.device())?))
            }
            Self::Gpu(m) => {
                let zeros = Matrix::short(m.gpu(), rows, columns, m.element())?;
                zeros.clear()?;
                Ok(Self::Gpu(zeros))
            }
        }
    }

    /// Returns the tensor of the host. Error: it is on a GPU.
    pub fn host(&self) -> Result<&candle_core::Tensor> {
        match self {
            Self::Host(t) => Ok(t),
            Self::Gpu(_) => bail!("a tensor on a GPU where one of the host belongs"),
        }
    }

    /// Overwrites the rows from `start` on with those of another matrix.
    pub fn set_rows(&self, start: usize, rows: &Self) -> Result<()> {
        match (self, rows) {
            (Self::Host(t), Self::Host(rows)) => t.slice_set(rows, 0, start),
            (Self::Gpu(m), Self::Gpu(rows)) => m.narrow(start, rows.dims().0)?.copy_from(rows),
            _ => bail!("set_rows: rows on the host and on a GPU"),
        }
    }

    /// Returns the tensor of the host, or a copy there in f32 after all work queued on the GPU so far.
    pub fn to_host(&self) -> Result<candle_core::Tensor> {
        match self {
            Self::Host(t) => Ok(t.clone()),
            Self::Gpu(m) => {
                candle_core::Tensor::from_vec(m.to_floats()?, m.dims(), &candle_core::Device::Cpu)
            }
        }
    }
}

impl FrozenWeight {
    /// Returns (rows, columns).
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Host(weight) => weight.dims(),
            Self::Gpu(frozen) => Ok(frozen.dims()),
        }
    }
}
