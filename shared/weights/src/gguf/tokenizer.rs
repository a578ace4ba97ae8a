//! tokenizer.json, special tokens and chat template in llama.cpp's keys.
//!
//! Two kinds: byte-level BPE ("gpt2": tokens, merges, and the name of the splitting rule) and BPE with byte fallback ("llama": tokens with
//! scores, which order the merges). The splitting rule is told by its regular expression.

use super::splitting::Rule;
use kto_cli::{Context, Error, Result, Ui, escape};
use kto_formats::{gguf::GgufValue, tensors::Map};
use serde_json::Value;
use std::{collections::HashMap, path::Path};

/// Longest JSON file of a tokenizer, in bytes.
const MAX_JSON: usize = 256 << 20;

/// What of a tokenizer llama.cpp has no key for, as JSON, for the way back: everything but tokens and merges.
pub const DETAILS: &str = "kto.tokenizer";

/// Kinds of tokens in llama.cpp's numbers.
#[derive(Clone, Copy)]
enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// Returns the keys of the tokenizer in `directory`; none with a warning when there is none. `vocabulary` is the number of rows of the
/// embedding, to which the list of tokens is filled up. Errors (65): a tokenizer of another kind.
pub fn keys(directory: &Path, vocabulary: usize, ui: &Ui) -> Result<Vec<(String, GgufValue)>> {
    let path = directory.join("tokenizer.json");
    let Some(json) = read(&path)? else {
        ui.warn(format_args!(
            "{}: no tokenizer.json; the file will have no tokenizer",
            escape(&directory.display().to_string())
        ));
        return Ok(vec![("tokenizer.ggml.model".into(), GgufValue::String("no_vocab".into()))]);
    };
    let config = read(&directory.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
    let place = escape(&path.display().to_string());
    let mut keys = tokens(&json, vocabulary, ui).at(&place)?;
    let model = read(&directory.join("config.json"))?.unwrap_or(Value::Null);
    keys.push((DETAILS.into(), GgufValue::String(details(&json, &config, &model))));
    special(&json, &config, directory, &mut keys)?;
    if let Some(template) = template(directory, &config)? {
        keys.push(("tokenizer.chat_template".into(), GgufValue::String(template)));
    }
    Ok(keys)
}

fn read(path: &Path) -> Result<Option<Value>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = Map::open(path)?;
    let place = escape(&path.display().to_string());
    if bytes.len() > MAX_JSON {
        return Err(Error::data(format!("{place}: {} bytes of JSON, at most {MAX_JSON}", bytes.len())));
    }
    let value = serde_json::from_slice(&bytes);
    value.map(Some).map_err(|e| Error::data(format!("{place}: not JSON: {}", escape(&e.to_string()))))
}

/// Everything but tokens, merges and templates.
fn details(json: &Value, config: &Value, model: &Value) -> String {
    let without = |value: &Value, fields: &[&str]| {
        let all = value.as_object().into_iter().flatten();
        let kept = all.filter(|(field, _)| !fields.contains(&field.as_str()));
        Value::Object(kept.map(|(field, value)| (field.clone(), value.clone())).collect())
    };
    let mut all = without(json, &["model", "version", "truncation", "padding"]);
    all["model"] = without(&json["model"], &["vocab", "merges"]);
    if config.is_object() {
        all["config"] = without(config, &["chat_template"]);
        // transformers takes tokenizer.json as it is written for this model type, which the file may not keep.
        if model["model_type"] == "mistral" {
            all["config"]["tokenizer_class"] = "PreTrainedTokenizerFast".into();
        }
    }
    all.to_string()
}

fn tokens(json: &Value, vocabulary: usize, ui: &Ui) -> Result<Vec<(String, GgufValue)>> {
    let model = &json["model"];
    let (Some(vocab), true) = (model["vocab"].as_object(), model["type"] == "BPE") else {
        return Err(Error::data(format!(
            "a tokenizer of type {} cannot be written as GGUF, only BPE",
            escape(&model["type"].to_string())
        )));
    };
    let fallback = model["byte_fallback"] == true;
    let unknown = model["unk_token"].as_str();
    let mut list: Vec<Option<(String, Kind)>> = vec![None; vocabulary];
    let mut place = |id: Option<u64>, text: &str, kind: Kind| -> Result<()> {
        let slot = id.and_then(|id| list.get_mut(id as usize));
        let slot = slot.ok_or_else(|| {
            Error::data(format!("token \"{}\" has no row in the embedding of {vocabulary}", escape(text)))
        })?;
        *slot = Some((text.to_string(), kind));
        Ok(())
    };
    for (text, id) in vocab {
        let byte = fallback && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        let kind = match () {
            () if byte => Kind::Byte,
            () if fallback && unknown == Some(text) => Kind::Unknown,
            () => Kind::Normal,
        };
        place(id.as_u64(), text, kind)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let text = added["content"].as_str().unwrap_or_default();
        let kind = match added["special"] == true {
            true if fallback && unknown == Some(text) => Kind::Unknown,
            true => Kind::Control,
            false => Kind::UserDefined,
        };
        place(added["id"].as_u64(), text, kind)?;
    }
    let filled: Vec<(String, Kind)> = list
        .into_iter()
        .enumerate()
        .map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), Kind::Unused)))
        .collect();
    let merges = merges(model)?;
    let pairs = || GgufValue::Strings(merges.iter().map(|(a, b)| format!("{a} {b}")).collect());
    let mut keys: Vec<(String, GgufValue)> = Vec::new();
    let mut put = |key: &str, value| keys.push((format!("tokenizer.ggml.{key}"), value));
    if fallback {
        put("model", GgufValue::String("llama".into()));
        put("pre", GgufValue::String("default".into()));
        put("scores", GgufValue::Floats(scores(&filled, &merges)));
        let prefix = json["normalizer"].to_string().contains("\"Prepend\"")
            || json["pre_tokenizer"]["prepend_scheme"].as_str().is_some_and(|scheme| scheme != "never");
        put("add_space_prefix", GgufValue::Bool(prefix));
        // llama.cpp goes by the scores; other readers, and the way back, find the same merges here.
        put("merges", pairs());
    } else {
        put("model", GgufValue::String("gpt2".into()));
        let rule = Rule::name_of(&json["pre_tokenizer"]);
        if rule.is_none() {
            ui.warn("tokenizer.json: its splitting rule is none that llama.cpp is known to have; llama.cpp may tokenize otherwise");
        }
        put("pre", GgufValue::String(rule.unwrap_or("default").into()));
        put("merges", pairs());
    }
    put("token_type", GgufValue::Ints(filled.iter().map(|(_, kind)| *kind as i32).collect()));
    put("tokens", GgufValue::Strings(filled.into_iter().map(|(text, _)| text).collect()));
    Ok(keys)
}

/// The merges, in order; files have them as texts or as pairs.
fn merges(model: &Value) -> Result<Vec<(String, String)>> {
    let bad = |merge: &Value| Error::data(format!("merge {} is no pair", escape(&merge.to_string())));
    let mut merges = Vec::new();
    for merge in model["merges"].as_array().into_iter().flatten() {
        let pair = match merge {
            Value::String(text) => text.split_once(' '),
            Value::Array(pair) if pair.len() == 2 => pair[0].as_str().zip(pair[1].as_str()),
            _ => None,
        };
        let (a, b) = pair.ok_or_else(|| bad(merge))?;
        merges.push((a.to_string(), b.to_string()));
    }
    Ok(merges)
}

/// llama.cpp joins the pair whose joined token has the highest score, so the first merge scores highest.
fn scores(tokens: &[(String, Kind)], merges: &[(String, String)]) -> Vec<f32> {
    let mut rank: HashMap<String, usize> = HashMap::new();
    for (i, (a, b)) in merges.iter().enumerate() {
        rank.entry(format!("{a}{b}")).or_insert(i);
    }
    let score = |(text, kind): &(String, Kind)| match (rank.get(text), kind) {
        (Some(rank), _) => -(*rank as f32),
        (None, Kind::Normal) => -(merges.len() as f32) - 1.0,
        (None, _) => 0.0,
    };
    tokens.iter().map(score).collect()
}

/// Adds the special tokens and whether one is put before every text.
fn special(
    json: &Value,
    config: &Value,
    directory: &Path,
    keys: &mut Vec<(String, GgufValue)>,
) -> Result<()> {
    let id_of = |text: &str| {
        let added = json["added_tokens"].as_array().into_iter().flatten().find(|t| t["content"] == text);
        added.map_or_else(|| json["model"]["vocab"][text].as_u64(), |t| t["id"].as_u64())
    };
    let named = |key: &str| {
        let value = &config[key];
        let text = value.as_str().or_else(|| value["content"].as_str())?;
        id_of(text)
    };
    let model = read(&directory.join("config.json"))?.unwrap_or(Value::Null);
    let stated = |key: &str| model[key].as_u64().or_else(|| model[key][0].as_u64());
    let bos = named("bos_token").or_else(|| stated("bos_token_id"));
    let ids = [
        ("bos_token_id", bos),
        ("eos_token_id", named("eos_token").or_else(|| stated("eos_token_id"))),
        ("unknown_token_id", named("unk_token")),
        ("padding_token_id", named("pad_token")),
    ];
    for (key, id) in ids {
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()) {
            keys.push((format!("tokenizer.ggml.{key}"), GgufValue::U32(id)));
        }
    }
    let first = &json["post_processor"];
    let step = match first["type"].as_str() {
        Some("Sequence") => first["processors"]
            .as_array()
            .and_then(|all| all.iter().find(|p| p["type"] == "TemplateProcessing")),
        _ => Some(first),
    };
    let begins = step.and_then(|s| s["single"][0]["SpecialToken"]["id"].as_str()).and_then(id_of);
    let adds = begins.is_some() && begins == bos;
    keys.push(("tokenizer.ggml.add_bos_token".into(), GgufValue::Bool(adds)));
    keys.push(("tokenizer.ggml.add_eos_token".into(), GgufValue::Bool(false)));
    Ok(())
}

/// The chat template: a file of its own, or an entry of tokenizer_config.json, of several the one called default.
fn template(directory: &Path, config: &Value) -> Result<Option<String>> {
    let path = directory.join("chat_template.jinja");
    if path.exists() {
        let bytes = Map::open(&path)?;
        let text = std::str::from_utf8(&bytes);
        let text = text.map_err(|_| Error::data("not UTF-8")).at(escape(&path.display().to_string()))?;
        return Ok(Some(text.to_string()));
    }
    let value = &config["chat_template"];
    let named = value.as_array().into_iter().flatten().find(|t| t["name"] == "default");
    Ok(value.as_str().or_else(|| named?["template"].as_str()).map(str::to_string))
}
