//! Rows picked, added back in order, scaled and biased: against loops that round after every operation, bit for bit.

use crate::{Arg, Machine, launch, support::*};
use candle_core::Result;
use kto_kernels::{Dense, gather_rows, gpu::Rows, scatter_add_rows};

/// Row numbers that repeat, and neither begin nor end in order.
fn index(n: usize, rows: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 7 + rows / 2) % rows) as u32).collect()
}

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for (rows, columns, grid) in MATRICES {
            let what = |kernel: &str| case(kernel, element, rows, columns, grid);
            let x = noise(element, rows * columns, 1);
            let picked = index(rows + 3, rows);
            let mut out = results(element, picked.len() * columns);
            let p = Rows { rows: picked.len() as u64, columns: columns as u32, unused: 0 };
            let (bx, bi) = (buffer(element, &x), indices(&picked));
            launch(
                m,
                &named("gather_rows", element),
                grid,
                &mut [Arg::Out(&mut out), Arg::In(&bx), Arg::In(&bi)],
                &p,
            )?;
            let expected = gather_rows(&single(&x, rows, columns)?, &picked)?;
            same_bits(&what("gather_rows"), element, &out, &values(&expected)?)?;

            let p = Rows { rows: rows as u64, ..p };
            let factors = noise(Dense::F32, rows, 5);
            let mut y = bx.clone();
            let bf = buffer(Dense::F32, &factors);
            launch(m, &named("scale_rows", element), grid, &mut [Arg::Out(&mut y), Arg::In(&bf)], &p)?;
            let expected: Vec<f32> = x.iter().enumerate().map(|(i, v)| v * factors[i / columns]).collect();
            same_bits(&what("scale_rows"), element, &y, &expected)?;

            let bias = noise(element, columns, 6);
            let (mut y, bb) = (bx.clone(), buffer(element, &bias));
            launch(m, &named("add_bias", element), grid, &mut [Arg::Out(&mut y), Arg::In(&bb)], &p)?;
            let expected: Vec<f32> = x.iter().enumerate().map(|(i, v)| v + bias[i % columns]).collect();
            same_bits(&what("add_bias"), element, &y, &expected)?;
        }
    }
    Ok(())
}

pub(crate) fn check_scatter(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for (rows, columns, grid) in MATRICES {
            let targets = index(rows + 3, rows);
            let (before, x) = (noise(element, rows * columns, 1), noise(element, targets.len() * columns, 2));
            let mut out = buffer(element, &before);
            let (bx, bi) = (buffer(element, &x), indices(&targets));
            let p = Rows { rows: targets.len() as u64, columns: columns as u32, unused: 0 };
            let args = &mut [Arg::Out(&mut out), Arg::In(&bx), Arg::In(&bi)];
            launch(m, &named("scatter_add_rows", element), grid, args, &p)?;

            let mut expected = before.clone();
            for (row, to) in x.chunks(columns).zip(&targets) {
                let sum = &mut expected[*to as usize * columns..][..columns];
                let added: Vec<f32> = sum.iter().zip(row).map(|(a, b)| a + b).collect();
                sum.copy_from_slice(&rounded(element, &added));
            }
            let what = case("scatter_add_rows", element, rows, columns, grid);
            same_bits(&what, element, &out, &expected)?;
            if element == Dense::F32 {
                let sum = single(&before, rows, columns)?;
                scatter_add_rows(&sum, &single(&x, targets.len(), columns)?, &targets)?;
                same_bits(&format!("{what}, CPU"), element, &out, &values(&sum)?)?;
            }
        }
    }
    Ok(())
}
