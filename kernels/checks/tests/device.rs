//! The GPU kernels on device 0. Built with the feature `cuda` only; the binary runs on a machine without Rust.

#![cfg(feature = "cuda")]

use kto_kernel_checks::{CHECKS, OnCuda};
use kto_kernels::gpu::cuda::Cuda;

#[test]
fn kernels_on_the_gpu_are_what_the_cpu_computes() {
    let device = OnCuda(Cuda::open(0).expect("an NVIDIA GPU with its driver"));
    for (name, check) in CHECKS {
        if let Err(e) = check(&device) {
            panic!("{name}: {e}");
        }
    }
}
