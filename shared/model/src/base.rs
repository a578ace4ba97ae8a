//! The frozen base model: weights as the file holds them, one block at a time.
//!
//! Called by the sweep and by generation, which say when the use of a block begins and ends. Matrices stay in the memory-mapped
//! file in their stored form; norms and biases, which are small, are read once. Invariant: a weight that is not finite is
//! refused, by name, before it is first used; headers are checked before anything else.
//! Deliberately absent: writable weights, and any copy of a matrix.

mod held;

use crate::{
    architecture::Architecture,
    norm::NormWeights,
    numeric::Numeric,
    on_gpu::weights::{GpuLayers, HostLayer, frozen},
    projection::Linear,
    rotary::{Rotary, Scaling, frequencies},
    weights::{self, EMBEDDING, FINAL_NORM, HEAD, Norms},
};
use candle_core::{DType, Tensor as HostTensor};
use held::{Layer, Loader, Matrix, Use};
use kto_cli::{Context, Error, Result, escape};
use kto_formats::{model_dir::ModelDir, tensors::non_finite};
use kto_kernels::{
    RopeTable, Weight,
    device::{Device, FrozenWeight, Rotation, Tensor, scale_in_place},
};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The weights of one block, where a sweep computes.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// As the engine multiplies with them.
    pub norms: Norms<NormWeights<Tensor>>,
    /// By [`crate::architecture::Module`].
    pub linears: [Linear; 7],
}

/// A frozen decoder.
pub struct BaseModel {
    /// Sizes and features.
    pub architecture: Architecture,
    /// Where it computes.
    device: Device,
    final_norm: NormWeights<HostTensor>,
    /// Positions in use.
    positions: usize,
    placed: Placed,
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

/// What is where the sweep computes.
struct Placed {
    final_norm: NormWeights<Tensor>,
    /// Of the blocks that see everything, and of those with a window where it is another.
    rope: (Rotation, Option<Rotation>),
    head: FrozenWeight,
    /// The blocks on a GPU.
    layers: Option<GpuLayers>,
}

/// What of the base is on a GPU all the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Whether blocks come when they are needed.
    pub streamed: bool,
    /// Whether a block's quantized matrices are widened one at a time, for every product, instead of all at once.
    pub share_widened: bool,
    /// Rows of a tile of the head, which then stays on the host.
    pub head_tile: Option<usize>,
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
        let final_norm = loader.norm(FINAL_NORM, c)?;
        let layers = (0..architecture.layers).map(|i| loader.layer(i)).collect::<Result<_>>()?;
        let device = Device::Host(dtype);
        architecture.check_positions(positions)?;
        let rope = rotations(&architecture, positions, &device)?;
        let own = head.as_ref().unwrap_or(&embedding).weight.clone();
        let placed = Placed {
            final_norm: final_norm.map(|norm| Ok::<_, Error>(Tensor::Host(norm.clone())))?,
            rope,
            head: FrozenWeight::Host(own),
            layers: None,
        };
        let mut this = Self {
            architecture,
            device,
            final_norm,
            positions,
            placed,
            directory,
            layers,
            embedding,
            head,
            streaming: false,
            place: AtomicUsize::new(NOWHERE),
        };
        if dtype != DType::F32 {
            this.densify(dtype)?;
        }
        Ok(this)
    }

    /// Lets sweeps compute on a GPU from now on: uploads what is resident there. `uploaded` hears how many blocks are.
    /// Errors: (65) a weight that is not finite; (71) not enough memory on the device.
    pub fn place(
        &mut self,
        device: &Device,
        placement: Placement,
        uploaded: impl FnMut(usize),
    ) -> Result<()> {
        self.check_forms()?;
        for layer in &self.layers {
            layer.use_.pages.prefetch();
            layer.check().at(self.shown())?;
        }
        let host = self.layers.iter().map(|l| HostLayer {
            norms: &l.norms,
            matrices: &l.stored,
            biases: l.linears.iter().map(|(_, b)| b.as_ref()).collect(),
        });
        let layers = GpuLayers::new(device, &self.architecture, host, placement, uploaded)?;
        let own = self.head.as_ref().unwrap_or(&self.embedding).checked().at(self.shown())?;
        let head = frozen(device, own, placement.head_tile)?;
        self.placed = Placed {
            final_norm: self.final_norm.map(|norm| device.bring(norm).numeric())?,
            rope: rotations(&self.architecture, self.positions, device)?,
            head,
            layers: Some(layers),
        };
        self.device = device.clone();
        if !placement.streamed {
            self.layers.iter().for_each(|l| l.use_.pages.release());
        }
        Ok(())
    }

    /// Fails (69) for weights that a GPU does not widen.
    fn check_forms(&self) -> Result<()> {
        let linears = self.layers.iter().flat_map(|l| l.linears.iter().map(|(weight, _)| weight));
        let ends = [&self.embedding].into_iter().chain(&self.head).map(|m| &m.weight);
        let kind = linears.chain(ends).find_map(|weight| match weight {
            Weight::Stored(stored) => stored.micro_float(),
            Weight::Dense(_) => None,
        });
        let Some(kind) = kind else { return Ok(()) };
        let (place, kind) = (self.shown(), format!("{kind:?}").to_lowercase());
        let text = format!("{place}: {kind} weights are not read on a GPU yet");
        Err(Error::new(kto_cli::Kind::Unavailable, text).with_hint("--device cpu"))
    }

    /// Returns the values of a tensor as the checkpoint has them, widened. Error (65): one that is not finite.
    pub(crate) fn values(&self, name: &str, shape: &[usize]) -> Result<HostTensor> {
        let loader = Loader {
            architecture: &self.architecture,
            directory: &self.directory,
            dtype: match &self.device {
                Device::Host(dtype) => *dtype,
                Device::Gpu(..) => DType::F32,
            },
        };
        let name = if name == HEAD && self.architecture.tied { EMBEDDING } else { name };
        let &[rows, columns] = shape else {
            return loader.vector(name, shape.iter().product()).at(self.shown());
        };
        let (stored, _) = loader.stored(name, rows, columns)?;
        if let Some((index, value)) = stored.first_non_finite() {
            return Err(non_finite(name, index, value)).at(self.shown());
        }
        Weight::Stored(stored).to_dense(loader.dtype).numeric()
    }

    /// Returns where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Multiplies rows of the embedding as the decoder wants them.
    pub(crate) fn scale_embedding(&self, rows: &Tensor) -> Result<()> {
        let scale = self.architecture.embedding_scale;
        if scale == 1.0 { Ok(()) } else { scale_in_place(rows, scale).numeric() }
    }

    /// Returns the last norm.
    pub(crate) fn final_norm(&self) -> &NormWeights<Tensor> {
        &self.placed.final_norm
    }

    /// Returns cosines and sines of block `layer` for every position in use; behind them, where sequences longer than
    /// [`Architecture::original_length`] are in use, those of all their positions.
    pub fn rope(&self, layer: usize) -> &Rotation {
        let sliding = self.architecture.sliding.get(layer).copied().unwrap_or(false);
        self.placed.rope.1.as_ref().filter(|_| sliding).unwrap_or(&self.placed.rope.0)
    }

    /// Makes room for rows of at most `positions` tokens.
    pub fn set_positions(&mut self, positions: usize) -> Result<()> {
        self.architecture.check_positions(positions)?;
        self.positions = positions;
        self.placed.rope = rotations(&self.architecture, positions, &self.device)?;
        Ok(())
    }

    /// Returns the weights of block `layer` and begins to read the block that the sweep will want next. On a GPU they are good until
    /// the next block is asked for. Error (65) at the first use: a weight that is not finite.
    pub fn layer(&self, layer: usize) -> Result<LayerWeights> {
        if let Some(on_gpu) = &self.placed.layers {
            return on_gpu.layer(layer);
        }
        self.enter(layer + 1);
        let own = &self.layers[layer];
        own.check().at(self.shown())?;
        let bring = |t: &HostTensor| Tensor::Host(t.clone());
        let norm = |n: &NormWeights<HostTensor>| n.map(|t| Ok(bring(t)));
        let linear = |(weight, bias): &(Weight, Option<HostTensor>)| Linear {
            weight: FrozenWeight::Host(weight.clone()),
            bias: bias.as_ref().map(bring),
        };
        let linears: Vec<Linear> = own.linears.iter().map(linear).collect();
        let linears = linears.try_into().map_err(|_| Error::internal("a block has seven linear layers"))?;
        Ok(LayerWeights { norms: own.norms.map(&self.architecture, |n, _| norm(n))?, linears })
    }

    /// Returns the sums of the squares of the rows of a matrix of block `layer`, whose use has begun.
    pub(crate) fn row_squares(&self, layer: usize, module: usize) -> Result<&[f64]> {
        let own = &self.layers[layer];
        if let Some(found) = own.squares[module].get() {
            return Ok(found);
        }
        let found = own.linears[module].0.row_squares().numeric()?;
        if self.placed.layers.is_some() {
            // Nothing else reads the file's pages once the weights are on a GPU, or not soon.
            own.use_.pages.release();
        }
        Ok(own.squares[module].get_or_init(|| found))
    }

    /// Returns the embedding (V, C). A sweep begins here. Error as for [`BaseModel::layer`].
    pub fn embedding(&self) -> Result<&Weight> {
        self.enter(0);
        self.embedding.checked().at(self.shown())
    }

    /// Returns the head (V, C), which is the embedding when tied. Error as for [`BaseModel::layer`].
    pub fn head(&self) -> Result<&FrozenWeight> {
        if self.placed.layers.is_none() {
            self.enter(self.layers.len() + 1);
            self.head.as_ref().unwrap_or(&self.embedding).checked().at(self.shown())?;
        }
        Ok(&self.placed.head)
    }

    /// Decides whether the memory of what is not in use goes back to the system from now on ([`BaseModel::release`] and its like).
    pub fn set_streaming(&mut self, streaming: bool) {
        self.streaming = streaming;
        self.layers.iter().for_each(|layer| self.drop_pages(&layer.use_));
        self.release_embedding();
        self.release_head();
    }

    /// Says that the use of block `layer` ends for now. When streaming its pages are dropped; a GPU begins to bring the next one.
    pub fn release(&self, layer: usize) -> Result<()> {
        match &self.placed.layers {
            Some(on_gpu) => on_gpu.release(layer),
            None => {
                self.drop_pages(&self.layers[layer].use_);
                Ok(())
            }
        }
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
        let layer = &self.layers[layer];
        match &layer.linears[..] {
            [(Weight::Dense(_), _), ..] => layer.linears.iter().map(|(w, _)| bytes(w)).sum(),
            _ => layer.stored.iter().map(|matrix| matrix.bytes()).sum(),
        }
    }

    /// Returns the bytes of the head beside the embedding: 0 when tied.
    pub fn bytes_head(&self) -> usize {
        self.head.as_ref().map_or(0, |head| bytes(&head.weight))
    }

    /// Widens everything to an element type that stored weights are not read in. Error (65): a weight that is not finite.
    fn densify(&mut self, dtype: DType) -> Result<()> {
        for layer in &mut self.layers {
            layer.check()?;
            for (weight, _) in &mut layer.linears {
                *weight = Weight::Dense(weight.to_dense(dtype).numeric()?);
            }
            layer.use_.pages.release();
            layer.use_ = Use::default();
        }
        self.embedding.densify(dtype)?;
        if let Some(head) = &mut self.head {
            head.densify(dtype)?;
        }
        let own = self.head.as_ref().unwrap_or(&self.embedding).weight.clone();
        self.placed.head = FrozenWeight::Host(own);
        Ok(())
    }

    /// Returns the directory that the model came from.
    pub fn directory(&self) -> &ModelDir {
        &self.directory
    }

    fn shown(&self) -> String {
        escape(&self.directory.path.display().to_string())
    }
}

fn bytes(weight: &Weight) -> usize {
    match weight {
        Weight::Dense(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
        Weight::Stored(stored) => stored.bytes(),
    }
}

fn rotations(
    architecture: &Architecture,
    positions: usize,
    device: &Device,
) -> Result<(Rotation, Option<Rotation>)> {
    let (head, positions) = (architecture.shape.dim, positions.max(1));
    let bring = |rotary: &Rotary| {
        let scaled = |length: usize, positions: usize| {
            let frequencies = frequencies(rotary, length);
            RopeTable::of_frequencies(head, &frequencies, rotary.attention_factor(), positions)
        };
        let table = match rotary.scaling {
            // Rounded as transformers rounds it, to the last bit.
            Scaling::Default if rotary.dim == head => RopeTable::new(head, rotary.theta, positions),
            _ => match architecture.original_length().filter(|length| *length < positions) {
                Some(length) => scaled(length, length).followed_by(scaled(positions, positions)),
                None => scaled(positions, positions),
            },
        };
        Rotation::new(table, device).numeric()
    };
    Ok((bring(&architecture.rotary)?, architecture.sliding_rotary.as_ref().map(bring).transpose()?))
}
