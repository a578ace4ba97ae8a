//! Matrix products against plain f64 sums: all sizes around the borders of tiles and chunks, any strides, several terms, every start.

use crate::support::*;
use candle_core::{Device, Result, Tensor};
use kto_kernels::{Factor, Onto, Product, matmul, multiply};

/// Sizes around the borders of tiles (6, 16), tasks (96) and chunks (320).
const BORDERS: [usize; 14] = [1, 5, 6, 7, 15, 16, 17, 95, 96, 97, 319, 320, 321, 641];

/// Sums of products and the sums of their sizes.
pub(crate) struct Sums {
    values: Vec<f64>,
    sizes: Vec<f64>,
}

impl Sums {
    /// A start, by its elements.
    pub fn new(values: Vec<f64>) -> Self {
        Self { sizes: values.iter().map(|v| v.abs()).collect(), values }
    }

    /// Adds `scale · a · b` by plain loops.
    pub fn add(mut self, a: &Tensor, b: &Tensor, scale: f64) -> Self {
        let (k, n) = b.dims2().unwrap();
        let (a, b) = (values(a), values(b));
        for (i, (sums, sizes)) in
            self.values.chunks_mut(n.max(1)).zip(self.sizes.chunks_mut(n.max(1))).enumerate()
        {
            for (l, row) in b.chunks(n.max(1)).enumerate() {
                let factor = scale * a[i * k + l];
                for ((sum, size), b) in sums.iter_mut().zip(sizes.iter_mut()).zip(row) {
                    *sum += factor * b;
                    *size += (factor * b).abs();
                }
            }
        }
        self
    }

    /// Fails unless each element errs by at most a rounding a term on the sum of the sizes: the bound of any order of summation.
    #[track_caller]
    pub fn check(&self, what: &str, found: &Tensor, terms: usize) {
        let found_values = values(found);
        assert_eq!(found_values.len(), self.values.len(), "{what}: number of elements");
        // The f64 reference rounds as well.
        let unit = if found.dtype() == candle_core::DType::F32 { U32 } else { 2.0 * U64 };
        let roundings = (terms as f64 + 4.0) * unit;
        for (i, ((f, e), s)) in found_values.iter().zip(&self.values).zip(&self.sizes).enumerate() {
            let close = (f - e).abs() <= roundings * s;
            assert!(close, "{what}: element {i} is {f}, expected {e} within {:e}", roundings * s);
        }
    }
}

/// Returns a · b by plain loops.
pub(crate) fn reference(a: &Tensor, b: &Tensor) -> Sums {
    Sums::new(vec![0.0; a.dims()[0] * b.dims()[1]]).add(a, b, 1.0)
}

/// Returns the bits of the elements of the first `m` rows and `n` columns.
fn corner(x: &Tensor, m: usize, n: usize) -> Vec<u64> {
    values(&x.narrow(0, 0, m).unwrap().narrow(1, 0, n).unwrap()).iter().map(|v| v.to_bits()).collect()
}

/// Every k against sums, and every m and n against the bits of the largest: an element depends on its row and column alone.
fn product_at_every_border(convert: impl Fn(&Tensor) -> Tensor) -> Outcome {
    let largest = 641;
    for k in BORDERS {
        let (a, b) = (normal(largest, k, 1), normal(k, largest, 2));
        let sums = reference(&a, &b);
        let (a, b) = (convert(&a), convert(&b));
        let all = matmul(&a, &b)?;
        sums.check(&format!("k = {k}"), &all, k);
        for n in BORDERS {
            let narrow = b.narrow(1, 0, n)?.contiguous()?;
            for m in BORDERS {
                let y = matmul(&a.narrow(0, 0, m)?, &narrow)?;
                assert_eq!(y.dims(), [m, n]);
                assert!(corner(&y, m, n) == corner(&all, m, n), "({m}, {k}) · ({k}, {n}): other bits");
            }
        }
    }
    Ok(())
}

#[test]
fn borders_in_f32() -> Outcome {
    product_at_every_border(single)
}

#[test]
fn borders_in_f64() -> Outcome {
    product_at_every_border(Tensor::clone)
}

#[test]
fn long_sums_with_few_columns() -> Outcome {
    for (m, k, n) in [(1, 4099, 1), (97, 4099, 7), (6, 2049, 33), (17, 3201, 17), (5, 9999, 3)] {
        let (a, b) = (normal(m, k, 1), normal(k, n, 2));
        let sums = reference(&a, &b);
        sums.check("f64", &matmul(&a, &b)?, k);
        sums.check("f32", &matmul(&single(&a), &single(&b))?, k);
    }
    Ok(())
}

/// Returns the matrix as every form of strides that a caller can make of it, by name.
fn strides(x: &Tensor) -> Result<Vec<(&'static str, Tensor)>> {
    let (rows, columns) = x.dims2()?;
    let nan = |rows, columns| Tensor::full(f64::NAN, (rows, columns), &Device::Cpu)?.to_dtype(x.dtype());
    let framed = |x: &Tensor| -> Result<Tensor> {
        let (rows, columns) = x.dims2()?;
        let wide = Tensor::cat(&[&nan(rows, 3)?, &x.contiguous()?, &nan(rows, 2)?], 1)?;
        Tensor::cat(&[&nan(2, columns + 5)?, &wide, &nan(1, columns + 5)?], 0)?
            .narrow(0, 2, rows)?
            .narrow(1, 3, columns)
    };
    // Neither of the strides is one: every third column of every second row.
    let sparse = Tensor::cat(
        &[&x.reshape((rows, columns, 1))?, &nan(rows, 2 * columns)?.reshape((rows, columns, 2))?],
        2,
    )?
    .reshape((rows, 1, 3 * columns))?;
    let sparse = Tensor::cat(&[&sparse, &nan(rows, 3 * columns)?.reshape((rows, 1, 3 * columns))?], 1)?;
    let sparse = sparse.reshape((rows, 6 * columns))?.narrow(1, 0, 3 * columns)?;
    let sparse = sparse.reshape((rows, columns, 3)).ok().map(|s| s.narrow(2, 0, 1)).transpose()?;
    let mut all = vec![
        ("contiguous", x.contiguous()?),
        ("transposed", x.t()?.contiguous()?.t()?),
        ("part", framed(x)?),
        ("transposed part", framed(&x.t()?)?.t()?),
    ];
    if let Some(sparse) = sparse {
        all.push(("sparse", sparse.squeeze(2)?));
    }
    Ok(all)
}

#[test]
fn operands_of_any_strides() -> Outcome {
    // The third is crowded: rows of a at a distance of 4096 bytes (or 8192) are copied first.
    for (m, k, n) in
        [(1, 7, 65), (63, 65, 7), (97, 1024, 64), (65, 321, 40), (257, 8, 63), (7, 1, 1), (1, 1, 33)]
    {
        let (a, b) = (normal(m, k, 3), normal(k, n, 4));
        let sums = reference(&a, &b);
        for [a, b] in [[a.clone(), b.clone()], [single(&a), single(&b)]] {
            let plain = matmul(&a, &b)?;
            sums.check("plain", &plain, k);
            for (a_form, a) in strides(&a)? {
                for (b_form, b) in strides(&b)? {
                    let y = matmul(&a, &b)?;
                    let same = corner(&y, m, n) == corner(&plain, m, n);
                    assert!(same, "({m}, {k}) · ({k}, {n}), a {a_form}, b {b_form}: other bits");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn repeated_rows_and_columns() -> Outcome {
    let (row, column) = (normal(1, 65, 7), normal(65, 1, 8));
    let (a, b) = (row.broadcast_as((63, 65))?, column.broadcast_as((65, 40))?);
    let sums = reference(&a.contiguous()?, &b.contiguous()?);
    sums.check("rows of a, columns of b", &matmul(&a, &b)?, 65);
    let (a, b) = (normal(63, 1, 7).broadcast_as((63, 65))?, normal(1, 40, 8).broadcast_as((65, 40))?);
    let sums = reference(&a.contiguous()?, &b.contiguous()?);
    sums.check("columns of a, rows of b", &matmul(&a, &b)?, 65);
    sums.check("f32", &matmul(&a.to_dtype(candle_core::DType::F32)?, &single(&b.contiguous()?))?, 65);
    Ok(())
}

/// Several terms at once, as a linear layer with its LoRA factors has them, onto every start.
#[test]
fn terms_and_starts() -> Outcome {
    for (m, n) in [(1, 1), (7, 65), (97, 17), (64, 320), (257, 33), (300, 8)] {
        let depths: [&[usize]; 4] = [&[65], &[641, 8], &[0, 7, 0], &[1100, 16, 321]];
        for depths in depths {
            let a: Vec<Tensor> = depths.iter().zip(1..).map(|(k, i)| normal(m, *k, i)).collect();
            let b: Vec<Tensor> = depths.iter().zip(11..).map(|(k, i)| normal(*k, n, i)).collect();
            let (before, row, matrix) = (normal(m, n, 21), normal_vector(n, 22), normal(m, n, 23));
            let repeated = row.broadcast_as((m, n))?.contiguous()?;
            let zeros = before.zeros_like()?;
            let (row32, matrix32) = (single(&row), single(&matrix));
            for (start, onto, onto32) in [
                (&zeros, Onto::Zero, Onto::Zero),
                (&before, Onto::Itself, Onto::Itself),
                (&repeated, Onto::Row(&row), Onto::Row(&row32)),
                (&matrix, Onto::Matrix(&matrix), Onto::Matrix(&matrix32)),
            ] {
                let mut sums = Sums::new(values(start));
                for ((a, b), scale) in a.iter().zip(&b).zip([1.0, -0.7, 2.5]) {
                    sums = sums.add(a, b, scale);
                }
                let depth = depths.iter().sum();
                let run = |onto: Onto, like: &Tensor, a: &[Tensor], b: &[Tensor]| -> Result<Tensor> {
                    let terms: Vec<Product> = a
                        .iter()
                        .zip(b)
                        .zip([1.0, -0.7, 2.5])
                        .map(|((a, b), scale)| Product::scaled(a, Factor::Plain(b), scale))
                        .collect();
                    match onto {
                        Onto::Itself => changed(like, |out| multiply(out, onto, &terms)),
                        _ => written(like, |out| multiply(out, onto, &terms)),
                    }
                };
                sums.check(&format!("({m}, {n}) {depths:?}"), &run(onto, &before, &a, &b)?, depth);
                let [a, b] = [&a, &b].map(|x| x.iter().map(single).collect::<Vec<_>>());
                sums.check(
                    &format!("({m}, {n}) {depths:?} f32"),
                    &run(onto32, &single(&before), &a, &b)?,
                    depth,
                );
            }
        }
    }
    Ok(())
}

#[test]
fn a_transposed_factor_is_its_transpose() -> Outcome {
    for (m, k, n) in [(7, 65, 33), (97, 321, 16), (1, 5, 641)] {
        let (a, b) = (single(&normal(m, k, 1)), single(&normal(n, k, 2)));
        let plain = matmul(&a, &b.t()?)?;
        let y =
            written(&plain, |out| multiply(out, Onto::Zero, &[Product::new(&a, Factor::Transposed(&b))]))?;
        assert_eq!(values(&y), values(&plain));
        let y = written(&plain, |out| {
            multiply(out, Onto::Zero, &[Product::new(&a, Factor::Transposed(&b.t()?.contiguous()?.t()?))])
        })?;
        assert_eq!(values(&y), values(&plain));
    }
    Ok(())
}

#[test]
fn gradients_of_a_product_are_products() -> Outcome {
    let (a, b, dy) = (normal(63, 65, 1), normal(65, 7, 2), normal(63, 7, 3));
    let expected = autograd(&[&a, &b], &dy, |v| v[0].matmul(&v[1]));
    assert_tensors("a", &matmul(&dy, &b.t()?)?, &expected[0], SAME_IN_F64);
    let db = b.zeros_like()?;
    multiply(&db, Onto::Itself, &[Product::new(&a.t()?, Factor::Plain(&dy))])?;
    assert_tensors("b", &db, &expected[1], SAME_IN_F64);
    Ok(())
}

#[test]
fn empty_sums_are_zero_and_add_nothing() -> Outcome {
    let (a, b) = (normal(3, 0, 1), normal(0, 5, 2));
    assert_eq!(values(&matmul(&a, &b)?), vec![0.0; 15]);
    let (c, row, matrix) = (normal(3, 5, 3), normal_vector(5, 4), normal(3, 5, 5));
    let none = [Product::scaled(&a, Factor::Plain(&b), 2.0)];
    for terms in [&none[..], &[]] {
        assert_eq!(values(&changed(&c, |c| multiply(c, Onto::Itself, terms))?), values(&c));
        assert_eq!(values(&written(&c, |c| multiply(c, Onto::Zero, terms))?), vec![0.0; 15]);
        assert_eq!(values(&written(&c, |c| multiply(c, Onto::Matrix(&matrix), terms))?), values(&matrix));
        let rows = written(&c, |c| multiply(c, Onto::Row(&row), terms))?;
        assert_eq!(values(&rows), values(&row).repeat(3));
    }
    Ok(())
}

#[test]
fn products_without_elements() -> Outcome {
    for (m, k, n) in
        [(0, 3, 5), (5, 3, 0), (0, 3, 0), (0, 0, 0), (0, 0, 5), (5, 0, 0), (0, 641, 641), (641, 641, 0)]
    {
        let (a, b) = (normal(m, k, 1), normal(k, n, 1));
        assert_eq!(matmul(&a, &b)?.dims(), [m, n]);
        assert_eq!(matmul(&normal(k, m, 1).t()?, &normal(n, k, 1).t()?)?.dims(), [m, n]);
        let (row, matrix) = (normal_vector(n, 1), normal(m, n, 2));
        for onto in [Onto::Itself, Onto::Row(&row), Onto::Matrix(&matrix)] {
            multiply(&normal(m, n, 3), onto, &[Product::new(&a, Factor::Plain(&b))])?;
        }
    }
    Ok(())
}

#[test]
fn infinities_and_nans_stay_in_their_rows_and_columns() -> Outcome {
    // A padded panel must not spread what lies beside it.
    for (m, k, n) in [(7, 17, 33), (97, 321, 5), (65, 7, 63)] {
        let spoiled = |x: Tensor, at: usize| -> Result<Tensor> {
            let mut data = values(&x);
            data[at] = f64::INFINITY;
            single(&x).to_dtype(candle_core::DType::F64)?;
            Tensor::from_vec(data, x.shape(), x.device())
        };
        let (a, b) = (spoiled(normal(m, k, 1), (m - 1) * k)?, spoiled(normal(k, n, 2), n - 1)?);
        for y in
            [matmul(&a, &b)?, matmul(&single(&a), &single(&b))?, matmul(&single(&a.t()?).t()?, &single(&b))?]
        {
            for (i, v) in values(&y).iter().enumerate() {
                assert_eq!(v.is_finite(), i / n != m - 1 && i % n != n - 1, "element {i} is {v}");
            }
        }
    }
    Ok(())
}
