use crate::support::*;
use candle_core::{DType, Device, Result, Tensor};
use kto_kernels::{RopeTable, rope};

/// (head size, theta, position, pair, cosine, sine) printed by `LlamaRotaryEmbedding` of transformers 5.23.0 on torch 2.15.0, f32.
const TRANSFORMERS: [(usize, f64, u32, usize, f64, f64); 24] = [
    (8, 10000.0, 1, 0, 5.403023362e-01, 8.414709568e-01),
    (8, 10000.0, 1, 1, 9.950041771e-01, 9.983342141e-02),
    (8, 10000.0, 1, 3, 9.999995232e-01, 9.999999311e-04),
    (8, 10000.0, 100, 1, -8.390715122e-01, -5.440211296e-01),
    (8, 10000.0, 100, 2, 5.403023362e-01, 8.414709568e-01),
    (8, 10000.0, 100, 3, 9.950041771e-01, 9.983342141e-02),
    (8, 10000.0, 2047, 1, -8.792673349e-01, -4.763286114e-01),
    (8, 10000.0, 2047, 3, -4.584086835e-01, 8.887414932e-01),
    (64, 500000.0, 1, 0, 5.403023362e-01, 8.414709568e-01),
    (64, 500000.0, 1, 1, 7.877790928e-01, 6.159578562e-01),
    (64, 500000.0, 1, 31, 1.000000000e+00, 3.013858077e-06),
    (64, 500000.0, 100, 1, -9.261644483e-01, -3.771198690e-01),
    (64, 500000.0, 100, 16, 9.900166392e-01, 1.409504116e-01),
    (64, 500000.0, 100, 31, 9.999999404e-01, 3.013858222e-04),
    (64, 500000.0, 2047, 1, 3.400565088e-01, 9.404050112e-01),
    (64, 500000.0, 2047, 31, 9.999809861e-01, 6.169328466e-03),
    (96, 10000.0, 1, 0, 5.403023362e-01, 8.414709568e-01),
    (96, 10000.0, 1, 1, 6.782600284e-01, 7.348219752e-01),
    (96, 10000.0, 1, 47, 1.000000000e+00, 1.211527488e-04),
    (96, 10000.0, 100, 8, -9.018324018e-01, 4.320860505e-01),
    (96, 10000.0, 100, 24, 5.403023362e-01, 8.414709568e-01),
    (96, 10000.0, 100, 47, 9.999266267e-01, 1.211497840e-02),
    (96, 10000.0, 2047, 8, 3.718879521e-01, 9.282776117e-01),
    (96, 10000.0, 2047, 47, 9.694053531e-01, 2.454653382e-01),
];

/// Returns a turned copy.
fn turned(x: &Tensor, table: &RopeTable, positions: &[u32], inverse: bool) -> Result<Tensor> {
    changed(x, |x| rope(x, table, positions, inverse))
}

#[test]
fn angles_are_those_of_transformers() -> Outcome {
    for (dim, theta, position, pair, cos, sin) in TRANSFORMERS {
        let table = RopeTable::new(dim, theta, 2048);
        // Turning the unit vector of a pair shows its cosine and sine.
        let mut unit = vec![0f32; dim];
        unit[pair] = 1.0;
        let y =
            values(&turned(&Tensor::from_vec(unit, (1, dim), &Device::Cpu)?, &table, &[position], false)?);
        // Torch's f32 cosine and ours each err by an ulp; at position 2047 an angle without torch's roundings is off by 1e-4.
        let place = format!("head size {dim}, theta {theta}, position {position}, pair {pair}");
        assert_close(&place, &[y[pair], y[pair + dim / 2]], &[cos, sin], 2.0 * U32);
    }
    Ok(())
}

/// Rotates pairs (j, j + D/2) by f32 angles, everything else in f64.
fn reference(x: &[f64], columns: usize, dim: usize, theta: f32, positions: &[u32]) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    for (i, position) in positions.iter().enumerate() {
        for head in 0..columns / dim {
            for j in 0..dim / 2 {
                let exponent = 2.0 * j as f32 / dim as f32;
                let frequency = 1.0f32 / (theta as f64).powf(exponent as f64) as f32;
                let angle = (*position as f32 * frequency) as f64;
                let (cos, sin) = (angle.cos() as f32 as f64, angle.sin() as f32 as f64);
                let a = i * columns + head * dim + j;
                let b = a + dim / 2;
                y[a] = x[a] * cos - x[b] * sin;
                y[b] = x[b] * cos + x[a] * sin;
            }
        }
    }
    y
}

/// Positions as a pack has them: rising, repeated by branches, and past 100.
fn positions(t: usize) -> Vec<u32> {
    (0..t).map(|i| ((i * 7) % 300) as u32).collect()
}

#[test]
fn forward_is_the_formula_on_every_head() -> Outcome {
    for dim in [2, 8, 16, 96] {
        let table = RopeTable::new(dim, 10000.0, 300);
        for t in ODD {
            for heads in [1, 3, 7] {
                let (x, at) = (normal(t, heads * dim, 1), positions(t));
                let expected = reference(&values(&x), heads * dim, dim, 10000.0, &at);
                assert_close("f64", &values(&turned(&x, &table, &at, false)?), &expected, SAME_IN_F64);
                // Two products and a sum.
                let y = turned(&single(&x), &table, &at, false)?;
                assert_close("f32", &values(&y), &expected, 4.0 * U32);
            }
        }
    }
    Ok(())
}

#[test]
fn inverse_undoes_and_is_the_gradient() -> Outcome {
    let table = RopeTable::new(16, 500000.0, 300);
    let (x, dy, at) = (normal(65, 48, 2), normal(65, 48, 3), positions(65));
    let back = turned(&turned(&x, &table, &at, false)?, &table, &at, true)?;
    // The table's cosines and sines are rounded to f32, so their squares add up to one within 2u.
    assert_tensors("there and back", &back, &x, 4.0 * U32);
    let dx = turned(&dy, &table, &at, true)?;
    let slope =
        differences(&x.narrow(0, 50, 2)?, &dy.narrow(0, 50, 2)?, |x| turned(x, &table, &at[50..52], false));
    assert_close("slope", &values(&dx.narrow(0, 50, 2)?), &slope, DIFFERENCES);
    let inner = |a: &Tensor, b: &Tensor| -> f64 { values(a).iter().zip(values(b)).map(|(a, b)| a * b).sum() };
    let (left, right) = (inner(&turned(&x, &table, &at, false)?, &dy), inner(&x, &dx));
    assert_close("adjoint", &[left], &[right], SAME_IN_F64);
    Ok(())
}

#[test]
fn scores_depend_on_distance_only() -> Outcome {
    let table = RopeTable::new(8, 10000.0, 200);
    let (q, k) = (normal(1, 8, 4), normal(1, 8, 5));
    let score = |a: u32, b: u32| -> Result<f64> {
        let (q, k) = (turned(&q, &table, &[a], false)?, turned(&k, &table, &[b], false)?);
        Ok(values(&(q * k)?).iter().sum())
    };
    // Angles at 150 are rounded to f32: 150·u, times the sizes of the vectors.
    assert_close("moved by 140", &[score(150, 145)?], &[score(10, 5)?], 1e-4);
    Ok(())
}

#[test]
fn positions_outside_and_wrong_shapes_are_refused() -> Outcome {
    let (table, x) = (RopeTable::new(8, 10000.0, 10), normal(3, 16, 1));
    assert_eq!(turned(&x, &table, &[0, 9, 9], false)?.dims(), [3, 16]);
    assert_refused("position at the end", turned(&x, &table, &[0, 1, 10], false));
    assert_refused("position far away", turned(&x, &table, &[0, 1, u32::MAX], false));
    assert_refused("too few positions", turned(&x, &table, &[0, 1], false));
    assert_refused("too many positions", turned(&x, &table, &[0, 1, 2, 3], false));
    assert_refused("half a head", turned(&normal(3, 12, 1), &table, &[0, 1, 2], false));
    assert_refused("empty table", turned(&x, &RopeTable::new(0, 10000.0, 10), &[0, 1, 2], false));
    assert_refused("half precision", turned(&x.to_dtype(DType::BF16)?, &table, &[0, 1, 2], false));
    assert_refused("strided", turned(&normal(16, 3, 1).t()?, &table, &[0, 1, 2], false));
    // What is refused is left as it was; a part of a larger tensor is turned alone.
    let before = values(&x);
    assert_refused("in place", rope(&x, &table, &[0, 1, 10], false));
    assert_eq!(values(&x), before);
    rope(&x.narrow(0, 1, 1)?, &table, &[5], false)?;
    assert_eq!(values(&x)[..16], before[..16]);
    assert_ne!(values(&x)[16..32], before[16..32]);
    assert_eq!(values(&x)[32..], before[32..]);
    Ok(())
}
