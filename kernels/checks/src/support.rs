//! Values, element types and comparisons.

use crate::Buffer;
use candle_core::{Device, Result, Tensor, bail};
use half::{bf16, f16};
use kto_kernels::{
    Dense,
    gpu::{Grid, type_name},
    random,
};

/// The element types of the kernels.
pub(crate) const TYPES: [Dense; 3] = [Dense::F32, Dense::Bf16, Dense::F16];

/// Unit roundoff of f32.
pub(crate) const U32: f64 = 1.0 / (1u64 << 24) as f64;

/// A matrix and a launch: one row and many, rows of one element, around powers of two, longer than a block; fewer and more
/// blocks than rows, blocks of one thread, of odd sizes and of the largest size.
pub(crate) const MATRICES: [(usize, usize, Grid); 12] = [
    (1, 1, grid(1, 1)),
    (1, 257, grid(3, 1)),
    (7, 63, grid(2, 32)),
    (7, 64, grid(7, 64)),
    (5, 65, grid(9, 64)),
    (65, 7, grid(4, 33)),
    (64, 1, grid(3, 7)),
    (17, 257, grid(20, 257)),
    (3, 1030, grid(2, 256)),
    (2, 1031, grid(1, 1000)),
    (2, 65, grid(2, 1024)),
    (257, 3, grid(5, 2)),
];

/// Numbers of elements and launches.
pub(crate) const LENGTHS: [(usize, Grid); 8] = [
    (1, grid(1, 1)),
    (2, grid(3, 32)),
    (7, grid(1, 7)),
    (63, grid(2, 64)),
    (64, grid(2, 31)),
    (65, grid(1, 257)),
    (257, grid(3, 128)),
    (4099, grid(5, 65)),
];

pub(crate) const fn grid(blocks: u32, threads: u32) -> Grid {
    Grid { blocks, threads }
}

/// Returns the kernel's name for a type.
pub(crate) fn named(kernel: &str, element: Dense) -> String {
    format!("{kernel}_{}", type_name(element))
}

/// Returns the unit roundoff of a type.
pub(crate) fn roundoff(element: Dense) -> f64 {
    match element {
        Dense::F32 => U32,
        Dense::Bf16 => 1.0 / 256.0,
        Dense::F16 => 1.0 / 2048.0,
    }
}

/// Returns `n` values in (−2, 2) that the type holds.
pub(crate) fn noise(element: Dense, n: usize, salt: u64) -> Vec<f32> {
    let values: Vec<f32> = (0..n as u64).map(|i| 4.0 * random::uniform(salt, i) as f32 - 2.0).collect();
    rounded(element, &values)
}

/// Rounds to a type and widens again.
pub(crate) fn rounded(element: Dense, values: &[f32]) -> Vec<f32> {
    decode(element, &encode(element, values))
}

/// Returns the bytes of values in a type.
pub(crate) fn encode(element: Dense, values: &[f32]) -> Vec<u8> {
    match element {
        Dense::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dense::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Dense::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    }
}

/// Returns the values of bytes in a type.
pub(crate) fn decode(element: Dense, bytes: &[u8]) -> Vec<f32> {
    let halves = bytes.as_chunks::<2>().0.iter();
    match element {
        Dense::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dense::F16 => halves.map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dense::Bf16 => halves.map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
    }
}

/// Returns a buffer with values in a type.
pub(crate) fn buffer(element: Dense, values: &[f32]) -> Buffer {
    Buffer::new(&encode(element, values))
}

/// Returns a buffer for `n` results.
pub(crate) fn results(element: Dense, n: usize) -> Buffer {
    Buffer::poisoned(n * element.size())
}

/// Returns a buffer with row numbers.
pub(crate) fn indices(values: &[u32]) -> Buffer {
    Buffer::new(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
}

/// Returns an f32 matrix.
pub(crate) fn single(values: &[f32], rows: usize, columns: usize) -> Result<Tensor> {
    Tensor::from_vec(values.to_vec(), (rows, columns), &Device::Cpu)
}

/// Returns an f64 matrix: what the operation computes of it is the truth for sums in another order.
pub(crate) fn double(values: &[f32], rows: usize, columns: usize) -> Result<Tensor> {
    Tensor::from_vec(values.iter().map(|v| f64::from(*v)).collect(), (rows, columns), &Device::Cpu)
}

/// Returns the elements in row-major order.
pub(crate) fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()
}

/// Returns the elements in row-major order.
pub(crate) fn wide(x: &Tensor) -> Result<Vec<f64>> {
    x.to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1()
}

/// Whether the CPU operations compute exponentials with fused multiply-adds, as the kernels do.
pub(crate) fn fused() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    return cfg!(target_arch = "aarch64");
}

/// Fails unless the buffer holds exactly `expected`, rounded to the type. Any NaN is as good as another.
pub(crate) fn same_bits(what: &str, element: Dense, found: &Buffer, expected: &[f32]) -> Result<()> {
    let (found, expected) = (decode(element, found.content()), rounded(element, expected));
    if found.len() != expected.len() {
        bail!("{what}: {} elements, expected {}", found.len(), expected.len());
    }
    for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
        if f.to_bits() != e.to_bits() && !(f.is_nan() && e.is_nan()) {
            bail!("{what}: element {i} is {f:e}, expected exactly {e:e}");
        }
    }
    Ok(())
}

/// Fails unless every element lies within `tolerance · max(1, largest expected magnitude)` and one rounding of `expected`. Where that
/// is NaN, the poison of a result that nobody writes, a NaN must be.
pub(crate) fn close(
    what: &str,
    element: Dense,
    found: &Buffer,
    expected: &[f64],
    tolerance: f64,
) -> Result<()> {
    let found = decode(element, found.content());
    if found.len() != expected.len() {
        bail!("{what}: {} elements, expected {}", found.len(), expected.len());
    }
    let bound = tolerance * expected.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    // Half of the smallest subnormal of f16.
    let tiny = if element == Dense::F16 { 1.0 / (1u64 << 25) as f64 } else { 0.0 };
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let allowed = bound + roundoff(element) * (e.abs() + bound) + tiny;
        // Written so that a NaN that is not expected fails.
        let near = if e.is_nan() { f.is_nan() } else { (f64::from(*f) - e).abs() <= allowed };
        if !near {
            bail!("{what}: element {i} is {f:e}, expected {e:e} within {allowed:e}");
        }
    }
    Ok(())
}

/// Roundings on the longest way through a sum of `n` terms over a block: a thread's share, then the tree.
pub(crate) fn depth(n: usize, grid: Grid) -> f64 {
    let threads = grid.threads as usize;
    (n.div_ceil(threads) + threads.next_power_of_two().ilog2() as usize) as f64
}

/// Names a case in messages.
pub(crate) fn case(kernel: &str, element: Dense, rows: usize, columns: usize, grid: Grid) -> String {
    let Grid { blocks, threads } = grid;
    format!("{} {rows} × {columns}, {blocks} blocks of {threads}", named(kernel, element))
}
