//! The GPU kernels and the library's products on device 0, and its rates. Built with the feature `cuda` only; the binary runs on a
//! machine without Rust, where `scripts/gpu-check` starts it.

#![cfg(feature = "cuda")]

use kto_kernel_checks::{CHECKS, LARGE, OnCuda, SMALL, check_products, rates};
use kto_kernels::gpu::cuda::Cuda;
use std::{io::Write as _, sync::Arc, time::Instant};

fn device() -> Arc<Cuda> {
    Cuda::open(0).expect("an NVIDIA GPU with its driver")
}

/// Says something whether or not the test passes.
fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").expect("standard output");
}

#[test]
fn kernels_on_the_gpu_are_what_the_cpu_computes() {
    let device = OnCuda(device());
    // The test's name stands without an end of line.
    say("");
    let mut wrong = Vec::new();
    for (name, check) in CHECKS {
        let (began, result) = (Instant::now(), check(&device));
        say(&format!(
            "{name}: {} in {:.2} s",
            if result.is_ok() { "ok" } else { "WRONG" },
            began.elapsed().as_secs_f64()
        ));
        wrong.extend(result.err().map(|e| format!("{name}: {e}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn products_on_the_gpu_are_those_of_the_host() {
    let shapes: Vec<_> = SMALL.into_iter().chain(LARGE).collect();
    if let Err(e) = check_products(&*device(), &shapes) {
        panic!("{e}");
    }
}

#[test]
#[ignore = "a measurement; scripts/gpu-check asks for it"]
fn rates_of_the_gpu() {
    say("");
    for rate in rates(&*device(), 1).expect("rates") {
        say(&format!("rate {:.4e} {}", rate.per_second, rate.name));
    }
}
