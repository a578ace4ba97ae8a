//! The two number types of the engine: f32 for work, f64 as the oracle of the tests.

use crate::{
    gemm::{Tiles, TransposeSquare, transpose_square, transpose_square_f32},
    stored::Stored,
};
use candle_core::{CpuStorage, WithDType};
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};
use std::{cell::RefCell, sync::OnceLock, thread::LocalKey};

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
    /// e^x, with fused multiply-adds where `FUSED`.
    fn exp<const FUSED: bool>(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Whether the value is neither infinite nor NaN.
    fn finite(self) -> bool;
    /// Returns the elements of a storage of this type.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    /// Returns the matrix-product tiles of this processor.
    fn tiles() -> &'static Tiles<Self>;
    /// Buffers of this thread for packed operands.
    fn scratch() -> &'static LocalKey<RefCell<Vec<Vec<Self>>>>;
    /// Transposes small squares.
    fn transpose_square() -> TransposeSquare<Self>;
    /// Returns a frozen weight whose bytes are this type's elements already.
    fn in_place(weight: &Stored) -> Option<&[Self]>;
    /// Writes `columns` elements of as many consecutive rows of a frozen weight as `out` holds.
    fn widen_rows(weight: &Stored, row: usize, column: usize, columns: usize, out: &mut [Self]);
    /// Writes consecutive elements of a row of a frozen weight.
    fn widen(weight: &Stored, row: usize, column: usize, out: &mut [Self]) {
        Self::widen_rows(weight, row, column, out.len(), out);
    }
}

macro_rules! real {
    ($t:ty, $variant:ident, $exp:expr, $tiles:ident, $square:expr, $in_place:expr, $widen:expr) => {
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
            fn exp<const FUSED: bool>(self) -> Self {
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
            fn tiles() -> &'static Tiles<Self> {
                static CHOSEN: OnceLock<&'static Tiles<$t>> = OnceLock::new();
                CHOSEN.get_or_init(crate::gemm::$tiles)
            }
            fn scratch() -> &'static LocalKey<RefCell<Vec<Vec<Self>>>> {
                thread_local!(static BUFFERS: RefCell<Vec<Vec<$t>>> = const { RefCell::new(Vec::new()) });
                &BUFFERS
            }
            fn transpose_square() -> TransposeSquare<Self> {
                $square
            }
            fn in_place(weight: &Stored) -> Option<&[Self]> {
                $in_place(weight)
            }
            fn widen_rows(w: &Stored, row: usize, column: usize, columns: usize, out: &mut [Self]) {
                $widen(w, row, column, columns, out)
            }
        }
    };
}
real!(
    f32,
    F32,
    crate::exp::exp::<FUSED>,
    fastest_f32,
    transpose_square_f32(),
    Stored::floats,
    Stored::widen_rows
);
real!(f64, F64, f64::exp, fastest_f64, transpose_square::<f64>, |_| None, widen_f64);

fn widen_f64(weight: &Stored, row: usize, column: usize, columns: usize, out: &mut [f64]) {
    let mut buffer = [0.0f32; 256];
    for (row, out) in (row..).zip(out.chunks_mut(columns.max(1))) {
        for (i, out) in out.chunks_mut(buffer.len()).enumerate() {
            let narrow = &mut buffer[..out.len()];
            weight.widen(row, column + i * 256, narrow);
            out.iter_mut().zip(narrow).for_each(|(wide, v)| *wide = f64::from(*v));
        }
    }
}

/// A strided matrix in memory, as a matrix product reads it.
#[derive(Clone, Copy)]
pub(crate) struct Operand<T> {
    pub at: *const T,
    /// Elements from one row to the next.
    pub row: isize,
    /// Elements from one column to the next.
    pub column: isize,
}

impl<T> Operand<T> {
    /// Returns the same memory with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self { at: self.at, row: self.column, column: self.row }
    }
}
