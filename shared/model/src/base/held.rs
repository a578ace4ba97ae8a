//! What the base is made of, as read from a checkpoint: blocks, single matrices, and what is known of their use.

use crate::{
    architecture::Architecture,
    norm::NormWeights,
    numeric::Numeric,
    residency::Pages,
    weights::{Norms, bias_name, norm_names, weight_name},
};
use candle_core::{DType, Tensor as HostTensor};
use kto_cli::{Error, Result};
use kto_formats::{
    model_dir::ModelDir,
    tensors::{check_finite, non_finite},
};
use kto_kernels::{Stored, Weight};
use kto_weights::Source;
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

/// The frozen weights of a block.
pub(super) struct Layer {
    pub(super) norms: Norms<NormWeights<HostTensor>>,
    /// The matrices as stored, by [`Architecture::modules`].
    pub(super) stored: Vec<Arc<Stored>>,
    /// By [`crate::architecture::Module`]: its rows of a matrix and its bias (out).
    pub(super) linears: Vec<(Weight, Option<HostTensor>)>,
    /// Sums of the squares of each matrix's rows, from the first use on.
    pub(super) squares: [OnceLock<Vec<f64>>; 7],
    pub(super) use_: Use,
}

/// The embedding, or the head.
pub(super) struct Matrix {
    pub(super) weight: Weight,
    pub(super) use_: Use,
}

/// What is known of the use of some weights.
#[derive(Default)]
pub(super) struct Use {
    /// Names of the matrices that are still as stored, and their pages.
    names: Vec<String>,
    pub(super) pages: Pages,
    /// Whether they were found finite.
    pub(super) checked: AtomicBool,
}

impl Use {
    /// Fails (65) at the first use when one of `matrices`, which are [`Use::names`], is not finite.
    fn check<'a>(&self, matrices: impl Iterator<Item = &'a Arc<Stored>>) -> Result<()> {
        if self.checked.load(Ordering::Relaxed) {
            return Ok(());
        }
        for (name, stored) in self.names.iter().zip(matrices) {
            if let Some((index, value)) = stored.first_non_finite() {
                return Err(non_finite(name, index, value));
            }
        }
        self.checked.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Layer {
    pub(super) fn check(&self) -> Result<()> {
        self.use_.check(self.stored.iter())
    }
}

impl Matrix {
    pub(super) fn checked(&self) -> Result<&Weight> {
        if !self.use_.checked.load(Ordering::Relaxed) {
            if let Weight::Stored(stored) = &self.weight {
                self.use_.check([stored].into_iter())?;
            }
            // Of the embedding only a few rows will be wanted.
            self.use_.pages.release();
        }
        Ok(&self.weight)
    }

    pub(super) fn densify(&mut self, dtype: DType) -> Result<()> {
        self.weight = Weight::Dense(self.checked()?.to_dense(dtype).numeric()?);
        self.use_.pages.release();
        self.use_ = Use::default();
        Ok(())
    }
}

/// Reads a checkpoint whose headers were checked.
pub(super) struct Loader<'a> {
    pub(super) architecture: &'a Architecture,
    pub(super) directory: &'a ModelDir,
    pub(super) dtype: DType,
}

impl Loader<'_> {
    pub(super) fn layer(&self, layer: usize) -> Result<Layer> {
        let (mut names, mut parts) = (Vec::new(), Vec::new());
        let (mut matrices, mut linears) = (Vec::new(), Vec::new());
        for &module in self.architecture.modules() {
            let (rows, columns) = self.architecture.weight_shape(module);
            let name = weight_name(module, layer);
            let (matrix, of) = self.stored(&name, rows, columns)?;
            let bias = match self.architecture.has_bias(module) {
                true => Some(self.vector(&bias_name(module, layer), rows)?),
                false => None,
            };
            for (_, rows) in self.architecture.parts().of(module) {
                let bias =
                    bias.as_ref().map(|b| b.narrow(0, rows.start, rows.len()).numeric()).transpose()?;
                let part = matrix.window(rows).ok_or_else(|| Error::internal("rows outside a matrix"))?;
                linears.push((Weight::Stored(Arc::new(part)), bias));
            }
            matrices.push(matrix);
            parts.extend(of);
            names.push(name);
        }
        let norms =
            Norms::names(self.architecture, layer).map(self.architecture, |name, n| self.norm(name, n))?;
        let squares = Default::default();
        Ok(Layer { norms, stored: matrices, linears, squares, use_: self.used(names, &parts) })
    }

    pub(super) fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Matrix> {
        let (matrix, parts) = self.stored(name, rows, columns)?;
        Ok(Matrix { weight: Weight::Stored(matrix), use_: self.used(vec![name.into()], &parts) })
    }

    fn used(&self, names: Vec<String>, parts: &[String]) -> Use {
        let pages = Pages::of(&self.directory.tensors, parts.iter().map(String::as_str));
        Use { names, pages, checked: AtomicBool::new(false) }
    }

    /// Returns a matrix as stored, and the tensors that it consists of.
    pub(super) fn stored(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<(Arc<Stored>, Vec<String>)> {
        let source = Source::find(self.directory, name)?;
        let parts = source.parts(name);
        let stored = source.wrap(&self.directory.tensors, name, rows, columns)?;
        Ok((Arc::new(stored), parts))
    }

    /// Returns a norm with its weight as it is multiplied with.
    pub(super) fn norm(&self, name: &str, length: usize) -> Result<NormWeights<HostTensor>> {
        let norm = norm_names(self.architecture, name).map(|name| self.vector(name, length))?;
        match self.architecture.norm_plus_one {
            true => Ok(NormWeights { weight: (norm.weight + 1.0).numeric()?, ..norm }),
            false => Ok(norm),
        }
    }

    pub(super) fn vector(&self, name: &str, length: usize) -> Result<HostTensor> {
        let view = self.directory.tensors.require(name)?;
        view.expect_shape(&[length])?;
        let values = view.to_f32()?;
        check_finite(name, 0, &values)?;
        HostTensor::from_vec(values, length, &candle_core::Device::Cpu)
            .and_then(|t| t.to_dtype(self.dtype))
            .numeric()
    }
}
