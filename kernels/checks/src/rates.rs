//! How fast a device is at what bounds a step: products of its library, and copies. Called by the checks on a device, which print
//! the numbers: a step's share of the measured peak needs the peak.

use candle_core::Result;
use kto_kernels::{
    Dense,
    gpu::{Gemm, Machine, Side, Stream},
    random,
};
use std::time::Instant;

/// A measured rate.
#[derive(Clone, Debug)]
pub struct Rate {
    /// What was measured.
    pub name: String,
    /// Floating-point operations or bytes a second.
    pub per_second: f64,
}

/// Products m × k × n: a square one, and those of a 7B model for 2,048 rows: MLP up and down, LoRA.
const PRODUCTS: [(&str, usize, usize, usize); 4] = [
    ("square", 8192, 8192, 8192),
    ("mlp up", 2048, 14336, 4096),
    ("mlp down", 2048, 4096, 14336),
    ("lora", 2048, 16, 4096),
];
/// Bytes of a copy.
const COPY: usize = 256 << 20;
/// Repetitions; the fastest counts.
const TIMES: usize = 5;

/// Measures. `shrink` divides every size, so that the measuring itself can be tried on an emulator.
pub fn rates(machine: &dyn Machine, shrink: usize) -> Result<Vec<Rate>> {
    let mut found = Vec::new();
    for element in [Dense::Bf16, Dense::F16, Dense::F32] {
        for (name, m, n, k) in PRODUCTS {
            let [m, n, k] = [m, n, k].map(|v| (v / shrink).max(1));
            let per_second = product(machine, element, (m, n, k))?;
            found.push(Rate { name: format!("product {name} {element:?} {m}x{k}x{n}"), per_second });
        }
    }
    let bytes = COPY / shrink / shrink;
    let (host, device) = (machine.pin(bytes)?, machine.allocate(bytes)?);
    for (name, up) in [("copy to the device", true), ("copy from the device", false)] {
        let seconds = fastest(machine, Stream::Copy, 1, || match up {
            true => machine.upload_pinned(device, host, bytes),
            false => machine.download_pinned(device, host, bytes),
        })?;
        found.push(Rate { name: name.into(), per_second: bytes as f64 / seconds });
    }
    machine.free(device);
    machine.unpin(host);
    Ok(found)
}

/// Operations a second of a product. The values are random: with zeros a device draws less power and runs faster.
fn product(machine: &dyn Machine, element: Dense, (m, n, k): (usize, usize, usize)) -> Result<f64> {
    let piece: Vec<f32> = (0..1 << 16).map(|i| random::uniform(9, i) as f32 - 0.5).collect();
    let mut bytes = vec![0; piece.len() * element.size()];
    element.encode(&piece, &mut bytes);
    let filled = |elements: usize| -> Result<u64> {
        let (size, at) = (elements * element.size(), machine.allocate(elements * element.size())?);
        for start in (0..size).step_by(bytes.len()) {
            machine.upload(at + start as u64, &bytes[..bytes.len().min(size - start)])?;
        }
        Ok(at)
    };
    let (a, b, c) = (filled(m * k)?, filled(n * k)?, filled(m * n)?);
    let side = |address, stride, transposed| Side { address, stride, transposed, batch: 0 };
    // As a linear layer: the weight has its outputs in rows.
    let gemm = Gemm {
        m,
        n,
        k,
        a: side(a, k, false),
        b: side(b, k, true),
        c: side(c, n, false),
        factors: element,
        result: element,
        alpha: 1.0,
        beta: 0.0,
        batch: 1,
    };
    let operations = 2.0 * m as f64 * n as f64 * k as f64;
    // About 10^13 operations a repetition, so that the start of the work does not count.
    let repeats = (1e13 / operations).clamp(1.0, 200.0) as usize;
    let seconds = fastest(machine, Stream::Compute, repeats, || machine.gemm(&gemm))?;
    [a, b, c].into_iter().for_each(|at| machine.free(at));
    Ok(operations / seconds)
}

/// Returns the seconds of one piece of work, the fastest of some runs of so many.
fn fastest(
    machine: &dyn Machine,
    stream: Stream,
    repeats: usize,
    work: impl Fn() -> Result<()>,
) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..=TIMES {
        machine.wait(&machine.mark(stream)?)?;
        let began = Instant::now();
        (0..repeats).try_for_each(|_| work())?;
        machine.wait(&machine.mark(stream)?)?;
        best = best.min(began.elapsed().as_secs_f64() / repeats as f64);
    }
    Ok(best)
}
