//! Products that must be refused: unsafe code relies on the check.

use crate::support::*;
use candle_core::{DType, Tensor};
use kto_kernels::{Dense, Factor, Onto, Product, Stored, Weight, matmul, multiply};
use std::sync::Arc;

#[test]
fn wrong_shapes_and_types() -> Outcome {
    let (a, b, c) = (normal(3, 4, 1), normal(4, 5, 2), normal(3, 5, 3));
    assert_refused("inner sizes", matmul(&a, &normal(5, 4, 1)));
    assert_refused("types", matmul(&a, &single(&b)));
    assert_refused("rank", matmul(&normal_vector(4, 1), &b));
    assert_refused("half precision", matmul(&a.to_dtype(DType::F16)?, &b.to_dtype(DType::F16)?));
    let onto = |out: &Tensor, onto: Onto| multiply(out, onto, &[Product::new(&a, Factor::Plain(&b))]);
    assert_refused("output shape", onto(&normal(5, 3, 1), Onto::Zero));
    assert_refused("output rows", onto(&normal(4, 5, 1), Onto::Zero));
    assert_refused("output columns", onto(&normal(3, 6, 1), Onto::Zero));
    assert_refused("output rank", onto(&normal_vector(15, 1), Onto::Zero));
    assert_refused("output type", onto(&single(&c), Onto::Itself));
    assert_refused("output strides", onto(&normal(5, 3, 1).t()?, Onto::Itself));
    assert_refused("part of the columns", onto(&normal(3, 6, 1).narrow(1, 0, 5)?, Onto::Itself));
    for (what, start) in [
        ("rows of the start", normal(4, 5, 4)),
        ("columns of the start", normal(3, 4, 4)),
        ("type of the start", single(&c)),
        ("strides of the start", normal(5, 3, 4).t()?),
        ("rank of the start", normal_vector(15, 4)),
    ] {
        assert_refused(what, onto(&c, Onto::Matrix(&start)));
    }
    for (what, row) in [
        ("short row", normal_vector(4, 4)),
        ("long row", normal_vector(6, 4)),
        ("type of the row", single(&normal_vector(5, 4))),
        ("rank of the row", normal(1, 5, 4)),
        ("strides of the row", normal(5, 2, 4).narrow(1, 0, 1)?.squeeze(1)?),
    ] {
        assert_refused(what, onto(&c, Onto::Row(&row)));
    }
    let before = values(&c);
    let with = |b: Factor| {
        multiply(&c, Onto::Itself, &[Product::new(&a, Factor::Plain(&normal(4, 5, 2))), Product::new(&a, b)])
    };
    assert_refused("second term", with(Factor::Plain(&normal(5, 5, 1))));
    assert_refused("second term transposed", with(Factor::Transposed(&b)));
    assert_refused("second term dense", with(Factor::Linear(&Weight::Dense(b.clone()))));
    let stored = Stored::dense(Dense::F32, vec![0; 80].into(), 4, 5)?;
    let stored = Weight::Stored(Arc::new(stored));
    assert_refused("second term stored", with(Factor::Linear(&stored)));
    assert!(with(Factor::Weight(&stored)).is_ok());
    assert_refused(
        "rows of a",
        multiply(&normal(2, 5, 1), Onto::Zero, &[Product::new(&a, Factor::Weight(&stored))]),
    );
    assert_eq!(before.len(), 15);
    Ok(())
}

#[test]
fn shared_memory() -> Outcome {
    let (square, other) = (normal(4, 4, 1), normal(4, 4, 2));
    let weight = Weight::Dense(square.clone());
    let before = values(&square);
    let into = |onto: Onto, a: &Tensor, b: Factor| multiply(&square, onto, &[Product::new(a, b)]);
    assert_refused("first factor", into(Onto::Itself, &square, Factor::Plain(&other)));
    assert_refused("transposed first factor", into(Onto::Zero, &square.t()?, Factor::Plain(&other)));
    assert_refused("second factor", into(Onto::Itself, &other, Factor::Plain(&square.t()?)));
    assert_refused("transposed factor", into(Onto::Zero, &other, Factor::Transposed(&square)));
    assert_refused("weight", into(Onto::Zero, &other, Factor::Weight(&weight)));
    assert_refused("linear", into(Onto::Zero, &other, Factor::Linear(&weight)));
    assert_refused("start", into(Onto::Matrix(&square), &other, Factor::Plain(&normal(4, 4, 3))));
    assert_refused("row", into(Onto::Row(&square.get(0)?), &other, Factor::Plain(&normal(4, 4, 3))));
    let large = normal(8, 4, 4);
    let (top, bottom) = (large.narrow(0, 0, 4)?, large.narrow(0, 4, 4)?);
    let term = [Product::new(&bottom, Factor::Plain(&other))];
    assert_refused("another part of the same memory", multiply(&top, Onto::Zero, &term));
    assert_eq!(values(&square), before);
    Ok(())
}

/// Sizes whose products and sums wrap around: repeated rows make them without memory.
#[test]
fn sizes_that_wrap_around() -> Outcome {
    // 3 · THIRD is 1 in 64 bits.
    const THIRD: usize = 0xaaaa_aaaa_aaaa_aaab;
    let one = normal(1, 1, 1);
    let repeated = |rows, columns| one.broadcast_as((rows, columns));
    assert_refused("elements", matmul(&normal(3, 1, 1), &repeated(1, THIRD)?));
    assert_refused("rows", matmul(&repeated(1 << 32, 1)?, &repeated(1, 1 << 32)?));
    let wrapped = Tensor::from_vec(vec![0.0f64], (3, THIRD), &candle_core::Device::Cpu);
    if let Ok(out) = &wrapped {
        let (a, b) = (normal(3, 1, 1), repeated(1, THIRD)?);
        assert_refused("output", multiply(out, Onto::Zero, &[Product::new(&a, Factor::Plain(&b))]));
        assert_refused("operand", matmul(out, &repeated(THIRD, 1)?));
        assert_refused("clear", kto_kernels::clear(out));
    }
    let deep = [(1 << 63) + 5, 1 << 63].map(|k| (repeated(1, k), repeated(k, 1)));
    let mut terms = Vec::new();
    for (a, b) in &deep {
        if let (Ok(a), Ok(b)) = (a, b) {
            terms.push(Product::new(a, Factor::Plain(b)));
        }
    }
    assert_eq!(terms.len(), 2);
    assert_refused("depth", multiply(&normal(1, 1, 2), Onto::Zero, &terms));
    Ok(())
}
