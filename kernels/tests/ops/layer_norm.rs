use crate::support::*;
use candle_core::{DType, Result, Tensor};
use kto_kernels::{layer_norm, layer_norm_backward};

const EPS: f64 = 1e-5;

/// Returns the result of the forward pass.
fn norm(x: &Tensor, (w, b): (&Tensor, &Tensor), eps: f64) -> Result<Tensor> {
    written(x, |out| layer_norm(out, x, w, b, eps))
}

/// Returns what the backward pass adds to zero.
fn gradient(dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let dx = Tensor::zeros(x.shape(), x.dtype(), x.device())?;
    layer_norm_backward(&dx, dy, x, w, eps)?;
    Ok(dx)
}

/// Returns the mean of a row and the mean square of what is left without it.
fn moments(row: &[f64]) -> (f64, f64) {
    let mean = row.iter().sum::<f64>() / row.len() as f64;
    (mean, row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / row.len() as f64)
}

fn reference(x: &[f64], w: &[f64], b: &[f64]) -> Vec<f64> {
    let normalized = |row: &[f64]| -> Vec<f64> {
        let (mean, variance) = moments(row);
        let of = |((v, w), b): ((&f64, &f64), &f64)| (v - mean) / (variance + EPS).sqrt() * w + b;
        row.iter().zip(w).zip(b).map(of).collect()
    };
    x.chunks(w.len()).flat_map(normalized).collect()
}

fn composed(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(1)?)?;
    let sd = centred.sqr()?.mean_keepdim(1)?.affine(1.0, EPS)?.sqrt()?;
    centred.broadcast_div(&sd)?.broadcast_mul(w)
}

#[test]
fn forward_is_the_formula() -> Outcome {
    for t in ODD {
        for c in ODD {
            let (x, w, b) = (normal(t, c, 1), normal_vector(c, 2), normal_vector(c, 9));
            let expected = reference(&values(&x), &values(&w), &values(&b));
            // The mean's rounding counts as often as 1/sd says; of one column sd is √eps.
            let worst = largest_inverse(&x);
            assert_close("f64", &values(&norm(&x, (&w, &b), EPS)?), &expected, worst * SAME_IN_F64);
            let y = norm(&single(&x), (&single(&w), &single(&b)), EPS)?;
            assert_eq!(y.dtype(), DType::F32);
            assert_close("f32", &values(&y), &expected, worst * (c as f64 / 2.0 + 8.0) * U32);
        }
    }
    Ok(())
}

/// What a row has in common is taken off before anything is squared.
#[test]
fn rows_far_from_zero_and_equal_elements() -> Outcome {
    let (x, w, b) = (normal(5, 64, 1), normal_vector(64, 2), normal_vector(64, 3));
    let far = (&x + 1024.0)?;
    let (near, far) = (norm(&x, (&w, &b), EPS)?, norm(&single(&far), (&single(&w), &single(&b)), EPS)?);
    // Elements near 1024 are multiples of 2^-13.
    assert_close("far", &values(&far), &values(&near), 2e-3);
    let equal = (x.zeros_like()? + 3.0)?;
    let rows: Vec<f64> = (0..5).flat_map(|_| values(&b)).collect();
    assert_eq!(values(&norm(&equal, (&w, &b), EPS)?), rows);
    assert!(values(&gradient(&x, &equal, &w, EPS)?).iter().all(|v| v.is_finite()));
    Ok(())
}

#[test]
fn backward_is_autograd() -> Outcome {
    for t in ODD {
        for c in ODD {
            let (x, w, dy) = (normal(t, c, 3), normal_vector(c, 4), normal(t, c, 5));
            let expected = autograd(&[&x], &dy, |v| composed(&v[0], &w)).remove(0);
            let worst = largest_inverse(&x);
            // 1/sd stands between an error of the bracket and one of the gradient, and between those of the mean and the bracket.
            assert_tensors("f64", &gradient(&dy, &x, &w, EPS)?, &expected, 100.0 * worst * SAME_IN_F64);
            let dx = gradient(&single(&dy), &single(&x), &single(&w), EPS)?;
            assert_tensors("f32", &dx, &expected, (2.0 * c as f64 + 16.0) * U32 * worst * worst);
        }
    }
    Ok(())
}

/// Returns the largest `1/sd` of the rows.
fn largest_inverse(x: &Tensor) -> f64 {
    let columns = x.dims()[1];
    values(x).chunks(columns).fold(1.0f64, |m, row| m.max(1.0 / (moments(row).1 + EPS).sqrt()))
}

#[test]
fn backward_is_the_slope() -> Outcome {
    let (x, w, b, dy) = (normal(3, 7, 6), normal_vector(7, 7), normal_vector(7, 9), normal(3, 7, 8));
    let slope = differences(&x, &dy, |x| norm(x, (&w, &b), EPS));
    assert_close("slope", &values(&gradient(&dy, &x, &w, EPS)?), &slope, DIFFERENCES);
    Ok(())
}

#[test]
fn the_gradient_is_added() -> Outcome {
    let (x, w, dy, before) = (normal(65, 63, 1), normal_vector(63, 2), normal(65, 63, 3), normal(65, 63, 4));
    let sum = changed(&before, |dx| layer_norm_backward(dx, &dy, &x, &w, EPS))?;
    let expected = (gradient(&dy, &x, &w, EPS)? + &before)?;
    assert_eq!(values(&sum), values(&expected));
    Ok(())
}

#[test]
fn wrong_shapes_types_and_shared_memory_are_refused() -> Outcome {
    let (x, w, b) = (normal(4, 8, 1), normal_vector(8, 2), normal_vector(8, 3));
    assert_refused("short weight", norm(&x, (&normal_vector(7, 2), &b), EPS));
    assert_refused("short bias", norm(&x, (&w, &normal_vector(7, 2)), EPS));
    assert_refused("weight of rank 2", norm(&x, (&normal(1, 8, 2), &b), EPS));
    assert_refused("bias of rank 2", norm(&x, (&w, &normal(1, 8, 2)), EPS));
    assert_refused("mixed types", norm(&single(&x), (&w, &b), EPS));
    assert_refused("type of the bias", norm(&x, (&w, &single(&b)), EPS));
    assert_refused("strided", norm(&normal(8, 4, 1).t()?, (&w, &b), EPS));
    assert_refused("gradient shape", gradient(&normal(3, 8, 1), &x, &w, EPS));
    assert_refused("gradient type", gradient(&single(&x), &x, &w, EPS));
    assert_eq!(norm(&normal(0, 8, 1), (&w, &b), EPS)?.dims(), [0, 8]);
    let (other, square) = (normal(4, 8, 3), normal(8, 8, 4));
    for (what, out) in [
        ("output rows", normal(3, 8, 1)),
        ("output columns", normal(4, 7, 1)),
        ("output type", single(&x)),
        ("output is the input", x.clone()),
    ] {
        assert_refused(what, layer_norm(&out, &x, &w, &b, EPS));
        assert_refused(what, layer_norm_backward(&out, &other, &x, &w, EPS));
    }
    let (large, row) = (normal(8, 8, 5), square.get(0)?);
    assert_refused("output holds the weight", layer_norm(&square, &large, &row, &b, EPS));
    assert_refused("output holds the bias", layer_norm(&square, &large, &w, &row, EPS));
    assert_refused("gradient in place", layer_norm_backward(&other, &other, &x, &w, EPS));
    Ok(())
}
