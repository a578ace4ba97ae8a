//! The 8-bit update against the f32 update between an obvious decoding and an obvious search.

use crate::support::*;
use candle_core::{DType, Device, Result, Tensor};
use kto_kernels::{
    AdamW, adamw_step,
    adamw8::{BLOCK, MIN_ELEMENTS, Moments8, adamw8_step, moment_bytes},
    quant::dynamic_map::{signed, unsigned},
};

fn options(step: u64) -> AdamW {
    adamw_options(0.01, step)
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

fn floats(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn codes(x: &Tensor) -> Vec<u8> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// The value of every code.
fn decode(codes: &[u8], absmax: &[f32], map: &[f32; 256]) -> Vec<f32> {
    codes.iter().enumerate().map(|(i, c)| map[*c as usize] * absmax[i / BLOCK]).collect()
}

/// For every value the index of the map's nearest one, found by looking at all; half-way the even one.
fn encode(values: &[f32], map: &[f32; 256]) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut absmax) = (Vec::new(), Vec::new());
    for block in values.chunks(BLOCK) {
        let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        absmax.push(largest);
        for v in block {
            let x = if largest > 0.0 { f64::from(*v * (1.0 / largest)) } else { 0.0 };
            let distance = |i: usize| (f64::from(map[i]) - x).abs();
            let least = (0..256).map(distance).fold(f64::INFINITY, f64::min);
            let found: Vec<usize> = (0..256).filter(|i| distance(*i) == least).collect();
            codes.push(*found.iter().find(|i| *i % 2 == 0).unwrap_or(&found[0]) as u8);
        }
    }
    (codes, absmax)
}

/// Everything that an update may change, as bits.
fn state(p: &Tensor, moments: &Moments8) -> Vec<Vec<u64>> {
    let all = [p, &moments.m.codes, &moments.m.absmax, &moments.v.codes, &moments.v.absmax];
    all.iter().map(|t| values(t).iter().map(|v| v.to_bits()).collect()).collect()
}

#[test]
fn a_step_is_the_f32_step_between_decoding_and_encoding() -> Outcome {
    for n in ODD.into_iter().chain([256, 512, 4096, 5003]) {
        // Blocks of very different sizes, and a zero now and then.
        let scaled = |seed: u64| -> Vec<f32> {
            let wild = |(i, x): (usize, f64)| if i % 11 == 3 { 0.0 } else { x * 10f64.powi(-(i as i32 % 9)) };
            normals(n, seed).into_iter().enumerate().map(wild).map(|x| x as f32).collect()
        };
        let (p8, p32) = (tensor(&scaled(1)), tensor(&scaled(1)));
        let moments = Moments8::zeros(&p8)?;
        for step in 1..=4 {
            let g = tensor(&scaled(10 + step));
            let m = tensor(&decode(&codes(&moments.m.codes), &floats(&moments.m.absmax), signed()));
            let v = tensor(&decode(&codes(&moments.v.codes), &floats(&moments.v.absmax), unsigned()));
            adamw_step(&p32, &m, &v, &g, options(step))?;
            adamw8_step(&p8, &moments, &g, options(step))?;
            assert_eq!(floats(&p8), floats(&p32), "{n} elements, step {step}");
            for (moment, truth, map) in [(&moments.m, &m, signed()), (&moments.v, &v, unsigned())] {
                let (mut expected, absmax) = encode(&floats(truth), map);
                if map == unsigned() {
                    let positive = floats(truth).into_iter().map(|v| u8::from(v > 0.0));
                    expected.iter_mut().zip(positive).for_each(|(c, one)| *c = one.max(*c));
                }
                assert_eq!(floats(&moment.absmax), absmax, "{n} elements, step {step}");
                assert_eq!(codes(&moment.codes), expected, "{n} elements, step {step}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_has_no_gradient_stays_exactly_zero() -> Outcome {
    let n = 1000;
    let start: Vec<f32> = normals(n, 1).iter().map(|x| *x as f32).collect();
    let p = tensor(&start);
    let moments = Moments8::zeros(&p)?;
    let quiet = |i: usize| i.is_multiple_of(3) || (256..512).contains(&i);
    for step in 1..=20 {
        let g = normals(n, 100 + step).into_iter().enumerate();
        let g: Vec<f32> = g.map(|(i, x)| if quiet(i) { -0.0 } else { x as f32 * 1e3 }).collect();
        adamw8_step(&p, &moments, &tensor(&g), AdamW { weight_decay: 0.0, ..options(step) })?;
    }
    let (m, v, after) = (codes(&moments.m.codes), codes(&moments.v.codes), floats(&p));
    for i in 0..n {
        assert_eq!(quiet(i), (m[i], v[i]) == (127, 0), "element {i}");
        assert_eq!(quiet(i), after[i] == start[i], "element {i}");
    }
    assert_eq!((signed()[127].to_bits(), unsigned()[0].to_bits()), (0, 0));
    assert_eq!((floats(&moments.m.absmax)[1], floats(&moments.v.absmax)[1]), (0.0, 0.0));
    Ok(())
}

#[test]
fn a_small_second_moment_beside_a_large_one_stays_positive() -> Outcome {
    // 1e-10 of the block's largest: the nearest value is zero, and the next step without a gradient would be 1e-6 / eps long.
    let (p, moments) = (tensor(&[0.0, 0.0]), Moments8::zeros(&tensor(&[0.0; 2]))?);
    let plain = |step| AdamW { weight_decay: 0.0, gradient_scale: 1.0, lr: 1e-3, ..options(step) };
    adamw8_step(&p, &moments, &tensor(&[1.0, 1e-5]), plain(1))?;
    assert_eq!(codes(&moments.v.codes), [255, 1]);
    let before = floats(&p)[1];
    adamw8_step(&p, &moments, &tensor(&[1.0, 0.0]), plain(2))?;
    let moved = (floats(&p)[1] - before).abs();
    assert!(moved > 0.0 && moved < 1e-3, "{moved:e}");
    Ok(())
}

#[test]
fn a_number_that_would_not_be_finite_is_refused_before_the_first_write() -> Outcome {
    let n = 5000;
    let single = |seed| tensor(&normals(n, seed).iter().map(|x| *x as f32).collect::<Vec<_>>());
    let with = |seed: u64, at: usize, value: f32| {
        let mut x = floats(&single(seed));
        x[at] = value;
        tensor(&x)
    };
    let plain = options(2);
    let cases = [
        ("NaN gradient", single(1), with(2, 4999, f32::NAN), plain),
        ("infinite gradient", single(1), with(2, 0, f32::NEG_INFINITY), plain),
        ("square of a gradient", single(1), with(2, 4096, 1e25), plain),
        ("NaN parameter", with(1, 300, f32::NAN), single(2), plain),
        ("parameter", with(1, 300, -3.4e38), single(2), AdamW { weight_decay: -1e3, ..plain }),
        ("learning rate", single(1), single(2), AdamW { lr: f64::INFINITY, ..plain }),
        ("0 / 0", single(1), with(2, 7, 0.0), AdamW { eps: 0.0, beta1: 0.0, beta2: 0.0, ..plain }),
        ("factor", single(1), single(2), AdamW { gradient_scale: f64::NAN, ..plain }),
    ];
    for (what, p, g, o) in cases {
        let moments = Moments8::zeros(&p)?;
        if what != "0 / 0" && what != "NaN parameter" && what != "parameter" {
            adamw8_step(&p, &moments, &single(3), options(1))?;
        }
        let before = state(&p, &moments);
        assert_refused(what, adamw8_step(&p, &moments, &g, o));
        assert!(state(&p, &moments) == before, "{what}: something was written");
    }
    for scale in [f32::NAN, f32::INFINITY, -1.0] {
        let (p, g) = (single(1), single(2));
        let mut moments = Moments8::zeros(&p)?;
        let mut absmax = floats(&moments.v.absmax);
        absmax[19] = scale;
        moments.v.absmax = tensor(&absmax);
        let before = floats(&p);
        assert_refused("scale", adamw8_step(&p, &moments, &g, options(1)));
        assert_eq!(floats(&p), before);
    }
    Ok(())
}

#[test]
fn large_numbers_that_stay_finite_are_not_refused() -> Outcome {
    // Beyond what the magnitudes alone can prove: every element is looked at.
    let (p, g) = (tensor(&[3e38, 1.0, 2.0]), tensor(&[1e-3, 1e18, 0.0]));
    let moments = Moments8::zeros(&p)?;
    adamw8_step(&p, &moments, &g, AdamW { weight_decay: 0.0, ..options(1) })?;
    let p = floats(&p);
    assert!(p[0] == 3e38 && (p[1] - 0.99).abs() < 1e-6 && p[2] == 2.0, "{p:?}");
    Ok(())
}

#[test]
fn operands_that_do_not_fit_are_refused() -> Outcome {
    let n = 600;
    let fresh = || -> Result<(Tensor, Moments8, Tensor)> {
        let p = single(&normal(20, 30, 1));
        let moments = Moments8::zeros(&p)?;
        Ok((p, moments, single(&normal(20, 30, 2))))
    };
    let refused = |what: &str, change: &dyn Fn(&mut (Tensor, Moments8, Tensor))| -> Outcome {
        let mut x = fresh()?;
        change(&mut x);
        let before = state(&x.0, &x.1);
        assert_refused(what, adamw8_step(&x.0, &x.1, &x.2, options(1)));
        assert!(state(&x.0, &x.1) == before, "{what}");
        Ok(())
    };
    refused("shape of p", &|x| x.0 = single(&normal(30, 20, 1)))?;
    refused("shape of g", &|x| x.2 = single(&normal(1, n, 1)))?;
    refused("f64", &|x| x.0 = normal(20, 30, 1))?;
    refused("strides", &|x| x.2 = single(&normal(30, 20, 1)).t().unwrap())?;
    refused("type of codes", &|x| x.1.m.codes = x.2.copy().unwrap())?;
    refused("type of scales", &|x| x.1.v.absmax = normal_vector(3, 1))?;
    refused("number of scales", &|x| x.1.v.absmax = single(&normal_vector(2, 1)))?;
    refused("shared memory of p and g", &|x| x.2 = x.0.clone())?;
    refused("shared codes", &|x| x.1.m.codes = x.1.v.codes.clone())?;
    refused("shared scales", &|x| x.1.m.absmax = x.1.v.absmax.clone())?;
    let (p, moments, g) = fresh()?;
    assert_refused("step zero", adamw8_step(&p, &moments, &g, AdamW { step: 0, ..options(1) }));
    assert_refused("beta", adamw8_step(&p, &moments, &g, AdamW { beta2: 1.0, ..options(1) }));
    let empty = Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?;
    adamw8_step(&empty, &Moments8::zeros(&empty)?, &empty.copy()?, options(1))
}

#[test]
fn bytes_are_those_of_the_tensors() -> Outcome {
    assert_eq!((moment_bytes(0), moment_bytes(4095)), (0, 8 * 4095));
    for n in [MIN_ELEMENTS, 4097, 5000, 1 << 16] {
        let moments = Moments8::zeros(&Tensor::zeros(n, DType::F32, &Device::Cpu)?)?;
        let bytes = |m: &kto_kernels::adamw8::Moment8| m.codes.elem_count() + 4 * m.absmax.elem_count();
        assert_eq!(moment_bytes(n as u64), (bytes(&moments.m) + bytes(&moments.v)) as u64, "{n}");
    }
    // 2.03125 bytes a parameter where f32 takes 8.
    assert_eq!(moment_bytes(1 << 20) * 32, 65 << 20);
    Ok(())
}
