//! Matrix products, plain and accumulating. Called for every linear layer, LoRA factor and the head.

use crate::{
    real::{Operand, Real, Sizes, product},
    tensor::{apart, matrix, read, same_type, with_type, write},
};
use candle_core::{Result, Tensor, bail};
use gemm::Parallelism;

/// Returns `a · b`. Shapes: a (M, K), b (K, N), result (M, N); any strides, so `.t()` costs nothing.
/// Errors: shapes or element types that do not match.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_type(a, b)?;
    with_type!(a, T => {
        let (ra, rb) = (read(a), read(b));
        let (x, y) = (ra.operand::<T>()?, rb.operand::<T>()?);
        let s = sizes(x, y)?;
        let mut out = vec![T::ZERO; s.m * s.n];
        // SAFETY: the readers hold both operands, whose bounds were checked, and `out` is fresh with m·n elements.
        unsafe { product(s, out.as_mut_ptr(), s.n as isize, T::ZERO, x.0, y.0, T::ONE, threads(s)) };
        matrix(out, s.m, s.n, a)
    })
}

/// Computes `out += scale · a · b` in place. `out` (M, N) is contiguous and shares no memory with the operands.
pub fn matmul_acc(out: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<()> {
    same_type(a, b)?;
    same_type(out, a)?;
    apart(out, a)?;
    apart(out, b)?;
    let (m, n) = out.dims2()?;
    with_type!(a, T => {
        let (ra, rb) = (read(a), read(b));
        let (x, y) = (ra.operand::<T>()?, rb.operand::<T>()?);
        let s = sizes(x, y)?;
        if (s.m, s.n) != (m, n) {
            bail!("product of shape ({}, {}) cannot be added to ({m}, {n})", s.m, s.n);
        }
        write::<T>(out, |c| {
            // SAFETY: as in `matmul`; the write lock on `out` proves that the operands live elsewhere.
            unsafe { product(s, c.as_mut_ptr(), n as isize, T::ONE, x.0, y.0, T::of(scale), threads(s)) };
            Ok(())
        })
    })
}

fn sizes<T>(a: (Operand<T>, usize, usize), b: (Operand<T>, usize, usize)) -> Result<Sizes> {
    if a.2 != b.1 {
        bail!("cannot multiply ({}, {}) by ({}, {})", a.1, a.2, b.1, b.2);
    }
    Ok(Sizes { m: a.1, n: b.2, k: a.2 })
}

/// Small products stay on the calling thread.
fn threads(s: Sizes) -> Parallelism {
    if s.m * s.n * s.k < 1 << 18 { Parallelism::None } else { Parallelism::Rayon(0) }
}
