//! The GPU forms of the operations: their source text, parameters and launch sizes.
//!
//! Called by back ends (which compile a [`module`] at run time) and by `kto-kernel-checks`, whose emulator runs the same text on the
//! CPU. Invariant: a kernel computes what the CPU operation of the same name computes, in f32 from values of the module's type,
//! rounded once when they are stored. Deliberately absent: matrix products (the vendors' libraries), devices and drivers.

pub mod attention;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod head;
mod machine;
mod matrix;
mod memory;
pub mod operations;
mod packed;
mod params;
pub mod products;

pub use machine::{DeviceInfo, Failure, Gemm, Machine, Mark, PRODUCTS, Side, Stream};
pub use matrix::Matrix;
pub use memory::{Gpu, Memory, Pinned};
pub use packed::Packed;
pub use params::*;

use crate::Dense;

/// What the kernels are written in, for CUDA, Metal and C++.
pub const DIALECT: &str = include_str!("../../gpu/dialect.h");

/// The files of kernels by name.
pub const SOURCES: [(&str, &str); 13] = [
    ("dequantize_affine", include_str!("../../gpu/dequantize_affine.kernel")),
    ("dequantize_int8", include_str!("../../gpu/dequantize_int8.kernel")),
    ("dequantize_nf4", include_str!("../../gpu/dequantize_nf4.kernel")),
    ("dropout", include_str!("../../gpu/dropout.kernel")),
    ("elementwise", include_str!("../../gpu/elementwise.kernel")),
    ("gains", include_str!("../../gpu/gains.kernel")),
    ("gated", include_str!("../../gpu/gated.kernel")),
    ("layer_norm", include_str!("../../gpu/layer_norm.kernel")),
    ("logprob", include_str!("../../gpu/logprob.kernel")),
    ("rms_norm", include_str!("../../gpu/rms_norm.kernel")),
    ("rope", include_str!("../../gpu/rope.kernel")),
    ("rows", include_str!("../../gpu/rows.kernel")),
    ("softmax", include_str!("../../gpu/softmax.kernel")),
];

/// Returns the dialect's name of a type, which ends the names of its kernels.
pub fn type_name(element: Dense) -> &'static str {
    match element {
        Dense::F32 => "f32",
        Dense::F16 => "f16",
        Dense::Bf16 => "bf16",
    }
}

/// Returns the text of all kernels for tensors of one type, for NVRTC (with `--fmad=false`) or Metal (with fast math off).
pub fn module(element: Dense) -> String {
    let mut text = format!("{DIALECT}\n#define T {}\n", type_name(element));
    SOURCES.iter().for_each(|(_, source)| text += source);
    text
}

/// How many blocks of how many threads run a kernel. Any numbers give right results; sums over a row depend on the threads in
/// their last bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Number of blocks.
    pub blocks: u32,
    /// Threads of a block, at most [`Grid::MOST_THREADS`].
    pub threads: u32,
}

impl Grid {
    /// The dialect's bound of a block.
    pub const MOST_THREADS: u32 = 1024;

    /// Returns the launch of a kernel that works element by element.
    pub fn elements(n: usize) -> Self {
        Self { blocks: n.div_ceil(256).clamp(1, 1 << 14) as u32, threads: 256 }
    }

    /// Returns the launch of a kernel whose blocks take a row each.
    pub fn rows(rows: usize, columns: usize) -> Self {
        let most = if columns >= 1 << 14 { Self::MOST_THREADS as usize } else { 256 };
        let threads = columns.next_power_of_two().clamp(32, most) as u32;
        Self { blocks: rows.clamp(1, 1 << 16) as u32, threads }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, path::Path};

    #[test]
    fn every_kernel_file_is_in_the_module() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("gpu");
        let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let files: BTreeSet<String> =
            files.filter_map(|f| f.strip_suffix(".kernel").map(String::from)).collect();
        let listed: BTreeSet<String> = SOURCES.iter().map(|(name, _)| name.to_string()).collect();
        assert_eq!(listed, files);
        let text = module(Dense::Bf16);
        assert!(text.contains("#define T bf16") && text.contains("KERNEL(rms_norm_backward)"));
    }

    #[test]
    fn launches_stay_within_the_limits() {
        for n in [0, 1, 255, 256, 257, 1 << 24, usize::MAX >> 8] {
            let (flat, rows, wide) = (Grid::elements(n), Grid::rows(n, 1), Grid::rows(1, n));
            for grid in [flat, rows, wide] {
                assert!(grid.blocks > 0 && grid.blocks <= 1 << 16, "{grid:?}");
                assert!(grid.threads >= 32 && grid.threads <= Grid::MOST_THREADS, "{grid:?}");
            }
        }
        assert_eq!(Grid::rows(7, 128_256), Grid { blocks: 7, threads: 1024 });
        assert_eq!(Grid::rows(7, 65), Grid { blocks: 7, threads: 128 });
    }
}
