//! The frozen base on a GPU: every block as a run of bytes as the file holds it, widened when the sweep comes to it.
//!
//! Resident runs are uploaded once. Streamed ones take turns in two places: while a block computes, the next one is copied from
//! the page cache to page-locked memory and from there to the device. Quantized matrices are widened once a block, each to the place
//! of its own; or, to save memory, for every product, all to one place.

use crate::{
    architecture::{Architecture, Module, Parts},
    base::{LayerWeights, Placement},
    norm::NormWeights,
    numeric::Numeric,
    projection::Linear,
    weights::Norms,
};
use candle_core::Tensor as HostTensor;
use kto_cli::{Error, Result};
use kto_kernels::{
    Stored, Weight,
    device::{Device, FrozenWeight, Tensor},
    gpu::{
        Gpu, Mark, Memory, Packed, Pinned, Stream,
        products::{Frozen, SharedPlace, Tiles},
    },
};
use std::{cell::RefCell, sync::Arc};

/// One block as the host has it.
pub(crate) struct HostLayer<'a> {
    pub norms: &'a Norms<NormWeights<HostTensor>>,
    /// As stored, by [`Architecture::modules`].
    pub matrices: &'a [Arc<Stored>],
    /// By [`Module`].
    pub biases: Vec<Option<&'a HostTensor>>,
}

/// The blocks on a GPU.
pub(crate) struct GpuLayers {
    gpu: Arc<Gpu>,
    layers: Vec<GpuLayer>,
    /// The matrices of a block, and which rows of them are whose.
    modules: (&'static [Module], Parts),
    widened: Widened,
    runs: Runs,
}

/// Where matrices are widened.
enum Widened {
    /// By matrix.
    Apart(Vec<Arc<Memory>>),
    /// One place for all.
    Shared(Arc<Memory>),
}

struct GpuLayer {
    norms: Norms<NormWeights<Tensor>>,
    biases: Vec<Option<Tensor>>,
    packed: Arc<Packed>,
}

enum Runs {
    Resident(Vec<Arc<Memory>>),
    Streamed(RefCell<Slots>),
}

/// Two blocks on their way or in use.
struct Slots {
    slots: [Slot; 2],
    /// The block of the last fetch, and whether the sweep goes up.
    last: usize,
    up: bool,
}

struct Slot {
    host: Pinned,
    memory: Arc<Memory>,
    holds: Option<usize>,
    /// End of the upload, and of the last use.
    uploaded: Option<Mark>,
    used: Option<Mark>,
}

impl GpuLayers {
    /// Uploads what is resident.
    pub fn new<'a>(
        device: &Device,
        architecture: &Architecture,
        layers: impl Iterator<Item = HostLayer<'a>>,
        placement: Placement,
        mut uploaded: impl FnMut(usize),
    ) -> Result<Self> {
        let Device::Gpu(gpu, element) = device else {
            return Err(Error::internal("weights for a GPU that is none"));
        };
        let mut own = Vec::new();
        for layer in layers {
            let bring = |t: &HostTensor| device.bring(t).numeric();
            own.push(GpuLayer {
                norms: layer.norms.map(architecture, |norm, _| norm.map(bring))?,
                biases: layer.biases.iter().map(|b| b.map(bring).transpose()).collect::<Result<_>>()?,
                packed: Arc::new(Packed::new(layer.matrices.to_vec(), *element)),
            });
        }
        let size = |m: usize| {
            let quantized = own.iter().filter(|l| l.packed.is_quantized(m));
            quantized.map(|l| l.packed.widened_bytes(m)).max().unwrap_or(0)
        };
        let modules = (architecture.modules(), architecture.parts());
        let sizes = (0..modules.0.len()).map(size);
        let place = |bytes: usize| gpu.take(bytes).map(Arc::new).numeric();
        let widened = match placement.share_widened {
            true => Widened::Shared(place(sizes.max().unwrap_or(0))?),
            false => Widened::Apart(sizes.map(place).collect::<Result<_>>()?),
        };
        let most = own.iter().map(|l| l.packed.bytes()).max().unwrap_or(0);
        let slot = || -> Result<Slot> {
            let (host, memory) = (gpu.pin(most).numeric()?, Arc::new(gpu.take(most).numeric()?));
            Ok(Slot { host, memory, holds: None, uploaded: None, used: None })
        };
        let runs = match placement.streamed {
            true => Runs::Streamed(RefCell::new(Slots { slots: [slot()?, slot()?], last: 0, up: true })),
            false => {
                let mut staged = gpu.pin(most).numeric()?;
                let mut resident = Vec::with_capacity(own.len());
                for (i, layer) in own.iter().enumerate() {
                    let memory = Arc::new(gpu.take(layer.packed.bytes()).numeric()?);
                    staged.write(|run| layer.packed.write(&mut run[..layer.packed.bytes()]));
                    staged.upload(0, memory.address(), layer.packed.bytes()).numeric()?;
                    let done = gpu.order(Stream::Copy, Stream::Compute).numeric()?;
                    gpu.machine().wait(&done).numeric()?;
                    resident.push(memory);
                    uploaded(i);
                }
                Runs::Resident(resident)
            }
        };
        Ok(Self { gpu: gpu.clone(), layers: own, modules, widened, runs })
    }

    /// Returns the weights of block `layer`. They are good until the next block is asked for.
    pub fn layer(&self, layer: usize) -> Result<LayerWeights> {
        let memory = match &self.runs {
            Runs::Resident(all) => all[layer].clone(),
            Runs::Streamed(slots) => {
                slots.borrow_mut().fetch(&self.gpu, layer, &self.layers[layer].packed)?
            }
        };
        let own = &self.layers[layer];
        let mut linears = Vec::with_capacity(Module::ALL.len());
        for (i, module) in self.modules.0.iter().enumerate() {
            let place = match &self.widened {
                Widened::Apart(places) => &places[i],
                Widened::Shared(place) => place,
            };
            let shared = matches!(self.widened, Widened::Shared(_)) && own.packed.is_quantized(i);
            let whole = match shared {
                true => None,
                false => Some(own.packed.matrix(&memory, i, || Ok(place.clone())).numeric()?),
            };
            for (part, rows) in self.modules.1.of(*module) {
                let weight = match &whole {
                    Some(whole) => Frozen::Whole(whole.narrow(rows.start, rows.len()).numeric()?),
                    None => Frozen::Shared(SharedPlace {
                        packed: own.packed.clone(),
                        run: memory.clone(),
                        matrix: i,
                        rows,
                        place: place.clone(),
                    }),
                };
                linears.push(Linear {
                    weight: FrozenWeight::Gpu(weight),
                    bias: own.biases[part as usize].clone(),
                });
            }
        }
        let linears = linears.try_into().map_err(|_| Error::internal("a block has seven linear layers"))?;
        Ok(LayerWeights { norms: own.norms.clone(), linears })
    }

    /// Says that all work with block `layer` is queued: the next one may come.
    pub fn release(&self, layer: usize) -> Result<()> {
        let Runs::Streamed(slots) = &self.runs else { return Ok(()) };
        let mut slots = slots.borrow_mut();
        let used = self.gpu.machine().mark(Stream::Compute).numeric()?;
        if let Some(slot) = slots.slots.iter_mut().find(|s| s.holds == Some(layer)) {
            slot.used = Some(used);
        }
        let next = if slots.up { layer + 1 } else { layer.wrapping_sub(1) };
        match self.layers.get(next) {
            Some(own) => slots.load(&self.gpu, next, &own.packed).map(|_| ()),
            None => Ok(()),
        }
    }
}

impl Slots {
    fn fetch(&mut self, gpu: &Gpu, layer: usize, packed: &Packed) -> Result<Arc<Memory>> {
        // A sweep goes up from the first block; one that asks for a block again turns there.
        self.up = layer == 0 || layer > self.last;
        self.last = layer;
        let slot = self.load(gpu, layer, packed)?;
        if let Some(uploaded) = &slot.uploaded {
            gpu.machine().follow(Stream::Compute, uploaded).numeric()?;
        }
        Ok(slot.memory.clone())
    }

    /// Begins to bring a block that is not there yet, in the place of the one that was used longer ago.
    fn load(&mut self, gpu: &Gpu, layer: usize, packed: &Packed) -> Result<&Slot> {
        if let Some(found) = self.slots.iter().position(|s| s.holds == Some(layer)) {
            return Ok(&self.slots[found]);
        }
        let place = usize::from(self.slots[0].holds == Some(self.last));
        let slot = &mut self.slots[place];
        if let Some(uploaded) = slot.uploaded.take() {
            gpu.machine().wait(&uploaded).numeric()?;
        }
        slot.host.write(|run| packed.write(&mut run[..packed.bytes()]));
        if let Some(used) = slot.used.take() {
            gpu.machine().follow(Stream::Copy, &used).numeric()?;
        }
        slot.host.upload(0, slot.memory.address(), packed.bytes()).numeric()?;
        slot.uploaded = Some(gpu.machine().mark(Stream::Copy).numeric()?);
        slot.holds = Some(layer);
        Ok(&self.slots[place])
    }
}

fn stored(weight: &Weight) -> Result<Arc<Stored>> {
    match weight {
        Weight::Stored(stored) => Ok(stored.clone()),
        Weight::Dense(_) => Err(Error::internal("a widened weight for a GPU")),
    }
}

/// Brings a matrix that is used once a sweep, such as the head: whole, or in tiles of so many rows.
pub(crate) fn frozen(device: &Device, weight: &Weight, tile_rows: Option<usize>) -> Result<FrozenWeight> {
    let Device::Gpu(gpu, element) = device else {
        return Ok(FrozenWeight::Host(weight.clone()));
    };
    let stored = stored(weight)?;
    let (rows, columns) = (stored.rows(), stored.columns());
    let tile_rows = tile_rows.map_or(rows, |r| r.clamp(1, rows));
    let tiles: Option<Vec<Packed>> = (0..rows)
        .step_by(tile_rows.max(1))
        .map(|start| {
            let tile = stored.rows_of(start..(start + tile_rows).min(rows))?;
            Some(Packed::new(vec![Arc::new(tile)], *element))
        })
        .collect();
    if let Some(tiles) = tiles.filter(|t| t.len() > 1) {
        return Ok(FrozenWeight::Gpu(Frozen::Tiles(Arc::new(Tiles { rows, columns, tiles, tile_rows }))));
    }
    let packed = Packed::new(vec![stored], *element);
    let memory = Arc::new(gpu.take(packed.bytes()).numeric()?);
    let mut run = vec![0; packed.bytes()];
    packed.write(&mut run);
    gpu.machine().upload(memory.address(), &run).numeric()?;
    let matrix = packed.matrix(&memory, 0, || Ok(Arc::new(gpu.take(packed.widened_bytes(0))?))).numeric()?;
    Ok(FrozenWeight::Gpu(Frozen::Whole(matrix)))
}
