//! AdamW over what is trained, with clipping by the gradient's norm; moments in f32 or in 8 bits.

use crate::args::OptimizerKind;
use candle_core::{DType, Tensor};
use kto_cli::{Error, Result};
use kto_kernels::{
    AdamW, adamw_step,
    adamw8::{self, Moments8, adamw8_step},
    sum_of_squares,
};
use kto_model::lora::Lora;

/// Settings that stay the same for the whole run.
#[derive(Clone, Copy, Debug)]
pub struct OptimizerSpec {
    /// How the moments are held.
    pub kind: OptimizerKind,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest gradient norm; 0 is no limit.
    pub max_grad_norm: f64,
}

/// torch's, and no limit of the norm.
impl Default for OptimizerSpec {
    fn default() -> Self {
        let kind = OptimizerKind::Adamw;
        Self { kind, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, max_grad_norm: 0.0 }
    }
}

/// Moments of one trained tensor.
enum Moments {
    F32 { m: Tensor, v: Tensor },
    Bits8(Moments8),
}

/// First and second moments of every trained tensor.
pub struct Optimizer {
    spec: OptimizerSpec,
    /// In the order of [`Lora::tensors`].
    moments: Vec<Moments>,
}

impl Optimizer {
    /// Starts with moments of zero. Tensors below [`adamw8::MIN_ELEMENTS`] keep theirs in f32 always.
    pub fn new(spec: OptimizerSpec, lora: &Lora) -> Result<Self> {
        let moments = |t: &Tensor| {
            let bits8 = spec.kind == OptimizerKind::Adamw8bit && t.elem_count() >= adamw8::MIN_ELEMENTS;
            if bits8 {
                return Moments8::zeros(t).map(Moments::Bits8);
            }
            Ok(Moments::F32 { m: t.zeros_like()?, v: t.zeros_like()? })
        };
        let moments = lora.tensors().map(moments).collect::<candle_core::Result<_>>().map_err(internal)?;
        Ok(Self { spec, moments })
    }

    /// Updates the adapter. `step` counts the updates from 1. `grad_norm` is [`norm`] of the gradients.
    /// Errors: an 8-bit update that would leave the range of f32 (65).
    pub fn step(&self, lora: &Lora, gradients: &Lora, grad_norm: f64, lr: f64, step: u64) -> Result<()> {
        let spec = self.spec;
        // torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm.
        let clip =
            if spec.max_grad_norm > 0.0 { (spec.max_grad_norm / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        let options = |name: &str| AdamW {
            lr,
            beta1: spec.beta1,
            beta2: spec.beta2,
            eps: spec.epsilon,
            weight_decay: if decays(name) { spec.weight_decay } else { 0.0 },
            step,
            gradient_scale: clip,
        };
        for (((name, p), g), moments) in lora.named_tensors().zip(gradients.tensors()).zip(&self.moments) {
            match moments {
                Moments::F32 { m, v } => adamw_step(p, m, v, g, options(&name)).map_err(internal)?,
                // Types and shapes are this module's, so what it refuses is the numbers.
                Moments::Bits8(moments) => adamw8_step(p, moments, g, options(&name))
                    .map_err(|e| Error::data(format!("{name}: {e}")).with_hint("a lower --lr"))?,
            }
        }
        Ok(())
    }

    /// Returns the state of a run's optimizer by name, raw: moments in f32, or U8 codes and f32 scales. `lora` is what it trains.
    pub fn parts(&self, lora: &Lora) -> Vec<(String, &Tensor)> {
        let mut parts = Vec::new();
        for moment in ["m", "v"] {
            for ((name, _), moments) in lora.named_tensors().zip(&self.moments) {
                match moments {
                    Moments::F32 { m, v } => {
                        parts.push((format!("{moment}/{name}"), if moment == "m" { m } else { v }));
                    }
                    Moments::Bits8(both) => {
                        let of = if moment == "m" { &both.m } else { &both.v };
                        parts.push((format!("{moment}.absmax/{name}"), &of.absmax));
                        parts.push((format!("{moment}.codes/{name}"), &of.codes));
                    }
                }
            }
        }
        // Bytes last, so that every number of four bytes lies aligned in a file.
        parts.sort_by_key(|(_, tensor)| tensor.dtype() == DType::U8);
        parts
    }
}

/// Returns whether weight decay is for a tensor: as in transformers' Trainer not for biases and the weights of norms.
fn decays(name: &str) -> bool {
    let is_norm = |part: &str| part == "norm" || part.ends_with("_norm");
    let anywhere = ["bias", "layernorm", "rmsnorm"].iter().any(|text| name.contains(text));
    !anywhere && !name.split('.').any(is_norm)
}

fn internal(e: candle_core::Error) -> Error {
    Error::internal(format!("optimizer: {e}"))
}

/// Returns the norm of all gradients together, before clipping.
pub fn norm(gradients: &Lora) -> Result<f64> {
    let mut sum = 0.0;
    for g in gradients.tensors() {
        sum += sum_of_squares(g).map_err(|e| Error::internal(format!("gradient norm: {e}")))?;
    }
    Ok(sum.sqrt())
}
