//! The adapter on a GPU: its factors in the computation's type, brought for a sweep, and the gradient of one block at a time in f32.
//!
//! The masters, the gradient of the step and the optimizer's state are the host's, in f32. A block's gradient is complete when the
//! sweep leaves the block; it goes to page-locked memory while the next block computes.

use crate::{
    architecture::{Module, Parts},
    block::BlockFactors,
    lora::{Factors, LayerFactors, Lora},
    numeric::Numeric,
    whole,
};
use candle_core::Tensor as HostTensor;
use kto_cli::Result;
use kto_kernels::{
    Dense,
    device::{Device, Tensor},
    gpu::{Gpu, Mark, Matrix, Memory, Pinned, Stream},
};
use rayon::prelude::*;
use std::{cell::RefCell, sync::Arc};

/// Distance between tensors, in bytes.
const ALIGN: usize = 256;

/// Where a tensor lies in a run of bytes, and its shape.
type Spot = (usize, usize, usize);

/// The matrices of a block, which are brought.
fn matrices(block: &LayerFactors) -> impl Iterator<Item = &HostTensor> {
    block.iter().flatten().flat_map(|f| [&f.a, &f.b])
}

/// All that has a gradient: the matrices, and the magnitudes, of which a sweep needs gains only.
fn trained(block: &LayerFactors) -> impl Iterator<Item = &HostTensor> {
    block.iter().flatten().flat_map(|f| [&f.a, &f.b].into_iter().chain(&f.magnitude))
}

/// Lays tensors out one after the other; returns their places and the size of all.
fn places<'t>(tensors: impl Iterator<Item = &'t HostTensor>, from: usize, size: usize) -> (Vec<Spot>, usize) {
    let (mut all, mut at) = (Vec::new(), from);
    for tensor in tensors {
        let (rows, columns) = match tensor.dims() {
            [rows, columns] => (*rows, *columns),
            dims => (1, dims.iter().product()),
        };
        all.push((at, rows, columns));
        at = (at + rows * columns * size).next_multiple_of(ALIGN);
    }
    (all, at)
}

/// Returns factors of the shape of `like` at some places of a memory. Magnitudes have a place where gradients are; what is brought leaves
/// them on the host.
fn within(
    (like, parts): (&LayerFactors, Parts),
    memory: &Arc<Memory>,
    places: &[Spot],
    element: Dense,
) -> Result<BlockFactors> {
    let with_magnitudes = places.len() == trained(like).count();
    let mut places = places.iter();
    let mut next = || {
        places.next().map(|(at, r, c)| Tensor::Gpu(Matrix::in_memory(memory.clone(), *at, *r, *c, element)))
    };
    let mut out = BlockFactors::default();
    for module in Module::NAMED {
        let Some(f) = &like[module as usize] else { continue };
        if let Some((a, b)) = next().zip(next()) {
            let magnitude = match &f.magnitude {
                Some(_) if with_magnitudes => next(),
                on_host => on_host.clone().map(Tensor::Host),
            };
            split(&mut out, (module, parts), Factors { a, b, scale: f.scale, magnitude })?;
        }
    }
    Ok(out)
}

/// Gives the factors of a matrix to the modules whose rows it has: all get A, each its rows of B and of the magnitudes.
fn split(out: &mut BlockFactors, of: (Module, Parts), f: Factors<Tensor>) -> Result<()> {
    for (part, rows) in of.1.of(of.0) {
        let b = f.b.narrow(rows.start, rows.len()).numeric()?;
        let magnitude = f.magnitude.as_ref().map(|m| m.part(rows.start, rows.len()).numeric()).transpose()?;
        out[part as usize] = Some(Factors { a: f.a.clone(), b, scale: f.scale, magnitude });
    }
    Ok(())
}

/// Returns the factors of every block where a sweep computes; on the host they are the same memory.
pub(crate) fn bring(device: &Device, lora: &Lora) -> Result<Vec<BlockFactors>> {
    let Device::Gpu(gpu, element) = device else {
        return lora.layers.iter().map(|block| on_host(device, block, lora.parts)).collect();
    };
    if !lora.whole.is_empty() {
        return Err(whole::not_on_gpu());
    }
    let (mut all, mut end) = (Vec::with_capacity(lora.layers.len()), 0);
    for block in &lora.layers {
        let (of, next) = places(matrices(block), end, element.size());
        (end, _) = (next, all.push(of));
    }
    let memory = Arc::new(gpu.borrow(end).numeric()?);
    let tensors: Vec<_> = lora.layers.iter().flat_map(matrices).zip(all.iter().flatten()).collect();
    tensors.par_iter().try_for_each(|(tensor, (at, rows, columns))| {
        let mut bytes = vec![0; rows * columns * element.size()];
        element.encode(&floats(tensor)?, &mut bytes);
        gpu.machine().upload(memory.address() + *at as u64, &bytes).numeric()
    })?;
    let blocks = lora.layers.iter().zip(&all);
    blocks.map(|(block, places)| within((block, lora.parts), &memory, places, *element)).collect()
}

fn on_host(device: &Device, block: &LayerFactors, parts: Parts) -> Result<BlockFactors> {
    let mut out = BlockFactors::default();
    for module in Module::NAMED {
        if let Some(f) = &block[module as usize] {
            let bring = |t: &HostTensor| device.bring(t).numeric();
            let magnitude = f.magnitude.as_ref().map(bring).transpose()?;
            let factors = Factors { a: bring(&f.a)?, b: bring(&f.b)?, scale: f.scale, magnitude };
            split(&mut out, (module, parts), factors)?;
        }
    }
    Ok(out)
}

fn floats(tensor: &HostTensor) -> Result<Vec<f32>> {
    tensor.to_dtype(candle_core::DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).numeric()
}

/// The gradient of an adapter while a way back computes it.
pub(crate) enum Gradient<'a> {
    /// The host's own.
    Host(&'a Lora, &'a Device),
    Gpu(Box<GpuGradient<'a>>),
}

/// The memory of a gradient: two blocks' on the device, and all of it on the host.
pub(crate) struct GradientMemory {
    buffers: [Arc<Memory>; 2],
    host: Pinned,
    sizes: (usize, usize),
}

pub(crate) struct GpuGradient<'a> {
    gpu: Arc<Gpu>,
    lora: &'a Lora,
    /// Places of each block's tensors in its own run, the run's size and its place in the host's memory.
    blocks: Vec<(Vec<Spot>, usize, usize)>,
    memory: GradientMemory,
    copied: [Option<Mark>; 2],
}

impl<'a> Gradient<'a> {
    /// Prepares to add to `gradients`. `memory` is kept from sweep to sweep.
    pub fn new(
        device: &'a Device,
        gradients: &'a Lora,
        memory: &RefCell<Option<GradientMemory>>,
    ) -> Result<Self> {
        let Device::Gpu(gpu, _) = device else { return Ok(Self::Host(gradients, device)) };
        let (mut blocks, mut end, mut most) = (Vec::with_capacity(gradients.layers.len()), 0, 0);
        for block in &gradients.layers {
            let (of, bytes) = places(trained(block), 0, Dense::F32.size());
            blocks.push((of, bytes, end));
            (end, most) = (end + bytes, most.max(bytes));
        }
        let memory = match memory.take().filter(|m| m.sizes == (most, end)) {
            Some(memory) => memory,
            None => {
                let buffer = || Ok(Arc::new(gpu.take(most).numeric()?));
                let (buffers, host) = ([buffer()?, buffer()?], gpu.pin(end).numeric()?);
                GradientMemory { buffers, host, sizes: (most, end) }
            }
        };
        let (gpu, lora) = (gpu.clone(), gradients);
        Ok(Self::Gpu(Box::new(GpuGradient { gpu, lora, blocks, memory, copied: [None, None] })))
    }

    /// Returns where the gradient of a block is added to.
    pub fn begin(&self, layer: usize) -> Result<BlockFactors> {
        match self {
            Self::Host(lora, device) => on_host(device, &lora.layers[layer], lora.parts),
            Self::Gpu(g) => {
                let machine = g.gpu.machine();
                let (places, bytes, _) = &g.blocks[layer];
                let memory = &g.memory.buffers[layer % 2];
                if let Some(copied) = &g.copied[layer % 2] {
                    machine.follow(Stream::Compute, copied).numeric()?;
                }
                if *bytes > 0 {
                    machine.clear(memory.address(), *bytes).numeric()?;
                }
                within((&g.lora.layers[layer], g.lora.parts), memory, places, Dense::F32)
            }
        }
    }

    /// Says that all work on the gradient of a block is queued.
    pub fn end(&mut self, layer: usize) -> Result<()> {
        let Self::Gpu(g) = self else { return Ok(()) };
        g.gpu.order(Stream::Compute, Stream::Copy).numeric()?;
        let (_, bytes, at) = g.blocks[layer];
        g.memory.host.download(at, g.memory.buffers[layer % 2].address(), bytes).numeric()?;
        g.copied[layer % 2] = Some(g.gpu.machine().mark(Stream::Copy).numeric()?);
        Ok(())
    }

    /// Adds the gradients of the blocks from `first` on to the host's, and leaves the memory for the next sweep.
    pub fn finish(self, first: usize, home: &RefCell<Option<GradientMemory>>) -> Result<()> {
        let Self::Gpu(g) = self else { return Ok(()) };
        let done = g.gpu.machine().mark(Stream::Copy).numeric()?;
        g.gpu.machine().wait(&done).numeric()?;
        let bytes = g.memory.host.read();
        let mut all = Vec::new();
        for (block, (places, _, start)) in g.lora.layers.iter().zip(&g.blocks).skip(first) {
            all.extend(trained(block).zip(places).map(|(tensor, (at, rows, columns))| {
                (tensor, (*rows, *columns), &bytes[start + at..][..rows * columns * 4])
            }));
        }
        all.par_iter()
            .try_for_each(|(tensor, shape, bytes)| {
                let values: Vec<f32> =
                    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                let found = HostTensor::from_vec(values, *shape, &candle_core::Device::Cpu)?
                    .to_dtype(tensor.dtype())?;
                kto_kernels::add(&tensor.reshape(*shape)?, &found)
            })
            .numeric()?;
        *home.borrow_mut() = Some(g.memory);
        Ok(())
    }
}
