//! Layouts and shapes that attention must refuse: unsafe code relies on the check.

use crate::attention_layout::*;
use crate::support::*;
use candle_core::{DType, Tensor};
use kto_kernels::{
    AttentionGradients, AttentionInputs, AttentionLayout, AttentionOutputs, HeadShape, ScoreRule, attention,
    attention_backward,
};

const SHAPE: HeadShape = HeadShape { heads: 4, kv_heads: 2, dim: 8 };

/// Two families: segments prompt, branch, branch, then prompt, branch. 13 queries and 13 keys.
fn pack() -> Pack {
    Pack::new(&[
        Family { prompt: 3, asked: 3, branches: &[2, 1] },
        Family { prompt: 4, asked: 4, branches: &[3] },
    ])
}

#[track_caller]
fn assert_both_refuse(what: &str, [q, k, v, d]: [&Tensor; 4], layout: &AttentionLayout, shape: HeadShape) {
    assert_refused(what, attend(q, k, v, layout, shape));
    assert_refused(what, attend_backward(d, q, k, v, layout, shape));
}

/// A named way to spoil a layout.
type Fault = (&'static str, fn(&mut AttentionLayout));

#[test]
fn layouts_that_reach_outside_or_overlap() {
    let faults: [Fault; 21] = [
        ("queries past the end", |l| l.segments[4].queries += 1),
        ("first query past the end", |l| l.segments[4].query = 13),
        ("first query wraps", |l| l.segments[4].query = usize::MAX),
        ("number of queries wraps", |l| l.segments[4].queries = usize::MAX),
        ("no queries", |l| l.segments[4].queries = 0),
        ("own keys past the end", |l| l.segments[4].own += 1),
        ("own keys wrap", |l| l.segments[4].own = usize::MAX - 1),
        ("offset past the end", |l| l.segments[4].offset = 1),
        ("offset and queries wrap to nothing", |l| l.segments[4].offset = usize::MAX - 2),
        ("prefix past the end", |l| l.segments[4].prefix_len = 8),
        ("prefix far away", |l| l.segments[4].prefix = 1 << 40),
        ("prefix wraps", |l| l.segments[4].prefix = usize::MAX),
        ("number of prefix rows wraps", |l| l.segments[4].prefix_len = usize::MAX),
        ("shared query row", |l| l.segments[1].query = 2),
        ("same segment twice", |l| l.segments[2] = l.segments[1]),
        ("groups share a prompt", |l| l.segments[4].prefix = 2),
        ("groups share own keys", |l| l.segments[4].own = 5),
        ("a group for each segment of a family", |l| l.groups = vec![0..1, 1..3, 3..5]),
        ("groups leave a gap", |l| l.groups = vec![0..2, 3..5]),
        ("groups overlap", |l| l.groups = vec![0..4, 3..5]),
        ("groups leave the end out", |l| l.groups.truncate(1)),
    ];
    let pack = pack();
    let [q, k, v, d] = pack.tensors(SHAPE, 1);
    assert!(attend(&q, &k, &v, &pack.layout, SHAPE).is_ok());
    for (what, spoil) in faults {
        let mut layout = pack.layout.clone();
        spoil(&mut layout);
        assert_both_refuse(what, [&q, &k, &v, &d], &layout, SHAPE);
    }
}

#[test]
#[allow(clippy::reversed_empty_ranges, clippy::single_range_in_vec_init)] // such ranges are the fault
fn groups_that_are_no_ranges_of_segments() {
    let pack = pack();
    let [q, k, v, d] = pack.tensors(SHAPE, 1);
    for groups in
        [vec![], vec![0..6], vec![0..3, 3..usize::MAX], vec![0..3, 3..1], vec![0..5, 5..2], vec![3..5, 0..3]]
    {
        let layout = AttentionLayout { groups, ..pack.layout.clone() };
        assert_both_refuse("groups", [&q, &k, &v, &d], &layout, SHAPE);
    }
}

#[test]
fn shapes_and_types_that_do_not_fit() -> Outcome {
    let pack = pack();
    let layout = &pack.layout;
    let [q, k, v, d] = pack.tensors(SHAPE, 1);
    let shapes = [
        HeadShape { heads: 2, ..SHAPE },
        HeadShape { kv_heads: 0, ..SHAPE },
        HeadShape { heads: 0, ..SHAPE },
        HeadShape { kv_heads: 3, ..SHAPE },
        HeadShape { dim: 16, ..SHAPE },
        HeadShape { dim: 0, ..SHAPE },
        HeadShape { heads: 2, kv_heads: 4, dim: 16 },
        HeadShape { heads: (1 << 63) + 4, ..SHAPE },
    ];
    for shape in shapes {
        assert_both_refuse(&format!("{shape:?}"), [&q, &k, &v, &d], layout, shape);
    }
    assert_both_refuse("fewer keys", [&q, &normal(12, 16, 1), &normal(12, 16, 1), &d], layout, SHAPE);
    assert_both_refuse("fewer values", [&q, &k, &normal(12, 16, 1), &d], layout, SHAPE);
    assert_both_refuse("fewer queries", [&normal(12, 32, 1), &k, &v, &normal(12, 32, 1)], layout, SHAPE);
    assert_both_refuse("key type", [&q, &single(&k), &v, &d], layout, SHAPE);
    assert_both_refuse("value type", [&q, &k, &single(&v), &d], layout, SHAPE);
    assert_both_refuse("rank", [&normal_vector(32, 1), &k, &v, &d], layout, SHAPE);
    assert_both_refuse("strided", [&normal(32, 13, 1).t()?, &k, &v, &d], layout, SHAPE);
    let half = [&q, &k, &v, &d].map(|x| x.to_dtype(DType::BF16).unwrap());
    assert_both_refuse("half precision", [&half[0], &half[1], &half[2], &half[3]], layout, SHAPE);
    assert_refused("gradient rows", attend_backward(&normal(12, 32, 1), &q, &k, &v, layout, SHAPE));
    assert_refused("gradient type", attend_backward(&single(&d), &q, &k, &v, layout, SHAPE));
    let none = AttentionLayout::default();
    assert_eq!(attend(&normal(0, 32, 1), &k, &v, &none, SHAPE)?.dims(), [0, 32]);
    Ok(())
}

#[test]
fn no_heads_and_no_columns() {
    let pack = pack();
    let [_, k, v, _] = pack.tensors(SHAPE, 1);
    let none = normal(13, 0, 1);
    assert_both_refuse("no heads", [&none, &k, &v, &none], &pack.layout, HeadShape { heads: 0, ..SHAPE });
}

#[test]
fn a_prefix_without_rows_may_be_anywhere() -> Outcome {
    let mut pack = pack();
    let [q, k, v, d] = pack.tensors(SHAPE, 1);
    let y = attend(&q, &k, &v, &pack.layout, SHAPE)?;
    let (dq, dk, dv) = attend_backward(&d, &q, &k, &v, &pack.layout, SHAPE)?;
    pack.layout.segments[0].prefix = 13;
    pack.layout.segments[3].prefix = 1;
    assert_eq!(values(&attend(&q, &k, &v, &pack.layout, SHAPE)?), values(&y));
    let (eq, ek, ev) = attend_backward(&d, &q, &k, &v, &pack.layout, SHAPE)?;
    for (a, b) in [(dq, eq), (dk, ek), (dv, ev)] {
        assert_eq!(values(&a), values(&b));
    }
    Ok(())
}

#[test]
fn outputs_of_other_shapes_types_and_strides() -> Outcome {
    let pack = pack();
    let [q, k, v, d] = pack.tensors(SHAPE, 1);
    let layout = &pack.layout;
    let inputs = AttentionInputs { q: &q, k: &k, v: &v, layout, shape: SHAPE, rule: ScoreRule::plain(SHAPE) };
    let (o, s) = (normal(13, 32, 3), normal(13, 8, 4));
    let outputs = AttentionOutputs { out: &o, stats: &s };
    attention(outputs, inputs)?;
    let out = |out: &Tensor| attention(AttentionOutputs { out, stats: &s }, inputs);
    let into = |dq: &Tensor, dk: &Tensor, dv: &Tensor| {
        attention_backward(AttentionGradients { dq, dk, dv }, &d, outputs, inputs)
    };
    let (dq, dk, dv) = (normal(13, 32, 7), normal(13, 16, 8), normal(13, 16, 9));
    assert!(into(&dq, &dk, &dv).is_ok());
    for bad in
        [normal(12, 32, 1), normal(13, 31, 1), single(&dq), normal(32, 13, 1).t()?, normal_vector(32, 1)]
    {
        assert_refused("output", out(&bad));
        let outputs = AttentionOutputs { out: &bad, stats: &s };
        let gradients = AttentionGradients { dq: &dq, dk: &dk, dv: &dv };
        assert_refused("known output", attention_backward(gradients, &d, outputs, inputs));
        assert_refused("dq", into(&bad, &dk, &dv));
    }
    for bad in [normal(12, 8, 1), normal(13, 7, 1), single(&s), normal(8, 13, 1).t()?, normal_vector(8, 1)] {
        let outputs = AttentionOutputs { out: &o, stats: &bad };
        let gradients = AttentionGradients { dq: &dq, dk: &dk, dv: &dv };
        assert_refused("stats", attention(outputs, inputs));
        assert_refused("known stats", attention_backward(gradients, &d, outputs, inputs));
    }
    for bad in
        [normal(12, 16, 1), normal(13, 15, 1), single(&dk), normal(16, 13, 1).t()?, normal_vector(16, 1)]
    {
        assert_refused("dk", into(&dq, &bad, &dv));
        assert_refused("dv", into(&dq, &dk, &bad));
    }
    Ok(())
}

/// Without the refusal the lock on the output would wait for ever for the lock on the operand.
#[test]
fn shared_memory() -> Outcome {
    // As many key-value heads as heads, so that all tensors have one shape.
    let shape = HeadShape { heads: 4, kv_heads: 4, dim: 8 };
    let pack = pack();
    let layout = &pack.layout;
    let [q, k, v, d] = pack.tensors(shape, 1);
    let inputs = AttentionInputs { q: &q, k: &k, v: &v, layout, shape, rule: ScoreRule::plain(shape) };
    let (o, s) = (normal(13, 32, 3), normal(13, 8, 4));
    let outputs = AttentionOutputs { out: &o, stats: &s };
    attention(outputs, inputs)?;
    let operands = [&q, &k, &v, &d, &o];
    for out in &operands[..3] {
        assert_refused("output", attention(AttentionOutputs { out, stats: &s }, inputs));
    }
    let own = [normal(13, 32, 7), normal(13, 32, 8), normal(13, 32, 9)];
    let backward = |[dq, dk, dv]: [&Tensor; 3]| {
        attention_backward(AttentionGradients { dq, dk, dv }, &d, outputs, inputs)
    };
    for place in 0..3 {
        for x in operands.into_iter().chain(&own).filter(|x| !std::ptr::eq(*x, &own[place])) {
            let mut gradients = own.each_ref();
            gradients[place] = x;
            assert_refused("gradients", backward(gradients));
        }
    }
    let large = normal(26, 32, 1);
    let (top, bottom) = (large.narrow(0, 0, 13)?, large.narrow(0, 13, 13)?);
    assert_refused(
        "another part of the same memory",
        attention(AttentionOutputs { out: &top, stats: &s }, AttentionInputs { q: &bottom, ..inputs }),
    );
    Ok(())
}
