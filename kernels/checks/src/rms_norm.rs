//! Root-mean-square normalization against the CPU operation in f64.

use crate::{Arg, Machine, launch, support::*};
use candle_core::{DType, Result, Tensor};
use kto_kernels::{gpu::RmsNorm, rms_norm, rms_norm_backward};

const EPS: f64 = 1e-5;

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for (rows, columns, grid) in MATRICES {
            let n = rows * columns;
            let [x, dy, before] = [1, 2, 3].map(|salt| noise(element, n, salt));
            let w = noise(element, columns, 4);
            let p = RmsNorm { rows: rows as u64, columns: columns as u32, eps: EPS as f32 };
            let [bx, bdy, bw] = [&x, &dy, &w].map(|v| buffer(element, v));
            let [tx, tdy, tdx] = [&x, &dy, &before].map(|v| double(v, rows, columns));
            let (tx, tdy, tdx, tw) = (tx?, tdy?, tdx?, double(&w, 1, columns)?.flatten_all()?);
            // A few roundings beside the sum's; the sum's count half, under the root.
            let tolerance = (depth(columns, grid) + 8.0) * U32;

            let mut y = results(element, n);
            let args = &mut [Arg::Out(&mut y), Arg::In(&bx), Arg::In(&bw)];
            launch(m, &named("rms_norm", element), grid, args, &p)?;
            let expected = Tensor::zeros((rows, columns), DType::F64, tx.device())?;
            rms_norm(&expected, &tx, &tw, f64::from(p.eps))?;
            let what = case("rms_norm", element, rows, columns, grid);
            close(&what, element, &y, &wide(&expected)?, tolerance)?;

            let mut dx = buffer(element, &before);
            let args = &mut [Arg::Out(&mut dx), Arg::In(&bdy), Arg::In(&bx), Arg::In(&bw)];
            launch(m, &named("rms_norm_backward", element), grid, args, &p)?;
            rms_norm_backward(&tdx, &tdy, &tx, &tw, f64::from(p.eps))?;
            let what = case("rms_norm_backward", element, rows, columns, grid);
            // Terms of both signs: 1/rms reaches 1/√eps for a row of one small element, and is cubed.
            let worst = wide(&tx)?.chunks(columns).map(inverse_rms).fold(1.0, f64::max);
            close(&what, element, &dx, &wide(&tdx)?, 8.0 * worst * tolerance)?;
        }
    }
    Ok(())
}

fn inverse_rms(row: &[f64]) -> f64 {
    1.0 / (row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64 + EPS).sqrt()
}
