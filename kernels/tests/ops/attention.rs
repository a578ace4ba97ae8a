use crate::attention_layout::*;
use crate::support::*;
use candle_core::{Device, Result, Tensor};
use kto_kernels::{AttentionLayout, HeadShape, Segment};

/// Attention by the definition: every query, every head, the keys that it sees.
fn reference(pack: &Pack, [q, k, v]: [&Tensor; 3], shape: HeadShape) -> Vec<f64> {
    let HeadShape { heads, kv_heads, dim } = shape;
    let (q, k, v) = (values(q), values(k), values(v));
    let mut out = vec![0.0; q.len()];
    for i in 0..pack.tq {
        let seen: Vec<usize> = (0..pack.tk).filter(|j| pack.sees[i * pack.tk + j]).collect();
        for h in 0..heads {
            let at = |row: usize| (row * kv_heads + h / (heads / kv_heads)) * dim;
            let query = &q[(i * heads + h) * dim..][..dim];
            let score = |j: &usize| -> f64 {
                query.iter().zip(&k[at(*j)..]).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt()
            };
            let weights: Vec<f64> = seen.iter().map(|j| score(j).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (j, w) in seen.iter().zip(&weights) {
                for d in 0..dim {
                    out[(i * heads + h) * dim + d] += w / total * v[at(*j) + d];
                }
            }
        }
    }
    out
}

/// Attention of candle operations, head by head, with a mask of minus infinities.
fn composed(pack: &Pack, x: &[Tensor], shape: HeadShape) -> Result<Tensor> {
    let HeadShape { heads, kv_heads, dim } = shape;
    let mask: Vec<f64> = pack.sees.iter().map(|s| if *s { 0.0 } else { f64::NEG_INFINITY }).collect();
    let mask = Tensor::from_vec(mask, (pack.tq, pack.tk), &Device::Cpu)?;
    let head = |h: usize| -> Result<Tensor> {
        let kv = h / (heads / kv_heads) * dim;
        let q = x[0].narrow(1, h * dim, dim)?.contiguous()?;
        let k = x[1].narrow(1, kv, dim)?.t()?.contiguous()?;
        let v = x[2].narrow(1, kv, dim)?.contiguous()?;
        let scores = ((q.matmul(&k)? / (dim as f64).sqrt())? + &mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(1)?.detach())?.exp()?;
        weights.broadcast_div(&weights.sum_keepdim(1)?)?.matmul(&v)
    };
    Tensor::cat(&(0..heads).map(head).collect::<Result<Vec<_>>>()?, 1)
}

/// A score errs by D roundings of its terms' sizes (near 2√D here) and its exponential by as much, a weighted sum by one rounding a key.
/// Gradients sum over queries what forward passes sum over keys, so both directions take the larger side.
fn tolerance(pack: &Pack, shape: HeadShape) -> f64 {
    (8.0 * shape.dim as f64 + pack.tk.max(pack.tq) as f64) * U32
}

#[test]
fn forward_is_the_definition() -> Outcome {
    for pack in packs() {
        for shape in SHAPES {
            let [q, k, v, _] = pack.tensors(shape, 1);
            let expected = reference(&pack, [&q, &k, &v], shape);
            let y = attend(&q, &k, &v, &pack.layout, shape)?;
            assert_eq!(y.dims(), q.dims());
            assert_close("f64", &values(&y), &expected, SAME_IN_F64);
            let y = attend(&single(&q), &single(&k), &single(&v), &pack.layout, shape)?;
            assert_close("f32", &values(&y), &expected, tolerance(&pack, shape));
        }
    }
    Ok(())
}

#[test]
fn backward_is_autograd() -> Outcome {
    for pack in packs() {
        for shape in SHAPES {
            let [q, k, v, dout] = pack.tensors(shape, 5);
            let expected = autograd(&[&q, &k, &v], &dout, |x| composed(&pack, x, shape));
            let (dq, dk, dv) = attend_backward(&dout, &q, &k, &v, &pack.layout, shape)?;
            for (what, found, expected) in
                [("dq", &dq, &expected[0]), ("dk", &dk, &expected[1]), ("dv", &dv, &expected[2])]
            {
                assert_tensors(what, found, expected, SAME_IN_F64);
            }
            let [q, k, v, dout] = [&q, &k, &v, &dout].map(single);
            let (dq, dk, dv) = attend_backward(&dout, &q, &k, &v, &pack.layout, shape)?;
            for (what, found, expected) in [
                ("dq in f32", &dq, &expected[0]),
                ("dk in f32", &dk, &expected[1]),
                ("dv in f32", &dv, &expected[2]),
            ] {
                assert_tensors(what, found, expected, tolerance(&pack, shape));
            }
        }
    }
    Ok(())
}

#[test]
fn backward_is_the_slope() -> Outcome {
    let pack = Pack::new(&[
        Family { prompt: 3, asked: 1, branches: &[2, 1] },
        Family { prompt: 0, asked: 0, branches: &[2] },
    ]);
    let (layout, shape) = (&pack.layout, HeadShape { heads: 4, kv_heads: 2, dim: 8 });
    let [q, k, v, dout] = pack.tensors(shape, 9);
    let (dq, dk, dv) = attend_backward(&dout, &q, &k, &v, layout, shape)?;
    let slope = differences(&q, &dout, |q| attend(q, &k, &v, layout, shape));
    assert_close("dq", &values(&dq), &slope, DIFFERENCES);
    let slope = differences(&k, &dout, |k| attend(&q, k, &v, layout, shape));
    assert_close("dk", &values(&dk), &slope, DIFFERENCES);
    let slope = differences(&v, &dout, |v| attend(&q, &k, v, layout, shape));
    assert_close("dv", &values(&dv), &slope, DIFFERENCES);
    Ok(())
}

/// A branch of a pack is the end of its own sequence: prompt and branch side by side with nothing else around.
#[test]
fn a_packed_branch_is_its_sequence_alone() -> Outcome {
    let pack = Pack::new(&[
        Family { prompt: 65, asked: 65, branches: &[63, 70] },
        Family { prompt: 7, asked: 7, branches: &[1] },
    ]);
    let shape = HeadShape { heads: 4, kv_heads: 2, dim: 16 };
    let [q, k, v, _] = pack.tensors(shape, 13);
    let packed = attend(&q, &k, &v, &pack.layout, shape)?;
    // (prompt's first row, prompt rows, branch's first row, branch rows)
    for (prompt, p, branch, b) in [(0, 65, 65, 63), (0, 65, 128, 70), (198, 7, 205, 1)] {
        let cut = |x: &Tensor| Tensor::cat(&[x.narrow(0, prompt, p)?, x.narrow(0, branch, b)?], 0);
        let alone = Pack::new(&[Family { prompt: p + b, asked: p + b, branches: &[] }]);
        let y = attend(&cut(&q)?, &cut(&k)?, &cut(&v)?, &alone.layout, shape)?;
        assert_tensors("rows of the sequence", &y, &cut(&packed)?, SAME_IN_F64);
    }
    Ok(())
}

/// Longer than a tile of keys and than a block of queries, prefix and own keys alike; few groups, so that sums are cut into parts.
#[test]
fn many_tiles_are_the_definition_and_autograd() -> Outcome {
    for families in [
        &[Family { prompt: 700, asked: 700, branches: &[] }][..],
        &[Family { prompt: 515, asked: 9, branches: &[300, 1] }],
        &[
            Family { prompt: 256, asked: 0, branches: &[257] },
            Family { prompt: 0, asked: 0, branches: &[513] },
        ],
    ] {
        let pack = Pack::new(families);
        for shape in
            [HeadShape { heads: 1, kv_heads: 1, dim: 8 }, HeadShape { heads: 3, kv_heads: 1, dim: 5 }]
        {
            let [q, k, v, dout] = pack.tensors(shape, 31);
            let y = attend(&q, &k, &v, &pack.layout, shape)?;
            let definition = reference(&pack, [&q, &k, &v], shape);
            assert_close("f64", &values(&y), &definition, SAME_IN_F64);
            let expected = autograd(&[&q, &k, &v], &dout, |x| composed(&pack, x, shape));
            let (dq, dk, dv) = attend_backward(&dout, &q, &k, &v, &pack.layout, shape)?;
            for (what, found, expected) in
                [("dq", dq, &expected[0]), ("dk", dk, &expected[1]), ("dv", dv, &expected[2])]
            {
                assert_tensors(what, &found, expected, SAME_IN_F64);
            }
            let [q, k, v, dout] = [&q, &k, &v, &dout].map(single);
            let y = attend(&q, &k, &v, &pack.layout, shape)?;
            assert_close("f32", &values(&y), &definition, tolerance(&pack, shape));
            let (dq, dk, dv) = attend_backward(&dout, &q, &k, &v, &pack.layout, shape)?;
            for (what, found, expected) in
                [("dq", dq, &expected[0]), ("dk", dk, &expected[1]), ("dv", dv, &expected[2])]
            {
                assert_tensors(&format!("{what} in f32"), &found, expected, tolerance(&pack, shape));
            }
        }
    }
    Ok(())
}

#[test]
fn segments_may_lie_in_any_order_and_leave_rows_out() -> Outcome {
    // Queries 2..4 ask the keys 0..2, queries 0..2 the keys 3..5 behind the prefix 2..3; query 4 and key 5 are nobody's.
    let layout = AttentionLayout {
        segments: vec![
            Segment { query: 2, queries: 2, prefix: 0, prefix_len: 0, own: 0, offset: 0 },
            Segment { query: 0, queries: 2, prefix: 2, prefix_len: 1, own: 3, offset: 0 },
        ],
        groups: vec![0..1, 1..2],
    };
    let sees = [[2, 3].as_slice(), &[2, 3, 4], &[0], &[0, 1], &[]];
    let sees = sees.iter().flat_map(|keys| (0..6).map(|k| keys.contains(&k))).collect();
    let (pack, shape) = (Pack { layout, tq: 5, tk: 6, sees }, HeadShape { heads: 2, kv_heads: 1, dim: 8 });
    let [q, k, v, dout] = pack.tensors(shape, 17);
    let y = values(&attend(&q, &k, &v, &pack.layout, shape)?);
    assert_close("forward", &y[..4 * 16], &reference(&pack, [&q, &k, &v], shape)[..4 * 16], SAME_IN_F64);
    assert!(y[4 * 16..].iter().all(|y| y.is_nan()), "a row that no segment names was written");
    let (dq, dk, dv) = attend_backward(&dout, &q, &k, &v, &pack.layout, shape)?;
    let named = |x: &Tensor| x.narrow(0, 0, 4);
    let slope =
        differences(&k, &named(&dout)?, |k| named(&attend(&q, k, &v, &pack.layout, shape)?)?.contiguous());
    assert_close("dk", &values(&dk), &slope, DIFFERENCES);
    assert!(values(&dq)[4 * 16..].iter().all(|d| d.is_nan()), "a row that no segment names was written");
    assert!(values(&named(&dq)?).iter().all(|d| d.is_finite()));
    assert_eq!(values(&dv)[5 * 8..], [0.0; 8]);
    Ok(())
}

#[test]
fn large_scores_do_not_overflow() -> Outcome {
    let pack = Pack::new(&[Family { prompt: 65, asked: 65, branches: &[7, 600] }]);
    let shape = HeadShape { heads: 2, kv_heads: 1, dim: 8 };
    let [q, k, v, dout] = pack.tensors(shape, 21).map(|x| single(&x));
    let q = (q * 1e4)?;
    let y = values(&attend(&q, &k, &v, &pack.layout, shape)?);
    let largest = values(&v).iter().fold(0.0f64, |m, x| m.max(x.abs()));
    assert!(y.iter().all(|x| x.abs() <= largest * (1.0 + 100.0 * U32)));
    let (dq, dk, dv) = attend_backward(&dout, &q, &k, &v, &pack.layout, shape)?;
    assert!([dq, dk, dv].iter().all(|x| values(x).iter().all(|x| x.is_finite())));
    Ok(())
}
