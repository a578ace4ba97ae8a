use crate::support::*;
use candle_core::{DType, Device, Result, Tensor};
use kto_kernels::{LogprobStats, logprob_stats, logprob_unit_gradient};

/// Target ids that touch the first and the last column.
fn targets(t: usize, v: usize) -> Vec<u32> {
    (0..t).map(|i| if i % 5 == 0 { v - 1 } else { (i * 31) % v } as u32).collect()
}

/// Logits as models give them: a spread of several nats around an offset.
fn logits(t: usize, v: usize, seed: u64) -> Tensor {
    single(&((normal(t, v, seed) * 4.0).unwrap() + 10.0).unwrap()).to_dtype(DType::F64).unwrap()
}

fn reference(row: &[f64], target: usize) -> [f64; 4] {
    let lse = row.iter().map(|x| (x - 10.0).exp()).sum::<f64>().ln() + 10.0;
    let entropy: f64 = row.iter().map(|x| -(x - lse).exp() * (x - lse)).sum();
    [row[target] - lse, entropy, row.iter().sum::<f64>() / row.len() as f64, lse]
}

fn numbers(stats: &[LogprobStats]) -> Vec<f64> {
    stats.iter().flat_map(|s| [s.logp, s.entropy, s.mean_logit, s.logsumexp]).collect()
}

fn composed(x: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let ids = Tensor::from_vec(targets.to_vec(), (targets.len(), 1), x.device())?;
    let lse = (x - 10.0)?.exp()?.sum_keepdim(1)?.log()?;
    x.gather(&ids, 1)? - lse
}

#[test]
fn statistics_are_the_formulas() -> Outcome {
    for t in ODD {
        for v in ODD.into_iter().chain([1024]) {
            let (x, ids) = (logits(t, v, 1), targets(t, v));
            let expected: Vec<f64> =
                values(&x).chunks(v).zip(&ids).flat_map(|(row, id)| reference(row, *id as usize)).collect();
            assert_close("f64", &numbers(&logprob_stats(&x, &ids)?), &expected, SAME_IN_F64);
            // Only the difference to the maximum (up to 32) and its exponential are rounded to f32; sums are f64.
            let stats = logprob_stats(&single(&x), &ids)?;
            assert_close("f32", &numbers(&stats), &expected, 32.0 * U32);
        }
    }
    Ok(())
}

#[test]
fn gradient_is_autograd() -> Outcome {
    for t in ODD {
        for v in ODD {
            let (x, ids) = (logits(t, v, 2), targets(t, v));
            let ones = Tensor::ones((t, 1), DType::F64, &Device::Cpu)?;
            let expected = autograd(&[&x], &ones, |x| composed(&x[0], &ids)).remove(0);
            let stats = logprob_stats(&x, &ids)?;
            let x32 = single(&x);
            let stats32 = logprob_stats(&x32, &ids)?;
            logprob_unit_gradient(&x, &ids, &stats)?;
            assert_tensors("f64", &x, &expected, SAME_IN_F64);
            // The exponent x − lse is a difference of numbers below 32, rounded to f32.
            logprob_unit_gradient(&x32, &ids, &stats32)?;
            assert_tensors("f32", &x32, &expected, 64.0 * U32);
        }
    }
    Ok(())
}

#[test]
fn gradient_is_the_slope() -> Outcome {
    let (x, ids) = (logits(3, 7, 3), targets(3, 7));
    let ones = Tensor::ones((3, 1), DType::F64, &Device::Cpu)?;
    let slope = differences(&x, &ones, |x| {
        let logps: Vec<f64> = logprob_stats(x, &ids)?.iter().map(|s| s.logp).collect();
        Tensor::from_vec(logps, (3, 1), &Device::Cpu)
    });
    let stats = logprob_stats(&x, &ids)?;
    logprob_unit_gradient(&x, &ids, &stats)?;
    assert_close("slope", &values(&x), &slope, DIFFERENCES);
    Ok(())
}

#[test]
fn huge_and_equal_logits_stay_exact() -> Outcome {
    let huge = Tensor::new(&[[1e4f32, 0.0, -1e4], [5.0, 5.0, 5.0]], &Device::Cpu)?;
    let stats = logprob_stats(&huge, &[0, 1])?;
    assert_close("certain", &[stats[0].logp, stats[0].entropy], &[0.0, 0.0], SAME_IN_F64);
    let third = 3f64.ln();
    assert_close("even", &[stats[1].logp, stats[1].entropy], &[-third, third], SAME_IN_F64);
    assert_eq!(logprob_stats(&huge, &[1, 1])?[0].logp, -1e4);
    // A vocabulary of one token is certain.
    let one = logprob_stats(&Tensor::new(&[[7f32]], &Device::Cpu)?, &[0])?;
    assert_eq!((one[0].logp, one[0].entropy, one[0].logsumexp), (0.0, 0.0, 7.0));
    Ok(())
}

#[test]
fn targets_outside_and_wrong_shapes_are_refused() -> Outcome {
    let x = logits(3, 7, 1);
    let stats = logprob_stats(&x, &[0, 1, 2])?;
    assert_refused("target past the vocabulary", logprob_stats(&x, &[0, 1, 7]));
    assert_refused("target far away", logprob_stats(&x, &[0, 1, u32::MAX]));
    assert_refused("too few targets", logprob_stats(&x, &[0, 1]));
    assert_refused("too many targets", logprob_stats(&x, &[0, 1, 2, 3]));
    assert_refused("rank", logprob_stats(&normal_vector(7, 1), &[0]));
    assert_refused("empty vocabulary", logprob_stats(&normal(1, 0, 1), &[0]));
    assert_refused("integers", logprob_stats(&x.to_dtype(DType::U32)?, &[0, 1, 2]));
    assert_refused("strided", logprob_stats(&x.t()?, &[0; 7]));
    assert_refused("gradient of a bad target", logprob_unit_gradient(&x, &[0, 1, 7], &stats));
    assert_refused("too few statistics", logprob_unit_gradient(&x, &[0, 1, 2], &stats[..2]));
    assert!(logprob_stats(&normal(0, 7, 1), &[])?.is_empty());
    Ok(())
}
