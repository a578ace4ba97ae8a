use crate::support::*;
use candle_core::{DType, Result, Tensor};
use kto_kernels::{geglu, geglu_backward, swiglu, swiglu_backward};

/// Returns the result of the forward pass.
fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    written(gate, |out| swiglu(out, gate, up))
}

/// Returns the gradients, after a look at the result that the backward pass leaves behind.
fn gradients(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let (y, dgate, dup) = (dy.copy()?, gate.copy()?, up.copy()?);
    swiglu_backward(&y, &dgate, &dup)?;
    assert_eq!(values(&y), values(&forward(gate, up)?), "the result once more");
    Ok((dgate, dup))
}

fn composed(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let silu = (gate / (gate.neg()?.exp()? + 1.0)?)?;
    silu * up
}

/// The exponential, the reciprocal and the products each round once or twice, and `1 − s` cancels by at most one.
const IN_F32: f64 = 32.0 * U32;

#[test]
fn forward_is_the_formula() -> Outcome {
    for t in ODD {
        for c in ODD {
            let (gate, up) = ((normal(t, c, 1) * 3.0)?, normal(t, c, 2));
            let expected: Vec<f64> =
                values(&gate).iter().zip(values(&up)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            assert_close("f64", &values(&forward(&gate, &up)?), &expected, SAME_IN_F64);
            let y = forward(&single(&gate), &single(&up))?;
            assert_close("f32", &values(&y), &expected, IN_F32);
        }
    }
    Ok(())
}

#[test]
fn backward_is_autograd() -> Outcome {
    for t in ODD {
        for c in ODD {
            let (gate, up, dy) = ((normal(t, c, 3) * 3.0)?, normal(t, c, 4), normal(t, c, 5));
            let expected = autograd(&[&gate, &up], &dy, |v| composed(&v[0], &v[1]));
            let (dgate, dup) = gradients(&dy, &gate, &up)?;
            assert_tensors("gate", &dgate, &expected[0], SAME_IN_F64);
            assert_tensors("up", &dup, &expected[1], SAME_IN_F64);
            let (dgate, dup) = gradients(&single(&dy), &single(&gate), &single(&up))?;
            assert_tensors("gate in f32", &dgate, &expected[0], IN_F32);
            assert_tensors("up in f32", &dup, &expected[1], IN_F32);
        }
    }
    Ok(())
}

#[test]
fn gelu_is_the_form_by_tanh() -> Outcome {
    let gelu =
        |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
    let composed = |gate: &Tensor, up: &Tensor| {
        let z = ((gate + (gate.powf(3.0)? * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
        (gate * 0.5)? * (z.tanh()? + 1.0)? * up
    };
    for (t, c) in [(1, 1), (3, 7), (5, 65), (2, 300)] {
        let (gate, up, dy) = ((normal(t, c, 3) * 3.0)?, normal(t, c, 4), normal(t, c, 5));
        let expected: Vec<f64> = values(&gate).iter().zip(values(&up)).map(|(g, u)| gelu(*g) * u).collect();
        let forward = |gate: &Tensor, up: &Tensor| written(gate, |out| geglu(out, gate, up));
        assert_close("f64", &values(&forward(&gate, &up)?), &expected, 1e-14);
        assert_close("f32", &values(&forward(&single(&gate), &single(&up))?), &expected, IN_F32);
        let expected = autograd(&[&gate, &up], &dy, |v| composed(&v[0], &v[1]));
        for (narrow, tolerance) in [(false, 1e-13), (true, 2.0 * IN_F32)] {
            let to = |t: &Tensor| if narrow { single(t) } else { t.copy().unwrap() };
            let (y, dgate, dup) = (to(&dy), to(&gate), to(&up));
            geglu_backward(&y, &dgate, &dup)?;
            assert_eq!(values(&y), values(&forward(&to(&gate), &to(&up))?), "the result once more");
            assert_tensors("gate", &dgate, &expected[0], tolerance);
            assert_tensors("up", &dup, &expected[1], tolerance);
        }
    }
    Ok(())
}

#[test]
fn backward_is_the_slope() -> Outcome {
    let (gate, up, dy) = (normal(3, 7, 6), normal(3, 7, 7), normal(3, 7, 8));
    let (dgate, dup) = gradients(&dy, &gate, &up)?;
    assert_close("gate", &values(&dgate), &differences(&gate, &dy, |g| forward(g, &up)), DIFFERENCES);
    assert_close("up", &values(&dup), &differences(&up, &dy, |u| forward(&gate, u)), DIFFERENCES);
    Ok(())
}

#[test]
fn large_gates_stay_finite() -> Outcome {
    let gate =
        Tensor::new(&[[-1e30f32, -1000.0, -100.0, 0.0, 100.0, 1000.0, 1e30]], &candle_core::Device::Cpu)?;
    let ones = gate.ones_like()?;
    let expected = [0.0, 0.0, 0.0, 0.0, 100.0, 1000.0, 1e30f32 as f64];
    assert_close("silu", &values(&forward(&gate, &ones)?)[..6], &expected[..6], IN_F32);
    assert_eq!(values(&forward(&gate, &ones)?)[6], expected[6]);
    let (dgate, _) = gradients(&ones, &gate, &ones)?;
    assert_close("slope", &values(&dgate), &[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0], IN_F32);
    Ok(())
}

#[test]
fn wrong_shapes_types_and_shared_memory_are_refused() -> Outcome {
    let x = normal(4, 8, 1);
    assert_refused("columns", forward(&x, &normal(4, 7, 1)));
    assert_refused("rows", forward(&x, &normal(3, 8, 1)));
    assert_refused("rank", forward(&normal_vector(8, 1), &normal_vector(8, 1)));
    assert_refused("mixed types", forward(&x, &single(&x)));
    assert_refused("half precision", forward(&x.to_dtype(DType::F16)?, &x.to_dtype(DType::F16)?));
    assert_refused("gradient shape", gradients(&normal(4, 7, 1), &x, &x));
    assert_refused("gradient type", gradients(&single(&x), &x, &x));
    assert_refused("strided", forward(&normal(8, 4, 1).t()?, &x));
    assert_refused("strided other", forward(&x, &normal(8, 4, 1).t()?));
    let (y, z) = (normal(4, 8, 2), normal(4, 8, 3));
    assert_refused("output rows", swiglu(&normal(3, 8, 1), &x, &y));
    assert_refused("output type", swiglu(&single(&z), &x, &y));
    assert_refused("output strides", swiglu(&normal(8, 4, 1).t()?, &x, &y));
    assert_refused("output is the gate", swiglu(&x, &x, &y));
    assert_refused("output is the other", swiglu(&y, &x, &y));
    // What is refused leaves all three as they were.
    let all = || [&x, &y, &z].map(values);
    let before = all();
    for [a, b, c] in [[&x, &x, &y], [&x, &y, &x], [&y, &x, &x], [&x, &x, &x]] {
        assert_refused("shared memory", swiglu_backward(a, b, c));
    }
    let strided = normal(8, 4, 1).t()?;
    for [a, b, c] in [[&strided, &y, &z], [&y, &strided, &z], [&y, &z, &strided]] {
        assert_refused("strided", swiglu_backward(a, b, c));
    }
    assert_eq!(all(), before);
    Ok(())
}
