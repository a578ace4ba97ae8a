//! Checks of the GPU kernels (`kernels/gpu`) against the CPU operations of `kto-kernels`, on any machine that can launch them.
//!
//! Called by the tests, on the emulator; a back end for a GPU implements [`Machine`] and runs the same [`CHECKS`]. Every buffer has
//! guards around it and results begin as NaN, so a kernel that leaves something out, reads or writes outside, or changes
//! an input is noticed. [`check_products`] does the same for a device's matrix products; [`rates()`] measures what bounds its steps.

mod attention;
#[cfg(feature = "cuda")]
mod cuda;
mod dequantize;
mod dropout;
mod elementwise;
#[cfg(emulated)]
mod emulator;
mod gains;
mod gated;
#[cfg(emulated)]
mod gpu;
mod layer_norm;
mod logprob;
mod machine;
mod products;
mod rates;
mod rms_norm;
mod rope;
mod rows;
mod softmax;
mod support;

#[cfg(feature = "cuda")]
pub use cuda::OnCuda;
#[cfg(emulated)]
pub use emulator::Emulator;
#[cfg(emulated)]
pub use gpu::EmulatedGpu;
pub use machine::{Arg, Buffer, Call, Machine, launch};
pub use products::{LARGE, SMALL, check_products};
pub use rates::{Rate, rates};

use candle_core::Result;
use kto_kernels::gpu::{Machine as GpuMachine, Stream};
use std::sync::Arc;

/// Returns an emulated GPU with so much memory, one of whose streams is lazy; nothing when there was no C++ compiler.
pub fn emulated_gpu(memory: usize, lazy: Stream) -> Option<Arc<dyn GpuMachine>> {
    #[cfg(emulated)]
    return Some(Arc::new(EmulatedGpu::new(memory, lazy)));
    #[cfg(not(emulated))]
    {
        let _ = (memory, lazy);
        None
    }
}

/// A check of one file of kernels.
pub type Check = fn(&dyn Machine) -> Result<()>;

/// All checks by name.
pub const CHECKS: [(&str, Check); 14] = [
    ("attention", attention::check),
    ("casts", elementwise::check_casts),
    ("dequantize", dequantize::check),
    ("dropout", dropout::check),
    ("elementwise", elementwise::check),
    ("gains", gains::check),
    ("gated", gated::check),
    ("layer_norm", layer_norm::check),
    ("logprob", logprob::check),
    ("rms_norm", rms_norm::check),
    ("rope", rope::check),
    ("rows", rows::check),
    ("scatter", rows::check_scatter),
    ("softmax", softmax::check),
];
