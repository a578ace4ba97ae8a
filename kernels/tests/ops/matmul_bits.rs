//! The bits of a product: whatever is computed beside an element, turned or not, on any number of threads, from memory or as stored.

use crate::matmul::reference;
use crate::support::*;
use candle_core::{DType, Result, Tensor};
use kto_kernels::quant::nf4::{CODE, quantize_nf4};
use kto_kernels::{
    AffineParts, Bytes, Dense, Factor, Nf4Parts, Nf4Scales, Onto, Product, Stored, Weight, matmul, multiply,
};
use std::sync::Arc;

#[track_caller]
fn assert_same(what: &str, a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims(), "{what}: shape");
    let bits = |x: &Tensor| -> Vec<u64> { values(x).iter().map(|v| v.to_bits()).collect() };
    assert!(bits(a) == bits(b), "{what}: other bits");
}

/// A gradient of a narrow LoRA factor, whose first factor is transposed, is computed transposed.
#[test]
fn a_turned_product_has_the_same_bits() -> Outcome {
    for (m, k, n) in [(65, 7, 1), (576, 257, 8), (641, 330, 16), (1536, 97, 63), (97, 641, 64), (66, 1, 65)] {
        for convert in [single, Tensor::clone] {
            let at = convert(&normal(k, m, 1));
            let (b, before) = (convert(&normal(k, n, 2)), convert(&normal(m, n, 3)));
            let (turned, plain) = (at.t()?, at.t()?.contiguous()?);
            let sums = reference(&plain, &b);
            sums.check("turned", &matmul(&turned, &b)?, k);
            assert_same("zero", &matmul(&turned, &b)?, &matmul(&plain, &b)?);
            let bt = b.t()?.contiguous()?;
            assert_same("both transposed", &matmul(&turned, &bt.t()?)?, &matmul(&plain, &b)?);
            let onto = |a: &Tensor| {
                let terms = [(a, -0.7), (a, 0.3)].map(|(a, s)| Product::scaled(a, Factor::Plain(&b), s));
                changed(&before, |out| multiply(out, Onto::Itself, &terms))
            };
            assert_same("itself", &onto(&turned)?, &onto(&plain)?);
            // A start that only the straight form knows gives what zero gives.
            let zeros = before.zeros_like()?;
            let straight = written(&before, |out| {
                multiply(out, Onto::Matrix(&zeros), &[Product::new(&turned, Factor::Plain(&b))])
            })?;
            assert_same("straight", &straight, &matmul(&turned, &b)?);
        }
    }
    Ok(())
}

/// A batch of sequences and one of them alone: more rows, and more columns, leave an element as it is.
#[test]
fn rows_of_a_batch_are_rows_alone() -> Outcome {
    let (k, n) = (1100, 330);
    let (a, b, row) = (single(&normal(300, k, 1)), single(&normal(k, n, 2)), single(&normal_vector(n, 3)));
    let product = |a: &Tensor| -> Result<Tensor> {
        let like = Tensor::zeros((a.dims()[0], n), DType::F32, a.device())?;
        written(&like, |out| multiply(out, Onto::Row(&row), &[Product::scaled(a, Factor::Plain(&b), 0.3)]))
    };
    let all = product(&a)?;
    for (first, m) in [(0, 1), (299, 1), (1, 6), (95, 2), (90, 97), (13, 192), (0, 300)] {
        assert_same("rows", &product(&a.narrow(0, first, m)?)?, &all.narrow(0, first, m)?);
    }
    let all = matmul(&a, &b)?;
    for (first, n) in [(0, 1), (329, 1), (1, 15), (16, 16), (31, 33), (100, 230)] {
        assert_same(
            "columns",
            &matmul(&a, &b.narrow(1, first, n)?)?,
            &all.narrow(1, first, n)?.contiguous()?,
        );
    }
    Ok(())
}

/// What is too large for one slab of panels is computed in several: by columns, or by runs of k.
#[test]
fn slabs_leave_no_seam() -> Outcome {
    for (m, k, n) in [(3, 1025, 2100), (100, 4100, 300), (5, 17, 70_001)] {
        let (a, b) = (single(&normal(m, k, 1)), single(&normal(k, n, 2)));
        let all = matmul(&a, &b)?;
        for first in [0, 500, 1010, 1024, n - 17].into_iter().filter(|f| f + 17 <= n) {
            let narrow = b.narrow(1, first, 17)?;
            assert_same("columns", &matmul(&a, &narrow)?, &all.narrow(1, first, 17)?.contiguous()?);
            reference(&a, &narrow).check("sums", &all.narrow(1, first, 17)?, k);
        }
    }
    Ok(())
}

#[test]
fn any_number_of_threads() -> Outcome {
    for (m, k, n) in
        [(1, 641, 1000), (7, 1100, 321), (97, 96, 95), (641, 321, 17), (300, 700, 8), (64, 2100, 1100)]
    {
        let (a, at, b) = (single(&normal(m, k, 1)), single(&normal(k, m, 2)), single(&normal(k, n, 3)));
        let (before, row) = (single(&normal(m, n, 4)), single(&normal_vector(n, 5)));
        let weight = Weight::Stored(Arc::new(dense(Dense::Bf16, &b, 0)?));
        let linear = Weight::Stored(Arc::new(dense(Dense::F16, &b.t()?.contiguous()?, 1)?));
        assert_same_on_any_pool(&format!("({m}, {k}) · ({k}, {n})"), || {
            let terms = [
                Product::new(&a, Factor::Plain(&b)),
                Product::scaled(&a, Factor::Linear(&linear), 0.3),
                Product::scaled(&a, Factor::Weight(&weight), -2.0),
            ];
            Ok(vec![
                written(&before, |out| multiply(out, Onto::Row(&row), &terms))?,
                changed(&before, |out| multiply(out, Onto::Itself, &terms))?,
                matmul(&at.t()?, &b)?,
                matmul(&a.to_dtype(DType::F64)?, &b.to_dtype(DType::F64)?)?,
            ])
        });
    }
    Ok(())
}

/// Stores a matrix as floats behind `offset` other bytes.
fn dense(dtype: Dense, x: &Tensor, offset: usize) -> Result<Stored> {
    let (rows, columns) = x.dims2()?;
    let bytes: Vec<u8> = match dtype {
        Dense::F32 => values(x).iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
        Dense::F16 => values(x).iter().flat_map(|v| half::f16::from_f64(*v).to_le_bytes()).collect(),
        Dense::Bf16 => values(x).iter().flat_map(|v| half::bf16::from_f64(*v).to_le_bytes()).collect(),
    };
    let bytes = [vec![0xee; offset], bytes].concat();
    let range = offset..bytes.len();
    let bytes = Bytes::new(Arc::new(bytes), range).unwrap();
    Stored::dense(dtype, bytes, rows, columns)
}

/// Stores a matrix as NF4.
fn nf4(x: &Tensor) -> Result<Stored> {
    let (rows, columns) = x.dims2()?;
    let made = quantize_nf4(&values(x).iter().map(|v| *v as f32).collect::<Vec<_>>());
    let absmax: Vec<u8> = made.absmax.iter().flat_map(|v| v.to_le_bytes()).collect();
    let scales = Nf4Scales::Plain(Dense::F32, absmax.into());
    let parts = Nf4Parts { packed: made.packed.into(), code: CODE, scales, block: 64, round: Dense::Bf16 };
    Stored::nf4(parts, rows, columns)
}

/// Returns `n` bytes that follow no pattern.
fn noise(n: usize, salt: u64) -> Vec<u8> {
    (0..n as u64).map(|i| kto_kernels::random::key(&[salt, i]) as u8).collect()
}

/// Returns the bytes of `n` scales.
fn scales(n: usize, salt: u64) -> Bytes {
    normals(n, salt).iter().flat_map(|v| (*v as f32).to_le_bytes()).collect::<Vec<u8>>().into()
}

/// Makes a matrix in every form in which it can be stored.
fn stored_forms(x: &Tensor) -> Result<Vec<(&'static str, Stored)>> {
    let (rows, columns) = x.dims2()?;
    let codes = noise(rows * columns, 7).into();
    let mut forms = vec![
        ("f32", dense(Dense::F32, x, 0)?),
        ("f32 out of line", dense(Dense::F32, x, 1)?),
        ("f16", dense(Dense::F16, x, 1)?),
        ("bf16", dense(Dense::Bf16, x, 1)?),
        ("nf4", nf4(x)?),
        ("int8", Stored::int8(codes, Dense::F32, scales(rows, 8), rows, columns)?),
    ];
    if columns.is_multiple_of(32) {
        let groups = rows * columns / 32;
        let parts = AffineParts {
            packed: noise(rows * columns * 5 / 8, 9).into(),
            dtype: Dense::F32,
            scales: scales(groups, 10),
            biases: scales(groups, 11),
            bits: 5,
            group: 32,
        };
        forms.push(("affine", Stored::affine(parts, rows, columns)?));
    }
    Ok(forms)
}

/// A weight as stored gives the bits of the same weight widened: both ways round, in both element types, with other terms.
#[test]
fn stored_weights_are_their_widened_form() -> Outcome {
    for (m, k, n) in
        [(1, 1, 1), (7, 65, 33), (97, 321, 130), (5, 641, 17), (1, 300, 1025), (300, 8, 65), (17, 97, 96)]
    {
        let x = normal(k, n, 2);
        for (what, stored) in stored_forms(&x)? {
            let weight = Weight::Stored(Arc::new(stored));
            for dtype in [DType::F32, DType::F64] {
                let wide = weight.to_dense(dtype)?;
                assert_eq!((wide.dims2()?, wide.dtype()), ((k, n), dtype));
                let (a, b) = (normal(m, k, 1).to_dtype(dtype)?, normal(m, n, 3).to_dtype(dtype)?);
                let what = format!("{what} ({m}, {k}, {n}) {dtype:?}");
                for (a, own, held, plain, width) in [
                    (
                        &a,
                        Factor::Weight(&weight),
                        Factor::Weight(&Weight::Dense(wide.clone())),
                        Factor::Plain(&wide),
                        n,
                    ),
                    (
                        &b,
                        Factor::Linear(&weight),
                        Factor::Linear(&Weight::Dense(wide.clone())),
                        Factor::Transposed(&wide),
                        k,
                    ),
                ] {
                    let (low, up) = (normal(m, 8, 4).to_dtype(dtype)?, normal(8, width, 5).to_dtype(dtype)?);
                    let row = normal_vector(width, 6).to_dtype(dtype)?;
                    let like = Tensor::zeros((m, width), dtype, a.device())?;
                    let run = |b: Factor| {
                        let terms = [Product::new(a, b), Product::scaled(&low, Factor::Plain(&up), 2.0)];
                        written(&like, |out| multiply(out, Onto::Row(&row), &terms))
                    };
                    let expected = run(plain)?;
                    assert_same(&what, &run(own)?, &expected);
                    assert_same(&what, &run(held)?, &expected);
                }
                let index = [k as u32 - 1, 0, k as u32 / 2];
                let like = Tensor::zeros((3, n), dtype, wide.device())?;
                let rows = written(&like, |out| weight.gather_into(out, &index))?;
                assert_same(&what, &rows, &kto_kernels::gather_rows(&wide, &index)?);
                assert_refused("row past the end", weight.gather_into(&like, &[0, 0, k as u32]));
                assert_refused("too few rows", weight.gather_into(&like, &[0, 0]));
            }
        }
    }
    Ok(())
}

/// An owner whose bytes vanish between two looks, which no sane one's do.
struct Vanishing(Vec<u8>, std::sync::atomic::AtomicUsize);

impl AsRef<[u8]> for Vanishing {
    fn as_ref(&self) -> &[u8] {
        if self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < 3 { &self.0 } else { &[] }
    }
}

#[test]
fn bytes_that_vanish_are_not_read() -> Outcome {
    let owner = Vanishing(vec![0; 4 * 97 * 64], Default::default());
    let bytes = Bytes::new(Arc::new(owner), 0..4 * 97 * 64).unwrap();
    let weight = Weight::Stored(Arc::new(Stored::dense(Dense::F32, bytes, 97, 64)?));
    for _ in 0..5 {
        let a = single(&normal(7, 97, 1));
        let y = written(&single(&normal(7, 64, 2)), |out| {
            multiply(out, Onto::Zero, &[Product::new(&a, Factor::Weight(&weight))])
        })?;
        // What is multiplied then is nobody's promise; it must only be memory of ours.
        assert_eq!(y.dims(), [7, 64]);
    }
    Ok(())
}
