//! The frozen base model: weights as the file holds them, one block at a time.
//!
//! Called by the sweep and by generation, which say when the use of a block begins and ends. Matrices stay in the memory-mapped
//! file in their stored form; norms and biases, which are small, are read once. Invariant: a weight that is not finite is
//! refused, by name, before it is first used; headers are checked before anything else.
//! Deliberately absent: writable weights, and any copy of a matrix.

use crate::{
    architecture::{Architecture, Module},
    numeric::Numeric,
    projection::Linear,
    residency::Pages,
    source::Source,
    weights::{self, EMBEDDING, FINAL_NORM, HEAD, NORMS, bias_name, norm_name, weight_name},
};
use candle_core::{DType, Device, Tensor};
use kto_cli::{Context, Error, Result, escape};
use kto_formats::{
    model_dir::ModelDir,
    tensors::{check_finite, non_finite},
};
use kto_kernels::{RopeTable, Weight};
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// The weights of one block.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// (C)
    pub input_norm: Tensor,
    /// (C)
    pub post_norm: Tensor,
    /// By [`Module`].
    pub linears: [Linear; 7],
}

/// A frozen decoder.
pub struct BaseModel {
    /// Sizes and features.
    pub architecture: Architecture,
    /// (C)
    pub final_norm: Tensor,
    /// Cosines and sines for every position in use.
    pub rope: RopeTable,
    dtype: DType,
    directory: ModelDir,
    layers: Vec<Layer>,
    /// (V, C)
    embedding: Matrix,
    /// (V, C); `None` when it is the embedding.
    head: Option<Matrix>,
    /// Whether the pages of what is not in use are given back.
    streaming: bool,
    /// The place in the sweep last entered ([`BaseModel::enter`]): says which way the sweep goes.
    place: AtomicUsize,
}

struct Layer {
    weights: LayerWeights,
    use_: Use,
}

struct Matrix {
    weight: Weight,
    use_: Use,
}

/// What is known of the use of some weights.
#[derive(Default)]
struct Use {
    /// Names of the matrices that are still as stored, and their pages.
    names: Vec<String>,
    pages: Pages,
    /// Whether they were found finite.
    checked: AtomicBool,
}

/// No place in the sweep yet.
const NOWHERE: usize = usize::MAX;

impl BaseModel {
    /// Opens a model for rows of at most `positions` tokens. `dtype` is f32, or f64 as the oracle of tests, in which all
    /// weights are widened now. Errors (65): a tensor that is missing, of another shape than config.json says or of no
    /// known form; a norm or bias that is not finite.
    pub fn load(directory: ModelDir, dtype: DType, positions: usize) -> Result<Self> {
        let architecture = Architecture::from_config(&directory.config)?;
        weights::check(&architecture, &directory)?;
        let loader = Loader { architecture: &architecture, directory: &directory, dtype };
        let (v, c) = (architecture.vocab_size, architecture.hidden);
        let embedding = loader.matrix(EMBEDDING, v, c)?;
        let head = if architecture.tied { None } else { Some(loader.matrix(HEAD, v, c)?) };
        let final_norm = loader.vector(FINAL_NORM, c)?;
        let layers = (0..architecture.layers).map(|i| loader.layer(i)).collect::<Result<_>>()?;
        let rope = RopeTable::new(architecture.shape.dim, architecture.rope_theta, positions.max(1));
        let place = AtomicUsize::new(NOWHERE);
        let streaming = false;
        let mut this = Self {
            architecture,
            final_norm,
            rope,
            dtype,
            directory,
            layers,
            embedding,
            head,
            streaming,
            place,
        };
        if dtype != DType::F32 {
            this.densify()?;
        }
        Ok(this)
    }

    /// Returns the weights of block `layer` and begins to read the block that the sweep will want next.
    /// Error (65) at the first use: a weight that is not finite.
    pub fn layer(&self, layer: usize) -> Result<LayerWeights> {
        self.enter(layer + 1);
        self.layers[layer].check().at(self.shown())?;
        Ok(self.layers[layer].weights.clone())
    }

    /// Returns the embedding (V, C). A sweep begins here. Error as for [`BaseModel::layer`].
    pub fn embedding(&self) -> Result<&Weight> {
        self.enter(0);
        self.embedding.checked().at(self.shown())
    }

    /// Returns the head (V, C), which is the embedding when tied. Error as for [`BaseModel::layer`].
    pub fn head(&self) -> Result<&Weight> {
        self.enter(self.layers.len() + 1);
        self.head.as_ref().unwrap_or(&self.embedding).checked().at(self.shown())
    }

    /// Decides whether the memory of what is not in use goes back to the system from now on ([`BaseModel::release`] and its like).
    pub fn set_streaming(&mut self, streaming: bool) {
        self.streaming = streaming;
        (0..self.layers.len()).for_each(|layer| self.release(layer));
        self.release_embedding();
        self.release_head();
    }

    /// Says that the use of block `layer` ends for now. When streaming its pages are dropped.
    pub fn release(&self, layer: usize) {
        self.drop_pages(&self.layers[layer].use_);
    }

    /// As [`BaseModel::release`], for the embedding.
    pub fn release_embedding(&self) {
        self.drop_pages(&self.embedding.use_);
    }

    /// As [`BaseModel::release`], for the head.
    pub fn release_head(&self) {
        self.drop_pages(&self.head.as_ref().unwrap_or(&self.embedding).use_);
    }

    fn drop_pages(&self, used: &Use) {
        if self.streaming {
            used.pages.release();
        }
    }

    /// Notes where the sweep is (0 the embedding, then the blocks, then the head), and begins to read what comes next:
    /// up to the head, and down again.
    fn enter(&self, place: usize) {
        let head = self.layers.len() + 1;
        let last = self.place.swap(place, Ordering::Relaxed);
        let up = last == NOWHERE || last < place;
        let next = if place == 0 || up && place < head { place + 1 } else { place - 1 };
        if place == last || next == 0 {
            return;
        }
        let used = match self.layers.get(next - 1) {
            Some(layer) => &layer.use_,
            None => &self.head.as_ref().unwrap_or(&self.embedding).use_,
        };
        if self.streaming || !used.checked.load(Ordering::Relaxed) {
            used.pages.prefetch();
        }
    }

    /// Returns the bytes of block `layer`'s matrices: in the mapped file, or in memory once they are dense.
    pub fn bytes_stored(&self, layer: usize) -> usize {
        self.layers[layer].weights.linears.iter().map(|l| bytes(&l.weight)).sum()
    }

    /// Returns the bytes of the head beside the embedding: 0 when tied.
    pub fn bytes_head(&self) -> usize {
        self.head.as_ref().map_or(0, |head| bytes(&head.weight))
    }

    /// Widens everything to an element type that stored weights are not read in. Error (65): a weight that is not finite.
    fn densify(&mut self) -> Result<()> {
        for layer in &mut self.layers {
            layer.check()?;
            for linear in &mut layer.weights.linears {
                linear.weight = Weight::Dense(linear.weight.to_dense(self.dtype).numeric()?);
            }
            layer.use_.pages.release();
            layer.use_ = Use::default();
        }
        self.embedding.densify(self.dtype)?;
        self.head.as_mut().map_or(Ok(()), |head| head.densify(self.dtype))
    }

    /// Returns the directory that the model came from.
    pub fn directory(&self) -> &ModelDir {
        &self.directory
    }

    /// Returns the element type of all activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn shown(&self) -> String {
        escape(&self.directory.path.display().to_string())
    }
}

impl Use {
    /// Fails (65) at the first use when one of `weights`, which are [`Use::names`], is not finite.
    fn check<'a>(&self, weights: impl Iterator<Item = &'a Weight>) -> Result<()> {
        if self.checked.load(Ordering::Relaxed) {
            return Ok(());
        }
        for (name, weight) in self.names.iter().zip(weights) {
            if let Weight::Stored(stored) = weight
                && let Some((index, value)) = stored.first_non_finite()
            {
                return Err(non_finite(name, index, value));
            }
        }
        self.checked.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Layer {
    fn check(&self) -> Result<()> {
        self.use_.check(self.weights.linears.iter().map(|l| &l.weight))
    }
}

impl Matrix {
    fn checked(&self) -> Result<&Weight> {
        if !self.use_.checked.load(Ordering::Relaxed) {
            self.use_.check([&self.weight].into_iter())?;
            // Of the embedding only a few rows will be wanted.
            self.use_.pages.release();
        }
        Ok(&self.weight)
    }

    fn densify(&mut self, dtype: DType) -> Result<()> {
        self.weight = Weight::Dense(self.checked()?.to_dense(dtype).numeric()?);
        self.use_.pages.release();
        self.use_ = Use::default();
        Ok(())
    }
}

fn bytes(weight: &Weight) -> usize {
    match weight {
        Weight::Dense(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
        Weight::Stored(stored) => stored.bytes(),
    }
}

/// Reads a checkpoint whose headers were checked.
struct Loader<'a> {
    architecture: &'a Architecture,
    directory: &'a ModelDir,
    dtype: DType,
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<Layer> {
        let (mut names, mut parts, mut linears) = (Vec::new(), Vec::new(), Vec::new());
        for module in Module::ALL {
            let (rows, columns) = self.architecture.weight_shape(module);
            let name = weight_name(module, layer);
            let (weight, of) = self.stored(&name, rows, columns)?;
            let bias = match self.architecture.has_bias(module) {
                true => Some(self.vector(&bias_name(module, layer), rows)?),
                false => None,
            };
            linears.push(Linear { weight, bias });
            parts.extend(of);
            names.push(name);
        }
        let [input_norm, post_norm] =
            NORMS.map(|n| self.vector(&norm_name(layer, n), self.architecture.hidden));
        let linears = linears.try_into().map_err(|_| Error::internal("a block has seven linear layers"))?;
        let weights = LayerWeights { input_norm: input_norm?, post_norm: post_norm?, linears };
        Ok(Layer { weights, use_: self.used(names, &parts) })
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Matrix> {
        let (weight, parts) = self.stored(name, rows, columns)?;
        Ok(Matrix { weight, use_: self.used(vec![name.into()], &parts) })
    }

    fn used(&self, names: Vec<String>, parts: &[String]) -> Use {
        let pages = Pages::of(&self.directory.tensors, parts.iter().map(String::as_str));
        Use { names, pages, checked: AtomicBool::new(false) }
    }

    /// Returns a matrix as stored, and the tensors that it consists of.
    fn stored(&self, name: &str, rows: usize, columns: usize) -> Result<(Weight, Vec<String>)> {
        let source = Source::find(self.directory, name)?;
        let parts = source.parts(name);
        let stored = source.wrap(&self.directory.tensors, name, rows, columns)?;
        Ok((Weight::Stored(Arc::new(stored)), parts))
    }

    fn vector(&self, name: &str, length: usize) -> Result<Tensor> {
        let view = self.directory.tensors.require(name)?;
        view.expect_shape(&[length])?;
        let values = view.to_f32()?;
        check_finite(name, 0, &values)?;
        Tensor::from_vec(values, length, &Device::Cpu).and_then(|t| t.to_dtype(self.dtype)).numeric()
    }
}
