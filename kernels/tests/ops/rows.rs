use crate::support::*;
use candle_core::{DType, Result, Tensor};
use kto_kernels::{clear, gather_rows, gather_rows_into, scale_rows, scatter_add_rows};

/// Returns `n` row numbers below `rows`, with repeats and out of order.
fn indices(n: usize, rows: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 37 + i * i + 5) % rows) as u32).collect()
}

/// Returns what scattering adds to zero.
fn scattered(x: &Tensor, index: &[u32], rows: usize) -> Result<Tensor> {
    let out = Tensor::zeros((rows, x.dims()[1]), x.dtype(), x.device()).unwrap();
    scatter_add_rows(&out, x, index)?;
    Ok(out)
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
            let out = written(&normal(65, c, 2), |out| gather_rows_into(out, &x, &index))?;
            assert_eq!(values(&out), expected);
        }
    }
    assert_eq!(gather_rows(&normal(3, 7, 1), &[])?.dims(), [0, 7]);
    Ok(())
}

#[test]
fn scatter_adds_rows_and_leaves_the_others_alone() -> Outcome {
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
            assert_eq!(values(&scattered(&x, &index, rows)?), expected);
            let before = normal(rows, c, 7);
            let sums = changed(&before, |out| scatter_add_rows(out, &x, &index))?;
            let added: Vec<f64> = values(&before).iter().zip(&expected).map(|(b, e)| b + e).collect();
            assert_close("onto others", &values(&sums), &added, SAME_IN_F64);
            for i in (0..rows).filter(|i| !index.contains(&(*i as u32))) {
                assert_eq!(values(&sums.get(i)?), values(&before.get(i)?), "row {i}");
            }
            // At most n additions into one row.
            let y = scattered(&single(&x), &index, rows)?;
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
    assert_tensors("gradient", &scattered(&dy, &index, 63)?, &expected, SAME_IN_F64);
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
fn clear_sets_a_part_to_zero() -> Outcome {
    for x in [normal(65, 257, 1), single(&normal(7, 3, 1)), normal_vector(7, 1), normal(0, 3, 1)] {
        clear(&x)?;
        assert!(values(&x).iter().all(|v| v.to_bits() == 0));
    }
    let x = normal(4, 3, 2);
    let expected: Vec<f64> =
        values(&x).iter().enumerate().map(|(i, v)| if (3..9).contains(&i) { 0.0 } else { *v }).collect();
    clear(&x.narrow(0, 1, 2)?)?;
    assert_eq!(values(&x), expected);
    assert_refused("strided", clear(&x.t()?));
    assert_refused("part of the columns", clear(&x.narrow(1, 1, 2)?));
    assert_refused("integers", clear(&x.to_dtype(DType::U32)?));
    Ok(())
}

#[test]
fn rows_outside_wrong_shapes_and_shared_memory_are_refused() -> Outcome {
    let x = normal(4, 8, 1);
    assert_refused("gather past the end", gather_rows(&x, &[0, 4]));
    assert_refused("gather far past the end", gather_rows(&x, &[u32::MAX]));
    assert_refused("gather from nothing", gather_rows(&normal(0, 8, 1), &[0]));
    assert_refused("gather of rank 1", gather_rows(&normal_vector(8, 1), &[0]));
    assert_refused("gather of integers", gather_rows(&x.to_dtype(DType::U32)?, &[0]));
    assert_refused("scatter past the end", scattered(&x, &[0, 1, 2, 5], 5));
    assert_refused("too few indices", scattered(&x, &[0, 1, 2], 5));
    assert_refused("too many indices", scattered(&x, &[0, 1, 2, 3, 4], 5));
    let gather = |out: &Tensor| gather_rows_into(out, &x, &[0, 1]);
    assert_refused("gather into other rows", gather(&normal(3, 8, 1)));
    assert_refused("gather into other columns", gather(&normal(2, 7, 1)));
    assert_refused("gather into another type", gather(&single(&normal(2, 8, 1))));
    assert_refused("gather into strided", gather(&normal(8, 2, 1).t()?));
    assert_refused("gather into its source", gather(&x.narrow(0, 2, 2)?));
    let scatter = |out: &Tensor| scatter_add_rows(out, &x, &[0, 1, 0, 1]);
    assert_refused("scatter into other columns", scatter(&normal(2, 7, 1)));
    assert_refused("scatter into another type", scatter(&single(&normal(2, 8, 1))));
    assert_refused("scatter into strided", scatter(&normal(8, 2, 1).t()?));
    assert_refused("scatter into its source", scatter(&x));
    assert_refused("scatter of strided", scatter_add_rows(&normal(5, 4, 1), &x.t()?, &[0; 8]));
    assert_refused("too few factors", scale_rows(&x, &[1.0; 3]));
    assert_refused("strided", scale_rows(&x.t()?, &[1.0; 8]));
    assert_refused("integers", scale_rows(&x.to_dtype(DType::U32)?, &[1.0; 4]));
    Ok(())
}
