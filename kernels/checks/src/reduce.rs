//! Sums of squares against f64, and the first value that is not finite, wherever it is.

use crate::{Arg, Buffer, Machine, launch, support::*};
use candle_core::{Result, bail};
use kto_kernels::{Dense, gpu::Reduce, sum_of_squares};

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for (n, grid) in LENGTHS {
            let x = noise(element, n, 1);
            let p = Reduce { elements: n as u64 };
            let (mut sums, bx) = (results(Dense::F32, grid.blocks as usize), buffer(element, &x));
            let args = &mut [Arg::Out(&mut sums), Arg::In(&bx)];
            launch(m, &named("sum_of_squares", element), grid, args, &p)?;
            let found: f64 = decode(Dense::F32, sums.content()).iter().map(|s| f64::from(*s)).sum();
            let expected = sum_of_squares(&double(&x, 1, n)?)?;
            let share = n.div_ceil(grid.blocks as usize);
            // Written so that a NaN fails.
            let near = (found - expected).abs() <= (depth(share, grid) + 2.0) * U32 * expected;
            if !near {
                bail!("{}: {found}, expected {expected}", case("sum_of_squares", element, 1, n, grid));
            }
            check_finite(m, element, x, grid)?;
        }
    }
    Ok(())
}

fn check_finite(m: &dyn Machine, element: Dense, x: Vec<f32>, grid: kto_kernels::gpu::Grid) -> Result<()> {
    let n = x.len();
    for places in [vec![], vec![0], vec![n - 1], vec![n / 2, n - 1, n / 3]] {
        let mut values = x.clone();
        for (i, at) in places.iter().enumerate() {
            values[*at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][i];
        }
        let (mut index, bx) = (Buffer::poisoned(8 * grid.blocks as usize), buffer(element, &values));
        let args = &mut [Arg::Out(&mut index), Arg::In(&bx)];
        let p = Reduce { elements: n as u64 };
        launch(m, &named("first_non_finite", element), grid, args, &p)?;
        let found = index.content().as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).min();
        let expected = places.iter().min().map_or(u64::MAX, |i| *i as u64);
        if found != Some(expected) {
            let what = case("first_non_finite", element, 1, n, grid);
            bail!("{what}: {found:?}, expected {expected} of {places:?}");
        }
    }
    Ok(())
}
