use crate::support::*;
use candle_core::{Result, Tensor};
use kto_kernels::{add_column_sums, add_norm_gradient, layer_norm, rms_norm};

const EPS: f64 = 1e-5;

/// The gradient of a norm's weight, from the norm itself with weights of one.
fn expected(to: &Tensor, dy: &Tensor, x: &Tensor, centred: bool) -> Result<Vec<f64>> {
    let c = x.dims()[1];
    let (ones, zeros) = (to.ones_like()?, to.zeros_like()?);
    let normed = written(x, |out| match centred {
        true => layer_norm(out, x, &ones, &zeros, EPS),
        false => rms_norm(out, x, &ones, EPS),
    })?;
    let mut sums = values(to);
    for (i, (d, n)) in values(dy).iter().zip(values(&normed)).enumerate() {
        sums[i % c] += d * n;
    }
    Ok(sums)
}

#[test]
fn sums_are_those_of_the_columns() -> Outcome {
    for t in ODD {
        for c in ODD {
            let (to, dy, x) = (normal_vector(c, 1), normal(t, c, 2), normal(t, c, 3));
            let mut sums = values(&to);
            values(&x).iter().enumerate().for_each(|(i, v)| sums[i % c] += v);
            let size = 1.0 + (t as f64).sqrt();
            assert_close("f64", &values(&changed(&to, |to| add_column_sums(to, &x))?), &sums, SAME_IN_F64);
            let narrow = changed(&single(&to), |to| add_column_sums(to, &single(&x)))?;
            assert_close("f32", &values(&narrow), &sums, 16.0 * size * U32);
            for centred in [false, true] {
                let expected = expected(&to, &dy, &x, centred)?;
                let wide = changed(&to, |to| add_norm_gradient(to, &dy, &x, EPS, centred))?;
                assert_close("norm in f64", &values(&wide), &expected, SAME_IN_F64);
                if c > 1 {
                    // Of one column alone a LayerNorm leaves rounding errors, which 1/√eps makes large.
                    let [to, dy, x] = [&to, &dy, &x].map(single);
                    let narrow = changed(&to, |to| add_norm_gradient(to, &dy, &x, EPS, centred))?;
                    let size = size * (c as f64 + 16.0);
                    assert_close("norm in f32", &values(&narrow), &expected, 16.0 * size * U32);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn they_are_the_same_bits_on_any_number_of_threads() -> Outcome {
    let (to, dy, x) =
        (single(&normal_vector(257, 1)), single(&normal(300, 257, 2)), single(&normal(300, 257, 3)));
    assert_same_on_any_pool("columns", || {
        Ok(vec![
            changed(&to, |to| add_column_sums(to, &x))?,
            changed(&to, |to| add_norm_gradient(to, &dy, &x, EPS, false))?,
            changed(&to, |to| add_norm_gradient(to, &dy, &x, EPS, true))?,
        ])
    });
    Ok(())
}

#[test]
fn wrong_shapes_types_and_shared_memory_are_refused() -> Outcome {
    let (to, x) = (normal_vector(4, 1), normal(3, 4, 2));
    for wrong in [normal_vector(3, 1), normal(1, 4, 1), single(&to)] {
        assert_refused("target", add_column_sums(&wrong, &x));
        assert_refused("target", add_norm_gradient(&wrong, &x, &x, EPS, false));
    }
    assert_refused("rows", add_norm_gradient(&to, &x, &normal(2, 4, 2), EPS, true));
    assert_refused("shared", add_column_sums(&x.get(1)?, &x));
    Ok(())
}
