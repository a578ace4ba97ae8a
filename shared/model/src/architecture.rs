//! What the engine computes of the record in config.json, checked before anything is allocated.

use crate::{
    family::{Activation, Family, Record},
    rotary::Scaling,
};
use kto_cli::{Error, Result};
use kto_kernels::HeadShape;
use serde_json::Value;

/// The seven linear layers of a decoder block, in the order in which they are computed.
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
}

impl Module {
    /// All modules; `ALL[m as usize] == m`.
    pub const ALL: [Module; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Returns the last part of the name, as `target_modules` lists it.
    pub fn name(self) -> &'static str {
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"][self as usize]
    }

    /// Returns the name in a checkpoint, without `.weight`.
    pub fn path(self, layer: usize) -> String {
        let part = if self <= Module::O { "self_attn" } else { "mlp" };
        format!("model.layers.{layer}.{part}.{}", self.name())
    }
}

/// A decoder of the Llama form.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// `llama` or `qwen2`.
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
    pub rms_eps: f64,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases on gate, up, down.
    pub mlp_bias: bool,
    /// Longest position the model was made for.
    pub max_positions: usize,
}

/// The families that the engine computes.
const WORKS: [Family; 2] = [Family::Llama, Family::Qwen2];

impl Architecture {
    /// Reads a config.json. Errors (65): an unknown family or feature, one that the engine does not compute, a missing
    /// field, sizes that do not fit together.
    pub fn from_config(config: &Value) -> Result<Self> {
        let record = Record::read(config, &WORKS)?;
        refuse(&record)?;
        Ok(Self {
            vocab_size: record.vocab_size,
            hidden: record.hidden,
            intermediate: record.intermediate,
            layers: record.layers,
            shape: record.shape,
            rms_eps: record.norm_eps,
            rope_theta: record.rotary.theta,
            tied: record.tied,
            qkv_bias: record.qkv_bias,
            o_bias: record.o_bias,
            mlp_bias: record.mlp_bias,
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

    /// Returns (rows, columns) of a module's weight.
    pub fn weight_shape(&self, module: Module) -> (usize, usize) {
        let (q, kv) = (self.shape.heads * self.shape.dim, self.shape.kv_heads * self.shape.dim);
        match module {
            Module::Q => (q, self.hidden),
            Module::K | Module::V => (kv, self.hidden),
            Module::O => (self.hidden, q),
            Module::Gate | Module::Up => (self.intermediate, self.hidden),
            Module::Down => (self.hidden, self.intermediate),
        }
    }

    /// Returns whether a module has a bias.
    pub fn has_bias(&self, module: Module) -> bool {
        match module {
            Module::Q | Module::K | Module::V => self.qkv_bias,
            Module::O => self.o_bias,
            Module::Gate | Module::Up | Module::Down => self.mlp_bias,
        }
    }

    /// Returns the number of parameters.
    pub fn parameters(&self) -> usize {
        let linear = |m: Module| {
            let (rows, columns) = self.weight_shape(m);
            rows * columns + if self.has_bias(m) { rows } else { 0 }
        };
        let block: usize = Module::ALL.into_iter().map(linear).sum::<usize>() + 2 * self.hidden;
        let ends = self.vocab_size * self.hidden * if self.tied { 1 } else { 2 } + self.hidden;
        self.layers * block + ends
    }
}

/// Refuses what a record of these families may say and the engine does not compute.
fn refuse(record: &Record) -> Result<()> {
    let bad = |what: &str, works: &str| {
        Err(Error::data(format!("config.json: {what} is not supported"))
            .with_hint(format!("supported: {works}")))
    };
    match &record.rotary.scaling {
        Scaling::Default => {}
        Scaling::Linear { .. } => return bad("a rotary embedding of type \"linear\"", "default"),
        Scaling::Dynamic { .. } => return bad("a rotary embedding of type \"dynamic\"", "default"),
        Scaling::Llama3 { .. } => return bad("a rotary embedding of type \"llama3\"", "default"),
        Scaling::Yarn { .. } => return bad("a rotary embedding of type \"yarn\"", "default"),
        Scaling::Long { .. } => return bad("a rotary embedding of type \"longrope\"", "default"),
    }
    if record.rotary.dim != record.shape.dim {
        return bad("a rotary embedding of a part of the head", "all of it");
    }
    if record.sliding.contains(&true) {
        return bad("a sliding window", "full_attention");
    }
    match record.activation {
        Activation::Silu => Ok(()),
        Activation::GeluTanh => bad("hidden_act \"gelu_pytorch_tanh\"", "silu"),
    }
}
