//! Element-wise and row-wise operations, where their tensors are.

use super::{
    Device,
    Tensor::{self, Gpu, Host},
    apart,
};
use crate::{
    DropoutKey, LogprobStats, RopeTable,
    gpu::{self, Matrix, operations as on},
};
use candle_core::Result;

/// As [`crate::rms_norm`].
pub fn rms_norm(out: &Tensor, x: &Tensor, w: &Tensor, eps: f64) -> Result<()> {
    match (out, x, w) {
        (Host(out), Host(x), Host(w)) => crate::rms_norm(out, x, w, eps),
        (Gpu(out), Gpu(x), Gpu(w)) => on::rms_norm(out, x, w, eps),
        _ => apart("rms_norm"),
    }
}

/// As [`crate::rms_norm_backward`].
pub fn rms_norm_backward(dx: &Tensor, dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64) -> Result<()> {
    match (dx, dy, x, w) {
        (Host(dx), Host(dy), Host(x), Host(w)) => crate::rms_norm_backward(dx, dy, x, w, eps),
        (Gpu(dx), Gpu(dy), Gpu(x), Gpu(w)) => on::rms_norm_backward(dx, dy, x, w, eps),
        _ => apart("rms_norm_backward"),
    }
}

/// Cosines and sines where the computation runs.
pub enum Rotation {
    /// On the processor.
    Host(RopeTable),
    /// On a GPU, each (positions, D/2) in f32.
    Gpu(Matrix, Matrix),
}

impl Rotation {
    /// Brings a table to a device.
    pub fn new(table: RopeTable, device: &Device) -> Result<Self> {
        let Device::Gpu(gpu, _) = device else { return Ok(Self::Host(table)) };
        let (cosines, sines) = table.tables();
        let half = table.half();
        let bring = |v: &[f32]| Matrix::of_floats(gpu, v, v.len() / half.max(1), half, crate::Dense::F32);
        Ok(Self::Gpu(bring(cosines)?, bring(sines)?))
    }
}

/// As [`crate::rope`].
pub fn rope(x: &Tensor, rotation: &Rotation, positions: &[u32], inverse: bool) -> Result<()> {
    match (x, rotation) {
        (Host(x), Rotation::Host(table)) => crate::rope(x, table, positions, inverse),
        (Gpu(x), Rotation::Gpu(cosines, sines)) => on::rope(x, (cosines, sines), positions, inverse),
        _ => apart("rope"),
    }
}

/// As [`crate::swiglu`].
pub fn swiglu(out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    match (out, gate, up) {
        (Host(out), Host(gate), Host(up)) => crate::swiglu(out, gate, up),
        (Gpu(out), Gpu(gate), Gpu(up)) => on::swiglu(out, gate, up),
        _ => apart("swiglu"),
    }
}

/// As [`crate::swiglu_backward`].
pub fn swiglu_backward(d: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    match (d, gate, up) {
        (Host(d), Host(gate), Host(up)) => crate::swiglu_backward(d, gate, up),
        (Gpu(d), Gpu(gate), Gpu(up)) => on::swiglu_backward(d, gate, up),
        _ => apart("swiglu_backward"),
    }
}

/// As [`crate::add`].
pub fn add(a: &Tensor, b: &Tensor) -> Result<()> {
    match (a, b) {
        (Host(a), Host(b)) => crate::add(a, b),
        (Gpu(a), Gpu(b)) => on::add(a, b),
        _ => apart("add"),
    }
}

/// As [`crate::add_bias`].
pub fn add_bias(x: &Tensor, bias: &Tensor) -> Result<()> {
    match (x, bias) {
        (Host(x), Host(bias)) => crate::add_bias(x, bias),
        (Gpu(x), Gpu(bias)) => on::add_bias(x, bias),
        _ => apart("add_bias"),
    }
}

/// As [`crate::scale_in_place`].
pub fn scale_in_place(x: &Tensor, factor: f64) -> Result<()> {
    match x {
        Host(x) => crate::scale_in_place(x, factor),
        Gpu(x) => on::scale_in_place(x, factor),
    }
}

/// As [`crate::clear`].
pub fn clear(x: &Tensor) -> Result<()> {
    match x {
        Host(x) => crate::clear(x),
        Gpu(x) => x.clear(),
    }
}

/// As [`crate::gather_rows`]; short-lived on a GPU.
pub fn gather_rows(x: &Tensor, index: &[u32]) -> Result<Tensor> {
    match x {
        Host(x) => Ok(Host(crate::gather_rows(x, index)?)),
        Gpu(x) => {
            let out = Matrix::short(x.gpu(), index.len(), x.dims().1, x.element())?;
            on::gather_rows_into(&out, x, index)?;
            Ok(Gpu(out))
        }
    }
}

/// As [`crate::Weight::gather_into`]: rows of a matrix that stays on the host, brought to where `out` is.
pub fn gather_rows_into(out: &Tensor, from: &crate::Weight, index: &[u32]) -> Result<()> {
    match out {
        Host(out) => from.gather_into(out, index),
        Gpu(out) => {
            let shape = (index.len(), from.dims()?.1);
            let rows = candle_core::Tensor::zeros(shape, candle_core::DType::F32, &candle_core::Device::Cpu)?;
            from.gather_into(&rows, index)?;
            out.write(&rows.flatten_all()?.to_vec1::<f32>()?)
        }
    }
}

/// As [`crate::scatter_add_rows`].
pub fn scatter_add_rows(out: &Tensor, x: &Tensor, index: &[u32]) -> Result<()> {
    match (out, x) {
        (Host(out), Host(x)) => crate::scatter_add_rows(out, x, index),
        (Gpu(out), Gpu(x)) => on::scatter_add_rows(out, x, index),
        _ => apart("scatter_add_rows"),
    }
}

/// As [`crate::scale_rows`].
pub fn scale_rows(x: &Tensor, factors: &[f64]) -> Result<()> {
    match x {
        Host(x) => crate::scale_rows(x, factors),
        Gpu(x) => on::scale_rows(x, factors),
    }
}

/// As [`crate::dropout`]; short-lived on a GPU.
pub fn dropout(x: &Tensor, key: DropoutKey, rows: &[u64]) -> Result<Tensor> {
    Ok(match x {
        Host(x) => Host(crate::dropout(x, key, rows)?),
        Gpu(x) => Gpu(on::dropout(x, key, rows)?),
    })
}

/// Returns [`crate::logprob_stats`], and with `gradient` the [`crate::logprob_unit_gradient`] of every row: in the logits' memory on
/// the host, short-lived and of the activations' type on a GPU.
pub fn logprobs(
    device: &Device,
    logits: &Tensor,
    targets: &[u32],
    gradient: bool,
) -> Result<(Vec<LogprobStats>, Option<Tensor>)> {
    match (logits, device) {
        (Host(logits), _) => {
            let stats = crate::logprob_stats(logits, targets)?;
            if !gradient {
                return Ok((stats, None));
            }
            crate::logprob_unit_gradient(logits, targets, &stats)?;
            Ok((stats, Some(Host(logits.clone()))))
        }
        (Gpu(logits), Device::Gpu(_, element)) => {
            let (stats, kept) = gpu::operations::logprob_stats(logits, targets)?;
            let unit =
                if gradient { Some(on::logprob_unit_gradient(logits, &kept, *element)?) } else { None };
            Ok((stats, unit.map(Gpu)))
        }
        _ => apart("logprobs"),
    }
}
