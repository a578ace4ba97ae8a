//! Rotary embedding against the CPU operation, bit for bit.

use crate::{Arg, Machine, launch, support::*};
use candle_core::Result;
use kto_kernels::{RopeTable, gpu::Rope, rope};

/// (rows, heads, head size, launch)
const CASES: [(usize, usize, usize, kto_kernels::gpu::Grid); 5] = [
    (1, 1, 2, grid(1, 1)),
    (7, 3, 10, grid(2, 33)),
    (65, 2, 64, grid(5, 64)),
    (3, 9, 64, grid(4, 257)),
    (2, 5, 26, grid(2, 1024)),
];

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    let table = |v: &[f32]| buffer(kto_kernels::Dense::F32, v);
    for element in TYPES {
        for (rows, heads, dim, grid) in CASES {
            let columns = heads * dim;
            let angles = RopeTable::new(dim, 10_000.0, 300);
            let (cosines, sines) = angles.tables();
            let positions: Vec<u32> = (0..rows as u32).map(|i| i * 37 % 300).collect();
            let x = noise(element, rows * columns, 1);
            for inverse in [false, true] {
                let mut y = buffer(element, &x);
                let sign = if inverse { -1.0 } else { 1.0 };
                let p = Rope {
                    rows: rows as u64,
                    heads: heads as u32,
                    half_dim: dim as u32 / 2,
                    sign,
                    head_dim: dim as u32,
                };
                let (index, cosines, sines) = (indices(&positions), table(cosines), table(sines));
                let args = &mut [Arg::Out(&mut y), Arg::In(&index), Arg::In(&cosines), Arg::In(&sines)];
                launch(m, &named("rope", element), grid, args, &p)?;
                let expected = single(&x, rows, columns)?;
                rope(&expected, &angles, &positions, inverse)?;
                same_bits(&case("rope", element, rows, columns, grid), element, &y, &values(&expected)?)?;
            }
        }
    }
    Ok(())
}
