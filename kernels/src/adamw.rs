//! One AdamW update, in torch's order: decay first, then the step.

use crate::{
    real::Real,
    tensor::{apart, read, same_type, with_type, write},
};
use candle_core::{Result, Tensor, bail};

/// Coefficients of one update.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this update, counted from 1.
    pub step: u64,
    /// Factor on the gradient (clipping).
    pub gradient_scale: f64,
}

/// Updates `p` and its moments `m`, `v` in place from the gradient `g`. All of one shape, contiguous.
/// Formula: `p ← p·(1 − lr·wd); m ← β1·m + (1−β1)·g; v ← β2·v + (1−β2)·g²; p ← p − lr/(1−β1ᵗ) · m / (√v/√(1−β2ᵗ) + eps)`.
/// Source: arXiv 1711.05101 as torch.optim.AdamW computes it.
pub fn adamw_step(p: &Tensor, m: &Tensor, v: &Tensor, g: &Tensor, o: AdamW) -> Result<()> {
    if p.shape() != g.shape() || m.shape() != g.shape() || v.shape() != g.shape() {
        bail!("adamw_step: shapes {:?}, {:?}, {:?}, {:?}", p.shape(), m.shape(), v.shape(), g.shape());
    }
    if o.step == 0 {
        bail!("adamw_step: steps are counted from 1");
    }
    // Everything that can fail is asked before the first write, so that no update is half done.
    let all = [p, m, v, g];
    for (i, a) in all.iter().enumerate() {
        if !a.is_contiguous() {
            bail!("adamw_step: strides {:?} are not contiguous", a.stride());
        }
        for b in &all[i + 1..] {
            same_type(a, b)?;
            apart(a, b)?;
        }
    }
    let (c1, c2) = (1.0 - o.beta1.powf(o.step as f64), (1.0 - o.beta2.powf(o.step as f64)).sqrt());
    with_type!(p, T => {
        let rg = read(g);
        // Complements are taken in f64 as torch takes them: 1 − 0.999f32 is off by 1e-5 relative.
        let (d1, b2, d2) = (T::of(1.0 - o.beta1), T::of(o.beta2), T::of(1.0 - o.beta2));
        let g_ = rg.slice::<T>()?;
        let scale = T::of(o.gradient_scale);
        write::<T>(m, |m| {
            m.iter_mut().zip(g_).for_each(|(m, g)| *m = *m + (*g * scale - *m) * d1);
            Ok(())
        })?;
        write::<T>(v, |v| {
            v.iter_mut().zip(g_).for_each(|(v, g)| *v = *v * b2 + *g * scale * (*g * scale) * d2);
            Ok(())
        })?;
        let (rm, rv) = (read(m), read(v));
        let (m_, v_) = (rm.slice::<T>()?, rv.slice::<T>()?);
        let (decay, size, c2, eps) = (T::of(1.0 - o.lr * o.weight_decay), T::of(o.lr / c1), T::of(c2), T::of(o.eps));
        write::<T>(p, |p| {
            for (i, p) in p.iter_mut().enumerate() {
                *p = *p * decay - size * m_[i] / (v_[i].sqrt() / c2 + eps);
            }
            Ok(())
        })
    })
}
