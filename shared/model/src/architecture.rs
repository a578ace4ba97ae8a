//! What the engine computes of the record in config.json, checked before anything is allocated.

use crate::{
    family::{Activation, Family, Norm, Record},
    rotary::{Rotary, Scaling},
    rows::Limits,
};
use kto_cli::{Error, Result};
use kto_kernels::{HeadShape, ScoreRule, device::Gate};
use serde_json::Value;
use std::ops::Range;

/// The seven linear layers of a decoder block, in the order in which they are computed; and, behind them, the matrices in which some
/// checkpoints and adapters have the rows of several of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Module {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Attention output projection.
    O,
    /// MLP gate.
    Gate,
    /// MLP up projection.
    Up,
    /// MLP down projection.
    Down,
    /// Rows of [`Module::Q`], [`Module::K`] and [`Module::V`].
    Qkv,
    /// Rows of [`Module::Gate`] and [`Module::Up`].
    GateUp,
}

impl Module {
    /// All that are computed; `ALL[m as usize] == m`.
    pub const ALL: [Module; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];
    /// All that have a name; `NAMED[m as usize] == m`.
    pub const NAMED: [Module; 9] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down, Self::Qkv, Self::GateUp];
    /// The matrices of a block where some are fused, in the order of [`Module::ALL`].
    const FUSED: [Module; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// Returns the last part of the name, as `target_modules` lists it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
            Self::Qkv => "qkv_proj",
            Self::GateUp => "gate_up_proj",
        }
    }

    /// Returns the name in a checkpoint, without `.weight`.
    pub fn path(self, layer: usize) -> String {
        let part = match self {
            Self::Q | Self::K | Self::V | Self::O | Self::Qkv => "self_attn",
            Self::Gate | Self::Up | Self::Down | Self::GateUp => "mlp",
        };
        format!("model.layers.{layer}.{part}.{}", self.name())
    }
}

/// How many rows the linear layers of a block have, and so which rows of a fused matrix are whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// C
    hidden: usize,
    /// H·D
    queries: usize,
    /// Hkv·D
    keys: usize,
    /// I
    intermediate: usize,
}

impl Parts {
    /// Returns the modules that a matrix holds, each with its rows.
    pub fn of(self, module: Module) -> Vec<(Module, Range<usize>)> {
        let (q, kv, i) = (self.queries, self.keys, self.intermediate);
        match module {
            Module::Qkv => {
                vec![(Module::Q, 0..q), (Module::K, q..q + kv), (Module::V, q + kv..q + 2 * kv)]
            }
            Module::GateUp => vec![(Module::Gate, 0..i), (Module::Up, i..2 * i)],
            Module::Q => vec![(module, 0..q)],
            Module::K | Module::V => vec![(module, 0..kv)],
            Module::Gate | Module::Up => vec![(module, 0..i)],
            Module::O | Module::Down => vec![(module, 0..self.hidden)],
        }
    }
}

/// A decoder of the Llama form and what its families add to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// Its `model_type`.
    pub family: String,
    /// V, rows of the embedding.
    pub vocab_size: usize,
    /// C, width of the residual stream.
    pub hidden: usize,
    /// I, width of the MLP.
    pub intermediate: usize,
    /// L, number of blocks.
    pub layers: usize,
    /// Head sizes.
    pub shape: HeadShape,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Norms take the mean off and have a bias (LayerNorm).
    pub norm_bias: bool,
    /// Rotation of the blocks that see everything.
    pub rotary: Rotary,
    /// Rotation of the blocks with a window, where it is another.
    pub sliding_rotary: Option<Rotary>,
    /// Positions that a block with a window sees, its own included.
    pub window: Option<usize>,
    /// Which blocks have it (L).
    pub sliding: Vec<bool>,
    /// Factor of the scores.
    pub attention_scale: f64,
    /// Scores s become cap · tanh(s / cap).
    pub attention_cap: Option<f64>,
    /// The same for logits.
    pub logit_cap: Option<f64>,
    /// Factor of the embedding's rows.
    pub embedding_scale: f64,
    /// Whether 1 is added to the weights of norms.
    pub norm_plus_one: bool,
    /// Norms also behind attention and MLP, before the sum.
    pub post_norms: bool,
    /// Norms of each head's queries and keys, before they turn.
    pub qk_norm: bool,
    /// The MLP's activation.
    pub gate: Gate,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases on gate, up, down.
    pub mlp_bias: bool,
    /// Q, k, v are one matrix, gate and up another, in checkpoints and adapters.
    pub fused: bool,
    /// Longest position the model was made for.
    pub max_positions: usize,
}

impl Architecture {
    /// Reads a config.json. Errors (65): an unknown family or feature, one that the engine does not compute, a missing
    /// field, sizes that do not fit together.
    pub fn from_config(config: &Value) -> Result<Self> {
        let record = Record::read(config, &Family::all())?;
        Ok(Self {
            vocab_size: record.vocab_size,
            hidden: record.hidden,
            intermediate: record.intermediate,
            layers: record.layers,
            shape: record.shape,
            norm_eps: record.norm_eps,
            norm_bias: record.norm == Norm::Layer,
            rotary: record.rotary,
            sliding_rotary: record.sliding_rotary,
            window: record.window,
            sliding: record.sliding,
            attention_scale: record.attention_scale,
            attention_cap: record.attention_cap,
            logit_cap: record.logit_cap,
            embedding_scale: record.embedding_scale,
            norm_plus_one: record.norm == Norm::RmsPlusOne,
            post_norms: record.post_norms,
            qk_norm: record.qk_norm,
            gate: match record.activation {
                Activation::Silu => Gate::Silu,
                Activation::GeluTanh => Gate::Gelu,
            },
            tied: record.tied,
            qkv_bias: record.qkv_bias,
            o_bias: record.o_bias,
            mlp_bias: record.mlp_bias,
            fused: record.fused,
            max_positions: record.max_positions,
            family: record.family.name().into(),
        })
    }

    /// Fails (65) when a token id has no row in the embedding. `place` names the ids in the message.
    pub fn check_ids(&self, ids: &[u32], place: impl std::fmt::Display) -> Result<()> {
        let vocab = self.vocab_size;
        match ids.iter().find(|id| **id as usize >= vocab) {
            None => Ok(()),
            Some(id) => {
                let text = format!("{place}: token id {id} is outside the model's vocabulary of {vocab}");
                Err(Error::data(text).with_hint("kto-tokenize --model with this model"))
            }
        }
    }

    /// Returns the matrices of a block as checkpoints and adapters have them, in the order in which they are computed.
    pub fn modules(&self) -> &'static [Module] {
        if self.fused { &Module::FUSED } else { &Module::ALL }
    }

    /// Returns the matrix that holds a computed module.
    pub fn matrix_of(&self, module: Module) -> Module {
        match module {
            Module::Q | Module::K | Module::V if self.fused => Module::Qkv,
            Module::Gate | Module::Up if self.fused => Module::GateUp,
            own => own,
        }
    }

    /// Returns the rows of the linear layers.
    pub fn parts(&self) -> Parts {
        let HeadShape { heads, kv_heads, dim } = self.shape;
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        Parts { hidden, queries: heads * dim, keys: kv_heads * dim, intermediate }
    }

    /// Returns (rows, columns) of a module's weight.
    pub fn weight_shape(&self, module: Module) -> (usize, usize) {
        let (q, kv) = (self.shape.heads * self.shape.dim, self.shape.kv_heads * self.shape.dim);
        match module {
            Module::Q => (q, self.hidden),
            Module::K | Module::V => (kv, self.hidden),
            Module::O => (self.hidden, q),
            Module::Gate | Module::Up => (self.intermediate, self.hidden),
            Module::Down => (self.hidden, self.intermediate),
            Module::Qkv => (q + 2 * kv, self.hidden),
            Module::GateUp => (2 * self.intermediate, self.hidden),
        }
    }

    /// Returns how block `layer` makes scores.
    pub fn rule(&self, layer: usize) -> ScoreRule {
        let window = self.window.filter(|_| self.sliding.get(layer).copied().unwrap_or(false));
        ScoreRule { scale: self.attention_scale, window, cap: self.attention_cap }
    }

    /// Returns the rotation of block `layer`.
    pub fn rotary(&self, layer: usize) -> &Rotary {
        let sliding = self.sliding.get(layer).copied().unwrap_or(false);
        self.sliding_rotary.as_ref().filter(|_| sliding).unwrap_or(&self.rotary)
    }

    /// Returns the number of tokens beyond which a sequence turns by the second set of divisors (LongRoPE).
    pub fn original_length(&self) -> Option<usize> {
        match &self.rotary.scaling {
            Scaling::Long { original, .. } => Some(*original as usize),
            _ => None,
        }
    }

    /// Returns how rows are cut and turned.
    pub fn limits(&self, max_length: usize) -> Limits {
        Limits { max_length, original: self.original_length() }
    }

    /// Returns the elements of the rotary tables for sequences of at most so many tokens.
    pub fn rope_elements(&self, positions: usize) -> usize {
        let first = self.original_length().filter(|length| *length < positions).unwrap_or(0);
        let sliding = self.sliding_rotary.as_ref().map_or(0, |rotary| positions * rotary.dim);
        (first + positions) * self.rotary.dim + sliding
    }

    /// Fails (65) when rows of `positions` tokens would each turn in a way of their own.
    pub fn check_positions(&self, positions: usize) -> Result<()> {
        for rotary in std::iter::once(&self.rotary).chain(&self.sliding_rotary) {
            let (name, original) = match &rotary.scaling {
                Scaling::Dynamic { original, .. } => ("dynamic", *original),
                Scaling::Long { original, .. } if self.sliding_rotary.is_some() => ("longrope", *original),
                _ => continue,
            };
            if positions as f64 > original {
                let text = format!(
                    "rows of {positions} tokens: beyond {original} the rotary embedding of type \"{name}\" is not supported"
                );
                return Err(Error::data(text).with_hint(format!("kto-tokenize --max-length {original}")));
            }
        }
        Ok(())
    }

    /// Returns whether a module has a bias.
    pub fn has_bias(&self, module: Module) -> bool {
        match module {
            Module::Q | Module::K | Module::V | Module::Qkv => self.qkv_bias,
            Module::O => self.o_bias,
            Module::Gate | Module::Up | Module::Down | Module::GateUp => self.mlp_bias,
        }
    }

    /// Returns the number of parameters.
    pub fn parameters(&self) -> usize {
        let linear = |m: Module| {
            let (rows, columns) = self.weight_shape(m);
            rows * columns + if self.has_bias(m) { rows } else { 0 }
        };
        let norm = self.hidden * if self.norm_bias { 2 } else { 1 };
        let norms =
            if self.post_norms { 4 } else { 2 } * norm + if self.qk_norm { 2 * self.shape.dim } else { 0 };
        let block: usize = self.modules().iter().copied().map(linear).sum::<usize>() + norms;
        let ends = self.vocab_size * self.hidden * if self.tied { 1 } else { 2 } + norm;
        self.layers * block + ends
    }
}
