//! One decoder block, forward and backward. What the backward pass needs was kept by the forward pass, or is computed again.

use crate::{
    architecture::{Architecture, Module},
    base::LayerWeights,
    buffers::{Activations, ForwardScratch, KeyValues, Scratch},
    dora::BlockLengths,
    norm::{NormGradient, NormWeights},
    projection::{Factors, Projection, Share, input_gradient},
    whole::WholeGradient,
};
use candle_core::Result;
use kto_kernels::{
    AttentionLayout, DropoutKey, HeadShape, ScoreRule, add_column_sums,
    device::{
        AttentionGradients, AttentionInputs, AttentionOutputs, Factor, Onto, Product, Rotation, Tensor, add,
        attention, attention_backward, clear, gated, gated_backward, gather_rows, multiply, rope,
        scatter_add_rows,
    },
    random,
};
use std::borrow::Cow;

/// The factors (or their gradients) of one block where it is computed, by [`Module`]; of a fused matrix all have the same A.
pub type BlockFactors = [Option<Factors<Tensor>>; 7];

/// Where the gradients of one block are added to.
pub(crate) struct BlockGradient {
    pub factors: BlockFactors,
    pub whole: WholeGradient,
}

/// A block's weights and what is common to a pass.
pub(crate) struct Block<'a> {
    pub architecture: &'a Architecture,
    pub rule: ScoreRule,
    pub rope: &'a Rotation,
    pub weights: &'a LayerWeights,
    pub factors: Option<&'a BlockFactors>,
    /// What DoRA multiplies with.
    pub lengths: Option<&'a BlockLengths>,
    /// Mask probability and key of this block.
    pub dropout: Option<DropoutKey>,
}

/// The rows that a block works on: a part of a pack.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Row of the rotary tables of every row.
    pub positions: &'a [u32],
    /// Name of every row for dropout masks.
    pub keys: &'a [u64],
    /// Rows of the result, when not all are needed (the last block); the others give keys and values only.
    pub selected: Option<&'a [u32]>,
    /// Queries count within the selected rows, keys within the pack.
    pub layout: &'a AttentionLayout,
}

impl<'a> Rows<'a> {
    /// Returns the number of rows of the result.
    pub fn results(&self) -> usize {
        self.selected.map_or(self.positions.len(), <[u32]>::len)
    }

    fn of_selected<T: Copy>(&self, all: &'a [T]) -> Cow<'a, [T]> {
        match self.selected {
            Some(index) => index.iter().map(|i| all[*i as usize]).collect::<Vec<T>>().into(),
            None => all.into(),
        }
    }

    fn select(&self, x: &Tensor) -> Result<Tensor> {
        self.selected.map_or_else(|| Ok(x.clone()), |index| gather_rows(x, index))
    }
}

/// What a block reads and fills for some rows.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    /// The block's input (T, C).
    pub h: &'a Tensor,
    pub rows: &'a Rows<'a>,
    /// Keys and values of the whole pack.
    pub all: &'a KeyValues<Tensor>,
    pub a: &'a Activations<Tensor>,
}

impl<'a> Pass<'a> {
    fn attends(&self, shape: HeadShape, rule: ScoreRule) -> AttentionInputs<'a> {
        let (k, v) = (&self.all.k, &self.all.v);
        AttentionInputs { q: &self.a.q, k, v, layout: self.rows.layout, shape, rule }
    }

    fn attended(&self) -> AttentionOutputs<'a> {
        AttentionOutputs { out: &self.a.attended, stats: &self.a.stats }
    }
}

impl Block<'_> {
    /// Writes the rows' keys and values. Leaves the normed rows in `scratch`. Shapes: new (T, Hkv·D).
    pub fn keys_and_values(
        &self,
        pass: Pass,
        new: &KeyValues<Tensor>,
        scratch: &ForwardScratch,
    ) -> Result<()> {
        let Pass { h, rows, a, .. } = pass;
        self.weights.norms.input.forward(&scratch.normed, h, self.architecture.norm_eps)?;
        let project = |m: Module, y: &Tensor| {
            self.projection(m, rows.keys).forward(y, None, &scratch.normed, &a.inner[m as usize])
        };
        match &self.weights.norms.heads {
            None => project(Module::K, &new.k)?,
            Some((_, norm)) => {
                project(Module::K, &a.raw.1)?;
                self.norm_heads(&new.k, &a.raw.1, norm)?;
            }
        }
        rope(&new.k, self.rope, rows.positions, false)?;
        project(Module::V, &new.v)
    }

    /// Computes everything from the queries to the gated product, after [`Block::keys_and_values`].
    fn attend(&self, pass: Pass, scratch: &ForwardScratch) -> Result<()> {
        let Pass { h, rows, a, .. } = pass;
        let (keys, positions) = (rows.of_selected(rows.keys), rows.of_selected(rows.positions));
        let project = |m: Module, y: &Tensor, residual: Option<&Tensor>, x: &Tensor| {
            self.projection(m, &keys).forward(y, residual, x, &a.inner[m as usize])
        };
        let selected = rows.select(&scratch.normed)?;
        match &self.weights.norms.heads {
            None => project(Module::Q, &a.q, None, &selected)?,
            Some((norm, _)) => {
                project(Module::Q, &a.raw.0, None, &selected)?;
                self.norm_heads(&a.q, &a.raw.0, norm)?;
            }
        }
        rope(&a.q, self.rope, &positions, false)?;
        attention(pass.attended(), pass.attends(self.architecture.shape, self.rule))?;
        let residual = rows.select(h)?;
        match &self.weights.norms.post {
            None => project(Module::O, &a.h2, Some(&residual), &a.attended)?,
            Some((norm, _)) => {
                project(Module::O, &a.sums.0, None, &a.attended)?;
                norm.forward(&a.h2, &a.sums.0, self.architecture.norm_eps)?;
                add(&a.h2, &residual)?;
            }
        }
        let normed = scratch.normed.narrow(0, rows.results())?;
        self.weights.norms.mlp.forward(&normed, &a.h2, self.architecture.norm_eps)?;
        project(Module::Gate, &a.gate, None, &normed)?;
        project(Module::Up, &a.up, None, &normed)?;
        gated(self.architecture.gate, &scratch.wide, &a.gate, &a.up)
    }

    /// Writes the block's output, after [`Block::keys_and_values`]. Shape: out (selected or T, C); it may be the input.
    pub fn output(&self, out: &Tensor, pass: Pass, scratch: &ForwardScratch) -> Result<()> {
        self.attend(pass, scratch)?;
        let (keys, inner) = (pass.rows.of_selected(pass.rows.keys), &pass.a.inner[Module::Down as usize]);
        let down = self.projection(Module::Down, &keys);
        match &self.weights.norms.post {
            None => down.forward(out, Some(&pass.a.h2), &scratch.wide, inner),
            Some((_, norm)) => {
                down.forward(&pass.a.sums.1, None, &scratch.wide, inner)?;
                norm.forward(out, &pass.a.sums.1, self.architecture.norm_eps)?;
                add(out, &pass.a.h2)
            }
        }
    }

    /// Computes again what [`Block::backward`] needs and was not kept.
    pub fn recompute(&self, pass: Pass, scratch: &ForwardScratch) -> Result<()> {
        self.keys_and_values(pass, pass.all, scratch)?;
        self.attend(pass, scratch)?;
        let (keys, inner) = (pass.rows.of_selected(pass.rows.keys), &pass.a.inner[Module::Down as usize]);
        let down = self.projection(Module::Down, &keys);
        match self.weights.norms.post {
            None => down.inner(inner, &scratch.wide),
            Some(_) => down.forward(&pass.a.sums.1, None, &scratch.wide, inner),
        }
    }

    /// Norms every head of queries or keys. Shapes: y and x (T, heads·D), norm (D).
    fn norm_heads(&self, y: &Tensor, x: &Tensor, norm: &NormWeights<Tensor>) -> Result<()> {
        let dim = self.architecture.shape.dim;
        norm.forward(&y.in_rows_of(dim)?, &x.in_rows_of(dim)?, self.architecture.norm_eps)
    }

    /// Writes the gradient of heads before their norm, and adds to that of the norm.
    fn unnorm_heads(
        &self,
        dx: &Tensor,
        dy: &Tensor,
        x: &Tensor,
        (norm, to): (&NormWeights<Tensor>, &NormGradient),
    ) -> Result<()> {
        let (dim, eps) = (self.architecture.shape.dim, self.architecture.norm_eps);
        clear(dx)?;
        let [dx, dy, x] = [dx.in_rows_of(dim)?, dy.in_rows_of(dim)?, x.in_rows_of(dim)?];
        norm.add_gradient(to, &dy, &x, eps)?;
        norm.backward(&dx, &dy, &x, eps)
    }

    /// Adds to the gradients of what is trained. `d` is the gradient of the block's output (selected or T, C) and is used up; the gradient of
    /// the input goes to `dh` (T, C), which is `d` itself when nothing is selected, if `need_dh`. Uses up gate and up.
    pub fn backward(
        &self,
        (dh, d): (&Tensor, &Tensor),
        pass: Pass,
        scratch: &Scratch<Tensor>,
        gradient: &BlockGradient,
        need_dh: bool,
    ) -> Result<()> {
        let Pass { h, rows, a, .. } = pass;
        let (keys, positions) = (rows.of_selected(rows.keys), rows.of_selected(rows.positions));
        let layer = |m: Module| match m {
            Module::K | Module::V => self.projection(m, rows.keys),
            _ => self.projection(m, &keys),
        };
        let (back, trained) = (Back { gradient, a, scratch }, &gradient.whole.norms);
        let need_dh = need_dh || trained.input.is_some();
        let eps = self.architecture.norm_eps;
        let (few, dattended) = (scratch.flow.0.narrow(0, rows.results())?, &scratch.flow.1);

        // The gradient of an output before its norm, or `d` itself.
        let before = |norm: Option<(&NormWeights<Tensor>, &NormGradient)>, x: &Tensor| -> Result<Tensor> {
            let Some((norm, to)) = norm else { return Ok(d.clone()) };
            norm.add_gradient(to, d, x, eps)?;
            clear(&scratch.before.1)?;
            norm.backward(&scratch.before.1, d, x, eps)?;
            Ok(scratch.before.1.clone())
        };
        let post = self.weights.norms.post.as_ref().zip(trained.post.as_ref());
        let (post_attention, post_mlp) =
            post.map(|((a, mlp), (to_a, to_mlp))| ((a, to_a), (mlp, to_mlp))).unzip();

        let (down, dout) = (layer(Module::Down), before(post_mlp, &a.sums.1)?);
        let (past, ddown) = (down.past_gains(&dout)?, down.before_gains(&dout, &scratch.before_gains)?);
        back.inner(Module::Down, &down, &ddown)?;
        back.input(&scratch.wide, &[(Module::Down, &down, &ddown, past)])?;
        gated_backward(self.architecture.gate, &scratch.wide, &a.gate, &a.up)?;
        back.factors(Module::Down, &down, &ddown, &scratch.wide)?;
        back.output(Module::Down, &down, &dout, &scratch.wide)?;

        let (gate, up) = (layer(Module::Gate), layer(Module::Up));
        let normed = scratch.normed.narrow(0, rows.results())?;
        self.weights.norms.mlp.forward(&normed, &a.h2, eps)?;
        let past_gate = back.gained(Module::Gate, &gate, &a.gate, &normed)?;
        let past_up = back.gained(Module::Up, &up, &a.up, &normed)?;
        back.inner(Module::Gate, &gate, &a.gate)?;
        back.inner(Module::Up, &up, &a.up)?;
        back.input(&few, &[(Module::Gate, &gate, &a.gate, past_gate), (Module::Up, &up, &a.up, past_up)])?;
        back.factors(Module::Gate, &gate, &a.gate, &normed)?;
        back.factors(Module::Up, &up, &a.up, &normed)?;
        self.weights.norms.mlp.add_gradient(&trained.mlp, &few, &a.h2, eps)?;
        self.weights.norms.mlp.backward(d, &few, &a.h2, eps)?;

        let (o, after) = (layer(Module::O), before(post_attention, &a.sums.0)?);
        back.output(Module::O, &o, &after, &a.attended)?;
        let (past, dout) = (o.past_gains(&after)?, o.before_gains(&after, &scratch.before_gains)?);
        back.inner(Module::O, &o, &dout)?;
        back.input(dattended, &[(Module::O, &o, &dout, past)])?;
        back.factors(Module::O, &o, &dout, &a.attended)?;
        let (dq, dk, dv) = (&scratch.dq, &scratch.dkv.k, &scratch.dkv.v);
        let inputs = pass.attends(self.architecture.shape, self.rule);
        attention_backward(AttentionGradients { dq, dk, dv }, dattended, pass.attended(), inputs)?;
        rope(dq, self.rope, &positions, true)?;
        rope(dk, self.rope, rows.positions, true)?;
        let (dq, dk) = match self.weights.norms.heads.as_ref().zip(trained.heads.as_ref()) {
            None => (dq, dk),
            // The gradient of attention's output is used up.
            Some(((q, k), (to_q, to_k))) => {
                self.unnorm_heads(dattended, dq, &a.raw.0, (q, to_q))?;
                self.unnorm_heads(&scratch.before.0, dk, &a.raw.1, (k, to_k))?;
                (dattended, &scratch.before.0)
            }
        };

        self.weights.norms.input.forward(&scratch.normed, h, eps)?;
        let (q, k, v) = (layer(Module::Q), layer(Module::K), layer(Module::V));
        let few_normed = rows.select(&scratch.normed)?;
        let past_q = back.gained(Module::Q, &q, dq, &few_normed)?;
        let past_k = back.gained(Module::K, &k, dk, &scratch.normed)?;
        let past_v = back.gained(Module::V, &v, dv, &scratch.normed)?;
        for (m, layer, dy) in [(Module::Q, &q, dq), (Module::K, &k, dk), (Module::V, &v, dv)] {
            back.inner(m, layer, dy)?;
        }
        back.factors(Module::Q, &q, dq, &few_normed)?;
        back.factors(Module::K, &k, dk, &scratch.normed)?;
        back.factors(Module::V, &v, dv, &scratch.normed)?;
        if !need_dh {
            return Ok(());
        }
        let dn1 = &scratch.flow.0;
        let (of_q, of_k, of_v) =
            ((Module::Q, &q, dq, past_q), (Module::K, &k, dk, past_k), (Module::V, &v, dv, past_v));
        match rows.selected {
            None => back.input(dn1, &[of_q, of_k, of_v])?,
            Some(index) => {
                // Queries and the residual exist for the selected rows only.
                let few = few.zeros_like()?;
                back.input(&few, &[of_q])?;
                back.input(dn1, &[of_k, of_v])?;
                scatter_add_rows(dn1, &few, index)?;
                clear(dh)?;
                scatter_add_rows(dh, d, index)?;
            }
        }
        self.weights.norms.input.add_gradient(&trained.input, dn1, h, eps)?;
        self.weights.norms.input.backward(dh, dn1, h, eps)
    }

    fn projection<'b>(&'b self, module: Module, keys: &'b [u64]) -> Projection<'b> {
        let factors = self.factors.and_then(|factors| factors[module as usize].as_ref());
        let lengths = self.lengths.and_then(|lengths| lengths[module as usize].as_ref());
        // The parts of a fused matrix have one mask: it is one linear layer to PEFT.
        let name = self.architecture.matrix_of(module) as u64;
        let dropout = self
            .dropout
            .filter(|_| factors.is_some())
            .map(|d| (DropoutKey { key: random::key(&[d.key, name]), ..d }, keys));
        Projection { linear: &self.weights.linears[module as usize], factors, lengths, dropout }
    }
}

/// The way back through the linear layers of a block.
struct Back<'a> {
    gradient: &'a BlockGradient,
    a: &'a Activations<Tensor>,
    scratch: &'a Scratch<Tensor>,
}

impl Back<'_> {
    /// Computes the gradient of a layer's inner values for the gradient `dy` of its output.
    fn inner(&self, m: Module, layer: &Projection, dy: &Tensor) -> Result<()> {
        layer.inner_gradient(&self.scratch.inner[m as usize], dy)
    }

    /// Adds to the gradients of a layer's factors; `x` is the layer's input.
    fn factors(&self, m: Module, layer: &Projection, dy: &Tensor, x: &Tensor) -> Result<()> {
        let i = m as usize;
        layer.factor_gradients(
            self.gradient.factors[i].as_ref(),
            dy,
            x,
            &self.a.inner[i],
            &self.scratch.inner[i],
        )
    }

    /// Adds to the gradients of a layer's weight, bias and magnitudes; `dy` is the gradient of its output, `x` its input.
    fn output(&self, m: Module, layer: &Projection, dy: &Tensor, x: &Tensor) -> Result<()> {
        if let Some(weight) = &self.gradient.whole.weights[m as usize] {
            let to = Tensor::Host(weight.clone());
            multiply(&to, Onto::Itself, &[Product::new(&dy.t()?, Factor::Plain(x))])?;
        }
        if let Some(bias) = &self.gradient.whole.biases[m as usize] {
            add_column_sums(bias, dy.host()?)?;
        }
        if layer.lengths.is_none() {
            return Ok(());
        }
        let (i, (rows, columns)) = (m as usize, dy.dims2()?);
        let room = self.scratch.gained.first(rows, columns)?;
        layer.magnitude_gradient(self.gradient.factors[i].as_ref(), (dy, x, &self.a.inner[i]), &room)
    }

    /// Does this, then makes `dy` the gradient before the layer's gains. Returns [`Projection::past_gains`].
    fn gained(&self, m: Module, layer: &Projection, dy: &Tensor, x: &Tensor) -> Result<Option<Tensor>> {
        self.output(m, layer, dy, x)?;
        let past = layer.past_gains(dy)?;
        layer.use_gains(dy)?;
        Ok(past)
    }

    /// Writes the gradient of an input that these layers share: each with the gradient of its output before gains, and what came past them.
    fn input(&self, dx: &Tensor, layers: &[(Module, &Projection, &Tensor, Option<Tensor>)]) -> Result<()> {
        let shares: Vec<Share> = layers
            .iter()
            .map(|(m, layer, dy, past)| Share {
                layer,
                dy,
                dinner: &self.scratch.inner[*m as usize],
                past: past.as_ref(),
            })
            .collect();
        input_gradient(dx, &shares)
    }
}
