//! Windows, caps and scales of scores, against the definition and candle's autograd.

use crate::support::*;
use candle_core::{Device, Result, Tensor};
use kto_kernels::{
    AttentionGradients, AttentionInputs, AttentionLayout, AttentionOutputs, HeadShape, ScoreRule, Segment,
    attention, attention_backward, soft_cap, soft_cap_backward,
};

const SHAPE: HeadShape = HeadShape { heads: 4, kv_heads: 2, dim: 6 };
/// A prompt longer than a tile, and two completions of it.
const ROWS: usize = 290 + 40 + 33;

fn layout() -> AttentionLayout {
    let segment =
        |query, queries, prefix_len| Segment { query, queries, prefix: 0, prefix_len, own: query, offset: 0 };
    let segments = vec![segment(0, 290, 0), segment(290, 40, 290), segment(330, 33, 290)];
    AttentionLayout { segments, groups: std::iter::once(0..3).collect() }
}

/// Position and part of a row.
fn place(row: usize) -> (usize, usize) {
    match row {
        0..290 => (row, 0),
        290..330 => (row, 1),
        _ => (290 + row - 330, 2),
    }
}

fn sees(query: usize, key: usize, rule: ScoreRule) -> bool {
    let ((q, a), (k, b)) = (place(query), place(key));
    (b == 0 || a == b) && k <= q && rule.window.is_none_or(|window| q - k < window)
}

fn composed(x: &[Tensor], rule: ScoreRule) -> Result<Tensor> {
    let mask: Vec<f64> = (0..ROWS * ROWS)
        .map(|i| if sees(i / ROWS, i % ROWS, rule) { 0.0 } else { f64::NEG_INFINITY })
        .collect();
    let mask = Tensor::from_vec(mask, (ROWS, ROWS), &Device::Cpu)?;
    let head = |h: usize| -> Result<Tensor> {
        let kv = h / 2 * SHAPE.dim;
        let q = x[0].narrow(1, h * SHAPE.dim, SHAPE.dim)?.contiguous()?;
        let k = x[1].narrow(1, kv, SHAPE.dim)?.t()?.contiguous()?;
        let v = x[2].narrow(1, kv, SHAPE.dim)?.contiguous()?;
        let mut scores = (q.matmul(&k)? * rule.scale)?;
        if let Some(cap) = rule.cap {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let scores = (scores + &mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(1)?.detach())?.exp()?;
        weights.broadcast_div(&weights.sum_keepdim(1)?)?.matmul(&v)
    };
    Tensor::cat(&(0..SHAPE.heads).map(head).collect::<Result<Vec<_>>>()?, 1)
}

#[test]
fn windows_caps_and_scales_are_the_definition() -> Outcome {
    let (wide, narrow) = (SHAPE.heads * SHAPE.dim, SHAPE.kv_heads * SHAPE.dim);
    let x = [normal(ROWS, wide, 1), normal(ROWS, narrow, 2), normal(ROWS, narrow, 3)];
    let dout = normal(ROWS, wide, 4);
    for (scale, window, cap) in [
        (0.4, None, Some(1.5)),
        (0.3, Some(1), None),
        (0.4, Some(7), None),
        (0.4, Some(256), Some(0.7)),
        (0.4, Some(300), None),
        (0.5, Some(4000), None),
    ] {
        let rule = ScoreRule { scale, window, cap };
        let expected = composed(&x, rule)?;
        let slopes = autograd(&[&x[0], &x[1], &x[2]], &dout, |x| composed(x, rule));
        for (in_f32, tolerance) in [(false, 1e-11), (true, 3e-5)] {
            let to = |t: &Tensor| if in_f32 { single(t) } else { t.clone() };
            let [q, k, v] = x.each_ref().map(to);
            let dout = to(&dout);
            let (out, stats) = (q.zeros_like()?, Tensor::zeros((ROWS, 8), q.dtype(), &Device::Cpu)?);
            let (dq, dk, dv) = (q.zeros_like()?, k.zeros_like()?, v.zeros_like()?);
            let layout = layout();
            let inputs = AttentionInputs { q: &q, k: &k, v: &v, layout: &layout, shape: SHAPE, rule };
            let outputs = AttentionOutputs { out: &out, stats: &stats };
            attention(outputs, inputs)?;
            assert_tensors(&format!("{rule:?}"), &out, &expected, tolerance);
            attention_backward(AttentionGradients { dq: &dq, dk: &dk, dv: &dv }, &dout, outputs, inputs)?;
            for (name, found, expected) in
                [("dq", dq, &slopes[0]), ("dk", dk, &slopes[1]), ("dv", dv, &slopes[2])]
            {
                assert_tensors(&format!("{name} {rule:?}"), &found, expected, 10.0 * tolerance);
            }
        }
    }
    Ok(())
}

#[test]
fn a_cap_is_a_tanh() -> Outcome {
    let (x, d) = ((normal(5, 37, 1) * 4.0)?, normal(5, 37, 2));
    let expected = ((&x / 3.0)?.tanh()? * 3.0)?;
    let slope = autograd(&[&x], &d, |x| (&x[0] / 3.0)?.tanh()? * 3.0);
    let (y, dx) = (x.copy()?, d.copy()?);
    soft_cap(&y, 3.0)?;
    assert_tensors("cap", &y, &expected, 1e-13);
    soft_cap_backward(&dx, &y, 3.0)?;
    assert_tensors("slope", &dx, &slope[0], 1e-12);
    Ok(())
}
