//! One block of an update: decode the moments, advance them, move the parameters, encode the moments again.
//!
//! A second moment is not the nearest value in one case: a positive one never becomes zero. Rounded to zero, an element
//! whose gradients are below 1/2500 of its block's largest would be divided by its last gradient alone (EXPERIMENTS.md).

use super::BLOCK;
use crate::{adamw::Coefficients, quant::dynamic_map::Codec, real::Real, simd::simd};

/// The codes of a block and their scale.
pub(super) struct Quantized<'a> {
    pub codes: &'a mut [u8],
    pub absmax: &'a mut f32,
}

/// A block of at most [`BLOCK`] parameters with what belongs to them.
pub(super) struct Block<'a> {
    pub p: &'a mut [f32],
    pub g: &'a [f32],
    pub m: Quantized<'a>,
    pub v: Quantized<'a>,
}

/// Both moments of a block, decoded. What is behind a short block is not used.
type Decoded = [[f32; BLOCK]; 2];

impl Block<'_> {
    /// Updates parameters and moments.
    pub fn step(self, c: &Coefficients<f32>) {
        let [mut m, mut v] = self.decoded();
        let n = self.p.len();
        let (m, v) = (&mut m[..n], &mut v[..n]);
        advance(self.p, m, v, self.g, *c);
        *self.m.absmax = Codec::signed().encode(m, self.m.codes);
        *self.v.absmax = Codec::unsigned().encode(v, self.v.codes);
        // The next step divides by the root: of zero only where there never was a gradient.
        self.v.codes.iter_mut().zip(&*v).for_each(|(code, v)| *code = (*code).max(u8::from(*v > 0.0)));
    }

    /// Returns the first place where an update would write a number that is not finite.
    pub fn first_non_finite(&self, c: &Coefficients<f32>) -> Option<usize> {
        let [mut m, mut v] = self.decoded();
        let n = self.p.len();
        let mut p = [0.0; BLOCK];
        p[..n].copy_from_slice(self.p);
        advance(&mut p[..n], &mut m[..n], &mut v[..n], self.g, *c);
        (0..n).find(|&i| ![p[i], m[i], v[i]].iter().all(|x| x.is_finite()))
    }

    fn decoded(&self) -> Decoded {
        let mut both = [[0.0; BLOCK]; 2];
        Codec::signed().decode(self.m.codes, *self.m.absmax, &mut both[0]);
        Codec::unsigned().decode(self.v.codes, *self.v.absmax, &mut both[1]);
        both
    }
}

simd! {
    /// Advances a block by the formula of [`crate::adamw_step`]. Nothing is fused, so all processors give the same bits.
    fn advance<T: Real>(p: &mut [T], m: &mut [T], v: &mut [T], g: &[T], c: Coefficients<T>) {
        let n = p.len();
        let (m, v, g) = (&mut m[..n], &mut v[..n], &g[..n]);
        for i in 0..n {
            m[i] = c.first(m[i], g[i]);
            v[i] = c.second(v[i], g[i]);
            p[i] = c.parameter(p[i], m[i], v[i]);
        }
    }
}
