//! AdamW with its moments in 8 bits: a code for each value and one scale for each block of 256.
//!
//! Called by kto-train. Blocks, maps and the size from which a tensor is quantized are those of bitsandbytes' `AdamW8bit`; the
//! arithmetic between decoding and encoding is that of [`crate::adamw_step`], decay first as torch has it; the search is exact.
//! Invariants: an update that would leave the range of f32 is refused before anything is written; a moment of zero has the code of
//! zero and is zero again; a positive second moment stays positive; blocks are independent, so the bits do not depend on the threads.
//! Deliberately absent: f64 (a moment in 8 bits has no f64 form), and bitsandbytes' correction of codes whose sign was lost, which
//! takes a small negative first moment for the least negative value rather than for zero.

mod block;

use crate::{
    adamw::{AdamW, Coefficients},
    parallel::{Pieces, each},
    quant::dynamic_map::Codec,
    tensor::{apart, read, write, write_bytes},
};
use block::{Block, Quantized};
use candle_core::{DType, Result, Tensor, bail};

/// Values that share a scale.
pub const BLOCK: usize = 256;

/// Tensors with fewer elements keep moments in f32, as in bitsandbytes (`min_8bit_size`).
pub const MIN_ELEMENTS: usize = 4096;

/// Blocks of a task.
const TASK: usize = 16;

/// Returns the size of both moments of a tensor of `n` elements, in bytes: in 8 bits, or in f32 for a small one.
pub fn moment_bytes(n: u64) -> u64 {
    match n < MIN_ELEMENTS as u64 {
        true => 2 * 4 * n,
        false => 2 * (n + 4 * n.div_ceil(BLOCK as u64)),
    }
}

/// A moment of one tensor. Value i is `map[codes[i]] · absmax[i / 256]`, counted in row-major order.
#[derive(Clone, Debug)]
pub struct Moment8 {
    /// U8, the tensor's shape.
    pub codes: Tensor,
    /// (blocks) f32
    pub absmax: Tensor,
}

/// Both moments of one tensor.
#[derive(Clone, Debug)]
pub struct Moments8 {
    /// First moments, in the signed map.
    pub m: Moment8,
    /// Second moments, in the unsigned map.
    pub v: Moment8,
}

impl Moments8 {
    /// Returns moments of zero for a tensor.
    pub fn zeros(like: &Tensor) -> Result<Self> {
        let (device, blocks) = (like.device(), like.elem_count().div_ceil(BLOCK));
        let moment = |codec: &Codec| -> Result<Moment8> {
            Ok(Moment8 {
                codes: Tensor::full(codec.zero(), like.shape(), device)?,
                absmax: Tensor::zeros(blocks, DType::F32, device)?,
            })
        };
        Ok(Self { m: moment(Codec::signed())?, v: moment(Codec::unsigned())? })
    }
}

/// Updates `p` and its moments in place from the gradient `g`. Shapes: `p`, `g` and codes alike, contiguous; f32.
/// Formula: that of [`crate::adamw_step`] on the decoded moments; then `absmax` of a block is its new largest magnitude, and a code the
/// index of the value nearest to `moment · (1 / absmax)`; 1 at least for a positive second moment.
/// Source: arXiv 2110.02861; bitsandbytes 0.50.2 for blocks and maps.
pub fn adamw8_step(p: &Tensor, moments: &Moments8, g: &Tensor, o: AdamW) -> Result<()> {
    check(p, moments, g, o)?;
    let (c, rg, Moments8 { m, v }) = (o.coefficients::<f32>(), read(g), moments);
    let g = rg.slice::<f32>()?;
    write::<f32>(p, |p| {
        write_bytes(&m.codes, |m_codes| {
            write::<f32>(&m.absmax, |m_absmax| {
                write_bytes(&v.codes, |v_codes| {
                    write::<f32>(&v.absmax, |v_absmax| {
                        Parts { p, g, m: (m_codes, m_absmax), v: (v_codes, v_absmax) }.update(&c)
                    })
                })
            })
        })
    })
}

/// Fails on what no update may begin with.
fn check(p: &Tensor, moments: &Moments8, g: &Tensor, o: AdamW) -> Result<()> {
    if o.step == 0 {
        bail!("adamw8_step: steps are counted from 1");
    }
    if ![o.beta1, o.beta2].iter().all(|beta| (0.0..1.0).contains(beta)) {
        bail!("adamw8_step: betas {} and {} are not in [0, 1)", o.beta1, o.beta2);
    }
    let Moments8 { m, v } = moments;
    let values = [(p, DType::F32), (g, DType::F32), (&m.codes, DType::U8), (&v.codes, DType::U8)];
    let scales = [(&m.absmax, DType::F32), (&v.absmax, DType::F32)];
    for (x, dtype) in values.iter().chain(&scales) {
        if x.dtype() != *dtype {
            bail!("adamw8_step: element type {:?} where {dtype:?} is needed", x.dtype());
        }
        if !x.is_contiguous() {
            bail!("adamw8_step: strides {:?} are not contiguous", x.stride());
        }
    }
    let blocks = g.elem_count().div_ceil(BLOCK);
    if values.iter().any(|(x, _)| x.shape() != g.shape()) || scales.iter().any(|(x, _)| x.dims() != [blocks])
    {
        let shapes: Vec<_> = values.iter().chain(&scales).map(|(x, _)| x.dims()).collect();
        bail!("adamw8_step: shapes {shapes:?} of parameter, gradient, codes and scales");
    }
    let all: Vec<&Tensor> = values.iter().chain(&scales).map(|(x, _)| *x).collect();
    for (i, a) in all.iter().enumerate() {
        all[i + 1..].iter().try_for_each(|b| apart(a, b))?;
    }
    Ok(())
}

/// Memory of the operands, all of it or a run of blocks.
struct Parts<'a> {
    p: &'a mut [f32],
    g: &'a [f32],
    /// (codes, absmax)
    m: (&'a mut [u8], &'a mut [f32]),
    v: (&'a mut [u8], &'a mut [f32]),
}

impl Parts<'_> {
    fn update(mut self, c: &Coefficients<f32>) -> Result<()> {
        if let Some(scale) = self.m.1.iter().chain(&*self.v.1).find(|s| !(0.0..=f32::MAX).contains(*s)) {
            bail!("adamw8_step: a block of the moments has the scale {scale}");
        }
        if !self.bounded(c) {
            self.attempt(c)?;
        }
        let (g, values) = (self.g, TASK * BLOCK);
        let p = Pieces::new(self.p, values);
        let m = (Pieces::new(self.m.0, values), Pieces::new(self.m.1, TASK));
        let v = (Pieces::new(self.v.0, values), Pieces::new(self.v.1, TASK));
        let tasks = g.len().div_ceil(values);
        each(tasks, tasks > 1, |task| {
            let g = &g[task * values..][..values.min(g.len() - task * values)];
            // SAFETY: every task runs once and takes its own pieces.
            let mut part = unsafe {
                let (m, v) = ((m.0.take(task), m.1.take(task)), (v.0.take(task), v.1.take(task)));
                Parts { p: p.take(task), g, m, v }
            };
            part.blocks().for_each(|block| block.step(c));
        });
        Ok(())
    }

    fn blocks(&mut self) -> impl Iterator<Item = Block<'_>> {
        let m = self.m.0.chunks_mut(BLOCK).zip(&mut *self.m.1);
        let v = self.v.0.chunks_mut(BLOCK).zip(&mut *self.v.1);
        let values = self.p.chunks_mut(BLOCK).zip(self.g.chunks(BLOCK));
        values.zip(m.zip(v)).map(|((p, g), (m, v))| Block {
            p,
            g,
            m: Quantized { codes: m.0, absmax: m.1 },
            v: Quantized { codes: v.0, absmax: v.1 },
        })
    }

    /// Returns whether the largest magnitudes alone prove that every number stays finite. They do in any run that is well.
    fn bounded(&self, c: &Coefficients<f32>) -> bool {
        // As integers, whose maximum compilers make SIMD of; infinities and NaN are the largest.
        let most = |x: &[f32]| f64::from(f32::from_bits(x.iter().fold(0, |m, x| x.abs().to_bits().max(m))));
        let gradient = most(self.g) * f64::from(c.scale.abs());
        // |m + (g − m)·d| with d in 0…1, and what is added on the way.
        let first = 2.0 * (most(self.m.1) + gradient);
        let second = most(self.v.1) + gradient * gradient;
        // The denominator is eps at least; the product before the division is finite too.
        let step = f64::from(c.size.abs()) * first / f64::from(c.eps.min(1.0));
        let after = most(self.p) * f64::from(c.decay.abs()).max(1.0) + step;
        let room = f64::from(f32::MAX) / 4.0;
        c.c2 > 0.0 && c.eps > 0.0 && first < room && second < room && after < room
    }

    /// Computes the update without writing it. Fails where a number is not finite.
    fn attempt(&mut self, c: &Coefficients<f32>) -> Result<()> {
        for (i, block) in self.blocks().enumerate() {
            if let Some(at) = block.first_non_finite(c) {
                bail!("adamw8_step: element {} would not be finite", i * BLOCK + at);
            }
        }
        Ok(())
    }
}
