//! Sums and scaling, and every value that a cast can meet, against the half crate.

use crate::{Arg, Machine, launch, support::*};
use candle_core::Result;
use kto_kernels::{Dense, gpu::Elements};

pub(crate) fn check(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        for (n, grid) in LENGTHS {
            let (a, b) = (noise(element, n, 1), noise(element, n, 2));
            let p = Elements { elements: n as u64, factor: 0.3, unused: 0 };
            let (mut sum, bb) = (buffer(element, &a), buffer(element, &b));
            launch(m, &named("add", element), grid, &mut [Arg::Out(&mut sum), Arg::In(&bb)], &p)?;
            let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            same_bits(&case("add", element, 1, n, grid), element, &sum, &expected)?;

            let mut product = buffer(element, &a);
            launch(m, &named("scale", element), grid, &mut [Arg::Out(&mut product)], &p)?;
            let expected: Vec<f32> = a.iter().map(|a| a * p.factor).collect();
            same_bits(&case("scale", element, 1, n, grid), element, &product, &expected)?;
        }
    }
    Ok(())
}

pub(crate) fn check_casts(m: &dyn Machine) -> Result<()> {
    for element in TYPES {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let stored = match element {
            Dense::F32 => encode(element, &between(Dense::F16)),
            _ => all,
        };
        let values = decode(element, &stored);
        let n = values.len();
        let p = Elements { elements: n as u64, factor: 0.0, unused: 0 };
        let (mut wide, narrow) = (results(Dense::F32, n), crate::Buffer::new(&stored));
        let (grid, args) = (grid(3, 65), &mut [Arg::Out(&mut wide), Arg::In(&narrow)]);
        launch(m, &named("cast_to_f32", element), grid, args, &p)?;
        same_bits(&case("cast_to_f32", element, 1, n, grid), Dense::F32, &wide, &values)?;

        let values = between(element);
        let n = values.len();
        let p = Elements { elements: n as u64, ..p };
        let (mut out, x) = (results(element, n), buffer(Dense::F32, &values));
        launch(m, &named("cast_of_f32", element), grid, &mut [Arg::Out(&mut out), Arg::In(&x)], &p)?;
        same_bits(&case("cast_of_f32", element, 1, n, grid), element, &out, &values)?;
    }
    Ok(())
}

/// Every value of a 16-bit type, the f32 half-way to its neighbour, and the f32s beside that.
fn between(element: Dense) -> Vec<f32> {
    let narrow = if element == Dense::Bf16 { Dense::Bf16 } else { Dense::F16 };
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let values = decode(narrow, &all);
    let mut out = Vec::with_capacity(4 * values.len());
    for pair in values.windows(2) {
        let middle = ((f64::from(pair[0]) + f64::from(pair[1])) / 2.0) as f32;
        out.extend([pair[0], middle, middle.next_up(), middle.next_down()]);
    }
    out.extend([65_519.996, 65_520.0, 1e30, f32::MAX, f32::MIN, 1e-44, f32::MIN_POSITIVE, f32::NEG_INFINITY]);
    out
}
