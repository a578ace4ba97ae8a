//! The softmax kernels inside whole attention, against the CPU operation: they read a pack's segments as it does.
//! The products around them are plain loops here.

use crate::{Arg, Machine, launch, support::*};
use candle_core::{DType, Device, Result, Tensor};
use kto_kernels::{
    AttentionGradients, AttentionInputs, AttentionLayout, AttentionOutputs, Dense, HeadShape, ScoreRule,
    Segment, attention, attention_backward, gpu::Softmax,
};

const SHAPE: HeadShape = HeadShape { heads: 4, kv_heads: 2, dim: 8 };
/// Query heads of one key-value head.
const GROUP: usize = SHAPE.heads / SHAPE.kv_heads;
const QUERIES: usize = 75;
const KEYS: usize = 79;

/// A prompt, a branch, and the end of a branch whose beginning asks nothing.
fn layout() -> AttentionLayout {
    let segment = |query, queries, prefix_len, own, offset| {
        let prefix = 0;
        Segment { query, queries, prefix, prefix_len, own, offset }
    };
    let segments = vec![segment(0, 65, 0, 0, 0), segment(65, 7, 65, 65, 0), segment(72, 3, 65, 72, 4)];
    AttentionLayout { segments, groups: std::iter::once(0..3).collect() }
}

/// The operands; rows of D numbers by (row, head).
struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
}

/// Sums in f64, as [`Inputs`].
struct Sums {
    out: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

fn query(row: usize, head: usize) -> usize {
    (row * SHAPE.heads + head) * SHAPE.dim
}

fn key(row: usize, head: usize) -> usize {
    (row * SHAPE.kv_heads + head) * SHAPE.dim
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a[..SHAPE.dim].iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
}

fn add(to: &mut [f64], factor: f32, x: &[f32]) {
    to[..SHAPE.dim].iter_mut().zip(x).for_each(|(t, x)| *t += f64::from(factor) * f64::from(*x));
}

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    let (nq, nk) = (QUERIES * SHAPE.heads * SHAPE.dim, KEYS * SHAPE.kv_heads * SHAPE.dim);
    let values = |n, salt| noise(Dense::F32, n, salt);
    let x = Inputs { q: values(nq, 1), k: values(nk, 2), v: values(nk, 3), dout: values(nq, 4) };
    let mut sums = Sums { out: vec![0.0; nq], dq: vec![0.0; nq], dk: vec![0.0; nk], dv: vec![0.0; nk] };
    for segment in layout().segments {
        for head in 0..SHAPE.kv_heads {
            block(m, &x, &mut sums, &segment, head)?;
        }
    }
    let found = [("out", sums.out), ("dq", sums.dq), ("dk", sums.dk), ("dv", sums.dv)];
    for ((what, found), expected) in found.into_iter().zip(expected(&x)?) {
        let found: Vec<f32> = found.into_iter().map(|v| v as f32).collect();
        // Scores up to D·4 are rounded to f32; everything else here is summed in f64.
        let tolerance = 128.0 * U32;
        close(&format!("attention {what}"), Dense::F32, &buffer(Dense::F32, &found), &expected, tolerance)?;
    }
    Ok(())
}

/// One segment and one key-value head, forward and backward.
fn block(m: &dyn Machine, x: &Inputs, sums: &mut Sums, segment: &Segment, head: usize) -> Result<()> {
    let keys = segment.prefix_len + segment.offset + segment.queries;
    let p = Softmax::of_segment(segment, GROUP, ScoreRule::plain(SHAPE), (keys as u32, keys as u32));
    let row_of = |r: usize| query(segment.query + r % segment.queries, head * GROUP + r / segment.queries);
    let key_of = |j: usize| match j.checked_sub(segment.prefix_len) {
        None => key(segment.prefix + j, head),
        Some(own) => key(segment.own + own, head),
    };
    let pairs = || (0..p.rows as usize).flat_map(|r| (0..keys).map(move |j| (r, j)));
    let grid = grid(5, 32);
    let scores: Vec<f32> = pairs().map(|(r, j)| dot(&x.q[row_of(r)..], &x.k[key_of(j)..])).collect();
    let slopes: Vec<f32> = pairs().map(|(r, j)| dot(&x.dout[row_of(r)..], &x.v[key_of(j)..])).collect();
    let (mut probabilities, mut ds) = (buffer(Dense::F32, &scores), buffer(Dense::F32, &slopes));
    // In place: scores become probabilities, slopes gradients of scores.
    launch(m, "softmax_f32", grid, &mut [Arg::Out(&mut probabilities), Arg::Again(0)], &p)?;
    let args = &mut [Arg::Out(&mut ds), Arg::Again(0), Arg::In(&probabilities), Arg::Again(2)];
    launch(m, "softmax_backward_f32", grid, args, &p)?;
    let (probabilities, ds) = (decode(Dense::F32, probabilities.content()), decode(Dense::F32, ds.content()));
    for ((r, j), (p, ds)) in pairs().zip(probabilities.into_iter().zip(ds)) {
        add(&mut sums.out[row_of(r)..], p, &x.v[key_of(j)..]);
        add(&mut sums.dv[key_of(j)..], p, &x.dout[row_of(r)..]);
        add(&mut sums.dq[row_of(r)..], ds, &x.k[key_of(j)..]);
        add(&mut sums.dk[key_of(j)..], ds, &x.q[row_of(r)..]);
    }
    Ok(())
}

/// Returns the output and the gradients of the CPU operations in f64.
fn expected(x: &Inputs) -> Result<[Vec<f64>; 4]> {
    let q = double(&x.q, QUERIES, SHAPE.heads * SHAPE.dim)?;
    let [k, v] = [&x.k, &x.v].map(|k| double(k, KEYS, SHAPE.kv_heads * SHAPE.dim));
    let (k, v, dout) = (k?, v?, double(&x.dout, QUERIES, SHAPE.heads * SHAPE.dim)?);
    let like = |t: &Tensor| Tensor::zeros(t.shape(), DType::F64, &Device::Cpu);
    let (out, dq, dk, dv) = (like(&q)?, like(&q)?, like(&k)?, like(&v)?);
    let stats = Tensor::zeros((QUERIES, 2 * SHAPE.heads), DType::F64, &Device::Cpu)?;
    let inputs = AttentionInputs {
        q: &q,
        k: &k,
        v: &v,
        layout: &layout(),
        shape: SHAPE,
        rule: ScoreRule::plain(SHAPE),
    };
    let outputs = AttentionOutputs { out: &out, stats: &stats };
    attention(outputs, inputs)?;
    let gradients = AttentionGradients { dq: &dq, dk: &dk, dv: &dv };
    attention_backward(gradients, &dout, outputs, inputs)?;
    Ok([wide(&out)?, wide(&dq)?, wide(&dk)?, wide(&dv)?])
}
