//! What is trained: LoRA factors of every block and tensors of the base that are trained whole; their gradients, and their form on disk.

use crate::{
    architecture::{Architecture, Module, Parts},
    numeric::Numeric,
    whole::{self, Whole},
};
use candle_core::{DType, Device, Tensor};
use kto_cli::{Error, Result};
use kto_formats::{
    adapter::{Adapter, AdapterConfig, AdapterMeta},
    lora::{LoraModule, Saved},
};
use std::collections::BTreeMap;

pub use crate::{
    lora_layout::{Init, LoraLayout, LoraSpec, Place},
    projection::Factors,
};

/// The factors of one block as they are trained, by [`Module::NAMED`]: one pair for each matrix that the checkpoint has.
pub type LayerFactors = [Option<Factors>; Module::NAMED.len()];

/// The trained part of a decoder.
#[derive(Clone, Debug)]
pub struct Lora {
    /// Factors by block and module.
    pub layers: Vec<LayerFactors>,
    /// What takes the place of the base's tensors, by name.
    pub whole: Whole,
    /// Which rows of a fused matrix are whose.
    pub parts: Parts,
}

impl Lora {
    /// Returns a fresh adapter of one rank on some modules of every block; see [`Lora::laid_out`].
    pub fn fresh(architecture: &Architecture, spec: &LoraSpec, seed: u64, dtype: DType) -> Result<Self> {
        Self::laid_out(architecture, &LoraLayout::uniform(architecture, spec), seed, dtype)
    }

    /// Returns a fresh adapter, a pure function of `seed`. What is trained whole is still to be filled
    /// ([`Lora::fill`]), and DoRA's magnitudes to be measured ([`Lora::measure`]).
    pub fn laid_out(
        architecture: &Architecture,
        layout: &LoraLayout,
        seed: u64,
        dtype: DType,
    ) -> Result<Self> {
        let mut layers = Vec::with_capacity(architecture.layers);
        for (layer, places) in layout.blocks.iter().enumerate() {
            let mut block = LayerFactors::default();
            for (module, place) in Module::NAMED.into_iter().zip(places) {
                let Some(Place { rank, scale }) = *place else { continue };
                let (out_features, in_features) = architecture.weight_shape(module);
                let stream = [seed, layer as u64, module as u64];
                let (a, b) = layout.init.draw(stream, rank, out_features, in_features);
                let magnitude = layout.dora.then(|| vec![1.0; out_features]);
                let own = LoraModule { a, b, r: rank, in_features, out_features, scale, magnitude };
                block[module as usize] = Some(factors(&own, dtype)?);
            }
            layers.push(block);
        }
        let zeros = |shape: &Vec<usize>| Tensor::zeros(&shape[..], dtype, &Device::Cpu).numeric();
        let whole = layout.whole.iter().map(|(name, shape)| Ok((name.clone(), zeros(shape)?)));
        Ok(Self { layers, whole: whole.collect::<Result<_>>()?, parts: architecture.parts() })
    }

    /// Takes an adapter read from disk. Errors (65): a tensor that fits no module of this decoder, or has another shape; one that the
    /// settings name and the file lacks.
    pub fn from_adapter(architecture: &Architecture, adapter: &Adapter, dtype: DType) -> Result<Self> {
        let mut layers = vec![LayerFactors::default(); architecture.layers];
        let places: BTreeMap<String, (usize, Module)> = (0..architecture.layers)
            .flat_map(|l| architecture.modules().iter().map(move |m| (m.path(l), (l, *m))))
            .collect();
        for (name, pair) in &adapter.tensors {
            let Some(&(layer, module)) = places.get(name) else {
                return Err(Error::data(format!(
                    "adapter: \"{name}\" is no linear layer of this {} model",
                    architecture.family
                )));
            };
            let (out, input) = architecture.weight_shape(module);
            if (pair.out_features, pair.in_features) != (out, input) {
                return Err(Error::data(format!(
                    "adapter: \"{name}\" is made for a weight of shape [{}, {}], the model has [{out}, {input}]",
                    pair.out_features, pair.in_features
                )));
            }
            layers[layer][module as usize] = Some(factors(pair, dtype)?);
        }
        let needed = whole::chosen(architecture, &adapter.config.peft()?)?;
        whole::take(architecture, &needed, adapter.saved.iter().map(|(name, s)| (name, &s.shape[..])))?;
        let tensor = |s: &Saved| {
            Tensor::from_slice(&s.values, &s.shape[..], &Device::Cpu)
                .and_then(|t| t.to_dtype(dtype))
                .numeric()
        };
        let whole = adapter.saved.iter().map(|(name, s)| Ok((name.clone(), tensor(s)?)));
        Ok(Self { layers, whole: whole.collect::<Result<_>>()?, parts: architecture.parts() })
    }

    /// Returns the form that goes to disk.
    pub fn to_adapter(&self, config: AdapterConfig) -> Result<Adapter> {
        let mut tensors = BTreeMap::new();
        let flat = |t: &Tensor| {
            t.to_dtype(DType::F32).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1::<f32>()).numeric()
        };
        for (name, f) in self.named() {
            let (r, in_features) = f.a.dims2().numeric()?;
            let (out_features, _) = f.b.dims2().numeric()?;
            let (a, b, magnitude) = (flat(&f.a)?, flat(&f.b)?, f.magnitude.as_ref().map(flat).transpose()?);
            let scale = f.scale;
            tensors.insert(name, LoraModule { a, b, r, in_features, out_features, scale, magnitude });
        }
        let saved = |t: &Tensor| Ok(Saved { shape: t.dims().to_vec(), values: flat(t)? });
        let saved = self.whole.iter().map(|(name, t)| Ok((name.clone(), saved(t)?)));
        let saved = saved.collect::<Result<_>>()?;
        Ok(Adapter { config, tensors, saved, meta: AdapterMeta::default() })
    }

    /// Returns the adapted modules by their names in a checkpoint.
    pub fn named(&self) -> impl Iterator<Item = (String, &Factors)> {
        self.layers.iter().enumerate().flat_map(|(l, block)| {
            Module::NAMED.into_iter().filter_map(move |m| block[m as usize].as_ref().map(|f| (m.path(l), f)))
        })
    }

    /// Returns every trained tensor with its name, in the order of [`Lora::tensors`].
    pub fn named_tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let factors = self.named().flat_map(|(name, f)| {
            let magnitude = f.magnitude.as_ref().map(|m| (format!("{name}.lora_magnitude_vector"), m));
            let pair = [(format!("{name}.lora_A"), &f.a), (format!("{name}.lora_B"), &f.b)];
            pair.into_iter().chain(magnitude)
        });
        factors.chain(self.whole.iter().map(|(name, tensor)| (name.clone(), tensor)))
    }

    /// Returns every trained tensor in a fixed order: A, B and perhaps magnitudes, module by module, block by block; then what is
    /// trained whole, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let factors = self.layers.iter().flatten().flatten();
        factors.flat_map(|f| [&f.a, &f.b].into_iter().chain(&f.magnitude)).chain(self.whole.values())
    }

    /// Returns the same shape filled with zeros (gradients, optimizer moments).
    pub fn zeros_like(&self) -> Result<Self> {
        self.map(|t| t.zeros_like())
    }

    /// Returns a copy that shares no memory.
    pub fn deep_copy(&self) -> Result<Self> {
        self.map(|t| t.copy())
    }

    fn map(&self, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        let mut layers = vec![LayerFactors::default(); self.layers.len()];
        for (from, to) in self.layers.iter().zip(&mut layers) {
            for (from, to) in from.iter().zip(to) {
                if let Some(x) = from {
                    let f = |t: &Tensor| f(t).numeric();
                    let magnitude = x.magnitude.as_ref().map(f).transpose()?;
                    *to = Some(Factors { a: f(&x.a)?, b: f(&x.b)?, scale: x.scale, magnitude });
                }
            }
        }
        let whole = self.whole.iter().map(|(name, t)| Ok((name.clone(), f(t).numeric()?)));
        Ok(Self { layers, whole: whole.collect::<Result<_>>()?, parts: self.parts })
    }

    /// Returns the lowest block that has something to train, or lies above a trained embedding; below it nothing needs a gradient.
    pub fn first_layer(&self) -> usize {
        let layers = self.layers.len();
        let factors = self.layers.iter().position(|b| b.iter().any(Option::is_some)).unwrap_or(layers);
        factors.min(whole::first_layer(self.whole.keys(), layers))
    }

    /// Returns the largest rank of the matrix that holds a computed module; 0 where there is none.
    pub(crate) fn rank_of(&self, module: Module) -> usize {
        let holds = |m: &Module| self.parts.of(*m).iter().any(|(part, _)| *part == module);
        let factors = Module::NAMED.into_iter().filter(holds);
        let factors = factors.flat_map(|m| self.layers.iter().filter_map(move |l| l[m as usize].as_ref()));
        factors.map(|f| f.a.dims()[0]).max().unwrap_or(0)
    }

    /// Returns the number of trained parameters.
    pub fn parameters(&self) -> usize {
        self.tensors().map(Tensor::elem_count).sum()
    }
}

fn factors(m: &LoraModule, dtype: DType) -> Result<Factors> {
    let tensor = |v: &[f32], shape: &[usize]| {
        Tensor::from_slice(v, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype)).numeric()
    };
    let magnitude = m.magnitude.as_ref().map(|v| tensor(v, &[m.out_features])).transpose()?;
    let (a, b) = (tensor(&m.a, &[m.r, m.in_features])?, tensor(&m.b, &[m.out_features, m.r])?);
    Ok(Factors { a, b, scale: m.scale, magnitude })
}
