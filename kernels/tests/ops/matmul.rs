use crate::support::*;
use candle_core::{DType, Tensor};
use kto_kernels::{matmul, matmul_acc};

/// Returns (a·b, |a|·|b|) by plain loops.
fn reference(a: &Tensor, b: &Tensor) -> (Vec<f64>, Vec<f64>) {
    let ((m, k), n) = (a.dims2().unwrap(), b.dims2().unwrap().1);
    let (a, b) = (values(a), values(b));
    let (mut sums, mut sizes) = (vec![0.0; m * n], vec![0.0; m * n]);
    for i in 0..m {
        for l in 0..k {
            for j in 0..n {
                let term = a[i * k + l] * b[l * n + j];
                sums[i * n + j] += term;
                sizes[i * n + j] += term.abs();
            }
        }
    }
    (sums, sizes)
}

/// Fails unless each element errs by at most `roundings` on the sum of its terms' sizes: the bound of any order of summation.
#[track_caller]
fn assert_product(what: &str, found: &Tensor, expected: &[f64], sizes: &[f64], roundings: f64) {
    for (i, ((f, e), s)) in values(found).iter().zip(expected).zip(sizes).enumerate() {
        let close = (f - e).abs() <= roundings * s;
        assert!(close, "{what}: element {i} is {f}, expected {e} within {:e}", roundings * s);
    }
}

fn bounds(k: usize) -> (f64, f64) {
    // The f64 reference rounds as well.
    ((k as f64 + 2.0) * U32, 2.0 * (k as f64 + 2.0) * U64)
}

#[test]
fn product_of_odd_sizes() -> Outcome {
    for m in ODD {
        for k in ODD {
            for n in ODD {
                let (a, b) = (normal(m, k, 1), normal(k, n, 2));
                let ((expected, sizes), (in32, in64)) = (reference(&a, &b), bounds(k));
                let y = matmul(&a, &b)?;
                assert_eq!(y.dims(), [m, n]);
                assert_product("f64", &y, &expected, &sizes, in64);
                assert_product("f32", &matmul(&single(&a), &single(&b))?, &expected, &sizes, in32);
            }
        }
    }
    Ok(())
}

#[test]
fn operands_of_any_strides() -> Outcome {
    for (m, k, n) in [(1, 7, 65), (63, 65, 7), (65, 257, 64), (257, 8, 63)] {
        let (at, bt) = (normal(k, m, 3), normal(n, k, 4));
        let (a, b) = (at.t()?, bt.t()?);
        let ((expected, sizes), (in32, in64)) = (reference(&a, &b), bounds(k));
        assert_product("both transposed", &matmul(&a, &b)?, &expected, &sizes, in64);
        assert_product("a transposed", &matmul(&a, &b.contiguous()?)?, &expected, &sizes, in64);
        assert_product("b transposed", &matmul(&a.contiguous()?, &b)?, &expected, &sizes, in64);
        let y = matmul(&single(&at).t()?, &single(&bt).t()?)?;
        assert_product("f32", &y, &expected, &sizes, in32);
        // A part of the columns of a wider matrix: rows are not adjacent, the start is not zero.
        let wide = Tensor::cat(&[&normal(m, 3, 5), &a.contiguous()?, &normal(m, 2, 6)], 1)?;
        let tall = Tensor::cat(&[&normal(5, n, 5), &b.contiguous()?], 0)?;
        let y = matmul(&wide.narrow(1, 3, k)?, &tall.narrow(0, 5, k)?)?;
        assert_product("part", &y, &expected, &sizes, in64);
    }
    let (row, b) = (normal(1, 65, 7), normal(65, 7, 8));
    let (expected, sizes) = reference(&row.broadcast_as((63, 65))?.contiguous()?, &b);
    assert_product(
        "repeated row",
        &matmul(&row.broadcast_as((63, 65))?, &b)?,
        &expected,
        &sizes,
        bounds(65).1,
    );
    Ok(())
}

#[test]
fn accumulation_adds_the_scaled_product() -> Outcome {
    for (m, k, n) in [(1, 1, 1), (7, 63, 65), (64, 257, 63), (257, 8, 257), (65, 7, 1)] {
        let (a, b, c) = (normal(k, m, 1), normal(k, n, 2), normal(m, n, 3));
        let (mut expected, mut sizes) = reference(&a.t()?, &b);
        for ((e, s), c) in expected.iter_mut().zip(&mut sizes).zip(values(&c)) {
            (*e, *s) = (c - 0.7 * *e, c.abs() + 0.7 * *s);
        }
        let (in32, in64) = bounds(k + 2);
        let c32 = single(&c);
        matmul_acc(&c, &a.t()?, &b, -0.7)?;
        assert_product("f64", &c, &expected, &sizes, in64);
        matmul_acc(&c32, &single(&a).t()?, &single(&b), -0.7)?;
        assert_product("f32", &c32, &expected, &sizes, in32);
    }
    Ok(())
}

#[test]
fn gradients_of_a_product_are_products() -> Outcome {
    let (a, b, dy) = (normal(63, 65, 1), normal(65, 7, 2), normal(63, 7, 3));
    let expected = autograd(&[&a, &b], &dy, |v| v[0].matmul(&v[1]));
    assert_tensors("a", &matmul(&dy, &b.t()?)?, &expected[0], SAME_IN_F64);
    let db = b.zeros_like()?;
    matmul_acc(&db, &a.t()?, &dy, 1.0)?;
    assert_tensors("b", &db, &expected[1], SAME_IN_F64);
    Ok(())
}

#[test]
fn empty_sums_are_zero_and_add_nothing() -> Outcome {
    let (a, b) = (normal(3, 0, 1), normal(0, 5, 2));
    assert_eq!(values(&matmul(&a, &b)?), vec![0.0; 15]);
    let c = normal(3, 5, 3);
    let before = values(&c);
    matmul_acc(&c, &a, &b, 2.0)?;
    assert_eq!(values(&c), before);
    assert_eq!(matmul(&normal(0, 3, 1), &normal(3, 5, 1))?.dims(), [0, 5]);
    assert_eq!(matmul(&normal(5, 3, 1), &normal(3, 0, 1))?.dims(), [5, 0]);
    Ok(())
}

#[test]
fn wrong_shapes_types_and_shared_memory_are_refused() -> Outcome {
    let (a, b, c) = (normal(3, 4, 1), normal(4, 5, 2), normal(3, 5, 3));
    assert_refused("inner sizes", matmul(&a, &normal(5, 4, 1)));
    assert_refused("types", matmul(&a, &single(&b)));
    assert_refused("rank", matmul(&normal_vector(4, 1), &b));
    assert_refused("half precision", matmul(&a.to_dtype(DType::F16)?, &b.to_dtype(DType::F16)?));
    assert_refused("output shape", matmul_acc(&normal(5, 3, 1), &a, &b, 1.0));
    assert_refused("output type", matmul_acc(&single(&c), &a, &b, 1.0));
    assert_refused("output strides", matmul_acc(&normal(5, 3, 1).t()?, &a, &b, 1.0));
    assert_refused("inner sizes of a sum", matmul_acc(&c, &a, &normal(5, 5, 1), 1.0));
    let square = normal(4, 4, 1);
    assert_refused("output is an operand", matmul_acc(&square, &square, &normal(4, 4, 2), 1.0));
    assert_refused("output is the other operand", matmul_acc(&square, &normal(4, 4, 2), &square.t()?, 1.0));
    Ok(())
}
