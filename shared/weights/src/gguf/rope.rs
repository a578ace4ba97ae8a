//! The rotation of a decoder: between config.json's fields and llama.cpp's keys and tensors of divisors.
//!
//! llama.cpp has `linear` and `yarn` as keys, `llama3` and `longrope` as divisors of every frequency (`rope_freqs`, `rope_factors_short` and
//! `…_long`). It has no `dynamic`. Out of a file, divisors that Llama 3's rule gives become that rule, others LongRoPE with one set.
//! Formulas: transformers 5.23, modeling_rope_utils.py.

use super::{
    names::Kind,
    settings::{decimal, number, tensor_floats},
};
use kto_cli::{Error, Result, escape};
use kto_formats::gguf::{GgufReader, GgufValue};
use serde_json::{Map, Value, json};
use std::f64::consts::PI;

/// Divisors of the frequencies, by the name of their tensor.
pub const FREQUENCIES: &str = "rope_freqs.weight";
/// LongRoPE's divisors up to the original length.
pub const SHORT: &str = "rope_factors_short.weight";
/// LongRoPE's divisors beyond.
pub const LONG: &str = "rope_factors_long.weight";
/// Gemma 3's base of layers with a window.
const LOCAL_BASE: f64 = 1e4;
/// The length that Llama 3 was trained on, where a file does not say it.
const LLAMA3_LENGTH: f64 = 8192.0;

/// A rotation.
pub struct Rope {
    /// Base of the frequencies.
    theta: f64,
    /// Base of layers with a window, where it is another.
    local: Option<f64>,
    /// Dimensions of a head that turn.
    pub dim: usize,
    scaling: Scaling,
}

#[derive(Debug, PartialEq)]
enum Scaling {
    None,
    Linear {
        factor: f64,
    },
    /// `attention`: factor of sine and cosine, where it is not the usual one.
    Yarn {
        factor: f64,
        original: f64,
        attention: Option<f64>,
        fast: Option<f64>,
        slow: Option<f64>,
    },
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    Long {
        short: Vec<f64>,
        long: Vec<f64>,
        attention: f64,
        original: f64,
    },
}

/// YaRN's usual factor of sine and cosine.
fn yarn_attention(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

/// LongRoPE's usual factor of sine and cosine.
fn long_attention(factor: f64, original: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
}

/// Sizes of the model around.
#[derive(Clone, Copy)]
pub struct Around {
    /// Size of a head.
    pub head_dim: usize,
    /// Longest position.
    pub context: usize,
}

impl Rope {
    /// Reads config.json, in either form: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling`, which wins.
    /// Errors (65): a rotation that llama.cpp does not have.
    pub fn of(config: &Value, kind: &Kind, around: Around) -> Result<Self> {
        let given = |field: &str| config.get(field).filter(|v| v.as_object().is_some_and(|m| !m.is_empty()));
        let parameters = given("rope_parameters");
        let own = |layers: &str| parameters.and_then(|p| p.get(layers));
        let fields = given("rope_scaling").or(own("full_attention")).or(parameters).unwrap_or(&Value::Null);
        let reader = Reader { config, fields };
        let theta = if kind.model_type == "gemma3_text" { 1e6 } else { 1e4 };
        let part = reader.or("partial_rotary_factor", if kind.layer_norm { 0.25 } else { 1.0 })?;
        let local = (kind.model_type == "gemma3_text").then(|| match own("sliding_attention") {
            Some(fields) => Reader { config: &Value::Null, fields }.or("rope_theta", LOCAL_BASE),
            None => Reader { config, fields: &Value::Null }.or("rope_local_base_freq", LOCAL_BASE),
        });
        let dim = (around.head_dim as f64 * part) as usize;
        if dim < 2 || !dim.is_multiple_of(2) || (dim != around.head_dim && !kind.partial) {
            return Err(Error::data(format!("partial_rotary_factor {part} cannot be written as GGUF")));
        }
        Ok(Self {
            theta: reader.or("rope_theta", theta)?,
            local: local.transpose()?,
            dim,
            scaling: reader.scaling(kind, around, dim)?,
        })
    }

    /// Returns the keys of the file, without the architecture before them.
    pub fn keys(&self) -> Vec<(&'static str, GgufValue)> {
        let float = |v: f64| GgufValue::F32(v as f32);
        let count = |v: f64| GgufValue::U32(v as u32);
        let kind = |t: &str| ("rope.scaling.type", GgufValue::String(t.into()));
        let mut keys = vec![
            ("rope.dimension_count", GgufValue::U32(self.dim as u32)),
            ("rope.freq_base", float(self.theta)),
        ];
        if let Some(local) = self.local {
            keys.push(("rope.freq_base_swa", float(local)));
        }
        match &self.scaling {
            Scaling::None => {}
            Scaling::Linear { factor } => {
                keys.extend([kind("linear"), ("rope.scaling.factor", float(*factor))])
            }
            Scaling::Yarn { factor, original, attention, fast, slow } => {
                keys.extend([
                    kind("yarn"),
                    ("rope.scaling.factor", float(*factor)),
                    ("rope.scaling.original_context_length", count(*original)),
                ]);
                // llama.cpp multiplies the usual one by this.
                let times = attention.map(|a| a / yarn_attention(*factor, 1.0));
                let optional = [
                    ("rope.scaling.attn_factor", times),
                    ("rope.scaling.yarn_beta_fast", *fast),
                    ("rope.scaling.yarn_beta_slow", *slow),
                ];
                keys.extend(optional.into_iter().filter_map(|(key, v)| Some((key, float(v?)))));
            }
            Scaling::Llama3 { original, .. } => {
                keys.push(("rope.scaling.original_context_length", count(*original)));
            }
            Scaling::Long { attention, original, .. } => keys.extend([
                ("rope.scaling.original_context_length", count(*original)),
                ("rope.scaling.attn_factor", float(*attention)),
            ]),
        }
        keys
    }

    /// Returns the tensors of the file.
    pub fn tensors(&self) -> Vec<(&'static str, Vec<f32>)> {
        let floats = |list: &[f64]| list.iter().map(|v| *v as f32).collect();
        match &self.scaling {
            Scaling::Llama3 { factor, low, high, original } => {
                vec![(FREQUENCIES, self.llama3(*factor, *low, *high, *original))]
            }
            Scaling::Long { short, long, .. } => vec![(LONG, floats(long)), (SHORT, floats(short))],
            _ => Vec::new(),
        }
    }

    /// Llama 3's divisors: low frequencies are divided, high ones kept, those between interpolated.
    fn llama3(&self, factor: f64, low: f64, high: f64, original: f64) -> Vec<f32> {
        let frequency = |i: usize| 1.0 / self.theta.powf((2 * i) as f64 / self.dim as f64);
        let divisor = |i: usize| {
            let turns = original * frequency(i) / (2.0 * PI);
            let part = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - part) / factor + part)) as f32
        };
        (0..self.dim / 2).map(divisor).collect()
    }

    /// Reads a file. Errors (65): a rotation that transformers does not have for this decoder.
    pub fn of_file(file: &GgufReader, kind: &Kind, around: Around) -> Result<Self> {
        let key = |name: &str| format!("{}.{name}", kind.architecture);
        let float = |name: &str| number(file, &key(name));
        let theta = if kind.model_type == "gemma3_text" { 1e6 } else { 1e4 };
        let dim = float("rope.dimension_count")?.map_or(around.head_dim, |n| n as usize);
        if dim < 2
            || !dim.is_multiple_of(2)
            || dim > around.head_dim
            || (dim != around.head_dim && !kind.partial)
        {
            let text = format!("{dim} of {} dimensions of a head turn", around.head_dim);
            return Err(Error::data(format!("{text}, which \"{}\" does not have", kind.model_type)));
        }
        let local = (kind.model_type == "gemma3_text")
            .then(|| float("rope.freq_base_swa").map(|v| v.unwrap_or(LOCAL_BASE)))
            .transpose()?;
        let rope =
            Self { theta: float("rope.freq_base")?.unwrap_or(theta), local, dim, scaling: Scaling::None };
        let scaling = rope.scaling_of_file(file, kind, around)?;
        Ok(Self { scaling, ..rope })
    }

    fn scaling_of_file(&self, file: &GgufReader, kind: &Kind, around: Around) -> Result<Scaling> {
        let key = |name: &str| format!("{}.rope.scaling.{name}", kind.architecture);
        let float = |name: &str| number(file, &key(name));
        let original = float("original_context_length")?;
        let times = float("attn_factor")?;
        let divisors = |name: &str| tensor_floats(file, name, self.dim / 2);
        if let (Some(short), Some(long)) = (divisors(SHORT)?, divisors(LONG)?) {
            if kind.model_type != "phi3" {
                let text = format!("LongRoPE is not known of \"{}\"", kind.model_type);
                return Err(Error::data(text));
            }
            let original = original.unwrap_or(around.context as f64);
            let usual = long_attention(around.context as f64 / original, original);
            return Ok(Scaling::Long { short, long, attention: times.unwrap_or(usual), original });
        }
        if let Some(divisors) = divisors(FREQUENCIES)? {
            return Ok(self.scaling_of_divisors(&divisors, original, around));
        }
        let factor = float("factor")?.or(number(file, &format!("{}.rope.scale_linear", kind.architecture))?);
        match (file.text(&key("type")), factor) {
            (None | Some("none" | "linear" | "longrope"), None) => Ok(Scaling::None),
            (Some("none"), _) => Ok(Scaling::None),
            (None | Some("linear"), Some(1.0)) => Ok(Scaling::None),
            (None | Some("linear"), Some(factor)) => Ok(Scaling::Linear { factor }),
            (Some("yarn"), Some(factor)) => Ok(Scaling::Yarn {
                factor,
                original: original.unwrap_or(around.context as f64),
                // llama.cpp's converter keeps transformers' own number under another key.
                attention: times.map(|t| t * yarn_attention(factor, 1.0)).or(float("yarn_attn_factor")?),
                fast: float("yarn_beta_fast")?,
                slow: float("yarn_beta_slow")?,
            }),
            (other, _) => {
                let other = escape(other.unwrap_or_default());
                Err(Error::data(format!("rope scaling of type \"{other}\" without what belongs to it")))
            }
        }
    }

    /// Llama 3's rule with its usual bounds if it gives these divisors, else LongRoPE with one set.
    fn scaling_of_divisors(&self, divisors: &[f64], original: Option<f64>, around: Around) -> Scaling {
        if divisors.iter().all(|divisor| *divisor == 1.0) {
            return Scaling::None;
        }
        let factor = divisors.iter().fold(1.0, |m: f64, d| m.max(*d));
        let (low, high) = (1.0, 4.0);
        for original in original.into_iter().chain([LLAMA3_LENGTH]) {
            let made = self.llama3(factor, low, high, original);
            if made.iter().zip(divisors).all(|(a, b)| (f64::from(*a) - b).abs() <= 1e-5 * b) {
                return Scaling::Llama3 { factor, low, high, original };
            }
        }
        let (short, long) = (divisors.to_vec(), divisors.to_vec());
        Scaling::Long { short, long, attention: 1.0, original: original.unwrap_or(around.context as f64) }
    }

    /// Writes the fields of config.json, in the form that every version of transformers reads.
    pub fn put(&self, kind: &Kind, around: Around, config: &mut Map<String, Value>) {
        let mut put = |field: &str, value: Value| config.insert(field.into(), value);
        put("rope_theta", decimal(self.theta));
        if let Some(local) = self.local {
            put("rope_local_base_freq", decimal(local));
        }
        if kind.partial {
            put("partial_rotary_factor", part(self.dim, around.head_dim));
        }
        let mut scaling = self.scaling_field(kind, around);
        if kind.model_type == "phi3" {
            let original = match &self.scaling {
                Scaling::Long { original, .. } => *original as u64,
                _ => around.context as u64,
            };
            put("original_max_position_embeddings", json!(original));
        }
        // The older name is the one that older versions know.
        if let Some(fields) = scaling.as_object_mut()
            && let Some(kind) = fields.get("rope_type").cloned()
        {
            fields.insert("type".into(), kind);
        }
        put("rope_scaling", scaling);
    }

    /// `rope_scaling`.
    fn scaling_field(&self, kind: &Kind, around: Around) -> Value {
        let list = |all: &[f64]| Value::Array(all.iter().map(|v| decimal(*v)).collect());
        match &self.scaling {
            Scaling::None => Value::Null,
            Scaling::Linear { factor } => json!({"rope_type": "linear", "factor": decimal(*factor)}),
            Scaling::Yarn { factor, original, attention, fast, slow } => {
                let mut fields = json!({
                    "rope_type": "yarn",
                    "factor": decimal(*factor),
                    "original_max_position_embeddings": *original as u64,
                });
                let optional = [("attention_factor", attention), ("beta_fast", fast), ("beta_slow", slow)];
                for (field, value) in optional {
                    if let Some(value) = value {
                        fields[field] = decimal(*value);
                    }
                }
                fields
            }
            Scaling::Llama3 { factor, low, high, original } => json!({
                "rope_type": "llama3",
                "factor": decimal(*factor),
                "low_freq_factor": decimal(*low),
                "high_freq_factor": decimal(*high),
                "original_max_position_embeddings": *original as u64,
            }),
            Scaling::Long { short, long, attention, original } => {
                let mut fields = json!({
                    "rope_type": "longrope",
                    "short_factor": list(short),
                    "long_factor": list(long),
                });
                let usual = long_attention(around.context as f64 / original, *original);
                if kind.model_type != "phi3" {
                    fields["factor"] = json!(1.0);
                    fields["original_max_position_embeddings"] = json!(*original as u64);
                }
                if (attention - usual).abs() > 1e-6 * usual {
                    fields["attention_factor"] = decimal(*attention);
                }
                fields
            }
        }
    }
}

/// The share of a head that turns, such that share × head gives the dimensions again, rounded down.
fn part(dim: usize, head: usize) -> Value {
    let share = dim as f64 / head as f64;
    json!(if (share * head as f64) as usize == dim { share } else { share.next_up() })
}

/// Fields of the rope object, or of config.json around it.
struct Reader<'a> {
    config: &'a Value,
    fields: &'a Value,
}

impl Reader<'_> {
    fn maybe(&self, field: &str) -> Result<Option<f64>> {
        match self.fields.get(field).filter(|v| !v.is_null()).or_else(|| self.config.get(field)) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let number = value.as_f64().filter(|x| *x > 0.0 && x.is_finite());
                let found = || escape(&value.to_string().chars().take(60).collect::<String>());
                let wrong =
                    || Error::data(format!("\"{field}\" must be a number above 0, found {}", found()));
                number.map(Some).ok_or_else(wrong)
            }
        }
    }

    fn or(&self, field: &str, default: f64) -> Result<f64> {
        self.maybe(field).map(|v| v.unwrap_or(default))
    }

    fn need(&self, field: &str) -> Result<f64> {
        self.maybe(field)?.ok_or_else(|| Error::data(format!("the rope scaling has no \"{field}\"")))
    }

    fn divisors(&self, field: &str, count: usize) -> Result<Vec<f64>> {
        let list = self.fields.get(field).and_then(Value::as_array);
        let numbers: Option<Vec<f64>> = list.and_then(|list| list.iter().map(Value::as_f64).collect());
        let fits = |list: &Vec<f64>| list.len() == count && list.iter().all(|x| *x > 0.0 && x.is_finite());
        numbers
            .filter(fits)
            .ok_or_else(|| Error::data(format!("\"{field}\" must be {count} numbers above 0")))
    }

    fn scaling(&self, kind: &Kind, around: Around, dim: usize) -> Result<Scaling> {
        let stated = self.fields.get("rope_type").or_else(|| self.fields.get("type"));
        let context = around.context as f64;
        let phi = kind.model_type == "phi3";
        // Phi 3's original length stands in config.json itself.
        let original = || match self.config.get("original_max_position_embeddings").and_then(Value::as_f64) {
            Some(outer) => Ok(outer),
            None => self.or("original_max_position_embeddings", if phi { 4096.0 } else { context }),
        };
        let name = stated.filter(|v| !v.is_null()).map_or(Some("default"), Value::as_str);
        match name {
            Some("default") if stated.is_some() || self.fields.get("factor").is_none() => Ok(Scaling::None),
            Some("linear") => Ok(Scaling::Linear { factor: self.need("factor")? }),
            Some("llama3") if kind.architecture == "llama" => Ok(Scaling::Llama3 {
                factor: self.need("factor")?,
                low: self.need("low_freq_factor")?,
                high: self.need("high_freq_factor")?,
                original: original()?,
            }),
            Some("longrope" | "su" | "yarn") if phi => {
                let original = original()?;
                let factor = self.or("factor", context / original)?;
                Ok(Scaling::Long {
                    short: self.divisors("short_factor", dim / 2)?,
                    long: self.divisors("long_factor", dim / 2)?,
                    attention: self.or("attention_factor", long_attention(factor, original))?,
                    original,
                })
            }
            Some("yarn") if self.fields.get("truncate") != Some(&Value::Bool(false)) && !kind.gemma => {
                let original = original()?;
                let factor = self.or("factor", context / original)?;
                let attention = match (
                    self.maybe("attention_factor")?,
                    self.maybe("mscale")?,
                    self.maybe("mscale_all_dim")?,
                ) {
                    (Some(given), _, _) => Some(given),
                    (None, Some(one), Some(all)) => {
                        Some(yarn_attention(factor, one) / yarn_attention(factor, all))
                    }
                    _ => None,
                };
                // llama.cpp has keys for these, and reads them for other decoders.
                for (field, theirs) in [("beta_fast", 32.0), ("beta_slow", 1.0)] {
                    if self.or(field, theirs)? != theirs {
                        let text = format!("a yarn whose {field} is not {theirs} cannot be written as GGUF");
                        return Err(Error::data(text));
                    }
                }
                Ok(Scaling::Yarn { factor, original, attention, fast: None, slow: None })
            }
            _ => {
                let found =
                    escape(&stated.unwrap_or(self.fields).to_string().chars().take(60).collect::<String>());
                Err(Error::data(format!("a rope of type {found} cannot be written as GGUF for this decoder")))
            }
        }
    }
}
