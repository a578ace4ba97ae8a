use crate::support::*;
use candle_core::{DType, Device, Result, Tensor};
use kto_kernels::{
    Weight, add, add_bias, add_column_dots, first_non_finite, scale_columns, scale_in_place, sum_of_squares,
};

/// Returns `a + b`.
fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    changed(a, |a| add(a, b))
}

#[test]
fn add_and_bias_add() -> Outcome {
    for t in ODD {
        for c in ODD {
            let (a, b, bias) = (normal(t, c, 1), normal(t, c, 2), normal_vector(c, 3));
            let (x, y, z) = (values(&a), values(&b), values(&bias));
            let both: Vec<f64> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            assert_eq!(values(&sum(&a, &b)?), both);
            // One rounding.
            assert_close("add in f32", &values(&sum(&single(&a), &single(&b))?), &both, U32);
            let biased: Vec<f64> = x.iter().enumerate().map(|(i, x)| x + z[i % c]).collect();
            let a32 = single(&a);
            add_bias(&a, &bias)?;
            assert_eq!(values(&a), biased);
            add_bias(&a32, &single(&bias))?;
            assert_close("bias in f32", &values(&a32), &biased, U32);
        }
    }
    Ok(())
}

#[test]
fn scale_multiplies_every_element_of_any_rank() -> Outcome {
    for x in [normal(65, 257, 1), normal_vector(7, 1)] {
        let expected: Vec<f64> = values(&x).iter().map(|v| v * 0.3).collect();
        let y = single(&x);
        scale_in_place(&x, 0.3)?;
        assert_eq!(values(&x), expected);
        scale_in_place(&y, 0.3)?;
        assert_close("f32", &values(&y), &expected, 2.0 * U32);
    }
    Ok(())
}

#[test]
fn columns_are_scaled_and_multiplied() -> Outcome {
    for t in ODD {
        for c in ODD {
            let (x, y, f) = (normal(t, c, 1), normal(t, c, 2), normal_vector(c, 3));
            let (a, b, g) = (values(&x), values(&y), values(&f));
            let scaled: Vec<f64> = a.iter().enumerate().map(|(i, a)| a * g[i % c]).collect();
            assert_eq!(values(&changed(&x, |x| scale_columns(x, &f))?), scaled);
            let to = normal_vector(c, 4);
            let dots = |j: usize| (0..t).map(|i| a[i * c + j] * b[i * c + j]).sum::<f64>();
            let expected: Vec<f64> =
                values(&to).iter().enumerate().map(|(j, v)| v + g[j] * dots(j)).collect();
            let found = changed(&to, |to| add_column_dots(to, &x, &y, &f))?;
            assert_close("dots", &values(&found), &expected, SAME_IN_F64);
            let narrow =
                changed(&single(&to), |to| add_column_dots(to, &single(&x), &single(&y), &single(&f)))?;
            let size = 1.0 + (t as f64).sqrt();
            assert_close("dots in f32", &values(&narrow), &expected, 16.0 * size * U32);
        }
    }
    let (x, short) = (normal(3, 4, 1), normal_vector(3, 1));
    assert!(scale_columns(&x, &short).is_err());
    assert!(add_column_dots(&short, &x, &x, &short).is_err());
    assert!(add_column_dots(&normal_vector(4, 1), &x, &normal(2, 4, 1), &normal_vector(4, 2)).is_err());
    Ok(())
}

#[test]
fn rows_have_their_own_squares() -> Outcome {
    for (rows, columns) in [(1, 1), (7, 65), (257, 63), (64, 257)] {
        let x = single(&normal(rows, columns, 1));
        let expected: Vec<f64> =
            values(&x).chunks(columns).map(|row| row.iter().map(|v| v * v).sum()).collect();
        assert_close("dense", &Weight::Dense(x).row_squares()?, &expected, SAME_IN_F64);
    }
    Ok(())
}

#[test]
fn squares_are_summed_in_f64() -> Outcome {
    for n in ODD {
        let x = normal(n, n, 1);
        let expected: f64 = values(&x).iter().map(|v| v * v).sum();
        assert_close("f64", &[sum_of_squares(&x)?], &[expected], SAME_IN_F64);
        // The elements are exact in f32, so only f64 sums come this close.
        assert_close("f32", &[sum_of_squares(&single(&x))?], &[expected], SAME_IN_F64);
    }
    assert_eq!(
        sum_of_squares(&Tensor::new(&[1e30f32, 1e30], &Device::Cpu)?)?,
        2.0 * (1e30f32 as f64).powi(2)
    );
    Ok(())
}

#[test]
fn the_first_non_finite_element_is_named() -> Outcome {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for place in [0, 64, 256] {
            let mut data = values(&normal(1, 257, 1));
            data[place] = bad;
            data[256] = f64::NAN;
            let x = Tensor::from_vec(data, (1, 257), &Device::Cpu)?;
            assert_eq!(first_non_finite(&x)?, Some(place));
            assert_eq!(first_non_finite(&single(&x))?, Some(place));
        }
    }
    assert_eq!(first_non_finite(&normal(65, 65, 1))?, None);
    assert_eq!(first_non_finite(&normal(0, 65, 1))?, None);
    Ok(())
}

#[test]
fn wrong_shapes_types_and_shared_memory_are_refused() -> Outcome {
    let x = normal(4, 8, 1);
    assert_refused("add of other rows", add(&x, &normal(3, 8, 1)));
    assert_refused("add of other columns", add(&x, &normal(4, 7, 1)));
    assert_refused("add of other types", add(&x, &single(&x)));
    assert_refused("add of strided", add(&x, &normal(8, 4, 1).t()?));
    assert_refused("add of rank 1", add(&normal_vector(8, 1), &normal_vector(8, 1)));
    assert_refused("add to itself", add(&x, &x));
    assert_refused("add of another part", add(&x.narrow(0, 0, 2)?, &x.narrow(0, 2, 2)?));
    assert_refused("add to strided", add(&normal(8, 4, 1).t()?, &x));
    assert_refused("short bias", add_bias(&x, &normal_vector(7, 1)));
    assert_refused("bias of rank 2", add_bias(&x, &normal(1, 8, 1)));
    assert_refused("bias of another type", add_bias(&x, &single(&normal_vector(8, 1))));
    assert_refused("bias inside the target", add_bias(&x, &x.get(0)?));
    assert_refused("strided target", scale_in_place(&x.t()?, 2.0));
    assert_refused("integers", scale_in_place(&x.to_dtype(DType::I64)?, 2.0));
    assert_refused("strided sum", sum_of_squares(&x.t()?));
    assert_refused("strided search", first_non_finite(&x.t()?));
    // A contiguous part of a larger tensor is changed alone.
    let all = values(&x);
    scale_in_place(&x.narrow(0, 1, 2)?, 2.0)?;
    let expected: Vec<f64> =
        all.iter().enumerate().map(|(i, v)| if (8..24).contains(&i) { 2.0 * v } else { *v }).collect();
    assert_eq!(values(&x), expected);
    Ok(())
}
