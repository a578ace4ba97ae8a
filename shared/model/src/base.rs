//! The frozen base model: weights of one block at a time, from a dense or a 4-bit checkpoint.

use crate::{
    architecture::{Architecture, Module},
    numeric::Numeric,
    projection::Linear,
    weights,
};
use candle_core::{DType, Device, Tensor};
use kto_cli::{Error, Result};
use kto_formats::{bnb::Nf4Tensor, model_dir::ModelDir, tensors::check_finite};
use kto_kernels::{RopeTable, Weight};
use rayon::prelude::*;

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
    /// (V, C)
    pub embedding: Weight,
    /// (C)
    pub final_norm: Tensor,
    /// (V, C); the embedding itself when tied.
    pub head: Weight,
    /// Cosines and sines for every position in use.
    pub rope: RopeTable,
    dtype: DType,
    directory: ModelDir,
    /// Blocks without a 4-bit weight, and all blocks after [`BaseModel::densify`]; `None` is dequantized at each use.
    layers: Vec<Option<LayerWeights>>,
}

impl BaseModel {
    /// Loads a model for rows of at most `positions` tokens. `dtype` is f32, or f64 as the oracle of tests.
    /// 4-bit weights stay as stored; the others are widened now.
    /// Errors (65): a tensor that is missing, of another shape than config.json says, or not finite.
    pub fn load(directory: ModelDir, dtype: DType, positions: usize) -> Result<Self> {
        let architecture = Architecture::from_config(&directory.config)?;
        weights::check(&architecture, &directory)?;
        let (v, c) = (architecture.vocab_size, architecture.hidden);
        let read = |name: &str, shape: &[usize]| dense(&directory, name, shape, dtype);
        let embedding = Weight::Dense(read("model.embed_tokens.weight", &[v, c])?);
        let final_norm = read("model.norm.weight", &[c])?;
        let head = if architecture.tied {
            embedding.clone()
        } else {
            Weight::Dense(read("lm_head.weight", &[v, c])?)
        };
        let rope = RopeTable::new(architecture.shape.dim, architecture.rope_theta, positions.max(1));
        let mut this =
            Self { embedding, final_norm, head, rope, dtype, directory, layers: Vec::new(), architecture };
        for layer in 0..this.architecture.layers {
            let weights = if this.is_quantized(layer)? { None } else { Some(this.read_layer(layer)?) };
            this.layers.push(weights);
        }
        Ok(this)
    }

    /// Returns the weights of block `layer`, dequantized if need be.
    pub fn layer(&self, layer: usize) -> Result<LayerWeights> {
        match &self.layers[layer] {
            Some(weights) => Ok(weights.clone()),
            None => self.read_layer(layer),
        }
    }

    /// Keeps every block dequantized: generation passes over all blocks for every token.
    pub fn densify(&mut self) -> Result<()> {
        for layer in 0..self.layers.len() {
            self.layers[layer] = Some(self.layer(layer)?);
        }
        Ok(())
    }

    /// Returns the directory that the model came from.
    pub fn directory(&self) -> &ModelDir {
        &self.directory
    }

    /// Returns the element type of all weights and activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn is_quantized(&self, layer: usize) -> Result<bool> {
        for module in Module::ALL {
            if Nf4Tensor::find(&self.directory.tensors, &weight_name(module, layer))?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn read_layer(&self, layer: usize) -> Result<LayerWeights> {
        let norm = |name: &str| {
            let name = format!("model.layers.{layer}.{name}.weight");
            dense(&self.directory, &name, &[self.architecture.hidden], self.dtype)
        };
        let mut linears = Vec::with_capacity(7);
        for module in Module::ALL {
            linears.push(self.read_linear(module, layer)?);
        }
        let linears = linears.try_into().map_err(|_| Error::internal("a block has seven linear layers"))?;
        Ok(LayerWeights {
            input_norm: norm("input_layernorm")?,
            post_norm: norm("post_attention_layernorm")?,
            linears,
        })
    }

    fn read_linear(&self, module: Module, layer: usize) -> Result<Linear> {
        let name = weight_name(module, layer);
        let (rows, columns) = self.architecture.weight_shape(module);
        let weight = match Nf4Tensor::find(&self.directory.tensors, &name)? {
            Some(packed) => {
                if packed.state.shape != [rows, columns] {
                    let found = format!(
                        "tensor \"{name}\" has shape {:?}, expected [{rows}, {columns}]",
                        packed.state.shape
                    );
                    return Err(Error::data(found));
                }
                let values = dequantize(&packed, &name)?;
                Tensor::from_vec(values, (rows, columns), &Device::Cpu)
                    .and_then(|t| t.to_dtype(self.dtype))
                    .numeric()?
            }
            None => dense(&self.directory, &name, &[rows, columns], self.dtype)?,
        };
        let bias = match self.architecture.has_bias(module) {
            true => {
                Some(dense(&self.directory, &format!("{}.bias", module.path(layer)), &[rows], self.dtype)?)
            }
            false => None,
        };
        Ok(Linear { weight: Weight::Dense(weight), bias })
    }
}

fn weight_name(module: Module, layer: usize) -> String {
    format!("{}.weight", module.path(layer))
}

/// Values decoded by one thread at a time.
const PIECE: usize = 1 << 16;

fn dequantize(packed: &Nf4Tensor, name: &str) -> Result<Vec<f32>> {
    let mut values = vec![0.0f32; packed.len()];
    values.par_chunks_mut(PIECE).enumerate().try_for_each(|(i, out)| {
        packed.dequantize_range(i * PIECE, out)?;
        check_finite(name, i * PIECE, out)
    })?;
    Ok(values)
}

/// Reads a stored tensor, checks shape and finiteness, widens it.
fn dense(directory: &ModelDir, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let view = directory.tensors.require(name)?;
    view.expect_shape(shape)?;
    let values = view.to_f32()?;
    check_finite(name, 0, &values)?;
    Tensor::from_vec(values, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype)).numeric()
}
