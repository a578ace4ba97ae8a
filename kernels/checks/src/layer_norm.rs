//! Layer normalization against the CPU operation in f64.

use crate::{Arg, Machine, launch, support::*};
use candle_core::{DType, Result, Tensor};
use kto_kernels::{gpu::LayerNorm, layer_norm, layer_norm_backward};

const EPS: f64 = 1e-5;

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for (rows, columns, grid) in MATRICES {
            let n = rows * columns;
            let [x, dy, before] = [1, 2, 3].map(|salt| noise(element, n, salt));
            let [w, b] = [4, 5].map(|salt| noise(element, columns, salt));
            let p = LayerNorm { rows: rows as u64, columns: columns as u32, eps: EPS as f32 };
            let [bx, bdy, bw, bb] = [&x, &dy, &w, &b].map(|v| buffer(element, v));
            let [tx, tdy, tdx] = [&x, &dy, &before].map(|v| double(v, rows, columns));
            let [tw, tb] = [&w, &b].map(|v| double(v, 1, columns).and_then(|t| t.flatten_all()));
            let (tx, tdy, tdx, tw, tb) = (tx?, tdy?, tdx?, tw?, tb?);
            // The mean's error, times 1/sd, and a few roundings.
            let worst = wide(&tx)?.chunks(columns).map(inverse_sd).fold(1.0, f64::max);
            let tolerance = worst * (depth(columns, grid) + 8.0) * U32;

            let mut y = results(element, n);
            let args = &mut [Arg::Out(&mut y), Arg::In(&bx), Arg::In(&bw), Arg::In(&bb)];
            launch(m, &named("layer_norm", element), grid, args, &p)?;
            let expected = Tensor::zeros((rows, columns), DType::F64, tx.device())?;
            layer_norm(&expected, &tx, &tw, &tb, f64::from(p.eps))?;
            let what = case("layer_norm", element, rows, columns, grid);
            close(&what, element, &y, &wide(&expected)?, tolerance)?;

            let mut dx = buffer(element, &before);
            let args = &mut [Arg::Out(&mut dx), Arg::In(&bdy), Arg::In(&bx), Arg::In(&bw)];
            launch(m, &named("layer_norm_backward", element), grid, args, &p)?;
            layer_norm_backward(&tdx, &tdy, &tx, &tw, f64::from(p.eps))?;
            let what = case("layer_norm_backward", element, rows, columns, grid);
            // Terms of both signs: 1/sd reaches 1/√eps for a row of equal elements, and is cubed.
            close(&what, element, &dx, &wide(&tdx)?, 8.0 * worst * tolerance)?;
        }
    }
    Ok(())
}

fn inverse_sd(row: &[f64]) -> f64 {
    let n = row.len() as f64;
    let mean = row.iter().sum::<f64>() / n;
    1.0 / (row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n + EPS).sqrt()
}
