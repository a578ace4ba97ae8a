//! Random tensors, comparisons and the two oracles of gradients.

use candle_core::{DType, Device, Result, Tensor, Var};
use kto_kernels::AdamW;

/// What a test returns.
pub(crate) type Outcome = Result<()>;

/// Sizes around one, around a power of two and past a block.
pub(crate) const ODD: [usize; 6] = [1, 7, 63, 64, 65, 257];

/// Unit roundoff of f32: the largest relative error of one rounded operation.
pub(crate) const U32: f64 = 1.0 / (1u64 << 24) as f64;

/// Unit roundoff of f64.
pub(crate) const U64: f64 = 1.0 / (1u64 << 53) as f64;

/// Returns the next number of a 64-bit generator (xorshift*), uniform in [0, 1).
fn uniform(state: &mut u64) -> f64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
}

/// Returns `n` standard normal numbers.
pub(crate) fn normals(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            let (a, b) = (uniform(&mut state), uniform(&mut state));
            (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
        })
        .collect()
}

/// Returns a (rows, columns) f64 tensor of standard normal numbers that are exact in f32.
pub(crate) fn normal(rows: usize, columns: usize, seed: u64) -> Tensor {
    let data: Vec<f64> = normals(rows * columns, seed).into_iter().map(|x| x as f32 as f64).collect();
    Tensor::from_vec(data, (rows, columns), &Device::Cpu).unwrap()
}

/// Returns an f64 vector of standard normal numbers that are exact in f32.
pub(crate) fn normal_vector(n: usize, seed: u64) -> Tensor {
    normal(1, n, seed).flatten_all().unwrap()
}

/// Returns the tensor in f32.
pub(crate) fn single(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap()
}

/// Runs an operation that writes to a tensor like `like`, and returns that tensor.
/// It holds NaN before, so that an element which is left out or read is noticed.
#[track_caller]
pub(crate) fn written(like: &Tensor, f: impl FnOnce(&Tensor) -> Result<()>) -> Result<Tensor> {
    let out =
        Tensor::full(f64::NAN, like.shape(), &Device::Cpu).and_then(|x| x.to_dtype(like.dtype())).unwrap();
    f(&out)?;
    Ok(out)
}

/// Runs an operation that changes a tensor on a copy, and returns the copy.
#[track_caller]
pub(crate) fn changed(x: &Tensor, f: impl FnOnce(&Tensor) -> Result<()>) -> Result<Tensor> {
    let copy = x.copy().unwrap();
    f(&copy)?;
    Ok(copy)
}

/// Returns the elements in row-major order, widened to f64.
pub(crate) fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Fails unless every element of `found` lies within `tolerance · max(1, largest expected magnitude)` of `expected`.
#[track_caller]
pub(crate) fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: number of elements");
    let bound = tolerance * expected.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        // Written so that a NaN fails.
        let close = (f - e).abs() <= bound;
        assert!(close, "{what}: element {i} is {f}, expected {e} within {bound:e}");
    }
}

/// As [`assert_close`] on tensors of one shape.
#[track_caller]
pub(crate) fn assert_tensors(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(found.dims(), expected.dims(), "{what}: shape");
    assert_close(what, &values(found), &values(expected), tolerance);
}

/// Returns the gradients of `Σ dy∘f(inputs)` by candle's autograd, one per input.
pub(crate) fn autograd(
    inputs: &[&Tensor],
    dy: &Tensor,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let gradients = f(&tensors).and_then(|y| (y * dy)?.sum_all()?.backward()).unwrap();
    vars.iter().map(|v| gradients.get(v).unwrap().clone()).collect()
}

/// Returns the gradient of `Σ dy∘f(x)` by central differences in f64.
///
/// With steps of 1e-5 the neglected third-order term is near 1e-10 and the rounding near 1e-16·|Σ|/1e-5: compare at [`DIFFERENCES`].
pub(crate) fn differences(x: &Tensor, dy: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let (at, dy) = (values(x), values(dy));
    let loss = |i: usize, step: f64| -> f64 {
        let mut moved = at.clone();
        moved[i] += step;
        let y = f(&Tensor::from_vec(moved, x.shape(), x.device()).unwrap()).unwrap();
        values(&y).iter().zip(&dy).map(|(y, d)| y * d).sum()
    };
    (0..at.len()).map(|i| (loss(i, STEP) - loss(i, -STEP)) / (2.0 * STEP)).collect()
}

/// Tolerance of [`differences`].
pub(crate) const DIFFERENCES: f64 = 1e-7;

/// Tolerance of f64 against another order of the same f64 sums: a few hundred roundings of 1e-16.
pub(crate) const SAME_IN_F64: f64 = 1e-12;

/// Fails unless `f` gives the same bits in pools of 1, 2, 3 and 7 threads.
#[track_caller]
pub(crate) fn assert_same_on_any_pool(what: &str, f: impl Fn() -> Result<Vec<Tensor>> + Sync) {
    let bits = |threads: usize| -> Vec<Vec<u64>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let tensors = pool.install(|| f().unwrap());
        // f32 widens to f64 without loss, so the bits of f64 tell all values apart.
        tensors.iter().map(|t| values(t).iter().map(|v| v.to_bits()).collect()).collect()
    };
    let one = bits(1);
    assert!(one.iter().any(|t| t.iter().any(|b| *b != 0)), "{what}: nothing to compare");
    for threads in [2, 3, 7] {
        assert!(bits(threads) == one, "{what}: {threads} threads differ from one");
    }
}

/// Fails unless the result is an error with a message.
#[track_caller]
pub(crate) fn assert_refused<T>(what: &str, result: Result<T>) {
    match result {
        Ok(_) => panic!("{what}: accepted"),
        Err(e) => assert!(!e.to_string().is_empty(), "{what}: no message"),
    }
}

/// Coefficients of an update: a rate that falls from `peak`, a strong decay, clipping on every third step.
pub(crate) fn adamw_options(peak: f64, step: u64) -> AdamW {
    AdamW {
        lr: peak / step as f64,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.3,
        step,
        gradient_scale: if step.is_multiple_of(3) { 0.25 } else { 1.0 },
    }
}
