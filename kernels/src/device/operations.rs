//! Element-wise and row-wise operations, where their tensors are.

use super::{
    Device, FrozenWeight,
    Tensor::{self, Gpu, Host},
    apart,
};
use crate::{
    DropoutKey, LogprobStats, RopeTable,
    gpu::{self, Matrix, operations as on, products::Frozen},
};
use candle_core::{Result, bail};

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

/// As [`crate::layer_norm`].
pub fn layer_norm(out: &Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<()> {
    match (out, x, w, b) {
        (Host(out), Host(x), Host(w), Host(b)) => crate::layer_norm(out, x, w, b, eps),
        (Gpu(out), Gpu(x), Gpu(w), Gpu(b)) => on::layer_norm(out, x, w, b, eps),
        _ => apart("layer_norm"),
    }
}

/// As [`crate::layer_norm_backward`].
pub fn layer_norm_backward(dx: &Tensor, dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64) -> Result<()> {
    match (dx, dy, x, w) {
        (Host(dx), Host(dy), Host(x), Host(w)) => crate::layer_norm_backward(dx, dy, x, w, eps),
        (Gpu(dx), Gpu(dy), Gpu(x), Gpu(w)) => on::layer_norm_backward(dx, dy, x, w, eps),
        _ => apart("layer_norm_backward"),
    }
}

/// Cosines and sines where the computation runs.
pub enum Rotation {
    /// On the processor.
    Host(RopeTable),
    /// On a GPU, each (positions, half of what turns) in f32, and D.
    Gpu(Matrix, Matrix, usize),
}

impl Rotation {
    /// Brings a table to a device.
    pub fn new(table: RopeTable, device: &Device) -> Result<Self> {
        let Device::Gpu(gpu, _) = device else { return Ok(Self::Host(table)) };
        let (cosines, sines) = table.tables();
        let half = table.half();
        let bring = |v: &[f32]| Matrix::of_floats(gpu, v, v.len() / half.max(1), half, crate::Dense::F32);
        Ok(Self::Gpu(bring(cosines)?, bring(sines)?, table.head()))
    }
}

/// As [`crate::rope`].
pub fn rope(x: &Tensor, rotation: &Rotation, positions: &[u32], inverse: bool) -> Result<()> {
    match (x, rotation) {
        (Host(x), Rotation::Host(table)) => crate::rope(x, table, positions, inverse),
        (Gpu(x), Rotation::Gpu(cosines, sines, head)) => {
            on::rope(x, (cosines, sines), *head, positions, inverse)
        }
        _ => apart("rope"),
    }
}

/// The activation of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x · sigmoid(x)`
    Silu,
    /// GELU by tanh.
    Gelu,
}

/// As [`crate::swiglu`] or [`crate::geglu`].
pub fn gated(kind: Gate, out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    match (kind, out, gate, up) {
        (Gate::Silu, Host(out), Host(gate), Host(up)) => crate::swiglu(out, gate, up),
        (Gate::Gelu, Host(out), Host(gate), Host(up)) => crate::geglu(out, gate, up),
        (Gate::Silu, Gpu(out), Gpu(gate), Gpu(up)) => on::gated("swiglu", out, gate, up),
        (Gate::Gelu, Gpu(out), Gpu(gate), Gpu(up)) => on::gated("geglu", out, gate, up),
        _ => apart("gated"),
    }
}

/// As [`crate::swiglu_backward`] or [`crate::geglu_backward`].
pub fn gated_backward(kind: Gate, d: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    match (kind, d, gate, up) {
        (Gate::Silu, Host(d), Host(gate), Host(up)) => crate::swiglu_backward(d, gate, up),
        (Gate::Gelu, Host(d), Host(gate), Host(up)) => crate::geglu_backward(d, gate, up),
        (Gate::Silu, Gpu(d), Gpu(gate), Gpu(up)) => on::gated("swiglu_backward", d, gate, up),
        (Gate::Gelu, Gpu(d), Gpu(gate), Gpu(up)) => on::gated("geglu_backward", d, gate, up),
        _ => apart("gated_backward"),
    }
}

/// `x ← cap·tanh(x / cap)`; as [`crate::soft_cap`].
pub fn soft_cap(x: &Tensor, cap: f64) -> Result<()> {
    match x {
        Host(x) => crate::soft_cap(x, cap),
        Gpu(x) => on::soft_cap(x, cap),
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

/// As [`crate::scale_columns`]; on a GPU the factors are f32.
pub fn scale_columns(x: &Tensor, factors: &Tensor) -> Result<()> {
    match (x, factors) {
        (Host(x), Host(factors)) => crate::scale_columns(x, factors),
        (Gpu(x), Gpu(factors)) => on::scale_columns(x, factors),
        _ => apart("scale_columns"),
    }
}

/// As [`crate::add_column_dots`]; on a GPU the factors and the sums are f32.
pub fn add_column_dots(to: &Tensor, x: &Tensor, y: &Tensor, factors: &Tensor) -> Result<()> {
    match (to, x, y, factors) {
        (Host(to), Host(x), Host(y), Host(factors)) => crate::add_column_dots(to, x, y, factors),
        (Gpu(to), Gpu(x), Gpu(y), Gpu(factors)) => on::add_column_dots(to, x, y, factors),
        _ => apart("add_column_dots"),
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
/// the host, short-lived and of the activations' type on a GPU. Logits that went through [`soft_cap`] name its cap: the gradient is then
/// that of what they were before.
pub fn logprobs(
    device: &Device,
    logits: &Tensor,
    targets: &[u32],
    (gradient, cap): (bool, Option<f64>),
) -> Result<(Vec<LogprobStats>, Option<Tensor>)> {
    match (logits, device) {
        (Host(logits), _) => {
            let stats = crate::logprob_stats(logits, targets)?;
            if !gradient {
                return Ok((stats, None));
            }
            let capped = cap.map(|cap| Ok::<_, candle_core::Error>((logits.copy()?, cap))).transpose()?;
            crate::logprob_unit_gradient(logits, targets, &stats)?;
            if let Some((capped, cap)) = capped {
                crate::soft_cap_backward(logits, &capped, cap)?;
            }
            Ok((stats, Some(Host(logits.clone()))))
        }
        (Gpu(logits), Device::Gpu(_, element)) => {
            let (stats, kept) = gpu::operations::logprob_stats(logits, targets)?;
            if !gradient {
                return Ok((stats, None));
            }
            let unit = on::logprob_unit_gradient(logits, &kept, *element)?;
            if let Some(cap) = cap {
                on::soft_cap_backward(&unit, logits, cap)?;
            }
            Ok((stats, Some(Gpu(unit))))
        }
        _ => apart("logprobs"),
    }
}

/// As [`logprobs`] of `x · Wᵀ`, for a head W of which only tiles are on the device; the gradient of every row of x goes to `unit`.
/// Shapes: x and unit (rows, C). Error: the head is there whole.
pub fn logprobs_in_tiles(
    head: &FrozenWeight,
    x: &Tensor,
    targets: &[u32],
    cap: Option<f64>,
    unit: Option<&Tensor>,
) -> Result<Vec<LogprobStats>> {
    let FrozenWeight::Gpu(Frozen::Tiles(tiles)) = head else {
        bail!("logprobs_in_tiles: a head that is there whole");
    };
    match (x, unit) {
        (Gpu(x), None) => gpu::head::logprobs_in_tiles(tiles, x, targets, cap, None),
        (Gpu(x), Some(Gpu(unit))) => gpu::head::logprobs_in_tiles(tiles, x, targets, cap, Some(unit)),
        _ => apart("logprobs_in_tiles"),
    }
}
