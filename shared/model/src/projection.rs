//! One linear layer with its LoRA factors: forward, and the pieces of the way back.

use crate::dora::Lengths;
use candle_core::Result;
use kto_kernels::{
    DropoutKey,
    device::{
        Factor, FrozenWeight, Onto, Product, Tensor, add, add_bias, add_column_dots, dropout, matmul,
        multiply, scale_columns, scale_in_place,
    },
};

/// A frozen linear layer.
#[derive(Clone, Debug)]
pub struct Linear {
    /// (out, in)
    pub weight: FrozenWeight,
    /// (out)
    pub bias: Option<Tensor>,
}

/// The trained factors of one linear layer: of the host as they are trained, or where a sweep computes.
#[derive(Clone, Debug)]
pub struct Factors<T = candle_core::Tensor> {
    /// A (R, in)
    pub a: T,
    /// B (out, R)
    pub b: T,
    /// Factor of B·A: alpha / rank, or alpha / √rank with rslora.
    pub scale: f64,
    /// DoRA: the lengths that the rows of W + scale·B·A get (out).
    pub magnitude: Option<T>,
}

/// A linear layer as one pass uses it: `y = x·Wᵀ + bias + scale·drop(x)·Aᵀ·Bᵀ`; with DoRA, where gains change the base's part too,
/// `y = (x − drop(x))·Wᵀ + (drop(x)·Wᵀ + scale·drop(x)·Aᵀ·Bᵀ) ⊙ gain + bias`, as in PEFT.
pub(crate) struct Projection<'a> {
    pub linear: &'a Linear,
    pub factors: Option<&'a Factors<Tensor>>,
    /// DoRA's gains.
    pub lengths: Option<&'a Lengths>,
    pub dropout: Option<(DropoutKey, &'a [u64])>,
}

impl Projection<'_> {
    /// Writes the layer's output, plus `residual`, to `y`, and `drop(x)·Aᵀ` to `inner`.
    /// Shapes: x (T, in), y and residual (T, out), inner (T, R).
    pub fn forward(&self, y: &Tensor, residual: Option<&Tensor>, x: &Tensor, inner: &Tensor) -> Result<()> {
        if self.factors.is_some() {
            self.inner(inner, x)?;
        }
        if let Some(lengths) = self.lengths {
            multiply(y, Onto::Zero, &self.products(&self.dropped(x)?, inner))?;
            scale_columns(y, &lengths.gain)?;
            if let Some(rest) = self.undropped(x)? {
                multiply(y, Onto::Itself, &[Product::new(&rest, Factor::Linear(&self.linear.weight))])?;
            }
            self.linear.bias.as_ref().map_or(Ok(()), |bias| add_bias(y, bias))?;
            return residual.map_or(Ok(()), |residual| add(y, residual));
        }
        let products = self.products(x, inner);
        match (residual, &self.linear.bias) {
            (None, None) => multiply(y, Onto::Zero, &products),
            (None, Some(bias)) => multiply(y, Onto::Row(bias), &products),
            (Some(residual), bias) => {
                multiply(y, Onto::Matrix(residual), &products)?;
                bias.as_ref().map_or(Ok(()), |bias| add_bias(y, bias))
            }
        }
    }

    /// Returns what the output is the sum of, before DoRA's gains.
    fn products<'t>(&'t self, x: &'t Tensor, inner: &'t Tensor) -> Vec<Product<'t>> {
        let base = Product::new(x, Factor::Linear(&self.linear.weight));
        let own = self.factors.map(|f| Product::scaled(inner, Factor::Transposed(&f.b), f.scale));
        std::iter::once(base).chain(own).collect()
    }

    /// Returns the gradient of the output before DoRA's gains for the gradient `dy` of the output: in `room`, or without DoRA `dy`
    /// itself. Shapes: dy and room (T, out).
    pub fn before_gains(&self, dy: &Tensor, room: &Tensor) -> Result<Tensor> {
        let Some(lengths) = self.lengths else { return Ok(dy.clone()) };
        room.set_rows(0, dy)?;
        scale_columns(room, &lengths.gain)?;
        Ok(room.clone())
    }

    /// Does the same in place: `dy` is used up.
    pub fn use_gains(&self, dy: &Tensor) -> Result<()> {
        self.lengths.map_or(Ok(()), |lengths| scale_columns(dy, &lengths.gain))
    }

    /// Returns the gradient of the input by what dropout takes from DoRA, which has no gains, for the gradient `dy` (T, out) of the output;
    /// nothing where there is no dropout or no DoRA. Shape: (T, in).
    pub fn past_gains(&self, dy: &Tensor) -> Result<Option<Tensor>> {
        if self.lengths.is_none() || self.dropout.is_none() {
            return Ok(None);
        }
        self.undropped(&self.through_base(dy)?)
    }

    /// Returns `dy·W`, short-lived.
    fn through_base(&self, dy: &Tensor) -> Result<Tensor> {
        let (rows, columns) = (dy.dims2()?.0, self.linear.weight.dims()?.1);
        let dx = dy.zeros_of(rows, columns)?;
        multiply(&dx, Onto::Zero, &[Product::new(dy, Factor::Weight(&self.linear.weight))])?;
        Ok(dx)
    }

    /// Adds to the gradient of DoRA's magnitudes; the lengths of rows that they are divided by count as constants, as in PEFT. `room` is
    /// work space. Shapes: dy and room (T, out), x (T, in), inner (T, R).
    pub fn magnitude_gradient(
        &self,
        gradient: Option<&Factors<Tensor>>,
        (dy, x, inner): (&Tensor, &Tensor, &Tensor),
        room: &Tensor,
    ) -> Result<()> {
        let magnitude = gradient.and_then(|g| g.magnitude.as_ref());
        let (Some(magnitude), Some(lengths)) = (magnitude, self.lengths) else { return Ok(()) };
        multiply(room, Onto::Zero, &self.products(&self.dropped(x)?, inner))?;
        add_column_dots(magnitude, dy, room, &lengths.inverse)
    }

    /// Writes `drop(x)·Aᵀ`. Shapes: x (T, in), inner (T, R).
    pub fn inner(&self, inner: &Tensor, x: &Tensor) -> Result<()> {
        match self.factors {
            Some(f) => {
                multiply(inner, Onto::Zero, &[Product::new(&self.dropped(x)?, Factor::Transposed(&f.a))])
            }
            None => Ok(()),
        }
    }

    /// Writes `dy·B` (`dy` before gains), the gradient of `inner` but for the scale. Shapes: dy (T, out), dinner (T, R).
    pub fn inner_gradient(&self, dinner: &Tensor, dy: &Tensor) -> Result<()> {
        match self.factors {
            Some(f) => multiply(dinner, Onto::Zero, &[Product::new(dy, Factor::Plain(&f.b))]),
            None => Ok(()),
        }
    }

    /// Adds to the gradients of A and B. Shapes: dy before gains (T, out), x (T, in), inner and dinner (T, R).
    pub fn factor_gradients(
        &self,
        gradient: Option<&Factors<Tensor>>,
        dy: &Tensor,
        x: &Tensor,
        inner: &Tensor,
        dinner: &Tensor,
    ) -> Result<()> {
        let (Some(g), Some(f)) = (gradient, self.factors) else { return Ok(()) };
        let dropped = self.dropped(x)?;
        multiply(&g.b, Onto::Itself, &[Product::scaled(&dy.t()?, Factor::Plain(inner), f.scale)])?;
        multiply(&g.a, Onto::Itself, &[Product::scaled(&dinner.t()?, Factor::Plain(&dropped), f.scale)])
    }

    fn dropped(&self, x: &Tensor) -> Result<Tensor> {
        match self.dropout {
            Some((key, rows)) => dropout(x, key, rows),
            None => Ok(x.clone()),
        }
    }

    /// Returns `x − drop(x)` where there is dropout.
    fn undropped(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let Some((key, rows)) = self.dropout else { return Ok(None) };
        let rest = dropout(x, key, rows)?;
        scale_in_place(&rest, -1.0)?;
        add(&rest, x)?;
        Ok(Some(rest))
    }
}

/// One layer's part in the gradient of an input.
pub(crate) struct Share<'a> {
    pub layer: &'a Projection<'a>,
    /// Gradient of its output before gains (T, out).
    pub dy: &'a Tensor,
    /// Gradient of its inner values (T, R).
    pub dinner: &'a Tensor,
    /// What [`Projection::past_gains`] has returned (T, in).
    pub past: Option<&'a Tensor>,
}

/// Writes the gradient of an input that several layers share. Shape: dx (T, in).
pub(crate) fn input_gradient(dx: &Tensor, shares: &[Share]) -> Result<()> {
    let mut products = Vec::with_capacity(2 * shares.len());
    for Share { layer, dy, dinner, past } in shares {
        if past.is_none() {
            products.push(Product::new(dy, Factor::Weight(&layer.linear.weight)));
        }
        if let (Some(f), None) = (layer.factors, layer.dropout) {
            products.push(Product::scaled(dinner, Factor::Plain(&f.a), f.scale));
        }
    }
    multiply(dx, Onto::Zero, &products)?;
    for Share { layer, dy, dinner, past } in shares {
        let (Some(f), Some((key, rows))) = (layer.factors, layer.dropout) else { continue };
        let share = matmul(dinner, &f.a)?;
        scale_in_place(&share, f.scale)?;
        if let Some(past) = past {
            multiply(&share, Onto::Itself, &[Product::new(dy, Factor::Weight(&layer.linear.weight))])?;
            add(dx, past)?;
        }
        add(dx, &dropout(&share, key, rows)?)?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor as HostTensor, Var};
    use kto_kernels::{Weight, random};

    const T: usize = 7;
    const IN: usize = 10;
    const OUT: usize = 6;
    const R: usize = 3;

    fn noise(rows: usize, columns: usize, stream: u64) -> HostTensor {
        let value = |i: usize| random::uniform(stream, i as u64) - 0.5;
        let values: Vec<f64> = (0..rows * columns).map(value).collect();
        HostTensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn vector(n: usize, stream: u64) -> HostTensor {
        (noise(1, n, stream).flatten_all().unwrap() + 1.0).unwrap()
    }

    fn zeros(rows: usize, columns: usize) -> Tensor {
        Tensor::Host(HostTensor::zeros((rows, columns), DType::F64, &Device::Cpu).unwrap())
    }

    fn same(what: &str, found: &HostTensor, expected: &HostTensor) {
        let flat = |t: &HostTensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (found, expected) = (flat(found), flat(expected));
        assert!(found.len() == expected.len() && expected.iter().any(|e| *e != 0.0), "{what}");
        for (f, e) in found.iter().zip(&expected) {
            assert!((f - e).abs() < 1e-12, "{what}: {f} {e}");
        }
    }

    /// PEFT's formula in training, result + (gain − 1)·drop(x)·Wᵀ + gain·scale·drop(x)·Aᵀ·Bᵀ, through candle's autograd; norms are constants there.
    #[test]
    fn dora_with_dropout_is_that_of_peft() {
        let (w, bias) = (noise(OUT, IN, 1), vector(OUT, 2));
        let [a, b] = [noise(R, IN, 3), noise(OUT, R, 4)].map(|t| Var::from_tensor(&t).unwrap());
        let magnitude = Var::from_tensor(&vector(OUT, 5)).unwrap();
        let (inverse, scale) = (vector(OUT, 6), 1.5);
        let x = Var::from_tensor(&noise(T, IN, 7)).unwrap();
        let dy = noise(T, OUT, 8);
        let (key, rows) = (DropoutKey { p: 0.4, key: 9 }, (0..T as u64).collect::<Vec<u64>>());

        let ones = Tensor::Host(HostTensor::ones((T, IN), DType::F64, &Device::Cpu).unwrap());
        let mask = dropout(&ones, key, &rows).unwrap().to_host().unwrap();
        let gain = (magnitude.as_tensor() * &inverse).unwrap();
        let dropped = (x.as_tensor() * &mask).unwrap();
        let through = |x: &HostTensor| x.matmul(&w.t().unwrap()).unwrap();
        let own = dropped.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
        let changed = through(&dropped).broadcast_mul(&(&gain - 1.0).unwrap()).unwrap();
        let own = (own * scale).unwrap().broadcast_mul(&gain).unwrap();
        let y = (through(&x).broadcast_add(&bias).unwrap() + changed + own).unwrap();
        let expected = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();

        let linear =
            Linear { weight: FrozenWeight::Host(Weight::Dense(w.clone())), bias: Some(Tensor::Host(bias)) };
        let host = |t: &HostTensor| Tensor::Host(t.clone());
        let factors = Factors { a: host(&a), b: host(&b), scale, magnitude: Some(host(&magnitude)) };
        let lengths = Lengths { gain: host(&gain), inverse: host(&inverse) };
        let layer = Projection {
            linear: &linear,
            factors: Some(&factors),
            lengths: Some(&lengths),
            dropout: Some((key, &rows)),
        };
        let (found, inner, x_) = (zeros(T, OUT), zeros(T, R), host(&x));
        layer.forward(&found, None, &x_, &inner).unwrap();
        same("output", found.host().unwrap(), &y);

        let d = host(&dy.copy().unwrap());
        let vector = Tensor::Host(HostTensor::zeros(OUT, DType::F64, &Device::Cpu).unwrap());
        let gradient = Factors { a: zeros(R, IN), b: zeros(OUT, R), scale, magnitude: Some(vector) };
        let (dinner, dx) = (zeros(T, R), zeros(T, IN));
        layer.magnitude_gradient(Some(&gradient), (&d, &x_, &inner), &zeros(T, OUT)).unwrap();
        let past = layer.past_gains(&d).unwrap();
        layer.use_gains(&d).unwrap();
        layer.inner_gradient(&dinner, &d).unwrap();
        input_gradient(&dx, &[Share { layer: &layer, dy: &d, dinner: &dinner, past: past.as_ref() }])
            .unwrap();
        layer.factor_gradients(Some(&gradient), &d, &x_, &inner, &dinner).unwrap();
        for (what, found, of) in [
            ("x", &dx, &x),
            ("A", &gradient.a, &a),
            ("B", &gradient.b, &b),
            ("magnitude", gradient.magnitude.as_ref().unwrap(), &magnitude),
        ] {
            same(what, found.host().unwrap(), expected.get(of).unwrap());
        }
    }
}
