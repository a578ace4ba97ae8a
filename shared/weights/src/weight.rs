//! A tensor of a model as floats, whatever its form.

use crate::{
    Values,
    source::{self, Source},
};
use kto_cli::{Context, Error, Kind, Result, escape};
use kto_formats::{
    bnb, mlx,
    model_dir::ModelDir,
    tensors::{TensorStore, float_size, non_finite},
};
use kto_kernels::Stored;
use safetensors::Dtype;
use std::ops::Range;

/// A tensor of floats, quantized or not.
pub struct Weight<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape when decoded.
    pub shape: Vec<usize>,
    /// What its values are rounded to: the dtype of the file, or the one that the quantization remembers.
    pub dtype: Dtype,
    /// Whether it is stored as something else than floats.
    pub quantized: bool,
    stored: Stored,
    store: &'a TensorStore,
    /// The tensors that its values are spread over.
    parts: Vec<String>,
}

/// Returns the names of all weights of a model: of quantized ones the weight, not its parts.
pub fn weights(model: &ModelDir) -> impl Iterator<Item = &str> {
    let store = &model.tensors;
    store.names().filter(move |name| {
        bnb::part_of(store, name).is_none_or(|weight| weight == *name) && mlx::part_of(store, name).is_none()
    })
}

impl<'a> Weight<'a> {
    /// Returns the weight `name`, or `None` if it holds no floats. Errors (65): a part is missing or does not fit.
    pub fn find(model: &'a ModelDir, name: &'a str) -> Result<Option<Self>> {
        Self::read(model, name).at(model.tensors.place_of(name))
    }

    fn read(model: &'a ModelDir, name: &'a str) -> Result<Option<Self>> {
        let store = &model.tensors;
        let source = Source::find(model, name)?;
        let parts = source.parts(name);
        let quantized = !matches!(source, Source::Float(_));
        let (shape, dtype) = match &source {
            Source::Float(view) if float_size(view.dtype).is_none() => return Ok(None),
            Source::Float(view) => (view.shape.to_vec(), view.dtype),
            Source::Nf4(packed) => (packed.state.shape.clone(), packed.state.dtype),
            Source::Int8(coded) => (coded.codes.shape.to_vec(), config_dtype(model).unwrap_or(Dtype::F16)),
            Source::Affine(packed) => (packed.shape.to_vec(), packed.scales.dtype),
            Source::Micro(packed) => (packed.shape.to_vec(), config_dtype(model).unwrap_or(Dtype::BF16)),
        };
        let columns = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().rev().skip(1).product();
        let stored = match source {
            Source::Float(view) => {
                let made = Stored::dense(source::float(&view)?, source::bytes(store, name)?, rows, columns);
                made.map_err(|e| Error::new(Kind::Internal, format!("tensor \"{}\": {e}", escape(name))))?
            }
            // A matrix in the sense of its form; the shape was checked against the codes.
            other => other.wrap(store, name, rows, columns)?,
        };
        Ok(Some(Self { name, shape, dtype, quantized, stored, store, parts }))
    }

    /// Returns the weight as the kernels have it.
    pub fn stored(&self) -> &Stored {
        &self.stored
    }

    /// Returns the file that holds it, for the beginning of a message.
    pub fn place(&self) -> String {
        self.store.place_of(self.name)
    }

    /// Returns the bytes that it takes in its file, parts included.
    pub fn bytes(&self) -> u64 {
        self.stored.bytes() as u64
    }
}

impl Values for Weight<'_> {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }
    fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }
    fn read(&self, start: usize, out: &mut [f32]) {
        self.stored.widen_flat(start, out);
    }
    fn done(&self, range: Range<usize>) {
        for part in &self.parts {
            let bytes = self.store.get(part).map_or(0, |view| view.data.len());
            let at = |value: usize| (bytes as u128 * value as u128 / self.len().max(1) as u128) as usize;
            self.store.release_part(part, at(range.start)..at(range.end));
        }
    }
}

/// Returns the dtype that config.json states.
pub fn config_dtype(model: &ModelDir) -> Option<Dtype> {
    let stated = ["dtype", "torch_dtype"].iter().find_map(|key| model.config.get(key)?.as_str())?;
    [Dtype::F32, Dtype::F16, Dtype::BF16].into_iter().find(|d| bnb::torch_name(*d) == stated)
}

/// Fails (65) at the first value of a weight that is not finite.
pub fn check_finite_all(weight: &Weight) -> Result<()> {
    match weight.stored.first_non_finite() {
        None => Ok(()),
        Some((index, value)) => Err(non_finite(weight.name, index, value)).at(weight.place()),
    }
}
