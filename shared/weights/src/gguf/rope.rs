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
use kto_formats::{
    gguf::{GgufReader, GgufValue},
    rope::{self, Around, LOCAL_THETA, Rotary, Scaling, YARN_BETAS, long_attention, yarn_attention},
};
use serde_json::{Map, Value, json};
use std::f64::consts::PI;

/// Divisors of the frequencies, by the name of their tensor.
pub const FREQUENCIES: &str = "rope_freqs.weight";
/// LongRoPE's divisors up to the original length.
pub const SHORT: &str = "rope_factors_short.weight";
/// LongRoPE's divisors beyond.
pub const LONG: &str = "rope_factors_long.weight";
/// The length that Llama 3 was trained on, where a file does not say it.
const LLAMA3_LENGTH: f64 = 8192.0;

/// A rotation.
pub struct Rope {
    /// Of layers that see everything.
    rotary: Rotary,
    /// Base of layers with a window, where it is another.
    local: Option<f64>,
}

/// Returns whether two factors are the same but for the rounding of a file.
fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * b
}

impl Rope {
    /// Reads config.json. Errors (65): as [`rope::read`] has them; a rotation that llama.cpp does not have.
    pub fn of(config: &Value, kind: &Kind, around: &Around) -> Result<Self> {
        let (rotary, local) = (rope::read(config, around)?, rope::read_local(config, around)?);
        if let Some(what) = missing(&rotary, kind).or_else(|| missing_local(local.as_ref()?)) {
            return Err(Error::data(format!("{what} cannot be written as GGUF for this decoder")));
        }
        Ok(Self { rotary, local: local.map(|local| local.theta) })
    }

    /// Returns the keys of the file, without the architecture before them.
    pub fn keys(&self) -> Vec<(&'static str, GgufValue)> {
        let float = |v: f64| GgufValue::F32(v as f32);
        let count = |v: f64| GgufValue::U32(v as u32);
        let kind = |t: &str| ("rope.scaling.type", GgufValue::String(t.into()));
        let mut keys = vec![
            ("rope.dimension_count", GgufValue::U32(self.rotary.dim as u32)),
            ("rope.freq_base", float(self.rotary.theta)),
        ];
        if let Some(local) = self.local {
            keys.push(("rope.freq_base_swa", float(local)));
        }
        match &self.rotary.scaling {
            Scaling::Default | Scaling::Dynamic { .. } => {}
            Scaling::Linear { factor } => {
                keys.extend([kind("linear"), ("rope.scaling.factor", float(*factor))])
            }
            Scaling::Yarn { factor, original, attention, .. } => {
                keys.extend([
                    kind("yarn"),
                    ("rope.scaling.factor", float(*factor)),
                    ("rope.scaling.original_context_length", count(*original)),
                ]);
                // llama.cpp multiplies the usual one by this.
                let usual = yarn_attention(*factor, 1.0);
                if *attention != usual {
                    keys.push(("rope.scaling.attn_factor", float(attention / usual)));
                }
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
        match &self.rotary.scaling {
            Scaling::Llama3 { factor, low, high, original } => {
                vec![(FREQUENCIES, self.llama3(*factor, *low, *high, *original))]
            }
            Scaling::Long { short, long, .. } => vec![(LONG, floats(long)), (SHORT, floats(short))],
            _ => Vec::new(),
        }
    }

    /// Llama 3's divisors: low frequencies are divided, high ones kept, those between interpolated.
    fn llama3(&self, factor: f64, low: f64, high: f64, original: f64) -> Vec<f32> {
        let frequency = |i: usize| 1.0 / self.rotary.theta.powf((2 * i) as f64 / self.rotary.dim as f64);
        let divisor = |i: usize| {
            let turns = original * frequency(i) / (2.0 * PI);
            let part = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - part) / factor + part)) as f32
        };
        (0..self.rotary.dim / 2).map(divisor).collect()
    }

    /// Reads a file. Errors (65): a rotation that transformers does not have for this decoder.
    pub fn of_file(file: &GgufReader, kind: &Kind, around: &Around) -> Result<Self> {
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
            .then(|| float("rope.freq_base_swa").map(|v| v.unwrap_or(LOCAL_THETA)))
            .transpose()?;
        let theta = float("rope.freq_base")?.unwrap_or(theta);
        let mut rope = Self { rotary: Rotary { dim, theta, scaling: Scaling::Default }, local };
        rope.rotary.scaling = rope.scaling_of_file(file, kind, around)?;
        Ok(rope)
    }

    fn scaling_of_file(&self, file: &GgufReader, kind: &Kind, around: &Around) -> Result<Scaling> {
        let key = |name: &str| format!("{}.rope.scaling.{name}", kind.architecture);
        let float = |name: &str| number(file, &key(name));
        let original = float("original_context_length")?;
        let times = float("attn_factor")?;
        let divisors = |name: &str| tensor_floats(file, name, self.rotary.dim / 2);
        if let (Some(short), Some(long)) = (divisors(SHORT)?, divisors(LONG)?) {
            if kind.model_type != "phi3" {
                let text = format!("LongRoPE is not known of \"{}\"", kind.model_type);
                return Err(Error::data(text));
            }
            let original = original.unwrap_or(around.max_positions as f64);
            let usual = long_attention(around.max_positions as f64 / original, original);
            return Ok(Scaling::Long { short, long, attention: times.unwrap_or(usual), original });
        }
        if let Some(divisors) = divisors(FREQUENCIES)? {
            return Ok(self.scaling_of_divisors(&divisors, original, around));
        }
        let factor = float("factor")?.or(number(file, &format!("{}.rope.scale_linear", kind.architecture))?);
        match (file.text(&key("type")), factor) {
            (None | Some("none" | "linear" | "longrope"), None) => Ok(Scaling::Default),
            (Some("none"), _) => Ok(Scaling::Default),
            (None | Some("linear"), Some(1.0)) => Ok(Scaling::Default),
            (None | Some("linear" | "yarn"), Some(_)) if kind.model_type == "phi3" => {
                Err(Error::data("a rope scaling that transformers does not have for this decoder"))
            }
            (None | Some("linear"), Some(factor)) => Ok(Scaling::Linear { factor }),
            (Some("yarn"), Some(factor)) => {
                let usual = yarn_attention(factor, 1.0);
                // llama.cpp's converter keeps transformers' own number under another key.
                let given = times.map(|times| times * usual).or(float("yarn_attn_factor")?);
                let [fast, slow] = YARN_BETAS;
                Ok(Scaling::Yarn {
                    factor,
                    original: original.unwrap_or(around.max_positions as f64),
                    attention: given.unwrap_or(usual),
                    fast: float("yarn_beta_fast")?.unwrap_or(fast),
                    slow: float("yarn_beta_slow")?.unwrap_or(slow),
                    truncate: true,
                })
            }
            (other, _) => {
                let other = escape(other.unwrap_or_default());
                Err(Error::data(format!("rope scaling of type \"{other}\" without what belongs to it")))
            }
        }
    }

    /// Llama 3's rule with its usual bounds if it gives these divisors, else LongRoPE with one set.
    fn scaling_of_divisors(&self, divisors: &[f64], original: Option<f64>, around: &Around) -> Scaling {
        if divisors.iter().all(|divisor| *divisor == 1.0) {
            return Scaling::Default;
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
        Scaling::Long {
            short,
            long,
            attention: 1.0,
            original: original.unwrap_or(around.max_positions as f64),
        }
    }

    /// Writes the fields of config.json, in the form that every version of transformers reads.
    pub fn put(&self, kind: &Kind, around: &Around, config: &mut Map<String, Value>) {
        let mut put = |field: &str, value: Value| config.insert(field.into(), value);
        put("rope_theta", decimal(self.rotary.theta));
        if let Some(local) = self.local {
            put("rope_local_base_freq", decimal(local));
        }
        if kind.partial {
            put("partial_rotary_factor", part(self.rotary.dim, around.head_dim));
        }
        let mut scaling = self.scaling_field(kind, around);
        if kind.model_type == "phi3" {
            let original = match &self.rotary.scaling {
                Scaling::Long { original, .. } => *original as u64,
                _ => around.max_positions as u64,
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
    fn scaling_field(&self, kind: &Kind, around: &Around) -> Value {
        let list = |all: &[f64]| Value::Array(all.iter().map(|v| decimal(*v)).collect());
        match &self.rotary.scaling {
            Scaling::Default | Scaling::Dynamic { .. } => Value::Null,
            Scaling::Linear { factor } => json!({"rope_type": "linear", "factor": decimal(*factor)}),
            Scaling::Yarn { factor, original, attention, fast, slow, .. } => {
                let mut fields = json!({
                    "rope_type": "yarn",
                    "factor": decimal(*factor),
                    "original_max_position_embeddings": *original as u64,
                });
                let [usual_fast, usual_slow] = YARN_BETAS;
                for (field, value, usual) in [
                    ("attention_factor", *attention, yarn_attention(*factor, 1.0)),
                    ("beta_fast", *fast, usual_fast),
                    ("beta_slow", *slow, usual_slow),
                ] {
                    if value != usual {
                        fields[field] = decimal(value);
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
                let usual = long_attention(around.max_positions as f64 / original, *original);
                if kind.model_type != "phi3" {
                    fields["factor"] = json!(1.0);
                    fields["original_max_position_embeddings"] = json!(*original as u64);
                }
                if !near(*attention, usual) {
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

/// What llama.cpp does not have of a rotation.
fn missing(rotary: &Rotary, kind: &Kind) -> Option<String> {
    let what = match &rotary.scaling {
        Scaling::Default | Scaling::Linear { .. } => return None,
        Scaling::Llama3 { .. } if kind.architecture == "llama" => return None,
        Scaling::Long { .. } if kind.model_type == "phi3" => return None,
        // llama.cpp has keys for these, and reads them for other decoders.
        Scaling::Yarn { fast, slow, .. } if [*fast, *slow] != YARN_BETAS => {
            let [fast, slow] = YARN_BETAS;
            return Some(format!("a yarn whose beta_fast is not {fast} or whose beta_slow is not {slow}"));
        }
        Scaling::Yarn { truncate: true, .. } if !kind.gemma => return None,
        Scaling::Yarn { .. } => "yarn",
        Scaling::Dynamic { .. } => "dynamic",
        Scaling::Llama3 { .. } => "llama3",
        Scaling::Long { .. } => "longrope",
    };
    Some(format!("a rope of type \"{what}\""))
}

/// The same of layers with a window, of which llama.cpp has the base alone.
fn missing_local(local: &Rotary) -> Option<String> {
    (local.scaling != Scaling::Default).then(|| "a scaling of the layers with a window".into())
}
