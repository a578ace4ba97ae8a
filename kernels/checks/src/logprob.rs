//! Log-probabilities against the CPU operation in f64, their gradient against it in f32.

use crate::{Arg, Buffer, Machine, launch, support::*};
use candle_core::Result;
use kto_kernels::{
    Dense, LogprobStats,
    gpu::{Grid, Logprob},
    logprob_stats, logprob_unit_gradient,
};

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for case in MATRICES {
            check_case(m, element, (element, ""), case)?;
            check_case(m, element, (Dense::F32, "_of_f32"), case)?;
        }
    }
    Ok(())
}

/// Logits of type `source` and the end of the gradient kernel's name; gradients of type `element`.
fn check_case(
    m: &dyn Machine,
    element: Dense,
    source: (Dense, &str),
    shape: (usize, usize, Grid),
) -> Result<()> {
    let ((rows, columns, grid), (source, suffix)) = (shape, source);
    let logits: Vec<f32> = noise(source, rows * columns, 1).iter().map(|v| 4.0 * v + 10.0).collect();
    let logits = rounded(source, &logits);
    let targets: Vec<u32> =
        (0..rows).map(|i| if i % 5 == 0 { columns - 1 } else { i * 31 % columns } as u32).collect();
    let p = Logprob { rows: rows as u64, vocabulary: columns as u32, first: 0 };
    let (x, index) = (buffer(source, &logits), indices(&targets));

    let mut found = results(Dense::F32, 4 * rows);
    let args = &mut [Arg::Out(&mut found), Arg::In(&x), Arg::In(&index)];
    launch(m, &named("logprob", source), grid, args, &p)?;
    let truth = logprob_stats(&double(&logits, rows, columns)?, &targets)?;
    let truth: Vec<f64> = truth.iter().flat_map(numbers).collect();
    // The difference to the maximum (up to 16) and its exponential are rounded, and sums of as many terms.
    let tolerance = (depth(columns, grid) + 32.0) * U32;
    close(&case("logprob", source, rows, columns, grid), Dense::F32, &found, &truth, tolerance)?;

    check_part(m, (source, &x), (&targets, &found), p, grid)?;

    let mut gradient = results(element, rows * columns);
    let kernel = format!("logprob_gradient{suffix}");
    let args = &mut [Arg::Out(&mut gradient), Arg::In(&x), Arg::In(&index), Arg::In(&found)];
    launch(m, &named(&kernel, element), grid, args, &p)?;
    let what = case(&kernel, element, rows, columns, grid);
    let expected = single(&logits, rows, columns)?;
    logprob_unit_gradient(&expected, &targets, &stats(&found))?;
    match fused() {
        true => same_bits(&what, element, &gradient, &values(&expected)?)?,
        false => close(&what, element, &gradient, &wide(&expected)?, 8.0 * U32)?,
    }
    if source != element {
        return Ok(());
    }
    let mut replaced = x;
    let args = &mut [Arg::Out(&mut replaced), Arg::Again(0), Arg::In(&index), Arg::In(&found)];
    launch(m, &named(&kernel, element), grid, args, &p)?;
    same_bits(&format!("{what} in place"), element, &replaced, &decode(element, gradient.content()))
}

/// The same columns as a part of a larger vocabulary: every other target is outside it, below or above.
fn check_part(
    m: &dyn Machine,
    (source, x): (Dense, &Buffer),
    (targets, whole): (&[u32], &Buffer),
    p: Logprob,
    grid: Grid,
) -> Result<()> {
    let p = Logprob { first: 1000, ..p };
    let outside = [999, 1000 + p.vocabulary];
    let targets: Vec<u32> =
        (0..targets.len()).map(|i| if i % 2 == 1 { outside[i / 2 % 2] } else { 1000 + targets[i] }).collect();
    let mut expected = decode(Dense::F32, whole.content());
    for row in expected.chunks_mut(4).skip(1).step_by(2) {
        row[0] = -row[3];
    }
    let mut found = results(Dense::F32, expected.len());
    let index = indices(&targets);
    launch(m, &named("logprob", source), grid, &mut [Arg::Out(&mut found), Arg::In(x), Arg::In(&index)], &p)?;
    let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
    close("logprob of a part", Dense::F32, &found, &expected, 2.0 * U32)
}

fn numbers(s: &LogprobStats) -> [f64; 4] {
    [s.logp, s.entropy, s.mean_logit, s.logsumexp]
}

fn stats(found: &Buffer) -> Vec<LogprobStats> {
    let values = decode(Dense::F32, found.content());
    values.chunks(4).map(|s| LogprobStats { logsumexp: f64::from(s[3]), ..Default::default() }).collect()
}
