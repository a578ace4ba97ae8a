//! AdamW over the adapter, with clipping by the gradient's norm.

use kto_cli::{Error, Result};
use kto_kernels::{AdamW, adamw_step, sum_of_squares};
use kto_model::lora::Lora;

/// Settings that stay the same for the whole run. Betas and eps are torch's: 0.9, 0.999, 1e-8.
#[derive(Clone, Copy, Debug)]
pub struct OptimizerSpec {
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest gradient norm; 0 is no limit.
    pub max_grad_norm: f64,
}

/// First and second moments of every trained tensor.
pub struct Optimizer {
    spec: OptimizerSpec,
    /// First moments.
    pub m: Lora,
    /// Second moments.
    pub v: Lora,
}

impl Optimizer {
    /// Starts with moments of zero.
    pub fn new(spec: OptimizerSpec, lora: &Lora) -> Result<Self> {
        Ok(Self { spec, m: lora.zeros_like()?, v: lora.zeros_like()? })
    }

    /// Updates the adapter. `step` counts from 1. `grad_norm` is [`norm`] of the gradients.
    pub fn step(&self, lora: &Lora, gradients: &Lora, grad_norm: f64, lr: f64, step: u64) -> Result<()> {
        // torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm.
        let clip = if self.spec.max_grad_norm > 0.0 {
            (self.spec.max_grad_norm / (grad_norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        let options = AdamW {
            lr,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: self.spec.weight_decay,
            step,
            gradient_scale: clip,
        };
        for (((p, g), m), v) in
            lora.tensors().zip(gradients.tensors()).zip(self.m.tensors()).zip(self.v.tensors())
        {
            adamw_step(p, m, v, g, options).map_err(|e| Error::internal(format!("optimizer: {e}")))?;
        }
        Ok(())
    }
}

/// Returns the norm of all gradients together, before clipping.
pub fn norm(gradients: &Lora) -> Result<f64> {
    let mut sum = 0.0;
    for g in gradients.tensors() {
        sum += sum_of_squares(g).map_err(|e| Error::internal(format!("gradient norm: {e}")))?;
    }
    Ok(sum.sqrt())
}
