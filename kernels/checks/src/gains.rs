//! DoRA's gains: columns scaled bit for bit, the dots of columns against the CPU operation in f64.

use crate::{Arg, Machine, launch, support::*};
use candle_core::Result;
use kto_kernels::{Dense, add_column_dots, gpu::Gains};

/// Rows whose products the kernel adds up before they join the others.
const ROWS: usize = 64;

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for (rows, columns, grid) in MATRICES {
            let [x, y] = [1, 2].map(|salt| noise(element, rows * columns, salt));
            let [factors, before] = [3, 4].map(|salt| noise(Dense::F32, columns, salt));
            let p = Gains { rows: rows as u64, columns: columns as u32, unused: 0 };
            let [bx, by] = [&x, &y].map(|v| buffer(element, v));
            let bf = buffer(Dense::F32, &factors);

            let mut scaled = bx.clone();
            let args = &mut [Arg::Out(&mut scaled), Arg::In(&bf)];
            launch(m, &named("scale_columns", element), grid, args, &p)?;
            let expected: Vec<f32> = x.iter().enumerate().map(|(i, v)| v * factors[i % columns]).collect();
            same_bits(&case("scale_columns", element, rows, columns, grid), element, &scaled, &expected)?;

            let mut to = buffer(Dense::F32, &before);
            let args = &mut [Arg::Out(&mut to), Arg::In(&bx), Arg::In(&by), Arg::In(&bf)];
            launch(m, &named("add_column_dots", element), grid, args, &p)?;
            let row = |v: &[f32]| double(v, 1, columns)?.flatten_all();
            let (expected, tf) = (row(&before)?, row(&factors)?);
            add_column_dots(&expected, &double(&x, rows, columns)?, &double(&y, rows, columns)?, &tf)?;
            // Products below 4 and a factor below 2, added in two levels.
            let roundings = rows.min(ROWS) + rows.div_ceil(ROWS) + 3;
            let tolerance = 8.0 * rows as f64 * roundings as f64 * U32;
            let what = case("add_column_dots", element, rows, columns, grid);
            close(&what, Dense::F32, &to, &wide(&expected)?, tolerance)?;
        }
    }
    Ok(())
}
