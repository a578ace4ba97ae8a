//! What this machine can do at most: multiply-adds in registers, a copy. The floors that `kernels.rs` compares with.

use rayon::prelude::*;
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

/// Multiply-adds of one lane in one call of [`chains`].
const LENGTH: usize = 20_000;
/// Vectors in flight: more than latency × units of any processor of today, and they fit the registers of AVX2.
const CHAINS: usize = 12;

/// Runs `CHAINS` vectors of `LANES` through `LENGTH` dependent multiply-adds.
#[inline(always)]
fn chains<const LANES: usize>(x: f32) -> f32 {
    let mut sums = [[x; LANES]; CHAINS];
    let (a, b) = ([black_box(0.999_f32); LANES], [black_box(1e-3_f32); LANES]);
    for _ in 0..LENGTH {
        for sum in &mut sums {
            for (s, (a, b)) in sum.iter_mut().zip(a.iter().zip(&b)) {
                *s = s.mul_add(*a, *b);
            }
        }
    }
    sums.iter().flatten().sum()
}

/// The same with intrinsics: compilers leave arrays of this size in memory.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn chains_avx512(x: f32) -> f32 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_set1_ps(x); CHAINS];
    let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-3)));
    for _ in 0..LENGTH {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, a, b);
        }
    }
    sums.iter().map(|s| _mm512_reduce_add_ps(*s)).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn chains_avx2(x: f32) -> f32 {
    chains::<8>(x)
}

/// One call of the widest form that this processor has, and its operations.
fn widest() -> (fn(f32) -> f32, usize) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the feature.
            return (|x| unsafe { chains_avx512(x) }, 2 * LENGTH * CHAINS * 16);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has both features.
            return (|x| unsafe { chains_avx2(x) }, 2 * LENGTH * CHAINS * 8);
        }
    }
    (chains::<4>, 2 * LENGTH * CHAINS * 4)
}

/// Returns the highest rate of multiply-adds on all threads of the pool, in GFLOP/s.
pub fn multiply_adds(time: Duration) -> f64 {
    let (call, operations) = widest();
    let threads = rayon::current_num_threads();
    let best = best(time, || {
        (0..threads).into_par_iter().with_max_len(1).for_each(|i| {
            for _ in 0..8 {
                black_box(call(black_box(i as f32)));
            }
        });
    });
    (8 * threads * operations) as f64 / best / 1e9
}

/// Copies between two buffers that were touched before.
pub struct Copier {
    from: Vec<f32>,
    to: Vec<f32>,
}

impl Copier {
    /// Makes buffers for copies that read and write up to `bytes` in all.
    pub fn new(bytes: usize) -> Self {
        Self { from: vec![1.0; bytes / 8], to: vec![0.0; bytes / 8] }
    }

    /// Returns the median seconds of a copy that moves `bytes` (half read, half written) on all threads.
    pub fn seconds(&mut self, bytes: usize, time: Duration) -> f64 {
        let n = (bytes / 8).clamp(1, self.from.len());
        let piece = n.div_ceil(rayon::current_num_threads());
        let (from, to) = (&self.from[..n], &mut self.to[..n]);
        median(time, || {
            to.par_chunks_mut(piece)
                .zip(from.par_chunks(piece))
                .for_each(|(to, from)| to.copy_from_slice(from));
            black_box(&to);
        })
    }
}

/// Calls `f` for `time`, at least three times after one call to warm up; returns the seconds of every call, ascending.
fn sample(time: Duration, mut f: impl FnMut()) -> Vec<f64> {
    f();
    let (start, mut seconds) = (Instant::now(), Vec::new());
    while seconds.len() < 3 || (start.elapsed() < time && seconds.len() < 10_000) {
        let began = Instant::now();
        f();
        seconds.push(began.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    seconds
}

/// Median seconds of a call.
pub fn median(time: Duration, f: impl FnMut()) -> f64 {
    let seconds = sample(time, f);
    seconds[seconds.len() / 2]
}

/// Seconds of the fastest call.
pub fn best(time: Duration, f: impl FnMut()) -> f64 {
    sample(time, f)[0]
}
