use crate::support::*;
use candle_core::{DType, Tensor};
use kto_kernels::{gather_rows, scale_rows, scatter_add_rows};

/// Returns `n` row numbers below `rows`, with repeats and out of order.
fn indices(n: usize, rows: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 37 + i * i + 5) % rows) as u32).collect()
}

#[test]
fn gather_picks_rows() -> Outcome {
    for t in ODD {
        for c in ODD {
            let (x, index) = (normal(t, c, 1), indices(65, t));
            let data = values(&x);
            let expected: Vec<f64> =
                index.iter().flat_map(|i| data[*i as usize * c..][..c].to_vec()).collect();
            assert_eq!(values(&gather_rows(&x, &index)?), expected);
            assert_eq!(values(&gather_rows(&single(&x), &index)?), expected);
        }
    }
    assert_eq!(gather_rows(&normal(3, 7, 1), &[])?.dims(), [0, 7]);
    Ok(())
}

#[test]
fn scatter_adds_rows_and_leaves_the_others_zero() -> Outcome {
    for n in ODD {
        for c in ODD {
            let (x, rows) = (normal(n, c, 2), 67);
            let (index, data) = (indices(n, rows), values(&x));
            let mut expected = vec![0.0; rows * c];
            for (i, at) in index.iter().enumerate() {
                for j in 0..c {
                    expected[*at as usize * c + j] += data[i * c + j];
                }
            }
            // The same sums in the same order: equal, not close.
            assert_eq!(values(&scatter_add_rows(&x, &index, rows)?), expected);
            // At most n additions into one row.
            let y = scatter_add_rows(&single(&x), &index, rows)?;
            assert_close("f32", &values(&y), &expected, n as f64 * U32);
        }
    }
    Ok(())
}

#[test]
fn scatter_is_the_gradient_of_gather() -> Outcome {
    let (x, index) = (normal(63, 7, 3), indices(257, 63));
    let dy = normal(index.len(), 7, 4);
    let ids = Tensor::new(index.as_slice(), x.device())?;
    let expected = autograd(&[&x], &dy, |v| v[0].index_select(&ids, 0)).remove(0);
    assert_tensors("gradient", &scatter_add_rows(&dy, &index, 63)?, &expected, SAME_IN_F64);
    Ok(())
}

#[test]
fn scale_multiplies_each_row_by_its_factor() -> Outcome {
    for t in ODD {
        for c in ODD {
            let x = normal(t, c, 5);
            let factors: Vec<f64> = normals(t, 6);
            let expected: Vec<f64> = values(&x).iter().enumerate().map(|(i, v)| v * factors[i / c]).collect();
            let y = single(&x);
            scale_rows(&x, &factors)?;
            assert_eq!(values(&x), expected);
            scale_rows(&y, &factors)?;
            assert_close("f32", &values(&y), &expected, 2.0 * U32);
        }
    }
    Ok(())
}

#[test]
fn rows_outside_and_wrong_shapes_are_refused() -> Outcome {
    let x = normal(4, 8, 1);
    assert_refused("gather past the end", gather_rows(&x, &[0, 4]));
    assert_refused("gather far past the end", gather_rows(&x, &[u32::MAX]));
    assert_refused("gather from nothing", gather_rows(&normal(0, 8, 1), &[0]));
    assert_refused("gather of rank 1", gather_rows(&normal_vector(8, 1), &[0]));
    assert_refused("gather of integers", gather_rows(&x.to_dtype(DType::U32)?, &[0]));
    assert_refused("scatter past the end", scatter_add_rows(&x, &[0, 1, 2, 5], 5));
    assert_refused("too few indices", scatter_add_rows(&x, &[0, 1, 2], 5));
    assert_refused("too many indices", scatter_add_rows(&x, &[0, 1, 2, 3, 4], 5));
    assert_refused("too few factors", scale_rows(&x, &[1.0; 3]));
    assert_refused("strided", scale_rows(&x.t()?, &[1.0; 8]));
    assert_refused("integers", scale_rows(&x.to_dtype(DType::U32)?, &[1.0; 4]));
    Ok(())
}
