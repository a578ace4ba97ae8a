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

/// The coefficients in the form in which an element's update uses them.
#[derive(Clone, Copy)]
pub(crate) struct Coefficients<T> {
    /// Factor on the gradient.
    pub scale: T,
    d1: T,
    b2: T,
    d2: T,
    /// Factor on the parameter.
    pub decay: T,
    /// Learning rate over the correction of the first moment.
    pub size: T,
    /// Root of the correction of the second moment.
    pub c2: T,
    /// Added to the denominator.
    pub eps: T,
}

impl AdamW {
    /// Complements are taken in f64 as torch takes them: 1 − 0.999f32 is off by 1e-5 relative.
    pub(crate) fn coefficients<T: Real>(&self) -> Coefficients<T> {
        let c1 = 1.0 - self.beta1.powf(self.step as f64);
        Coefficients {
            scale: T::of(self.gradient_scale),
            d1: T::of(1.0 - self.beta1),
            b2: T::of(self.beta2),
            d2: T::of(1.0 - self.beta2),
            decay: T::of(1.0 - self.lr * self.weight_decay),
            size: T::of(self.lr / c1),
            c2: T::of((1.0 - self.beta2.powf(self.step as f64)).sqrt()),
            eps: T::of(self.eps),
        }
    }
}

impl<T: Real> Coefficients<T> {
    /// Returns the first moment after the gradient `g`.
    #[inline(always)]
    pub fn first(&self, m: T, g: T) -> T {
        m + (g * self.scale - m) * self.d1
    }

    /// Returns the second moment after the gradient `g`.
    #[inline(always)]
    pub fn second(&self, v: T, g: T) -> T {
        v * self.b2 + g * self.scale * (g * self.scale) * self.d2
    }

    /// Returns the parameter after its moments have become `m` and `v`.
    #[inline(always)]
    pub fn parameter(&self, p: T, m: T, v: T) -> T {
        p * self.decay - self.size * m / (v.sqrt() / self.c2 + self.eps)
    }
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
    with_type!(p, T => {
        let (rg, c) = (read(g), o.coefficients::<T>());
        let g_ = rg.slice::<T>()?;
        write::<T>(m, |m| {
            m.iter_mut().zip(g_).for_each(|(m, g)| *m = c.first(*m, *g));
            Ok(())
        })?;
        write::<T>(v, |v| {
            v.iter_mut().zip(g_).for_each(|(v, g)| *v = c.second(*v, *g));
            Ok(())
        })?;
        let (rm, rv) = (read(m), read(v));
        let (m_, v_) = (rm.slice::<T>()?, rv.slice::<T>()?);
        write::<T>(p, |p| {
            p.iter_mut().enumerate().for_each(|(i, p)| *p = c.parameter(*p, m_[i], v_[i]));
            Ok(())
        })
    })
}
