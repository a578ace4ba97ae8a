//! The innermost part of the matrix product: one tile of the result held in registers, for each instruction set.
//!
//! Every element of a tile is one chain of multiply-adds over k in order, so its bits depend on nothing but its row of A,
//! its column of B and the instruction set: not on the tile's size, its place in the matrix or the number of threads.

/// Computes `c[i][j] = start[i][j] + alpha · Σ_k a[i][k]·b[k][j]` for one tile.
///
/// Arguments: k, a, elements between rows of a, b, elements between its rows (the columns of a packed panel), alpha, start, elements between its rows
/// (0 repeats one row), c, elements between its rows.
pub(super) type Tile<T> =
    unsafe fn(usize, *const T, usize, *const T, usize, T, *const T, usize, *mut T, usize);

/// The tiles of one instruction set for one element type.
pub struct Tiles<T: 'static> {
    /// Columns of a tile and of a packed panel.
    pub(super) columns: usize,
    /// `by_rows[m - 1]` computes a tile of m rows; the last is the largest.
    pub(super) by_rows: &'static [Tile<T>],
    /// For reports.
    pub name: &'static str,
}

/// Largest tile of any instruction set, in elements.
pub(super) const LARGEST: usize = 12 * 32;

macro_rules! table {
    ($f:ident: $($m:literal)*) => { &[$($f::<$m>),*] };
}

/// Defines a tile of M rows and two vectors of columns with the intrinsics of one instruction set.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_tile {
    ($name:ident, $t:ty, $lanes:literal, $features:literal, $zero:ident, $load:ident, $store:ident, $set:ident, $fma:ident) => {
        #[target_feature(enable = $features)]
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name<const M: usize>(
            k: usize,
            a: *const $t,
            a_row: usize,
            b: *const $t,
            b_row: usize,
            alpha: $t,
            start: *const $t,
            start_row: usize,
            c: *mut $t,
            c_row: usize,
        ) {
            use std::arch::x86_64::*;
            let mut sums = [[$zero(); 2]; M];
            // SAFETY: the caller's promise: M rows of k elements, k rows of two vectors, and tiles of M rows.
            unsafe {
                for p in 0..k {
                    let b = b.add(p * b_row);
                    let (b0, b1) = ($load(b), $load(b.add($lanes)));
                    // Where b is not packed the next panel lies beside this one, in lines that no prefetcher foresees.
                    _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(2 * $lanes).cast());
                    for i in 0..M {
                        let x = $set(*a.add(i * a_row + p));
                        sums[i][0] = $fma(x, b0, sums[i][0]);
                        sums[i][1] = $fma(x, b1, sums[i][1]);
                    }
                }
                let alpha = $set(alpha);
                for i in 0..M {
                    let (from, to) = (start.add(i * start_row), c.add(i * c_row));
                    $store(to, $fma(alpha, sums[i][0], $load(from)));
                    $store(to.add($lanes), $fma(alpha, sums[i][1], $load(from.add($lanes))));
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Tiles;

    x86_tile!(
        avx2_f32,
        f32,
        8,
        "avx2,fma",
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps
    );
    x86_tile!(
        avx2_f64,
        f64,
        4,
        "avx2,fma",
        _mm256_setzero_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_set1_pd,
        _mm256_fmadd_pd
    );
    x86_tile!(
        avx512_f32,
        f32,
        16,
        "avx512f",
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps
    );
    x86_tile!(
        avx512_f64,
        f64,
        8,
        "avx512f",
        _mm512_setzero_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_set1_pd,
        _mm512_fmadd_pd
    );

    pub static AVX2_F32: Tiles<f32> =
        Tiles { columns: 16, by_rows: table!(avx2_f32: 1 2 3 4 5 6), name: "avx2" };
    pub static AVX2_F64: Tiles<f64> =
        Tiles { columns: 8, by_rows: table!(avx2_f64: 1 2 3 4 5 6), name: "avx2" };
    pub static AVX512_F32: Tiles<f32> =
        Tiles { columns: 32, by_rows: table!(avx512_f32: 1 2 3 4 5 6 7 8 9 10 11 12), name: "avx512" };
    pub static AVX512_F64: Tiles<f64> =
        Tiles { columns: 16, by_rows: table!(avx512_f64: 1 2 3 4 5 6 7 8 9 10 11 12), name: "avx512" };
}

/// Defines the same tile in plain Rust: the form of processors without the above, fused where that is an instruction (AArch64).
macro_rules! portable_tile {
    ($name:ident, $t:ty, $columns:literal) => {
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name<const M: usize>(
            k: usize,
            a: *const $t,
            a_row: usize,
            b: *const $t,
            b_row: usize,
            alpha: $t,
            start: *const $t,
            start_row: usize,
            c: *mut $t,
            c_row: usize,
        ) {
            let add =
                |x: $t, y: $t, z: $t| if cfg!(target_arch = "aarch64") { x.mul_add(y, z) } else { x * y + z };
            let mut sums = [[0.0; $columns]; M];
            // SAFETY: the caller's promise: M rows of k elements, k rows of the columns, and tiles of M rows.
            unsafe {
                for p in 0..k {
                    let b = &*b.add(p * b_row).cast::<[$t; $columns]>();
                    for i in 0..M {
                        let x = *a.add(i * a_row + p);
                        for j in 0..$columns {
                            sums[i][j] = add(x, b[j], sums[i][j]);
                        }
                    }
                }
                for i in 0..M {
                    for j in 0..$columns {
                        *c.add(i * c_row + j) = add(alpha, sums[i][j], *start.add(i * start_row + j));
                    }
                }
            }
        }
    };
}
portable_tile!(portable_f32, f32, 8);
portable_tile!(portable_f64, f64, 4);
static PORTABLE_F32: Tiles<f32> =
    Tiles { columns: 8, by_rows: table!(portable_f32: 1 2 3 4 5 6), name: "portable" };
static PORTABLE_F64: Tiles<f64> =
    Tiles { columns: 4, by_rows: table!(portable_f64: 1 2 3 4 5 6), name: "portable" };

macro_rules! choose {
    ($all:ident, $fastest:ident, $t:ty, $avx512:ident, $avx2:ident, $portable:ident) => {
        /// Returns the tiles that this processor can run, the fastest first.
        pub(crate) fn $all() -> Vec<&'static Tiles<$t>> {
            let mut all: Vec<&'static Tiles<$t>> = Vec::new();
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f") {
                    all.push(&x86::$avx512);
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    all.push(&x86::$avx2);
                }
            }
            all.push(&$portable);
            all
        }

        /// Returns the fastest tiles that this processor can run.
        pub(crate) fn $fastest() -> &'static Tiles<$t> {
            $all()[0]
        }
    };
}
choose!(all_f32, fastest_f32, f32, AVX512_F32, AVX2_F32, PORTABLE_F32);
choose!(all_f64, fastest_f64, f64, AVX512_F64, AVX2_F64, PORTABLE_F64);
