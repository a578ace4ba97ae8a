use crate::support::*;
use candle_core::{DType, Result, Tensor};
use kto_kernels::{rms_norm, rms_norm_backward};

const EPS: f64 = 1e-5;

/// Returns the result of the forward pass.
fn norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    written(x, |out| rms_norm(out, x, w, eps))
}

/// Returns what the backward pass adds to zero.
fn gradient(dy: &Tensor, x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let dx = Tensor::zeros(x.shape(), x.dtype(), x.device())?;
    rms_norm_backward(&dx, dy, x, w, eps)?;
    Ok(dx)
}

fn reference(x: &[f64], w: &[f64]) -> Vec<f64> {
    let normalized = |row: &[f64]| -> Vec<f64> {
        let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
        row.iter().zip(w).map(|(v, w)| v / (mean + EPS).sqrt() * w).collect()
    };
    x.chunks(w.len()).flat_map(normalized).collect()
}

fn composed(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let rms = x.sqr()?.mean_keepdim(1)?.affine(1.0, EPS)?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(w)
}

#[test]
fn forward_is_the_formula() -> Outcome {
    for t in ODD {
        for c in ODD {
            let (x, w) = (normal(t, c, 1), normal_vector(c, 2));
            let expected = reference(&values(&x), &values(&w));
            assert_close("f64", &values(&norm(&x, &w, EPS)?), &expected, SAME_IN_F64);
            // A sum of c squares errs by at most c roundings, halved by the root.
            let tolerance = (c as f64 / 2.0 + 8.0) * U32;
            let y = norm(&single(&x), &single(&w), EPS)?;
            assert_eq!(y.dtype(), DType::F32);
            assert_close("f32", &values(&y), &expected, tolerance);
        }
    }
    Ok(())
}

#[test]
fn eps_keeps_a_row_of_zeros_finite_and_small_rows_small() -> Outcome {
    let x = (normal(3, 7, 1) * 1e-4)?;
    let w = normal_vector(7, 2);
    assert_close("small", &values(&norm(&x, &w, EPS)?), &reference(&values(&x), &values(&w)), SAME_IN_F64);
    let zeros = x.zeros_like()?;
    assert_eq!(values(&norm(&zeros, &w, EPS)?), vec![0.0; 21]);
    assert_tensors(
        "gradient at zero",
        &gradient(&x, &zeros, &w, EPS)?,
        &(x.broadcast_mul(&w)? / EPS.sqrt())?,
        SAME_IN_F64,
    );
    Ok(())
}

#[test]
fn backward_is_autograd() -> Outcome {
    for t in ODD {
        for c in ODD {
            let (x, w, dy) = (normal(t, c, 3), normal_vector(c, 4), normal(t, c, 5));
            let expected = autograd(&[&x], &dy, |v| composed(&v[0], &w)).remove(0);
            let dx = gradient(&dy, &x, &w, EPS)?;
            // A single column nearly cancels after a division by |x|, which autograd rounds in another place.
            assert_tensors("f64", &dx, &expected, 100.0 * SAME_IN_F64);
            // Two sums of c terms; r is a few times larger than one on the rows of a single small element.
            let tolerance = (2.0 * c as f64 + 16.0) * U32 * largest_inverse(&x);
            let dx = gradient(&single(&dy), &single(&x), &single(&w), EPS)?;
            assert_tensors("f32", &dx, &expected, tolerance);
        }
    }
    Ok(())
}

/// Returns the largest `1/rms` of the rows: the factor between an error of the bracket and an error of the gradient.
fn largest_inverse(x: &Tensor) -> f64 {
    let rms = x.sqr().and_then(|s| s.mean(1)).map(|m| values(&m)).unwrap();
    rms.iter().fold(1.0f64, |m, v| m.max(1.0 / (v + EPS).sqrt()))
}

#[test]
fn backward_is_the_slope() -> Outcome {
    let (x, w, dy) = (normal(3, 7, 6), normal_vector(7, 7), normal(3, 7, 8));
    let slope = differences(&x, &dy, |x| norm(x, &w, EPS));
    assert_close("slope", &values(&gradient(&dy, &x, &w, EPS)?), &slope, DIFFERENCES);
    Ok(())
}

#[test]
fn the_gradient_is_added() -> Outcome {
    let (x, w, dy, before) = (normal(65, 63, 1), normal_vector(63, 2), normal(65, 63, 3), normal(65, 63, 4));
    let sum = changed(&before, |dx| rms_norm_backward(dx, &dy, &x, &w, EPS))?;
    let expected = (gradient(&dy, &x, &w, EPS)? + &before)?;
    assert_eq!(values(&sum), values(&expected));
    Ok(())
}

#[test]
fn wrong_shapes_types_and_shared_memory_are_refused() -> Outcome {
    let (x, w) = (normal(4, 8, 1), normal_vector(8, 2));
    assert_refused("short weight", norm(&x, &normal_vector(7, 2), EPS));
    assert_refused("weight of rank 2", norm(&x, &normal(1, 8, 2), EPS));
    assert_refused("input of rank 1", norm(&w, &w, EPS));
    assert_refused("mixed types", norm(&single(&x), &w, EPS));
    assert_refused("half precision", norm(&x.to_dtype(DType::BF16)?, &w.to_dtype(DType::BF16)?, EPS));
    assert_refused("strided", norm(&normal(8, 4, 1).t()?, &w, EPS));
    assert_refused("gradient shape", gradient(&normal(3, 8, 1), &x, &w, EPS));
    assert_refused("gradient type", gradient(&single(&x), &x, &w, EPS));
    assert_eq!(norm(&normal(0, 8, 1), &w, EPS)?.dims(), [0, 8]);
    let (other, square) = (normal(4, 8, 3), normal(8, 8, 4));
    for (what, out) in [
        ("output rows", normal(3, 8, 1)),
        ("output columns", normal(4, 7, 1)),
        ("output type", single(&x)),
        ("output strides", normal(8, 4, 1).t()?),
        ("output is the input", x.clone()),
    ] {
        assert_refused(what, rms_norm(&out, &x, &w, EPS));
        assert_refused(what, rms_norm_backward(&out, &other, &x, &w, EPS));
    }
    assert_refused("output holds the weight", rms_norm(&square, &normal(8, 8, 5), &square.get(0)?, EPS));
    assert_refused(
        "gradient holds the weight",
        rms_norm_backward(&square, &normal(8, 8, 5), &normal(8, 8, 6), &square.get(0)?, EPS),
    );
    assert_refused("gradient in place", rms_norm_backward(&other, &other, &x, &w, EPS));
    let long = normal(8, 8, 7);
    assert_refused(
        "another part of the input",
        rms_norm(&long.narrow(0, 0, 4)?, &long.narrow(0, 4, 4)?, &w, EPS),
    );
    Ok(())
}
