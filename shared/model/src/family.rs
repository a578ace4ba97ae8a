//! The record of a model: everything that config.json says about a decoder, for every family that is known.
//!
//! One record describes all families; a family is a set of defaults and of fields that it reads. [`crate::architecture`]
//! takes from it what the engine computes and refuses the rest by name. Source of names and defaults: transformers 5.23,
//! models/*/configuration_*.py; testdata/families holds a model of each. Unknown values are refused, never passed over.

use kto_cli::{Context, Error, Result};
use kto_formats::{
    json::{quoted, short},
    model_dir::refuse_remote_code,
    rope::{self, Around, Rotary},
};
use kto_kernels::HeadShape;
use serde_json::Value;

/// Models that share a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, TinyLlama, SmolLM2, DeepSeek-R1-Distill-Llama.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen 2 and 2.5, DeepSeek-R1-Distill-Qwen.
    Qwen2,
    /// Qwen 3, dense.
    Qwen3,
    /// Phi 3, 3.5 and 4.
    Phi3,
    /// Gemma 2.
    Gemma2,
    /// Gemma 3, text only.
    Gemma3,
    /// StableLM.
    StableLm,
}

/// All families, and their `model_type`.
const FAMILIES: [(Family, &str); 8] = [
    (Family::Llama, "llama"),
    (Family::Mistral, "mistral"),
    (Family::Qwen2, "qwen2"),
    (Family::Qwen3, "qwen3"),
    (Family::Phi3, "phi3"),
    (Family::Gemma2, "gemma2"),
    (Family::Gemma3, "gemma3_text"),
    (Family::StableLm, "stablelm"),
];

impl Family {
    /// Returns all of them: the engine computes each.
    pub fn all() -> [Self; FAMILIES.len()] {
        FAMILIES.map(|(family, _)| family)
    }

    /// Returns `model_type`.
    pub fn name(self) -> &'static str {
        FAMILIES.iter().find(|(family, _)| *family == self).map_or("", |(_, name)| name)
    }

    /// Returns the family of a configuration. Errors (65): one that is not known, with the list of those in `works`; or
    /// remote code.
    pub fn of(config: &Value, works: &[Family]) -> Result<Self> {
        let name = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
        config.as_object().map_or(Ok(()), refuse_remote_code).at("config.json")?;
        match FAMILIES.iter().find(|(family, known)| *known == name && works.contains(family)) {
            Some((family, _)) => Ok(*family),
            None => {
                let works: Vec<&str> = works.iter().map(|family| family.name()).collect();
                Err(Error::data(format!("config.json: model_type {} is not supported", quoted(name)))
                    .with_hint(format!("supported families: {}", works.join(", "))))
            }
        }
    }

    fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }
}

/// How rows are normed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// Root mean square, times a weight.
    Rms,
    /// Root mean square, times 1 + a weight (Gemma).
    RmsPlusOne,
    /// Mean and variance, with weight and bias.
    Layer,
}

/// The MLP's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// GELU by tanh.
    GeluTanh,
}

/// Everything that a configuration says.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The family.
    pub family: Family,
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
    /// Longest position the model was made for.
    pub max_positions: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Kind of all norms.
    pub norm: Norm,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Norms also behind attention and MLP, before the sum (Gemma).
    pub post_norms: bool,
    /// Norms of each head's queries and keys, before they turn.
    pub qk_norm: bool,
    /// The MLP's gate.
    pub activation: Activation,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases on gate, up, down.
    pub mlp_bias: bool,
    /// q, k, v are one matrix, gate and up another (Phi 3).
    pub fused: bool,
    /// Rotation of layers that see everything.
    pub rotary: Rotary,
    /// Rotation of layers with a window, where it is another.
    pub sliding_rotary: Option<Rotary>,
    /// Positions that a layer with a window sees, its own included.
    pub window: Option<usize>,
    /// Which layers have it (L).
    pub sliding: Vec<bool>,
    /// Factor of the scores.
    pub attention_scale: f64,
    /// Scores s become cap · tanh(s / cap).
    pub attention_cap: Option<f64>,
    /// The same for logits.
    pub logit_cap: Option<f64>,
    /// Factor of the embedding's rows.
    pub embedding_scale: f64,
}

/// Positions that a layer with a window sees where nothing is said.
const USUAL_WINDOW: usize = 4096;
/// Largest value accepted for any size: beyond it, a product of two could not be an index.
const LARGEST: u64 = 1 << 24;

impl Record {
    /// Reads a config.json of one of the families in `works`. Errors (65): another family, an unknown feature, a missing
    /// field, sizes that do not fit together.
    pub fn read(config: &Value, works: &[Family]) -> Result<Self> {
        let family = Family::of(config, works)?;
        let fields = Fields(config);
        let gemma = family.is_gemma();
        let (hidden, layers) = (fields.size("hidden_size")?, fields.size("num_hidden_layers")?);
        let shape = fields.heads(family, hidden)?;
        let max_positions = fields.size_or("max_position_embeddings", 2048)?;
        let window = fields.window(family)?;
        let (layer_norm, phi) = (family == Family::StableLm, family == Family::Phi3);
        let around = Around { model_type: family.name(), head_dim: shape.dim, max_positions };
        let (eps, default_eps) = if layer_norm {
            ("layer_norm_eps", 1e-5)
        } else {
            ("rms_norm_eps", if phi { 1e-5 } else { 1e-6 })
        };
        let bias = |field: &str, default| fields.flag(field, default);
        let (attention, llama) = (bias("attention_bias", false)?, family == Family::Llama);
        let scalar = if gemma { fields.positive("query_pre_attn_scalar", 256.0)? } else { shape.dim as f64 };
        let this = Self {
            family,
            vocab_size: fields.size("vocab_size")?,
            hidden,
            intermediate: fields.size("intermediate_size")?,
            layers,
            shape,
            max_positions,
            tied: fields.flag("tie_word_embeddings", gemma)?,
            norm: match family {
                Family::StableLm => Norm::Layer,
                _ if gemma => Norm::RmsPlusOne,
                _ => Norm::Rms,
            },
            norm_eps: fields.positive(eps, default_eps)?,
            post_norms: gemma,
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
            activation: fields.activation(gemma)?,
            qkv_bias: match family {
                Family::Qwen2 => true,
                Family::StableLm => bias("use_qkv_bias", false)?,
                Family::Llama | Family::Qwen3 | Family::Gemma2 | Family::Gemma3 => attention,
                Family::Mistral | Family::Phi3 => false,
            },
            o_bias: attention && (llama || gemma || family == Family::Qwen3),
            mlp_bias: llama && bias("mlp_bias", false)?,
            fused: phi,
            rotary: rope::read(config, &around).at("config.json")?,
            sliding_rotary: rope::read_local(config, &around).at("config.json")?,
            sliding: fields.sliding(family, layers, window)?,
            window,
            attention_scale: scalar.powf(-0.5),
            // transformers looks at neither in other families, and at the first not in Gemma 3.
            attention_cap: match family {
                Family::Gemma2 => fields.cap("attn_logit_softcapping", Some(50.0))?,
                _ => None,
            },
            logit_cap: match family {
                Family::Gemma2 => fields.cap("final_logit_softcapping", Some(30.0))?,
                Family::Gemma3 => fields.cap("final_logit_softcapping", None)?,
                _ => None,
            },
            embedding_scale: if gemma { (hidden as f64).sqrt() } else { 1.0 },
        };
        fields.refuse_variants(family)?;
        Ok(this)
    }
}

/// config.json with its kinds of fields.
struct Fields<'a>(&'a Value);

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn size(&self, field: &str) -> Result<usize> {
        let value =
            self.get(field).ok_or_else(|| Error::data(format!("config.json: \"{field}\" is missing")))?;
        match value.as_u64() {
            Some(n) if (1..=LARGEST).contains(&n) => Ok(n as usize),
            _ => Err(wrong(field, &format!("an integer from 1 to {LARGEST}"), value)),
        }
    }

    fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        if self.get(field).is_some() { self.size(field) } else { Ok(default) }
    }

    fn positive(&self, field: &str, default: f64) -> Result<f64> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(x) if x > 0.0 && x.is_finite() => Ok(x),
                _ => Err(wrong(field, "a number above 0", value)),
            },
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| wrong(field, "true or false", value)),
        }
    }

    /// A soft cap: null is none, a missing field the default.
    fn cap(&self, field: &str, default: Option<f64>) -> Result<Option<f64>> {
        match self.0.get(field) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.positive(field, 1.0).map(Some),
        }
    }

    fn heads(&self, family: Family, hidden: usize) -> Result<HeadShape> {
        let heads = self.size("num_attention_heads")?;
        let kv_heads = self.size_or("num_key_value_heads", heads)?;
        let given = self.get("head_dim").is_some();
        // These have a head size of their own, whatever hidden / heads is.
        let default = match family {
            Family::Qwen3 => 128,
            Family::Gemma2 | Family::Gemma3 => 256,
            _ => hidden / heads,
        };
        let dim = self.size_or("head_dim", default.max(1))?;
        let bad = |what: String| Err(Error::data(format!("config.json: {what}")));
        if heads % kv_heads != 0 {
            return bad(format!(
                "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            ));
        }
        if !given && default == hidden / heads && !hidden.is_multiple_of(heads) {
            return bad(format!("hidden_size {hidden} is not a multiple of num_attention_heads {heads}"));
        }
        if dim % 2 != 0 {
            return bad(format!("head_dim {dim} must be even and above 0"));
        }
        Ok(HeadShape { heads, kv_heads, dim })
    }

    fn activation(&self, gemma: bool) -> Result<Activation> {
        // Gemma reads hidden_activation; the other field is left over from its first version.
        let field = if gemma { "hidden_activation" } else { "hidden_act" };
        match self.get(field).map(|value| (value, value.as_str().unwrap_or_default())) {
            None => Ok(if gemma { Activation::GeluTanh } else { Activation::Silu }),
            Some((_, "silu")) => Ok(Activation::Silu),
            Some((_, "gelu_pytorch_tanh")) => Ok(Activation::GeluTanh),
            Some((value, _)) => {
                let found = short(value);
                Err(Error::data(format!("config.json: {field} {found} is not supported"))
                    .with_hint("supported: silu, gelu_pytorch_tanh"))
            }
        }
    }

    /// The window, where the family has one and the configuration does not turn it off.
    fn window(&self, family: Family) -> Result<Option<usize>> {
        let on = match family {
            Family::Mistral | Family::Phi3 | Family::Gemma2 | Family::Gemma3 => true,
            Family::Qwen2 | Family::Qwen3 => self.flag("use_sliding_window", false)?,
            Family::Llama | Family::StableLm => false,
        };
        match self.0.get("sliding_window").filter(|_| on) {
            None => Ok(Some(USUAL_WINDOW).filter(|_| on && family != Family::Phi3)),
            Some(Value::Null) => Ok(None),
            Some(_) => self.size("sliding_window").map(Some),
        }
    }

    /// Which layers have the window.
    fn sliding(&self, family: Family, layers: usize, window: Option<usize>) -> Result<Vec<bool>> {
        if let Some(list) = self.get("layer_types") {
            let kinds = list.as_array().filter(|list| list.len() == layers);
            let kinds =
                kinds.ok_or_else(|| wrong("layer_types", &format!("a list of {layers} names"), list))?;
            let listed: Result<Vec<bool>> = kinds
                .iter()
                .map(|kind| match kind.as_str() {
                    Some("full_attention") => Ok(false),
                    Some("sliding_attention") if window.is_some() => Ok(true),
                    _ => {
                        let found = short(kind);
                        Err(Error::data(format!("config.json: layer_types {found} is not supported"))
                            .with_hint(
                                "supported: full_attention, and sliding_attention with sliding_window",
                            ))
                    }
                })
                .collect();
            // All layers of Phi 3 are alike: transformers does not look at the list.
            return listed
                .map(|list| if family == Family::Phi3 { vec![window.is_some(); layers] } else { list });
        }
        if family.is_gemma() && window.is_none() {
            return Err(Error::data("config.json: \"sliding_window\" is null, and layers have a window"));
        }
        let pattern = match family {
            Family::Gemma3 => {
                self.size_or("sliding_window_pattern", self.size_or("_sliding_window_pattern", 6)?)?
            }
            Family::Gemma2 => 2,
            _ => 0,
        };
        let first = match family {
            Family::Qwen2 | Family::Qwen3 if window.is_some() => match self.get("max_window_layers") {
                Some(value) if value.as_u64() == Some(0) => 0,
                _ => self.size_or("max_window_layers", 28)?,
            },
            _ => 0,
        };
        let has =
            |i: usize| window.is_some() && i >= first && (pattern == 0 || !(i + 1).is_multiple_of(pattern));
        Ok((0..layers).map(has).collect())
    }

    /// Variants of a family that compute something else.
    fn refuse_variants(&self, family: Family) -> Result<()> {
        let variants: &[&str] = match family {
            Family::StableLm => &["use_parallel_residual", "qk_layernorm"],
            Family::Gemma3 => &["use_bidirectional_attention"],
            _ => &[],
        };
        for field in variants {
            if self.flag(field, false)? {
                return Err(Error::data(format!("config.json: {field} is not supported")));
            }
        }
        Ok(())
    }
}

fn wrong(field: &str, expected: &str, found: &Value) -> Error {
    Error::data(format!("config.json: \"{field}\" must be {expected}, found {}", short(found)))
}

#[cfg(test)]
mod tests;
