//! Rotary position embedding as config.json states it: which part of a head turns, how fast, and how models are
//! stretched to longer texts than they were trained on.
//!
//! Called by [`crate::family`]. Source of the formulas: transformers 5.23, modeling_rope_utils.py; held against it by
//! testdata/families. Both ways of writing are read: `rope_parameters`, and `rope_theta` with `rope_scaling`.
//! Invariant: what a sequence computes depends on its own length only. transformers decides by the longest sequence of the batch,
//! and its dynamic scaling remembers the longest one of the process.

use kto_cli::{Error, Result};
use kto_formats::json::short;
use serde_json::Value;
use std::f64::consts::PI;

/// The rotation of one kind of layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// Dimensions of a head that turn, the first ones; even.
    pub dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// How it is stretched.
    pub scaling: Scaling,
}

/// A way of stretching.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// None.
    Default,
    /// All frequencies divided.
    Linear {
        /// By this.
        factor: f64,
    },
    /// NTK scaling: from `original` positions on, theta grows with the length.
    Dynamic {
        /// Stretch at the original length.
        factor: f64,
        /// Positions that the model was trained on.
        original: f64,
    },
    /// Low frequencies divided, high ones kept, those between interpolated (Llama 3.1).
    Llama3 {
        /// Divides the low frequencies.
        factor: f64,
        /// Wavelengths above original / this are low frequencies.
        low: f64,
        /// Wavelengths below original / this are high ones.
        high: f64,
        /// Positions that the model was trained on.
        original: f64,
    },
    /// YaRN: a ramp over the dimensions, and a factor of sine and cosine.
    Yarn {
        /// Divides the frequencies below the ramp.
        factor: f64,
        /// Factor of sine and cosine.
        attention: f64,
        /// Rotations over the original length where the ramp begins.
        fast: f64,
        /// Rotations where it ends.
        slow: f64,
        /// The ends of the ramp are whole dimensions.
        truncate: bool,
        /// Positions that the model was trained on.
        original: f64,
    },
    /// LongRoPE: a divisor for each frequency, others for sequences longer than the original length.
    Long {
        /// Divisors up to the original length.
        short: Vec<f64>,
        /// Divisors beyond.
        long: Vec<f64>,
        /// Factor of sine and cosine.
        attention: f64,
        /// Positions that the model was trained on.
        original: f64,
    },
}

impl Rotary {
    /// Returns the frequencies (dim / 2) for a sequence of `length` positions.
    pub fn frequencies(&self, length: usize) -> Vec<f64> {
        // Exponents, powers and reciprocals in f32, as transformers rounds them.
        let of =
            |theta: f64, i: usize| (theta as f32 as f64).powf(f64::from((2 * i) as f32 / self.dim as f32));
        let base = |theta: f64| (0..self.dim / 2).map(move |i| f64::from(1.0 / of(theta, i) as f32));
        let length = length as f64;
        match &self.scaling {
            Scaling::Default => base(self.theta).collect(),
            Scaling::Linear { factor } => base(self.theta).map(|f| f / factor).collect(),
            Scaling::Dynamic { factor, original } => {
                let stretch = factor * length.max(*original) / original - (factor - 1.0);
                let dim = self.dim as f64;
                base(self.theta * stretch.powf(dim / (dim - 2.0))).collect()
            }
            Scaling::Llama3 { factor, low, high, original } => base(self.theta)
                .map(|f| {
                    let turns = original * f / (2.0 * PI);
                    let part = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - part) * f / factor + part * f
                })
                .collect(),
            Scaling::Yarn { factor, .. } => {
                let (start, end) = self.ramp();
                let kept = |i: usize| 1.0 - ((i as f64 - start) / (end - start)).clamp(0.0, 1.0);
                base(self.theta)
                    .enumerate()
                    .map(|(i, f)| f / factor * (1.0 - kept(i)) + f * kept(i))
                    .collect()
            }
            Scaling::Long { short, long, original, .. } => {
                let divisors = if length > *original { long } else { short };
                base(self.theta).zip(divisors).map(|(f, divisor)| f / divisor).collect()
            }
        }
    }

    /// Returns the factor of sine and cosine.
    pub fn attention_factor(&self) -> f64 {
        match &self.scaling {
            Scaling::Yarn { attention, .. } | Scaling::Long { attention, .. } => *attention,
            _ => 1.0,
        }
    }

    /// The dimensions between which YaRN interpolates.
    fn ramp(&self) -> (f64, f64) {
        let Scaling::Yarn { fast, slow, truncate, original, .. } = self.scaling else { return (0.0, 1.0) };
        let dim = self.dim as f64;
        let at = |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut start, mut end) = (at(fast), at(slow));
        if truncate {
            (start, end) = (start.floor(), end.ceil());
        }
        (start, end) = (start.max(0.0), end.min(dim - 1.0));
        if start == end { (start, end + 0.001) } else { (start, end) }
    }
}

/// What the reader must know of the rest of config.json.
pub struct Surroundings<'a> {
    /// The whole configuration.
    pub config: &'a Value,
    /// D, head size.
    pub head_dim: usize,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// The base when none is given.
    pub default_theta: f64,
    /// The part of a head that turns when none is given.
    pub default_part: f64,
    /// The length that a model was trained on when none is given.
    pub default_original: f64,
    /// Whether LongRoPE may be called yarn (Phi 3).
    pub yarn_is_long: bool,
}

/// Reads the rotation of layers of `kind`, where a model has one for each kind (Gemma 3), else the only one.
/// Errors (65): an unknown type, a field that is missing or not what it must be.
pub fn read(of: &Surroundings, kind: Option<&str>) -> Result<Rotary> {
    let config = of.config;
    let given = |value: &&Value| !value.is_null();
    let is_empty = |value: &Value| value.as_object().is_some_and(serde_json::Map::is_empty);
    let older = config.get("rope_scaling").filter(given).filter(|value| !is_empty(value));
    // The older field wins where both are, as in transformers.
    let (name, fields) = match (older, config.get("rope_parameters").filter(given)) {
        (Some(value), _) => ("rope_scaling", value),
        (None, Some(value)) => ("rope_parameters", kind.and_then(|kind| value.get(kind)).unwrap_or(value)),
        (None, None) => ("rope_scaling", &Value::Null),
    };
    if !fields.is_object() && !fields.is_null() {
        return Err(Error::data(format!("config.json: \"{name}\" must be an object")));
    }
    let reader = Reader { name, fields, config };
    let theta = reader.number_or("rope_theta", of.default_theta)?;
    let part = reader.number_or("partial_rotary_factor", of.default_part)?;
    let dim = (of.head_dim as f64 * part) as usize;
    if !(part <= 1.0 && dim >= 2 && dim.is_multiple_of(2)) {
        let what =
            format!("config.json: partial_rotary_factor {part} of head_dim {} is no even size", of.head_dim);
        return Err(Error::data(what));
    }
    let scaling = scaling(&reader, of, dim)?;
    Ok(Rotary { dim, theta, scaling })
}

/// The names of the ways that are known, for refusals.
const KNOWN: &str = "default, linear, dynamic, llama3, yarn, longrope";

fn scaling(reader: &Reader, of: &Surroundings, dim: usize) -> Result<Scaling> {
    let (name, fields, max_positions) = (reader.name, reader.fields, of.max_positions as f64);
    let kind = fields.get("rope_type").or_else(|| fields.get("type")).filter(|kind| !kind.is_null());
    let Some(kind) = kind else {
        // Without a type a factor would be a form that is not known here.
        return match fields.get("factor") {
            None => Ok(Scaling::Default),
            Some(_) => Err(Error::data(format!("config.json: \"{name}\" has a factor and no \"rope_type\""))),
        };
    };
    let original = || reader.number_or("original_max_position_embeddings", of.default_original);
    match kind.as_str().unwrap_or_default() {
        "default" => Ok(Scaling::Default),
        "linear" => Ok(Scaling::Linear { factor: reader.number("factor")? }),
        // This one counts from max_position_embeddings, whatever else is written.
        "dynamic" if dim > 2 => {
            Ok(Scaling::Dynamic { factor: reader.number("factor")?, original: max_positions })
        }
        "llama3" => {
            let (low, high) = (reader.number("low_freq_factor")?, reader.number("high_freq_factor")?);
            if low >= high {
                return Err(Error::data(format!(
                    "config.json: \"{name}\": low_freq_factor must be below high_freq_factor"
                )));
            }
            Ok(Scaling::Llama3 { factor: reader.number("factor")?, low, high, original: original()? })
        }
        "yarn" if of.yarn_is_long => long(reader, dim, original()?, max_positions),
        "yarn" => yarn(reader, original()?, max_positions),
        // Phi-3's first files call it su.
        "longrope" | "su" => long(reader, dim, original()?, max_positions),
        _ => {
            let found = short(kind);
            Err(Error::data(format!("config.json: {name} of type {found} is not supported"))
                .with_hint(format!("supported: {KNOWN}")))
        }
    }
}

fn yarn(reader: &Reader, original: f64, max_positions: f64) -> Result<Scaling> {
    let factor = reader.number_or("factor", max_positions / original)?;
    let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let attention =
        match (reader.maybe("attention_factor")?, reader.maybe("mscale")?, reader.maybe("mscale_all_dim")?) {
            (Some(given), _, _) => given,
            (None, Some(one), Some(all)) => scale(one) / scale(all),
            _ => scale(1.0),
        };
    let truncate = match reader.fields.get("truncate") {
        None | Some(Value::Null) => true,
        Some(value) => value.as_bool().ok_or_else(|| reader.wrong("truncate", "true or false", value))?,
    };
    let (fast, slow) = (reader.number_or("beta_fast", 32.0)?, reader.number_or("beta_slow", 1.0)?);
    Ok(Scaling::Yarn { factor, attention, fast, slow, truncate, original })
}

fn long(reader: &Reader, dim: usize, original: f64, max_positions: f64) -> Result<Scaling> {
    let factor = reader.number_or("factor", max_positions / original)?;
    let attention = match reader.maybe("attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / original.ln()).sqrt(),
    };
    let (short, long) = (reader.divisors("short_factor", dim / 2)?, reader.divisors("long_factor", dim / 2)?);
    Ok(Scaling::Long { short, long, attention, original })
}

/// Fields of the object, or of config.json around it.
struct Reader<'a> {
    name: &'static str,
    fields: &'a Value,
    config: &'a Value,
}

impl Reader<'_> {
    /// A positive number that may be missing.
    fn maybe(&self, field: &str) -> Result<Option<f64>> {
        match self.fields.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => self.positive(field, value).map(Some),
        }
    }

    fn number(&self, field: &str) -> Result<f64> {
        let missing = || Error::data(format!("config.json: \"{}\" has no \"{field}\"", self.name));
        self.maybe(field)?.ok_or_else(missing)
    }

    /// A number that may stand in config.json itself, or nowhere. Phi-3's original length there wins.
    fn number_or(&self, field: &str, default: f64) -> Result<f64> {
        let outer = self.config.get(field).filter(|value| !value.is_null());
        match (outer, self.maybe(field)?) {
            (Some(value), _) if field == "original_max_position_embeddings" => self.positive(field, value),
            (_, Some(own)) => Ok(own),
            (Some(value), None) => self.positive(field, value),
            (None, None) => Ok(default),
        }
    }

    fn positive(&self, field: &str, value: &Value) -> Result<f64> {
        let number = value.as_f64().filter(|x| *x > 0.0 && x.is_finite());
        number.ok_or_else(|| self.wrong(field, "a number above 0", value))
    }

    fn divisors(&self, field: &str, count: usize) -> Result<Vec<f64>> {
        let list = self.fields.get(field).and_then(Value::as_array);
        let numbers: Option<Vec<f64>> = list.and_then(|list| list.iter().map(Value::as_f64).collect());
        let fits = |list: &Vec<f64>| list.len() == count && list.iter().all(|x| *x > 0.0 && x.is_finite());
        numbers.filter(fits).ok_or_else(|| {
            Error::data(format!(
                "config.json: \"{}\": \"{field}\" must be {count} numbers above 0",
                self.name
            ))
        })
    }

    fn wrong(&self, field: &str, expected: &str, found: &Value) -> Error {
        Error::data(format!("config.json: \"{field}\" must be {expected}, found {}", short(found)))
    }
}
