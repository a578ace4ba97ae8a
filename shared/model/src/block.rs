//! One decoder block, forward and backward. The backward recomputes the forward from the block's input.

use crate::{
    architecture::{Architecture, Module},
    base::LayerWeights,
    projection::{Dx, Factors, Projection},
};
use candle_core::{Error, Result, Tensor};
use kto_kernels::{
    AttentionLayout, DropoutKey, RopeTable, add, attention, attention_backward, gather_rows, random,
    rms_norm, rms_norm_backward, rope, scatter_add_rows, swiglu, swiglu_backward,
};

/// The factors (or their gradients) of one block, by [`Module`].
pub type BlockFactors = [Option<Factors>; 7];

/// A block's weights and what is common to a pass.
pub(crate) struct Block<'a> {
    pub architecture: &'a Architecture,
    pub rope: &'a RopeTable,
    pub weights: &'a LayerWeights,
    pub factors: Option<(&'a BlockFactors, f64)>,
    /// Mask probability and key of this block.
    pub dropout: Option<DropoutKey>,
}

/// The rows that a block works on.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Position of every row.
    pub positions: &'a [u32],
    /// Name of every row for dropout masks.
    pub keys: &'a [u64],
    /// Rows of the result, when not all are needed (the last block); the others give keys and values only.
    pub selected: Option<&'a [u32]>,
    /// Queries count within the selected rows.
    pub layout: &'a AttentionLayout,
}

/// Everything between a block's input and its output.
struct Forward {
    n1: Tensor,
    n1_selected: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    h2: Tensor,
    n2: Tensor,
    gate: Tensor,
    up: Tensor,
    gated: Tensor,
    /// Row names and positions of the selected rows.
    keys: Vec<u64>,
    positions: Vec<u32>,
}

impl Block<'_> {
    /// Returns the block's output. Shapes: h (T, C), result (selected or T, C).
    pub fn forward(&self, h: &Tensor, rows: Rows) -> Result<Tensor> {
        let f = self.run(h, rows)?;
        add(&f.h2, &self.projection(Module::Down, &f.keys).forward(&f.gated)?)
    }

    /// Adds to the factors' gradients and returns the gradient of `h` (T, C), if asked for.
    /// Shapes: h (T, C), dout as the block's output.
    pub fn backward(
        &self,
        h: &Tensor,
        dout: &Tensor,
        rows: Rows,
        gradient: &BlockFactors,
        need_dh: bool,
    ) -> Result<Option<Tensor>> {
        let f = self.run(h, rows)?;
        let of = |m: Module| gradient[m as usize].as_ref();
        let back = |m: Module, dy: &Tensor, x: &Tensor, keys: &[u64], dx| {
            self.projection(m, keys).backward(dy, x, of(m), dx)
        };

        let dgated = needed(back(Module::Down, dout, &f.gated, &f.keys, Dx::New)?)?;
        let (dgate, dup) = swiglu_backward(&dgated, &f.gate, &f.up)?;
        let dn2 = needed(back(Module::Gate, &dgate, &f.n2, &f.keys, Dx::New)?)?;
        let dn2 = needed(back(Module::Up, &dup, &f.n2, &f.keys, Dx::AddTo(dn2))?)?;
        let eps = self.architecture.rms_eps;
        let dh2 = add(dout, &rms_norm_backward(&dn2, &f.h2, &self.weights.post_norm, eps)?)?;

        let dattended = needed(back(Module::O, &dh2, &f.attended, &f.keys, Dx::New)?)?;
        let (dq, dk, dv) =
            attention_backward(&dattended, &f.q, &f.k, &f.v, rows.layout, self.architecture.shape)?;
        let dq = rope(&dq, self.rope, &f.positions, true)?;
        let dk = rope(&dk, self.rope, rows.positions, true)?;
        let first = || if need_dh { Dx::New } else { Dx::Skip };
        let dn1_selected = back(Module::Q, &dq, &f.n1_selected, &f.keys, first())?;
        let dn1 = back(Module::K, &dk, &f.n1, rows.keys, first())?;
        let dn1 = back(Module::V, &dv, &f.n1, rows.keys, dn1.map_or(Dx::Skip, Dx::AddTo))?;
        let (Some(dn1), Some(dn1_selected)) = (dn1, dn1_selected) else { return Ok(None) };
        let all = |x: Tensor| match rows.selected {
            Some(index) => scatter_add_rows(&x, index, rows.positions.len()),
            None => Ok(x),
        };
        let dn1 = add(&dn1, &all(dn1_selected)?)?;
        Ok(Some(add(&all(dh2)?, &rms_norm_backward(&dn1, h, &self.weights.input_norm, eps)?)?))
    }

    fn run(&self, h: &Tensor, rows: Rows) -> Result<Forward> {
        let eps = self.architecture.rms_eps;
        let n1 = rms_norm(h, &self.weights.input_norm, eps)?;
        let (n1_selected, h_selected, keys, positions) = match rows.selected {
            Some(index) => (
                gather_rows(&n1, index)?,
                gather_rows(h, index)?,
                index.iter().map(|i| rows.keys[*i as usize]).collect(),
                index.iter().map(|i| rows.positions[*i as usize]).collect(),
            ),
            None => (n1.clone(), h.clone(), rows.keys.to_vec(), rows.positions.to_vec()),
        };
        let q =
            rope(&self.projection(Module::Q, &keys).forward(&n1_selected)?, self.rope, &positions, false)?;
        let k = rope(&self.projection(Module::K, rows.keys).forward(&n1)?, self.rope, rows.positions, false)?;
        let v = self.projection(Module::V, rows.keys).forward(&n1)?;
        let attended = attention(&q, &k, &v, rows.layout, self.architecture.shape)?;
        let h2 = add(&h_selected, &self.projection(Module::O, &keys).forward(&attended)?)?;
        let n2 = rms_norm(&h2, &self.weights.post_norm, eps)?;
        let gate = self.projection(Module::Gate, &keys).forward(&n2)?;
        let up = self.projection(Module::Up, &keys).forward(&n2)?;
        let gated = swiglu(&gate, &up)?;
        Ok(Forward { n1, n1_selected, q, k, v, attended, h2, n2, gate, up, gated, keys, positions })
    }

    /// Returns keys and values of new rows and the block's output for them, given all keys and values so far.
    /// `cache` receives this block's new keys and values and returns all of them. Shapes: h (T, C), result (T, C).
    pub fn decode(
        &self,
        h: &Tensor,
        positions: &[u32],
        layout: &AttentionLayout,
        cache: impl FnOnce(&Tensor, &Tensor) -> Result<(Tensor, Tensor)>,
    ) -> Result<Tensor> {
        let eps = self.architecture.rms_eps;
        let n1 = rms_norm(h, &self.weights.input_norm, eps)?;
        let linear = |m: Module, x: &Tensor| self.projection(m, &[]).forward(x);
        let q = rope(&linear(Module::Q, &n1)?, self.rope, positions, false)?;
        let k = rope(&linear(Module::K, &n1)?, self.rope, positions, false)?;
        let (k, v) = cache(&k, &linear(Module::V, &n1)?)?;
        let attended = attention(&q, &k, &v, layout, self.architecture.shape)?;
        let h2 = add(h, &linear(Module::O, &attended)?)?;
        let n2 = rms_norm(&h2, &self.weights.post_norm, eps)?;
        let gated = swiglu(&linear(Module::Gate, &n2)?, &linear(Module::Up, &n2)?)?;
        add(&h2, &linear(Module::Down, &gated)?)
    }

    fn projection<'b>(&'b self, module: Module, keys: &'b [u64]) -> Projection<'b> {
        let (factors, scale) = match self.factors {
            Some((factors, scale)) => (factors[module as usize].as_ref(), scale),
            None => (None, 0.0),
        };
        let dropout = self
            .dropout
            .filter(|_| factors.is_some())
            .map(|d| (DropoutKey { key: random::key(&[d.key, module as u64]), ..d }, keys));
        Projection { linear: &self.weights.linears[module as usize], factors, scale, dropout }
    }
}

fn needed(dx: Option<Tensor>) -> Result<Tensor> {
    dx.ok_or_else(|| Error::Msg("the gradient of a layer's input was not computed".into()))
}
