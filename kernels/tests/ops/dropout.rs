use crate::support::*;
use candle_core::{DType, Device, Tensor};
use kto_kernels::{DropoutKey, dropout};

const P: f64 = 0.1;

fn key(key: u64) -> DropoutKey {
    DropoutKey { p: P, key }
}

/// Returns which elements survive, row by row.
fn mask(key: DropoutKey, rows: &[u64], columns: usize) -> Vec<bool> {
    let ones = Tensor::ones((rows.len(), columns), DType::F32, &Device::Cpu).unwrap();
    values(&dropout(&ones, key, rows).unwrap()).iter().map(|v| *v != 0.0).collect()
}

/// Fails unless the share of `true` lies within five standard deviations of `p`.
#[track_caller]
fn assert_share(what: &str, p: f64, draws: impl Iterator<Item = bool>) {
    let (mut n, mut hits) = (0.0, 0.0);
    for draw in draws {
        n += 1.0;
        hits += f64::from(u8::from(draw));
    }
    let (share, sigma) = (hits / n, (p * (1.0 - p) / n).sqrt());
    assert!((share - p).abs() <= 5.0 * sigma, "{what}: share {share} of {n}, expected {p} ± {sigma}");
}

#[test]
fn elements_survive_scaled_or_become_zero() -> Outcome {
    for t in ODD {
        for c in ODD {
            let x = normal(t, c, 1);
            let rows: Vec<u64> = (0..t as u64).collect();
            let kept = mask(key(5), &rows, c);
            let expected: Vec<f64> =
                values(&x).iter().zip(kept).map(|(x, k)| if k { x / (1.0 - P) } else { 0.0 }).collect();
            assert_close("f64", &values(&dropout(&x, key(5), &rows)?), &expected, SAME_IN_F64);
            // The same mask; 1 − p and the quotient are rounded.
            assert_close("f32", &values(&dropout(&single(&x), key(5), &rows)?), &expected, 2.0 * U32);
        }
    }
    Ok(())
}

#[test]
fn the_share_of_survivors_is_one_minus_p() {
    let rows: Vec<u64> = (0..257).collect();
    for p in [0.05, 0.1, 0.5, 0.9] {
        let kept = mask(DropoutKey { p, key: 1 }, &rows, 1024);
        assert_share("all", 1.0 - p, kept.iter().copied());
        for row in kept.chunks(1024) {
            assert_share("one row", 1.0 - p, row.iter().copied());
        }
        for column in 0..1024 {
            assert_share("one column", 1.0 - p, kept.iter().skip(column).step_by(1024).copied());
        }
    }
}

#[test]
fn equal_keys_give_equal_masks_and_neighbours_independent_ones() {
    let rows: Vec<u64> = (0..64).collect();
    let (first, next) = (mask(key(7), &rows, 1024), mask(key(8), &rows, 1024));
    assert_eq!(first, mask(key(7), &rows, 1024));
    // Two independent draws agree with probability p² + (1 − p)².
    let agree = P * P + (1.0 - P) * (1.0 - P);
    assert_share("keys 7 and 8", agree, first.iter().zip(&next).map(|(a, b)| a == b));
    let neighbours = first.chunks(1024).zip(first[1024..].chunks(1024));
    assert_share("rows", agree, neighbours.flat_map(|(a, b)| a.iter().zip(b)).map(|(a, b)| a == b));
    assert_share("columns", agree, first.windows(2).map(|w| w[0] == w[1]));
    // Sums or differences of key and row must not meet: (7, 1) against (8, 0) and, bit by bit, (6, 0).
    assert_share("diagonal", agree, first[1024..].iter().zip(&next).map(|(a, b)| a == b));
    assert_share("bits", agree, first[1024..].iter().zip(&mask(key(6), &rows, 1024)).map(|(a, b)| a == b));
    // A key shifted by one must not be a mask shifted by one column.
    assert_share("shifted", agree, first[1..].iter().zip(&next).map(|(a, b)| a == b));
}

#[test]
fn a_row_keeps_its_mask_wherever_it_sits() -> Outcome {
    let (names, columns) = ([90u64, 3, 1 << 40, u64::MAX, 0, 17, 18], 257);
    let x = normal(names.len(), columns, 2);
    let all = values(&dropout(&x, key(9), &names)?);
    for order in [[6usize, 5, 4, 3, 2, 1, 0], [2, 0, 1, 6, 3, 5, 4]] {
        let moved: Vec<u64> = order.iter().map(|i| names[*i]).collect();
        let index = Tensor::new(order.map(|i| i as u32).as_slice(), &Device::Cpu)?;
        let y = values(&dropout(&x.index_select(&index, 0)?, key(9), &moved)?);
        for (row, i) in order.iter().enumerate() {
            assert_eq!(y[row * columns..][..columns], all[i * columns..][..columns]);
        }
    }
    // Alone, and with fewer columns: a row's first elements do not depend on its length.
    let alone = values(&dropout(&x.narrow(0, 3, 1)?.narrow(1, 0, 64)?.contiguous()?, key(9), &names[3..4])?);
    assert_eq!(alone, all[3 * columns..][..64]);
    Ok(())
}

#[test]
fn the_gradient_passes_through_the_same_mask() -> Outcome {
    let (x, dy, rows) = (normal(7, 63, 3), normal(7, 63, 4), (10..17).collect::<Vec<u64>>());
    let slope = differences(&x, &dy, |x| dropout(x, key(11), &rows));
    assert_close("slope", &values(&dropout(&dy, key(11), &rows)?), &slope, DIFFERENCES);
    Ok(())
}

#[test]
fn p_zero_changes_nothing() -> Outcome {
    let x = normal(7, 65, 5);
    assert_eq!(values(&dropout(&x, DropoutKey { p: 0.0, key: 1 }, &[0; 7])?), values(&x));
    Ok(())
}

#[test]
fn wrong_shapes_and_probabilities_are_refused() -> Outcome {
    let x = normal(3, 8, 1);
    assert_refused("too few rows", dropout(&x, key(1), &[0, 1]));
    assert_refused("too many rows", dropout(&x, key(1), &[0, 1, 2, 3]));
    assert_refused("rank", dropout(&normal_vector(8, 1), key(1), &[0]));
    assert_refused("integers", dropout(&x.to_dtype(DType::U32)?, key(1), &[0, 1, 2]));
    assert_refused("strided", dropout(&x.t()?, key(1), &[0; 8]));
    for p in [1.0, 1.5, -0.1, f64::NAN] {
        assert_refused("probability", dropout(&x, DropoutKey { p, key: 1 }, &[0, 1, 2]));
    }
    Ok(())
}
