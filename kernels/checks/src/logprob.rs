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
    let p = Logprob { rows: rows as u64, vocabulary: columns as u32, unused: 0 };
    let (x, index) = (buffer(source, &logits), indices(&targets));

    let mut found = results(Dense::F32, 4 * rows);
    let args = &mut [Arg::Out(&mut found), Arg::In(&x), Arg::In(&index)];
    launch(m, &named("logprob", source), grid, args, &p)?;
    let truth = logprob_stats(&double(&logits, rows, columns)?, &targets)?;
    let truth: Vec<f64> = truth.iter().flat_map(numbers).collect();
    // The difference to the maximum (up to 16) and its exponential are rounded, and sums of as many terms.
    let tolerance = (depth(columns, grid) + 32.0) * U32;
    close(&case("logprob", source, rows, columns, grid), Dense::F32, &found, &truth, tolerance)?;

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

fn numbers(s: &LogprobStats) -> [f64; 4] {
    [s.logp, s.entropy, s.mean_logit, s.logsumexp]
}

fn stats(found: &Buffer) -> Vec<LogprobStats> {
    let values = decode(Dense::F32, found.content());
    values.chunks(4).map(|s| LogprobStats { logsumexp: f64::from(s[3]), ..Default::default() }).collect()
}
