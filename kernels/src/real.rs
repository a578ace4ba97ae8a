//! The two number types of the engine: f32 for work, f64 as the oracle of the tests.

use candle_core::{CpuStorage, WithDType};
use gemm::Parallelism;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// A floating-point type that the kernels are generic over.
pub trait Real:
    WithDType
    + Copy
    + Send
    + Sync
    + PartialOrd
    + Default
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    /// Positive zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Negative infinity.
    const NEG_INFINITY: Self;
    /// Rounds from f64.
    fn of(x: f64) -> Self;
    /// Widens to f64.
    fn wide(self) -> f64;
    /// e^x.
    fn exp(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Whether the value is neither infinite nor NaN.
    fn finite(self) -> bool;
    /// Returns the elements of a storage of this type.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! real {
    ($t:ty, $variant:ident, $exp:path) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = <$t>::NEG_INFINITY;
            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn finite(self) -> bool {
                self.is_finite()
            }
            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(v) => Some(v),
                    _ => None,
                }
            }
        }
    };
}
real!(f32, F32, crate::exp::exp);
real!(f64, F64, f64::exp);

/// A strided matrix in memory, as a matrix product reads it.
#[derive(Clone, Copy)]
pub(crate) struct Operand<T> {
    pub at: *const T,
    /// Elements from one row to the next.
    pub row: isize,
    /// Elements from one column to the next.
    pub column: isize,
}

/// Sizes of a matrix product: (m, k) · (k, n).
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// Computes `out = beta·out + alpha·a·b`; with `beta` zero `out` is not read.
///
/// # Safety
/// The operands and `out` (row stride `out_row`, unit column stride) must be valid for the sizes, and `out` must overlap neither.
#[allow(clippy::too_many_arguments)] // the usual signature of a BLAS gemm
pub(crate) unsafe fn product<T: Real>(
    s: Sizes,
    out: *mut T,
    out_row: isize,
    beta: T,
    a: Operand<T>,
    b: Operand<T>,
    alpha: T,
    parallelism: Parallelism,
) {
    // SAFETY: the caller's promise is the one that gemm asks for; T is f32 or f64, the types gemm knows.
    unsafe {
        gemm::gemm(
            s.m,
            s.n,
            s.k,
            out,
            1,
            out_row,
            beta != T::ZERO,
            a.at,
            a.column,
            a.row,
            b.at,
            b.column,
            b.row,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        )
    }
}
