//! DoRA: the rows of an adapted weight W + scale·B·A are scaled to trained lengths, the magnitudes.
//!
//! Called by the sweep and by generation, once for each block they enter. Formula (arXiv 2402.09353, as PEFT 0.21.2 computes it):
//! gain = magnitude / ‖W + scale·B·A‖ by rows, the norm without gradient. The norm of W alone is computed once; what A and B add to it comes
//! from A·Wᵀ and A·Aᵀ, so the sum of the matrices never exists. On a GPU both products are made there; lengths and gains are the host's.
//! Dropout masks the input of the whole sum, as in PEFT; what it takes away goes through W without gains.

use crate::{
    base::BaseModel, block::BlockFactors, lora::Lora, numeric::Numeric, on_gpu::adapter, projection::Factors,
};
use candle_core::{DType, Tensor as HostTensor};
use kto_cli::Result;
use kto_kernels::device::{Device, Factor, FrozenWeight, Onto, Product, Tensor, multiply};

/// What the rows of one adapted weight are multiplied with.
pub(crate) struct Lengths {
    /// magnitude / norm (out)
    pub gain: Tensor,
    /// 1 / norm (out)
    pub inverse: Tensor,
}

/// Those of a block, by [`crate::architecture::Module`]; nothing where there is no DoRA.
pub(crate) type BlockLengths = [Option<Lengths>; 7];

/// Returns the lengths of the rows of block `layer`, whose weights are in use.
pub(crate) fn lengths(
    base: &BaseModel,
    layer: usize,
    factors: Option<&BlockFactors>,
    linears: &[crate::projection::Linear; 7],
) -> Result<BlockLengths> {
    let mut all = BlockLengths::default();
    let Some(factors) = factors else { return Ok(all) };
    for (m, (factors, to)) in factors.iter().zip(&mut all).enumerate() {
        let Some((f, magnitude)) = factors.as_ref().and_then(|f| Some((f, f.magnitude.as_ref()?))) else {
            continue;
        };
        let squares = base.row_squares(layer, m)?;
        let norms = norms(base.device(), f, &linears[m].weight, squares).numeric()?;
        let magnitude = magnitude.host().numeric()?;
        let values = magnitude.to_dtype(DType::F64).and_then(|t| t.to_vec1::<f64>()).numeric()?;
        // A row of zeros has no direction to be long in; PEFT divides by zero there.
        let inverse: Vec<f64> = norms.iter().map(|n| if *n > 0.0 { 1.0 / n } else { 0.0 }).collect();
        let gain: Vec<f64> = values.iter().zip(&inverse).map(|(m, i)| m * i).collect();
        let numbers = |values: &[f64]| base.device().numbers(values).numeric();
        *to = Some(Lengths { gain: numbers(&gain)?, inverse: numbers(&inverse)? });
    }
    Ok(all)
}

/// Returns ‖W + scale·B·A‖ by rows: ‖W‖² + 2·scale·B·(A·Wᵀ) + scale²·B·(A·Aᵀ)·Bᵀ, each row by itself.
fn norms(
    device: &Device,
    f: &Factors<Tensor>,
    weight: &FrozenWeight,
    squares: &[f64],
) -> candle_core::Result<Vec<f64>> {
    let (out, r) = f.b.dims2()?;
    let (crossed, gram) = (device.gradient(r, out)?, device.gradient(r, r)?);
    multiply(&crossed, Onto::Zero, &[Product::new(&f.a, Factor::Linear(weight))])?;
    multiply(&gram, Onto::Zero, &[Product::new(&f.a, Factor::Transposed(&f.a))])?;
    let wide = |t: &Tensor| t.to_host()?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (crossed, gram, b) = (wide(&crossed)?, wide(&gram)?, wide(&f.b)?);
    let row = |j: usize| {
        let b = &b[j * r..][..r];
        let mut sum = 0.0;
        for (k, value) in b.iter().enumerate() {
            let own: f64 = gram[k * r..][..r].iter().zip(b).map(|(g, b)| g * b).sum();
            sum += value * (2.0 * crossed[k * out + j] + f.scale * own);
        }
        (squares[j] + f.scale * sum).max(0.0).sqrt()
    };
    Ok((0..out).map(row).collect())
}

impl Lora {
    /// Returns whether the rows of adapted weights have trained lengths.
    pub fn has_magnitudes(&self) -> bool {
        self.layers.iter().flatten().flatten().any(|f| f.magnitude.is_some())
    }

    /// Sets the magnitudes of a fresh adapter to the lengths that the rows have, so that it changes nothing.
    pub fn measure(&self, base: &BaseModel) -> Result<()> {
        // Magnitudes are the host's memory wherever the rest is, each computed module by itself.
        for (layer, block) in adapter::bring(base.device(), self)?.iter().enumerate() {
            if block.iter().flatten().all(|f| f.magnitude.is_none()) {
                continue;
            }
            let linears = base.layer(layer)?.linears;
            for (m, f) in block.iter().enumerate() {
                let Some((f, to)) = f.as_ref().and_then(|f| Some((f, f.magnitude.as_ref()?))) else {
                    continue;
                };
                let squares = base.row_squares(layer, m)?;
                let norms = norms(base.device(), f, &linears[m].weight, squares).numeric()?;
                let to = to.host().numeric()?;
                let values = HostTensor::from_vec(norms, to.dims(), &candle_core::Device::Cpu);
                values.and_then(|v| to.slice_set(&v.to_dtype(to.dtype())?, 0, 0)).numeric()?;
            }
            base.release(layer)?;
        }
        Ok(())
    }
}
