//! config.json and llama.cpp's keys: one table for both directions, and what is more than another name.

use super::{
    names::{Family, Kind},
    rope::Rope,
    types::{self, FileType},
};
use kto_cli::{Error, Result, escape};
use kto_formats::{
    gguf::{GgufReader, GgufValue},
    rope::Around,
};
use serde_json::{Map, Value, json};

/// A whole number of both: key behind the architecture, field of config.json, and the value that is not written down.
const COUNTS: [(&str, &str, Option<usize>); 6] = [
    ("block_count", "num_hidden_layers", None),
    ("context_length", "max_position_embeddings", Some(2048)),
    ("embedding_length", "hidden_size", None),
    ("feed_forward_length", "intermediate_size", None),
    ("attention.head_count", "num_attention_heads", None),
    ("attention.head_count_kv", "num_key_value_heads", Some(0)),
];
/// A soft cap of both: Gemma's. The last is Gemma 2's when its configuration does not say.
const CAPS: [(&str, &str, f64); 2] = [
    ("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", "final_logit_softcapping", 30.0),
];
const WINDOW: &str = "attention.sliding_window";
const PATTERN: &str = "attention.sliding_window_pattern";
/// Largest count that a file may have.
const LARGEST: u32 = 1 << 24;

/// The key and the field of the norms' epsilon, and the usual value.
fn epsilon(kind: &Kind) -> (&'static str, &'static str, f64) {
    match () {
        () if kind.layer_norm => ("attention.layer_norm_epsilon", "layer_norm_eps", 1e-5),
        () if kind.fused => ("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-5),
        () => ("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-6),
    }
}

/// Every how many layers one sees everything, in llama.cpp, where the file does not say.
fn usual_period(kind: &Kind) -> usize {
    if kind.model_type == "gemma2" { 2 } else { 6 }
}

/// The number that llama.cpp scales Gemma's queries by: the root of this is divided by.
fn query_scalar(kind: &Kind, blocks: usize, hidden: usize, heads: usize, head_dim: usize) -> usize {
    // The largest of each is told by its blocks.
    let largest = if kind.model_type == "gemma2" { 46 } else { 62 };
    if blocks == largest { hidden / heads.max(1) } else { head_dim }
}

fn present<'a>(config: &'a Value, field: &str) -> Option<&'a Value> {
    config.get(field).filter(|v| !v.is_null())
}

/// Reads a field that must be a positive count.
pub fn count(config: &Value, field: &str) -> Result<usize> {
    let value = config.get(field).and_then(Value::as_u64).filter(|n| (1..=u64::from(u32::MAX)).contains(n));
    value
        .map(|n| n as usize)
        .ok_or_else(|| Error::data(format!("\"{field}\" must be a positive whole number")))
}

fn float(config: &Value, field: &str, default: f64) -> Result<f32> {
    match present(config, field) {
        None => Ok(default as f32),
        Some(v) => v.as_f64().filter(|x| x.is_finite()).map(|x| x as f32).ok_or_else(|| {
            Error::data(format!("\"{field}\" must be a number, found {}", escape(&v.to_string())))
        }),
    }
}

/// What config.json says in llama.cpp's terms.
pub struct Settings {
    /// Keys of the file.
    pub keys: Vec<(String, GgufValue)>,
    /// Tensors of the file that are no weights.
    pub tensors: Vec<(&'static str, Vec<f32>)>,
    /// Where llama.cpp computes something else.
    pub notes: Vec<String>,
}

/// Returns what is written of a configuration. Errors (65): a missing field, something that llama.cpp does not have.
pub fn write(config: &Value, family: &Family, file: FileType) -> Result<Settings> {
    let kind = family.kind;
    let number = |n: usize| GgufValue::U32(n as u32);
    let text = |t: &str| GgufValue::String(t.into());
    let own = |key: &str| format!("{}.{key}", kind.architecture);
    let mut keys = vec![
        ("general.architecture".into(), text(kind.architecture)),
        ("general.type".into(), text("model")),
        ("general.file_type".into(), GgufValue::U32(types::file_number(file))),
        ("general.quantization_version".into(), GgufValue::U32(2)),
    ];
    for (key, field, default) in COUNTS {
        let value = match (present(config, field), default) {
            (None, Some(0)) => family.heads,
            (None, Some(default)) => default,
            _ => count(config, field)?,
        };
        keys.push((own(key), number(value)));
    }
    let hidden = count(config, "hidden_size")?;
    let own_default = match kind.model_type {
        "qwen3" => 128,
        "gemma2" | "gemma3_text" => 256,
        _ => hidden / family.heads.max(1),
    };
    let dim = if present(config, "head_dim").is_some() { count(config, "head_dim")? } else { own_default };
    if matches!(kind.model_type, "phi3" | "stablelm") && dim * family.heads != hidden {
        return Err(Error::data(format!("heads of {dim} do not make up hidden_size {hidden}")));
    }
    let context = present(config, "max_position_embeddings").and_then(Value::as_u64).unwrap_or(2048);
    let rope = Rope::of(
        config,
        kind,
        &Around { model_type: kind.model_type, head_dim: dim, max_positions: context as usize },
    )?;
    let (key, field, default) = epsilon(kind);
    keys.extend([
        (own("attention.key_length"), number(dim)),
        (own("attention.value_length"), number(dim)),
        (own(key), GgufValue::F32(float(config, field, default)?)),
        (own("vocab_size"), number(family.vocabulary)),
    ]);
    keys.extend(rope.keys().into_iter().map(|(key, value)| (own(key), value)));
    let mut notes = Vec::new();
    for (key, value) in layers(config, family, hidden, dim, &mut notes)? {
        keys.push((own(key), value));
    }
    Ok(Settings { keys, tensors: rope.tensors(), notes })
}

/// Windows, caps and variants.
fn layers(
    config: &Value,
    family: &Family,
    hidden: usize,
    dim: usize,
    notes: &mut Vec<String>,
) -> Result<Vec<(&'static str, GgufValue)>> {
    let kind = family.kind;
    let refuse = |what: String| Err(Error::data(format!("{what} cannot be written as GGUF")));
    let field = if kind.gemma { "hidden_activation" } else { "hidden_act" };
    let expected = if kind.gemma { "gelu_pytorch_tanh" } else { "silu" };
    if let Some(found) = present(config, field).filter(|v| *v != expected) {
        return refuse(format!("{field} {}", escape(&found.to_string())));
    }
    for variant in ["use_parallel_residual", "qk_layernorm", "use_bidirectional_attention"] {
        if config.get(variant) == Some(&Value::Bool(true)) {
            return refuse(variant.into());
        }
    }
    let mut keys = Vec::new();
    let window = match config.get("sliding_window") {
        // transformers' default; Phi 3 has none.
        None => Some(4096).filter(|_| kind.model_type != "phi3"),
        Some(Value::Null) => None,
        Some(_) => Some(count(config, "sliding_window")?),
    };
    let context = present(config, "max_position_embeddings").and_then(Value::as_u64);
    let mut ignored = |window: usize| {
        if context.is_none_or(|context| (window as u64) < context) {
            let what = format!("llama.cpp does not compute the window of {window} positions of this decoder");
            notes.push(format!("{what}: beyond them its results are others"));
        }
    };
    match kind.model_type {
        "stablelm" => keys.push(("use_parallel_residual", GgufValue::Bool(false))),
        "phi3" => {
            window.into_iter().for_each(&mut ignored);
            keys.push((WINDOW, GgufValue::U32(window.unwrap_or(0) as u32)));
        }
        "mistral" => {
            if let Some(window) = window {
                ignored(window);
                keys.push((WINDOW, GgufValue::U32(window as u32)));
            }
        }
        "qwen2" | "qwen3" if config.get("use_sliding_window") == Some(&Value::Bool(true)) => {
            window.into_iter().for_each(ignored);
        }
        _ if kind.gemma => keys.extend(gemma_layers(config, family, (hidden, dim), window)?),
        _ => {}
    }
    Ok(keys)
}

/// What Gemma alone has: a scale of heads, alternating windows, caps.
fn gemma_layers(
    config: &Value,
    family: &Family,
    (hidden, dim): (usize, usize),
    window: Option<usize>,
) -> Result<Vec<(&'static str, GgufValue)>> {
    let kind = family.kind;
    let refuse = |what: String| Err(Error::data(format!("{what} cannot be written as GGUF")));
    let mut keys = Vec::new();
    let scalar = float(config, "query_pre_attn_scalar", 256.0)?;
    let theirs = query_scalar(kind, family.blocks, hidden, family.heads, dim);
    if scalar != theirs as f32 {
        return refuse(format!("query_pre_attn_scalar {scalar} (llama.cpp has {theirs} there)"));
    }
    let period = period(config, family)?;
    if period != usual_period(kind) {
        keys.push((PATTERN, GgufValue::U32(period as u32)));
    }
    // With a period of 1 there is no window anywhere.
    if period > 1 {
        keys.push((WINDOW, GgufValue::U32(window.unwrap_or(4096) as u32)));
    }
    for (key, field, default) in CAPS {
        // transformers looks at the first in Gemma 2 alone.
        if kind.model_type != "gemma2" && key.starts_with("attn") {
            continue;
        }
        let default = if kind.model_type == "gemma2" { Some(default) } else { None };
        let value = match config.get(field) {
            None => default,
            Some(Value::Null) => None,
            Some(_) => Some(f64::from(float(config, field, 0.0)?)),
        };
        match value {
            Some(cap) => keys.push((key, GgufValue::F32(cap as f32))),
            // llama.cpp caps where nothing is said.
            None if kind.model_type == "gemma2" => return refuse(format!("no {field}")),
            None => {}
        }
    }
    Ok(keys)
}

/// Every how many layers one sees everything, the last of them.
fn period(config: &Value, family: &Family) -> Result<usize> {
    let usual = usual_period(family.kind);
    let stated = ["sliding_window_pattern", "_sliding_window_pattern"];
    let Some(list) = present(config, "layer_types") else {
        let field = stated.iter().find(|field| present(config, field).is_some());
        return field.map_or(Ok(usual), |field| count(config, field));
    };
    let layers: Option<Vec<bool>> = list.as_array().and_then(|list| {
        let sliding = |v: &Value| match v.as_str()? {
            "sliding_attention" => Some(true),
            "full_attention" => Some(false),
            _ => None,
        };
        list.iter().map(sliding).collect()
    });
    let layers = layers.filter(|list| list.len() == family.blocks);
    let fits = |list: &[bool], period: usize| {
        list.iter().enumerate().all(|(i, sliding)| *sliding != (i + 1).is_multiple_of(period))
    };
    let found = layers.and_then(|list| {
        std::iter::once(usual).chain(1..=family.blocks + 1).find(|period| fits(&list, *period))
    });
    found.ok_or_else(|| Error::data("layer_types of no regular order cannot be written as GGUF"))
}

/// Reads a number of a file. Errors (65): another kind of value, or one that is not above 0.
pub fn number(file: &GgufReader, key: &str) -> Result<Option<f64>> {
    let value = match file.get(key) {
        Some(GgufValue::U32(n)) => f64::from(*n),
        Some(GgufValue::F32(v)) => shortest(*v),
        None if !file.has(key) => return Ok(None),
        _ => f64::NAN,
    };
    match value > 0.0 && value.is_finite() {
        true => Ok(Some(value)),
        false => Err(Error::data(format!("\"{}\" must be a number above 0", escape(key)))),
    }
}

/// Returns the f64 that is written as the f32 is.
fn shortest(v: f32) -> f64 {
    v.to_string().parse().unwrap_or(f64::from(v))
}

/// Returns a number for config.json.
pub fn decimal(v: f64) -> Value {
    json!(v)
}

/// Returns the values of an F32 vector of the file, which must be so many numbers above 0; none when there is no such tensor.
pub fn tensor_floats(file: &GgufReader, name: &str, length: usize) -> Result<Option<Vec<f64>>> {
    let Some(entry) = file.tensors().get(name) else { return Ok(None) };
    let bad = || Error::data(format!("tensor \"{name}\" must be {length} numbers above 0 in F32"));
    if entry.kind != 0 || entry.shape != [length] {
        return Err(bad());
    }
    let values = file.bytes(entry).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
    let values: Vec<f64> = values.map(shortest).collect();
    if values.iter().all(|v| *v > 0.0 && v.is_finite()) { Ok(Some(values)) } else { Err(bad()) }
}

fn file_count(file: &GgufReader, key: &str) -> Result<Option<usize>> {
    match file.get(key) {
        None if !file.has(key) => Ok(None),
        Some(GgufValue::U32(n)) if (1..=LARGEST).contains(n) => Ok(Some(*n as usize)),
        _ => {
            let key = escape(key);
            Err(Error::data(format!("\"{key}\" must be one whole number from 1 to {LARGEST}")))
        }
    }
}

/// Reads a file: the decoder, and the fields of config.json that its keys give. `rows` are those of the embedding, `has` says whether there
/// is a tensor. Errors (65): a key that is missing or what transformers does not have.
pub fn read(
    file: &GgufReader,
    rows: usize,
    has: &dyn Fn(&str) -> bool,
) -> Result<(Family, Map<String, Value>)> {
    let kind = Kind::of_file(file)?;
    let own = |key: &str| format!("{}.{key}", kind.architecture);
    let mut config = Map::new();
    let mut sizes = Vec::new();
    for (key, field, default) in COUNTS {
        let value = match (file_count(file, &own(key))?, default) {
            (Some(value), _) => value,
            // As many as query heads, which come before.
            (None, Some(0)) => sizes.last().copied().unwrap_or(1),
            (None, _) => return Err(Error::data(format!("no \"{}\"", own(key)))),
        };
        sizes.push(value);
        config.insert(field.into(), json!(value));
    }
    let [blocks, context, hidden, _, heads, kv_heads] = sizes[..] else {
        return Err(Error::internal("a table of six counts"));
    };
    if blocks > file.tensors().len() {
        return Err(Error::data(format!("{blocks} blocks, {} tensors", file.tensors().len())));
    }
    let family = Family { kind, heads, kv_heads, blocks, vocabulary: rows };
    let dim = file_count(file, &own("attention.key_length"))?.unwrap_or(hidden / heads);
    if file_count(file, &own("attention.value_length"))?.is_some_and(|value| value != dim) {
        return Err(Error::data("values have another head size than keys, which transformers does not have"));
    }
    if dim == 0 || !dim.is_multiple_of(2) || !heads.is_multiple_of(kv_heads) {
        return Err(Error::data(format!("{heads} heads of {dim}, {kv_heads} of keys: they do not fit")));
    }
    if !kind.own_head_dim && dim * heads != hidden {
        return Err(Error::data(format!("{heads} heads of {dim} do not make up {hidden} columns")));
    }
    let (key, field, _) = epsilon(kind);
    let eps = number(file, &own(key))?.ok_or_else(|| Error::data(format!("no \"{}\"", own(key))))?;
    let mut put = |field: &str, value: Value| config.insert(field.into(), value);
    put(field, decimal(eps));
    put("architectures", json!([kind.class]));
    put("model_type", json!(kind.model_type));
    put("vocab_size", json!(rows));
    put("tie_word_embeddings", json!(!has("output.weight")));
    put("use_cache", json!(true));
    if kind.own_head_dim {
        put("head_dim", json!(dim));
    }
    biases(kind, has, &mut config);
    read_layers(file, &family, (hidden, dim), &mut config)?;
    let around = Around { model_type: kind.model_type, head_dim: dim, max_positions: context };
    Rope::of_file(file, kind, &around)?.put(kind, &around, &mut config);
    Ok((family, config))
}

fn biases(kind: &Kind, has: &dyn Fn(&str) -> bool, config: &mut Map<String, Value>) {
    let queries = has("blk.0.attn_q.bias");
    let mut put = |field: &str, value: Value| config.insert(field.into(), value);
    match kind.model_type {
        "llama" => {
            put("attention_bias", json!(queries));
            put("mlp_bias", json!(has("blk.0.ffn_up.bias")));
        }
        "qwen3" | "gemma2" | "gemma3_text" => {
            put("attention_bias", json!(queries));
        }
        "stablelm" => {
            put("use_qkv_bias", json!(queries));
            put("use_parallel_residual", json!(false));
            put("qk_layernorm", json!(false));
        }
        _ => {}
    }
    let (field, value) =
        if kind.gemma { ("hidden_activation", "gelu_pytorch_tanh") } else { ("hidden_act", "silu") };
    put(field, json!(value));
}

/// Windows and caps.
fn read_layers(
    file: &GgufReader,
    family: &Family,
    (hidden, dim): (usize, usize),
    config: &mut Map<String, Value>,
) -> Result<()> {
    let kind = family.kind;
    let own = |key: &str| format!("{}.{key}", kind.architecture);
    let mut put = |field: &str, value: Value| config.insert(field.into(), value);
    // Zero says that there is none.
    let window = match file.get(&own(WINDOW)) {
        Some(GgufValue::U32(0)) => None,
        _ => file_count(file, &own(WINDOW))?,
    };
    match kind.model_type {
        "mistral" | "phi3" => {
            put("sliding_window", json!(window));
        }
        "qwen2" | "qwen3" => {
            put("use_sliding_window", json!(false));
        }
        _ if !kind.gemma => {}
        _ => {
            let period = match file.get(&own(PATTERN)) {
                Some(GgufValue::U32(period)) if *period > 0 => *period as usize,
                None if !file.has(&own(PATTERN)) && window.is_none() && kind.model_type == "gemma3_text" => 1,
                None if !file.has(&own(PATTERN)) => usual_period(kind),
                _ => return Err(Error::data(format!("\"{}\" must be a whole number above 0", own(PATTERN)))),
            };
            let name = |i: usize| {
                if (i + 1).is_multiple_of(period) { "full_attention" } else { "sliding_attention" }
            };
            put("layer_types", (0..family.blocks).map(name).collect());
            put("sliding_window", json!(window.unwrap_or(4096)));
            let scalar = query_scalar(kind, family.blocks, hidden, family.heads, dim);
            put("query_pre_attn_scalar", json!(scalar));
            for (key, field, default) in CAPS {
                // llama.cpp caps Gemma 2 where the file says nothing.
                let default = Some(default).filter(|_| kind.model_type == "gemma2");
                put(field, number(file, &own(key))?.or(default).map_or(Value::Null, decimal));
            }
        }
    }
    Ok(())
}
