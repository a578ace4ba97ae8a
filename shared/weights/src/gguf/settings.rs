//! config.json in llama.cpp's keys.

use super::{
    names::Family,
    types::{self, FileType},
};
use kto_cli::{Error, Result, escape};
use kto_formats::gguf::GgufValue;
use serde_json::Value;

/// Reads a field that must be a positive count.
pub fn count(config: &Value, field: &str) -> Result<usize> {
    let value = config.get(field).and_then(Value::as_u64).filter(|n| (1..=u64::from(u32::MAX)).contains(n));
    value
        .map(|n| n as usize)
        .ok_or_else(|| Error::data(format!("\"{field}\" must be a positive whole number")))
}

fn float(config: &Value, field: &str, default: f64) -> Result<f32> {
    match config.get(field) {
        None | Some(Value::Null) => Ok(default as f32),
        Some(v) => v.as_f64().filter(|x| x.is_finite()).map(|x| x as f32).ok_or_else(|| {
            Error::data(format!("\"{field}\" must be a number, found {}", escape(&v.to_string())))
        }),
    }
}

/// Returns the keys of the decoder. Errors (65): a missing field, a rotary embedding of a kind that is not the default.
pub fn keys(config: &Value, family: &Family, file: FileType) -> Result<Vec<(String, GgufValue)>> {
    let architecture = family.architecture;
    let hidden = count(config, "hidden_size")?;
    let dim = match config.get("head_dim") {
        None | Some(Value::Null) => hidden / family.heads,
        Some(_) => count(config, "head_dim")?,
    };
    let context = match config.get("max_position_embeddings") {
        None | Some(Value::Null) => 2048,
        Some(_) => count(config, "max_position_embeddings")?,
    };
    let number = |n: usize| GgufValue::U32(n as u32);
    let text = |t: &str| GgufValue::String(t.into());
    let own = |key: &str| format!("{architecture}.{key}");
    Ok(vec![
        ("general.architecture".into(), text(architecture)),
        ("general.type".into(), text("model")),
        ("general.file_type".into(), GgufValue::U32(types::file_number(file))),
        ("general.quantization_version".into(), GgufValue::U32(2)),
        (own("block_count"), number(family.blocks)),
        (own("context_length"), number(context)),
        (own("embedding_length"), number(hidden)),
        (own("feed_forward_length"), number(count(config, "intermediate_size")?)),
        (own("attention.head_count"), number(family.heads)),
        (own("attention.head_count_kv"), number(family.kv_heads)),
        (own("attention.key_length"), number(dim)),
        (own("attention.value_length"), number(dim)),
        (own("attention.layer_norm_rms_epsilon"), GgufValue::F32(float(config, "rms_norm_eps", 1e-6)?)),
        (own("rope.dimension_count"), number(dim)),
        (own("rope.freq_base"), GgufValue::F32(rope_base(config)?)),
        (own("vocab_size"), number(family.vocabulary)),
    ])
}

/// The rotary base, in either form: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling`.
fn rope_base(config: &Value) -> Result<f32> {
    for field in ["rope_parameters", "rope_scaling"] {
        let Some(rope) = config.get(field).filter(|v| !v.is_null()) else { continue };
        let kind = rope.get("rope_type").or_else(|| rope.get("type"));
        let plain = kind.map_or(rope.get("factor").is_none(), |kind| kind == "default");
        if !plain {
            let found = escape(&kind.unwrap_or(rope).to_string());
            return Err(Error::data(format!("{field} of type {found} cannot be written as GGUF here")));
        }
    }
    match config.get("rope_parameters").filter(|p| p.get("rope_theta").is_some()) {
        Some(parameters) => float(parameters, "rope_theta", 10_000.0),
        None => float(config, "rope_theta", 10_000.0),
    }
}
