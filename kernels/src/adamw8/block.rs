//! One block of an update: decode the moments, advance them, move the parameters, encode the moments again.
//!
//! A second moment is not the nearest value in one case: a positive one never becomes zero. Rounded to zero, an element
//! whose gradients are below 1/2500 of its block's largest would be divided by its last gradient alone (EXPERIMENTS.md).

use super::BLOCK;
use crate::{adamw::Coefficients, quant::dynamic_map::Codec, simd::simd};

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
        update(self, c);
    }

    /// Returns the first place where an update would write a number that is not finite.
    pub fn first_non_finite(&self, c: &Coefficients<f32>) -> Option<usize> {
        let [mut m, mut v] = self.decoded();
        let n = self.p.len();
        let mut p = [0.0; BLOCK];
        p[..n].copy_from_slice(self.p);
        advance(&mut p[..n], &mut m[..n], &mut v[..n], self.g, c);
        (0..n).find(|&i| ![p[i], m[i], v[i]].iter().all(|x| x.is_finite()))
    }

    #[inline(always)]
    fn decoded(&self) -> Decoded {
        let mut both = [[0.0; BLOCK]; 2];
        Codec::signed().decode(self.m.codes, *self.m.absmax, &mut both[0]);
        Codec::unsigned().decode(self.v.codes, *self.v.absmax, &mut both[1]);
        both
    }
}

simd! {
    fn update(block: Block<'_>, c: &Coefficients<f32>) {
        let [mut m, mut v] = block.decoded();
        let n = block.p.len();
        let (m, v) = (&mut m[..n], &mut v[..n]);
        advance(block.p, m, v, block.g, c);
        *block.m.absmax = Codec::signed().encode(m, block.m.codes);
        *block.v.absmax = Codec::unsigned().encode(v, block.v.codes);
        // The next step divides by the root: of zero only where there never was a gradient.
        block.v.codes.iter_mut().zip(&*v).for_each(|(code, v)| *code = (*code).max(u8::from(*v > 0.0)));
    }
}

/// Advances a block by the formula of [`crate::adamw_step`]. Nothing is fused, so all processors give the same bits.
#[inline(always)]
fn advance(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], c: &Coefficients<f32>) {
    let n = p.len();
    let (m, v, g, c) = (&mut m[..n], &mut v[..n], &g[..n], *c);
    for i in 0..n {
        m[i] = c.first(m[i], g[i]);
        v[i] = c.second(v[i], g[i]);
        p[i] = c.parameter(p[i], m[i], v[i]);
    }
}
