//! Rotary position embedding as config.json states it: which part of a head turns, how fast, and how models are
//! stretched to longer texts than they were trained on.
//!
//! Called by kto-model, which computes it, and by kto-weights, which writes it as GGUF. Both ways of writing are read: `rope_parameters`, and
//! `rope_theta` with `rope_scaling`. A family is a set of defaults, and what transformers ignores of a family is ignored: source of
//! both, transformers 5.23, modeling_rope_utils.py and the families' own files; held against it by testdata/families. Messages name the field,
//! callers the file.

use crate::json::short;
use kto_cli::{Error, Result};
use serde_json::{Map, Value};

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
    /// Returns the factor of sine and cosine.
    pub fn attention_factor(&self) -> f64 {
        match &self.scaling {
            Scaling::Yarn { attention, .. } | Scaling::Long { attention, .. } => *attention,
            _ => 1.0,
        }
    }
}

/// Returns YaRN's factor of sine and cosine where none is given; `scale` is 1, or one of the two whose ratio is taken.
pub fn yarn_attention(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

/// Returns LongRoPE's factor of sine and cosine where none is given.
pub fn long_attention(factor: f64, original: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
}

/// YaRN's rotations where the ramp begins and ends, if nothing is said.
pub const YARN_BETAS: [f64; 2] = [32.0, 1.0];

/// What the reader must know of the rest of the model.
#[derive(Clone, Copy)]
pub struct Around<'a> {
    /// `model_type`.
    pub model_type: &'a str,
    /// D, head size.
    pub head_dim: usize,
    /// `max_position_embeddings`.
    pub max_positions: usize,
}

/// What a family has where its configuration says nothing.
struct Usual {
    theta: f64,
    /// The part of a head that turns, in families of which only a part may.
    part: Option<f64>,
    /// The length that a model was trained on.
    original: f64,
    /// LongRoPE may be called yarn.
    yarn_is_long: bool,
    /// Layers with a window turn by themselves, and `rope_parameters` has an object for each kind.
    by_layers: bool,
}

impl Usual {
    fn of(around: &Around) -> Self {
        let original = around.max_positions as f64;
        let this = Self { theta: 1e4, part: None, original, yarn_is_long: false, by_layers: false };
        match around.model_type {
            "phi3" => Self { part: Some(1.0), original: 4096.0, yarn_is_long: true, ..this },
            "stablelm" => Self { part: Some(0.25), ..this },
            "gemma3_text" => Self { theta: 1e6, by_layers: true, ..this },
            _ => this,
        }
    }
}

/// Reads the rotation of layers that see everything. Errors (65): an unknown type, a field that is missing or not what it must be, a part of
/// a head that transformers cannot compute.
pub fn read(config: &Value, around: &Around) -> Result<Rotary> {
    let usual = Usual::of(around);
    let older = object(config, "rope_scaling")?.filter(|fields| !fields.is_empty());
    let newer = object(config, "rope_parameters")?;
    let own = newer.and_then(|fields| fields.get("full_attention")).and_then(Value::as_object);
    let empty = Map::new();
    let merged;
    // The older field wins where both are, as in transformers; by kinds of layers it is laid over the newer one.
    let (name, fields) = match (older, newer) {
        (Some(older), _) if usual.by_layers => {
            merged = own.into_iter().chain([older]).flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
            ("rope_scaling", &merged)
        }
        (Some(older), _) => ("rope_scaling", older),
        (None, Some(_)) if usual.by_layers => ("rope_parameters", own.unwrap_or(&empty)),
        (None, Some(newer)) => ("rope_parameters", own.unwrap_or(newer)),
        (None, None) => ("rope_scaling", &empty),
    };
    rotary(Reader { name, fields, config }, around, &usual)
}

/// Reads the rotation of layers with a window, where a family has one for them: `rope_parameters`, or the older
/// `rope_local_base_freq`, unscaled. Errors as [`read`].
pub fn read_local(config: &Value, around: &Around) -> Result<Option<Rotary>> {
    let mut usual = Usual::of(around);
    if !usual.by_layers {
        return Ok(None);
    }
    let own = object(config, "rope_parameters")?.and_then(|fields| fields.get("sliding_attention"));
    let empty = Map::new();
    let fields = own.and_then(Value::as_object).unwrap_or(&empty);
    usual.theta =
        Reader { name: "config", fields: &empty, config }.number_or("rope_local_base_freq", LOCAL_THETA)?;
    // What else stands in config.json itself is of the other layers.
    rotary(Reader { name: "rope_parameters", fields, config: &Value::Null }, around, &usual).map(Some)
}

/// Base of Gemma 3's layers with a window.
pub const LOCAL_THETA: f64 = 1e4;

fn object<'a>(config: &'a Value, name: &str) -> Result<Option<&'a Map<String, Value>>> {
    match config.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(fields)) => Ok(Some(fields)),
        Some(_) => Err(Error::data(format!("\"{name}\" must be an object"))),
    }
}

fn rotary(reader: Reader, around: &Around, usual: &Usual) -> Result<Rotary> {
    let theta = reader.number_or("rope_theta", usual.theta)?;
    let size = |part: f64| (around.head_dim as f64 * part) as usize;
    let Some(part) = usual.part else {
        let scaling = scaling(&reader, around, usual, around.head_dim)?;
        // Without a stretch transformers does not look at it; with one it computes a table that does not fit the head.
        if scaling != Scaling::Default {
            let part = reader.number_or("partial_rotary_factor", 1.0)?;
            if size(part) != around.head_dim {
                let what = format!("partial_rotary_factor {part} with a scaling of the rotation");
                return Err(Error::data(format!("{what} is not supported: this family turns whole heads")));
            }
        }
        return Ok(Rotary { dim: around.head_dim, theta, scaling });
    };
    let part = reader.number_or("partial_rotary_factor", part)?;
    let dim = size(part);
    if !(part <= 1.0 && dim >= 2 && dim.is_multiple_of(2)) {
        let what = format!("partial_rotary_factor {part} of head_dim {} is no even size", around.head_dim);
        return Err(Error::data(what));
    }
    Ok(Rotary { dim, theta, scaling: scaling(&reader, around, usual, dim)? })
}

/// The names of the ways that are known, for refusals.
const KNOWN: &str = "default, linear, dynamic, llama3, yarn, longrope";

fn scaling(reader: &Reader, around: &Around, usual: &Usual, dim: usize) -> Result<Scaling> {
    let (name, fields, max_positions) = (reader.name, reader.fields, around.max_positions as f64);
    let kind = fields.get("rope_type").or_else(|| fields.get("type")).filter(|kind| !kind.is_null());
    let Some(kind) = kind else {
        // Without a type a factor would be a form that is not known here.
        return match fields.get("factor") {
            None => Ok(Scaling::Default),
            Some(_) => Err(Error::data(format!("\"{name}\" has a factor and no \"rope_type\""))),
        };
    };
    let shown = || short(kind);
    let known = ["default", "longrope", "su", "yarn"];
    if usual.yarn_is_long && !kind.as_str().is_some_and(|kind| known.contains(&kind)) {
        return Err(Error::data(format!("{name} of type {} is not supported for this family", shown()))
            .with_hint("supported: default, longrope"));
    }
    let original = || reader.number_or("original_max_position_embeddings", usual.original);
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
                    "\"{name}\": low_freq_factor must be below high_freq_factor"
                )));
            }
            Ok(Scaling::Llama3 { factor: reader.number("factor")?, low, high, original: original()? })
        }
        "yarn" if usual.yarn_is_long => long(reader, dim, original()?, max_positions),
        "yarn" => yarn(reader, original()?, max_positions),
        // Phi-3's first files call it su.
        "longrope" | "su" => long(reader, dim, original()?, max_positions),
        _ => Err(Error::data(format!("{name} of type {} is not supported", shown()))
            .with_hint(format!("supported: {KNOWN}"))),
    }
}

fn yarn(reader: &Reader, original: f64, max_positions: f64) -> Result<Scaling> {
    let factor = reader.number_or("factor", max_positions / original)?;
    let attention =
        match (reader.maybe("attention_factor")?, reader.maybe("mscale")?, reader.maybe("mscale_all_dim")?) {
            (Some(given), _, _) => given,
            (None, Some(one), Some(all)) => yarn_attention(factor, one) / yarn_attention(factor, all),
            _ => yarn_attention(factor, 1.0),
        };
    let truncate = match reader.fields.get("truncate") {
        None | Some(Value::Null) => true,
        Some(value) => value.as_bool().ok_or_else(|| reader.wrong("truncate", "true or false", value))?,
    };
    let [fast, slow] = YARN_BETAS;
    let (fast, slow) = (reader.number_or("beta_fast", fast)?, reader.number_or("beta_slow", slow)?);
    Ok(Scaling::Yarn { factor, attention, fast, slow, truncate, original })
}

fn long(reader: &Reader, dim: usize, original: f64, max_positions: f64) -> Result<Scaling> {
    let factor = reader.number_or("factor", max_positions / original)?;
    let attention = reader.maybe("attention_factor")?.unwrap_or_else(|| long_attention(factor, original));
    let (short, long) = (reader.divisors("short_factor", dim / 2)?, reader.divisors("long_factor", dim / 2)?);
    Ok(Scaling::Long { short, long, attention, original })
}

/// Fields of the object, or of config.json around it.
struct Reader<'a> {
    name: &'static str,
    fields: &'a Map<String, Value>,
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
        let missing = || Error::data(format!("\"{}\" has no \"{field}\"", self.name));
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
            Error::data(format!("\"{}\": \"{field}\" must be {count} numbers above 0", self.name))
        })
    }

    fn wrong(&self, field: &str, expected: &str, found: &Value) -> Error {
        Error::data(format!("\"{field}\" must be {expected}, found {}", short(found)))
    }
}
