//! The same bits on any number of threads: what a run that resumes on another machine relies on.

use crate::attention_layout::*;
use crate::support::*;
use kto_kernels::{
    adamw8::{Moments8, adamw8_step},
    *,
};

#[test]
fn matrix_products() {
    // Large ones of a small model, one row, thin LoRA factors, and sizes that no tile divides.
    for (m, k, n) in
        [(257, 576, 1536), (1, 576, 1536), (65, 1536, 577), (257, 1536, 8), (257, 8, 1536), (300, 300, 1)]
    {
        let (a, b, bt, c) = (normal(m, k, 1), normal(k, n, 2), normal(n, k, 3), normal(m, n, 4));
        let (a32, b32, bt32, c32) = (single(&a), single(&b), single(&bt), single(&c));
        assert_same_on_any_pool(&format!("({m}, {k}) · ({k}, {n})"), || {
            let (acc, acc32) = (c.copy()?, c32.copy()?);
            multiply(&acc, Onto::Itself, &[Product::scaled(&a, Factor::Plain(&b), 0.3)])?;
            multiply(&acc32, Onto::Itself, &[Product::scaled(&a32, Factor::Plain(&b32), 0.3)])?;
            Ok(vec![
                acc,
                acc32,
                matmul(&a, &b)?,
                matmul(&a32, &b32)?,
                matmul(&a, &bt.t()?)?,
                matmul(&a32, &bt32.t()?)?,
                matmul(&b32.t()?, &a32.t()?)?,
            ])
        });
    }
}

#[test]
fn attention_of_packs() {
    for pack in packs() {
        for shape in SHAPES {
            let [q, k, v, d] = pack.tensors(shape, 1).map(|x| single(&x));
            assert_same_on_any_pool("attention", || {
                let (dq, dk, dv) = attend_backward(&d, &q, &k, &v, &pack.layout, shape)?;
                Ok(vec![attend(&q, &k, &v, &pack.layout, shape)?, dq, dk, dv])
            });
        }
    }
}

#[test]
fn operations_on_rows() {
    // More elements than the 16384 below which a call stays on one thread.
    for (t, c) in [(257, 257), (63, 2049), (16385, 1), (2, 16384)] {
        let (x, y, z, w) =
            (normal(t, c, 1), normal(t, c, 2), single(&normal(t, c, 3)), single(&normal_vector(c, 4)));
        let (x, y) = (single(&x), single(&y));
        let targets: Vec<u32> = (0..t).map(|i| (i % c) as u32).collect();
        let names: Vec<u64> = (0..t as u64).map(|i| i * 1001).collect();
        let index: Vec<u32> = (0..t).map(|i| ((i * 7) % t) as u32).collect();
        let factors: Vec<f64> = normals(t, 5);
        assert_same_on_any_pool(&format!("({t}, {c})"), || {
            let (gradient, scaled, biased, dx, sum) = (x.copy()?, x.copy()?, x.copy()?, x.copy()?, x.copy()?);
            let centred = x.copy()?;
            let stats = logprob_stats(&x, &targets)?;
            logprob_unit_gradient(&gradient, &targets, &stats)?;
            scale_rows(&scaled, &factors)?;
            add_bias(&biased, &w)?;
            let (result, dgate, dup, scattered) = (z.copy()?, x.copy()?, y.copy()?, x.copy()?);
            swiglu_backward(&result, &dgate, &dup)?;
            rms_norm_backward(&dx, &z, &x, &w, 1e-5)?;
            layer_norm_backward(&centred, &z, &x, &w, 1e-5)?;
            add(&sum, &y)?;
            scatter_add_rows(&scattered, &y, &index)?;
            let logps: Vec<f64> = stats.iter().flat_map(|s| [s.logp, s.entropy, s.mean_logit]).collect();
            Ok(vec![
                candle_core::Tensor::new(logps, x.device())?,
                candle_core::Tensor::new(&[sum_of_squares(&x)?], x.device())?,
                gradient,
                scaled,
                biased,
                written(&x, |out| rms_norm(out, &x, &w, 1e-5))?,
                dx,
                written(&x, |out| layer_norm(out, &x, &w, &w, 1e-5))?,
                centred,
                written(&x, |out| swiglu(out, &x, &y))?,
                result,
                dgate,
                dup,
                sum,
                dropout(&x, DropoutKey { p: 0.1, key: 3 }, &names)?,
                gather_rows(&x, &index)?,
                scattered,
            ])
        });
    }
}

#[test]
fn rotation_and_optimizer() {
    let (table, x, g) =
        (RopeTable::new(16, 10000.0, 257), single(&normal(257, 96, 1)), single(&normal(257, 96, 2)));
    let positions: Vec<u32> = (0..257).rev().collect();
    assert_same_on_any_pool("rope and adamw", || {
        let (p, m, v, p8) = (x.copy()?, x.zeros_like()?, x.zeros_like()?, x.copy()?);
        let Moments8 { m: m8, v: v8 } = Moments8::zeros(&x)?;
        let o = AdamW {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 1,
            gradient_scale: 0.5,
        };
        adamw_step(&p, &m, &v, &g, o)?;
        let moments = Moments8 { m: m8.clone(), v: v8.clone() };
        with_team(|| adamw8_step(&p8, &moments, &g, o))?;
        let turned = |inverse| changed(&x, |x| rope(x, &table, &positions, inverse));
        let state8 = [p8, m8.codes, m8.absmax, v8.codes, v8.absmax];
        Ok([turned(false)?, turned(true)?, p, m, v].into_iter().chain(state8).collect())
    });
}
