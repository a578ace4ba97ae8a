//! What config.json says about a decoder, checked before anything is allocated.

use kto_cli::{Error, Result, escape};
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

/// Largest value accepted for any size: beyond it, a product of two could not be an index.
const LARGEST: u64 = 1 << 24;

impl Architecture {
    /// Reads a config.json. Errors (65): an unknown family or feature, a missing field, sizes that do not fit together.
    pub fn from_config(config: &Value) -> Result<Self> {
        let family = config.get("model_type").and_then(Value::as_str).unwrap_or_default().to_string();
        if !matches!(family.as_str(), "llama" | "qwen2") {
            let found = escape(&family);
            return Err(Error::data(format!("config.json: model_type \"{found}\" is not supported"))
                .with_hint("supported families: llama, qwen2"));
        }
        if config.get("auto_map").is_some() {
            return Err(Error::data("config.json: \"auto_map\" asks for remote code, which is never run"));
        }
        let (hidden, heads) = (size(config, "hidden_size")?, size(config, "num_attention_heads")?);
        let kv_heads =
            if present(config, "num_key_value_heads") { size(config, "num_key_value_heads")? } else { heads };
        let dim = if present(config, "head_dim") { size(config, "head_dim")? } else { hidden / heads };
        let this = Self {
            vocab_size: size(config, "vocab_size")?,
            hidden,
            intermediate: size(config, "intermediate_size")?,
            layers: size(config, "num_hidden_layers")?,
            shape: HeadShape { heads, kv_heads, dim },
            rms_eps: positive(config, "rms_norm_eps", 1e-6)?,
            rope_theta: rope_theta(config)?,
            tied: flag(config, "tie_word_embeddings", false)?,
            qkv_bias: family == "qwen2" || flag(config, "attention_bias", false)?,
            o_bias: family == "llama" && flag(config, "attention_bias", false)?,
            mlp_bias: family == "llama" && flag(config, "mlp_bias", false)?,
            max_positions: if present(config, "max_position_embeddings") {
                size(config, "max_position_embeddings")?
            } else {
                2048
            },
            family,
        };
        this.check(config)?;
        Ok(this)
    }

    fn check(&self, config: &Value) -> Result<()> {
        let HeadShape { heads, kv_heads, dim } = self.shape;
        if heads % kv_heads != 0 {
            let text =
                format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}");
            return Err(Error::data(format!("config.json: {text}")));
        }
        if dim % 2 != 0 || dim == 0 {
            return Err(Error::data(format!("config.json: head_dim {dim} must be even and above 0")));
        }
        if !present(config, "head_dim") && !self.hidden.is_multiple_of(heads) {
            let text =
                format!("hidden_size {} is not a multiple of num_attention_heads {heads}", self.hidden);
            return Err(Error::data(format!("config.json: {text}")));
        }
        let act = config.get("hidden_act").filter(|v| !v.is_null());
        if let Some(act) = act.filter(|v| v.as_str() != Some("silu")) {
            let found = escape(&act.to_string());
            return Err(Error::data(format!("config.json: hidden_act {found} is not supported"))
                .with_hint("supported: silu"));
        }
        let kinds = config.get("layer_types").and_then(Value::as_array).into_iter().flatten();
        if let Some(kind) = kinds.into_iter().find(|k| k.as_str() != Some("full_attention")) {
            let found = escape(&kind.to_string());
            return Err(Error::data(format!("config.json: layer_types {found} is not supported"))
                .with_hint("supported: full_attention"));
        }
        if flag(config, "use_sliding_window", false)? {
            return Err(Error::data("config.json: use_sliding_window is not supported"));
        }
        Ok(())
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

fn present(config: &Value, field: &str) -> bool {
    config.get(field).is_some_and(|v| !v.is_null())
}

fn size(config: &Value, field: &str) -> Result<usize> {
    match config.get(field) {
        None | Some(Value::Null) => Err(Error::data(format!("config.json: \"{field}\" is missing"))),
        Some(v) => match v.as_u64() {
            Some(n) if (1..=LARGEST).contains(&n) => Ok(n as usize),
            _ => Err(Error::data(format!(
                "config.json: \"{field}\" must be an integer from 1 to {LARGEST}, found {v}"
            ))),
        },
    }
}

fn positive(config: &Value, field: &str, default: f64) -> Result<f64> {
    match config.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(v) => match v.as_f64() {
            Some(x) if x > 0.0 && x.is_finite() => Ok(x),
            _ => Err(Error::data(format!("config.json: \"{field}\" must be a number above 0, found {v}"))),
        },
    }
}

fn flag(config: &Value, field: &str, default: bool) -> Result<bool> {
    match config.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(b)) => Ok(*b),
        Some(v) => Err(Error::data(format!("config.json: \"{field}\" must be true or false, found {v}"))),
    }
}

/// Reads the rotary base from either form: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling`.
fn rope_theta(config: &Value) -> Result<f64> {
    for field in ["rope_parameters", "rope_scaling"] {
        let Some(rope) = config.get(field).filter(|v| !v.is_null()) else { continue };
        let kind = rope.get("rope_type").or_else(|| rope.get("type"));
        // Without a type a factor would be a form that is not known here.
        let plain = match kind {
            Some(kind) => kind.as_str() == Some("default"),
            None => rope.is_object() && rope.get("factor").is_none(),
        };
        if !plain {
            let found = escape(&kind.unwrap_or(rope).to_string());
            return Err(Error::data(format!("config.json: {field} of type {found} is not supported"))
                .with_hint("supported: default"));
        }
    }
    match config.get("rope_parameters").filter(|p| p.get("rope_theta").is_some()) {
        Some(parameters) => positive(parameters, "rope_theta", 10_000.0),
        None => positive(config, "rope_theta", 10_000.0),
    }
}
