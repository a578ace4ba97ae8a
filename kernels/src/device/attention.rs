//! Attention, where its tensors are.

use super::{
    Tensor::{self, Gpu, Host},
    apart,
};
use crate::{AttentionLayout, HeadShape, ScoreRule, gpu::attention as on};
use candle_core::Result;

/// As [`crate::AttentionInputs`].
#[derive(Clone, Copy)]
pub struct AttentionInputs<'a> {
    /// (Tq, H·D)
    pub q: &'a Tensor,
    /// (Tk, Hkv·D)
    pub k: &'a Tensor,
    /// (Tk, Hkv·D)
    pub v: &'a Tensor,
    /// Which queries see which keys.
    pub layout: &'a AttentionLayout,
    /// Sizes of the heads.
    pub shape: HeadShape,
    /// How scores are made.
    pub rule: ScoreRule,
}

/// As [`crate::AttentionOutputs`].
#[derive(Clone, Copy)]
pub struct AttentionOutputs<'a> {
    /// (Tq, H·D)
    pub out: &'a Tensor,
    /// (Tq, 2·H); a GPU leaves it alone.
    pub stats: &'a Tensor,
}

/// As [`crate::AttentionGradients`].
#[derive(Clone, Copy)]
pub struct AttentionGradients<'a> {
    /// Of the queries.
    pub dq: &'a Tensor,
    /// Of the keys.
    pub dk: &'a Tensor,
    /// Of the values.
    pub dv: &'a Tensor,
}

/// As [`crate::attention`].
pub fn attention(outputs: AttentionOutputs, inputs: AttentionInputs) -> Result<()> {
    let AttentionInputs { q, k, v, layout, shape, rule } = inputs;
    match (outputs.out, outputs.stats, q, k, v) {
        (Host(out), Host(stats), Host(q), Host(k), Host(v)) => {
            let inputs = crate::AttentionInputs { q, k, v, layout, shape, rule };
            crate::attention(crate::AttentionOutputs { out, stats }, inputs)
        }
        (Gpu(out), _, Gpu(q), Gpu(k), Gpu(v)) => {
            on::attention(out, on::Inputs { q, k, v, layout, shape, rule })
        }
        _ => apart("attention"),
    }
}

/// As [`crate::attention_backward`].
pub fn attention_backward(
    gradients: AttentionGradients,
    dout: &Tensor,
    outputs: AttentionOutputs,
    inputs: AttentionInputs,
) -> Result<()> {
    let AttentionInputs { q, k, v, layout, shape, rule } = inputs;
    let AttentionGradients { dq, dk, dv } = gradients;
    match (q, k, v, dq, dk, dv, dout) {
        (Host(q), Host(k), Host(v), Host(dq), Host(dk), Host(dv), Host(dout)) => {
            let inputs = crate::AttentionInputs { q, k, v, layout, shape, rule };
            let outputs = crate::AttentionOutputs { out: outputs.out.host()?, stats: outputs.stats.host()? };
            crate::attention_backward(crate::AttentionGradients { dq, dk, dv }, dout, outputs, inputs)
        }
        (Gpu(q), Gpu(k), Gpu(v), Gpu(dq), Gpu(dk), Gpu(dv), Gpu(dout)) => {
            on::attention_backward((dq, dk, dv), dout, on::Inputs { q, k, v, layout, shape, rule })
        }
        _ => apart("attention_backward"),
    }
}
