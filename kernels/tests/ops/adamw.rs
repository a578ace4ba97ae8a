use crate::support::*;
use candle_core::{DType, Result, Tensor};
use kto_kernels::{AdamW, adamw_step};

const STEPS: u64 = 12;

fn options(step: u64) -> AdamW {
    adamw_options(0.1, step)
}

fn gradient(step: u64, n: usize) -> Tensor {
    normal(1, n, 100 + step)
}

/// One element through all steps in the textbook's form: corrected moments, then the quotient. Returns (p, m, v).
fn reference(start: f64, gradients: &[f64], decay_first: bool) -> [f64; 3] {
    let (mut p, mut m, mut v) = (start, 0.0, 0.0);
    for (g, step) in gradients.iter().zip(1..) {
        let o = options(step);
        let g = g * o.gradient_scale;
        m = o.beta1 * m + (1.0 - o.beta1) * g;
        v = o.beta2 * v + (1.0 - o.beta2) * g * g;
        let m_hat = m / (1.0 - o.beta1.powi(step as i32));
        let v_hat = v / (1.0 - o.beta2.powi(step as i32));
        let decay = 1.0 - o.lr * o.weight_decay;
        let update = o.lr * m_hat / (v_hat.sqrt() + o.eps);
        p = if decay_first { p * decay - update } else { (p - update) * decay };
    }
    [p, m, v]
}

/// Runs all steps and returns p, m and v.
fn run(start: &Tensor) -> Result<[Tensor; 3]> {
    let (p, m, v) = (start.copy()?, start.zeros_like()?, start.zeros_like()?);
    for step in 1..=STEPS {
        let g = gradient(step, start.elem_count()).to_dtype(start.dtype())?.reshape(start.shape())?;
        adamw_step(&p, &m, &v, &g, options(step))?;
    }
    Ok([p, m, v])
}

fn expected(start: &Tensor, decay_first: bool) -> [Vec<f64>; 3] {
    let n = start.elem_count();
    let steps: Vec<Vec<f64>> = (1..=STEPS).map(|s| values(&gradient(s, n))).collect();
    let mut out = [vec![], vec![], vec![]];
    for (i, p) in values(start).into_iter().enumerate() {
        let gradients: Vec<f64> = steps.iter().map(|g| g[i]).collect();
        for (out, x) in out.iter_mut().zip(reference(p, &gradients, decay_first)) {
            out.push(x);
        }
    }
    out
}

#[test]
fn twelve_steps_are_plain_adam_with_decay_first() -> Outcome {
    for n in ODD {
        let start = normal(n, 7, 1);
        let expected = expected(&start, true);
        for (found, expected) in run(&start)?.iter().zip(&expected) {
            assert_close("f64", &values(found), expected, SAME_IN_F64);
        }
        // Twelve steps of some eight roundings on numbers near one.
        for (found, expected) in run(&single(&start))?.iter().zip(&expected) {
            assert_close("f32", &values(found), expected, 12.0 * 8.0 * U32);
        }
    }
    Ok(())
}

#[test]
fn decay_after_the_step_would_be_noticed() -> Outcome {
    let start = normal(1, 7, 1);
    let found = values(&run(&start)?[0]);
    let other = &expected(&start, false)[0];
    assert!(found.iter().zip(other).all(|(a, b)| (a - b).abs() > 1e-4));
    Ok(())
}

#[test]
fn the_second_moment_keeps_precision_in_f32() -> Outcome {
    // 1 − β2 taken in f32 would be off by 1e-5 relative.
    let (p, g) = (single(&normal(1, 7, 1)), single(&normal(1, 7, 2)));
    let (m, v) = (p.zeros_like()?, p.zeros_like()?);
    adamw_step(&p, &m, &v, &g, options(1))?;
    for (v, g) in values(&v).iter().zip(values(&g)) {
        assert!((v / (0.001 * g * g) - 1.0).abs() <= 4.0 * U32);
    }
    Ok(())
}

#[test]
fn a_refused_step_changes_nothing() -> Outcome {
    let tensors = || [1, 2, 3, 4].map(|seed| normal(4, 8, seed));
    let bad: [(&str, usize, Tensor); 5] = [
        ("shape of p", 0, normal(8, 4, 1)),
        ("shape of m", 1, normal(4, 7, 1)),
        ("type of v", 2, single(&normal(4, 8, 1))),
        ("strides of p", 0, normal(8, 4, 1).t()?),
        ("integer gradient", 3, normal(4, 8, 1).to_dtype(DType::U32)?),
    ];
    for (what, place, replacement) in bad {
        let mut x = tensors();
        x[place] = replacement;
        let before: Vec<Vec<f64>> = x.iter().map(values).collect();
        assert_refused(what, adamw_step(&x[0], &x[1], &x[2], &x[3], options(1)));
        assert_eq!(x.iter().map(values).collect::<Vec<_>>(), before, "{what}");
    }
    let x = tensors();
    assert_refused("step zero", adamw_step(&x[0], &x[1], &x[2], &x[3], AdamW { step: 0, ..options(1) }));
    for (a, b) in [(0, 1), (0, 3), (1, 2), (1, 3), (2, 3)] {
        let mut x = tensors();
        x[a] = x[b].clone();
        assert_refused("shared memory", adamw_step(&x[0], &x[1], &x[2], &x[3], options(1)));
    }
    Ok(())
}
