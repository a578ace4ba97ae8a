//! A model directory in Hugging Face form: config.json and safetensors weights, one file or sharded.
//!
//! Called by every tool that reads weights. Invariant: no file outside the directory is opened by a name that a
//! file of the directory gave (symbolic links inside it are followed: that is how download caches look).
//! Deliberately absent: pickle weights, GGUF (`gguf/read.rs`), remote code, the meaning of config.json (see `kto-model`). That a configuration asks for
//! remote code is found here, so that every tool that opens a model says so.

use crate::{
    gguf::{self, is_gguf},
    mmap::{Map, shown},
    safetensors_header::refuse_other_formats,
    tensors::{TensorStore, TensorView},
    text_part,
};
use kto_cli::{Context, Error, Kind, Result, escape, hash::Sha256Hex};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

type Object = serde_json::Map<String, Value>;

/// Longest JSON file of a model directory that is read, in bytes.
pub const MAX_JSON: u64 = 64 << 20;
/// Key of the source's fingerprint in the safetensors metadata of a quantized model, and in a GGUF file.
pub const QUANTIZED_FROM: &str = "kto.quantized_from";
/// Key of the list of merges in the safetensors metadata of a merged model, and in a GGUF file; also in what is made of it.
pub const MERGED_FROM: &str = "kto.merged_from";
/// Bytes of each end of a tensor that go into the fingerprint.
const SAMPLE: usize = 32 << 10;
/// Entries of config.json that say nothing about the weights.
const NOT_IDENTITY: [&str; 5] =
    ["transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"];

/// An open model directory.
pub struct ModelDir {
    /// The directory as given.
    pub path: PathBuf,
    /// config.json, always an object; of a model that takes images too that of its language model.
    pub config: Value,
    /// The weights.
    pub tensors: TensorStore,
    /// What was odd but harmless (an index with a wrong total, tensors that it does not name); for the tool to pass on.
    pub notes: Vec<String>,
    /// Whether it is the language model of one that takes images too ([`crate::text_part`]).
    pub is_part: bool,
}

impl ModelDir {
    /// Opens the directory and checks every header; reads no weights.
    /// Errors: 66 for a missing directory, config, weight file or shard; 65 for anything malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let kind = std::fs::metadata(path).map_err(|e| Error::reading(path, &e))?;
        if !kind.is_dir() {
            return Err(not_a_directory(path));
        }
        Self::with_config(path, read_json(&path.join("config.json"))?)
    }

    /// The same of a directory that has not got its config.json yet.
    pub fn with_config(path: &Path, config: Object) -> Result<Self> {
        refuse_remote_code(&config).at(shown(&path.join("config.json")))?;
        let mut notes = Vec::new();
        let mut tensors = open_weights(path, &mut notes)?;
        let part = text_part::config(&config);
        if let Some(part) = &part {
            refuse_remote_code(part).at(shown(&path.join("config.json")))?;
            let left = tensors.rename(text_part::name)?;
            notes.push(format!(
                "{}: the language model is used, {left} tensors of images are not",
                shown(path)
            ));
        }
        if tensors.is_empty() {
            return Err(Error::data(format!("{}: the weights hold no tensor", shown(path))));
        }
        let (is_part, mut config) = (part.is_some(), part.unwrap_or(config));
        if unties(&config, &tensors) {
            config.insert("tie_word_embeddings".into(), false.into());
            let text =
                "config.json ties the head to the embedding, the weights hold another head: that is used";
            notes.push(format!("{}: {text}", shown(path)));
        }
        let config = Value::Object(config);
        Ok(Self { path: path.into(), config, tensors, notes, is_part })
    }

    /// Returns the identity of the model: SHA-256 over config.json (without entries that do not touch the weights),
    /// every tensor's name, dtype and shape, and the first and last 32 KiB of each.
    /// Equal for one file and shards of the same weights. 64 hexadecimal digits; of a model that kto-quantize made,
    /// followed by `+` and the fingerprint of what it was made from.
    pub fn fingerprint(&self) -> String {
        let mut own = self.own_fingerprint();
        if let Some(source) = self.tensors.metadata().get(QUANTIZED_FROM) {
            own.push('+');
            own.push_str(source);
        }
        own
    }

    fn own_fingerprint(&self) -> String {
        let mut hash = Sha256Hex::new();
        if let Value::Object(config) = &self.config {
            let sorted: BTreeMap<_, _> =
                config.iter().filter(|(k, _)| !NOT_IDENTITY.contains(&k.as_str())).collect();
            for (key, value) in sorted {
                feed(&mut hash, key.as_bytes());
                feed(&mut hash, canonical(value).to_string().as_bytes());
            }
        }
        for view in self.tensors.views() {
            feed(&mut hash, view.name.as_bytes());
            feed(&mut hash, format!("{} {:?}", view.dtype, view.shape).as_bytes());
            let (head, tail) = samples(&view);
            feed(&mut hash, head);
            feed(&mut hash, tail);
            self.tensors.release(view.name);
        }
        hash.finish()
    }
}

/// Returns whether two fingerprints are of the same weights, or of quantizations of the same weights: an adapter that
/// was trained on the one may be merged into the other.
pub fn same_origin(a: &str, b: &str) -> bool {
    a.split('+').any(|x| b.split('+').any(|y| x == y))
}

/// Fails (2) when the output directory `out` is the input directory `input`, lies inside it or holds it: replacing the
/// output would remove the input. `-` is no directory (2).
pub fn refuse_output(out: &Path, input: &Path) -> Result<()> {
    if out == Path::new("-") {
        return Err(Error::usage("the output is a directory; it cannot go to standard output")
            .with_hint("./- is a directory of that name"));
    }
    let real = |path: &Path| {
        let existing = path.ancestors().find(|a| !a.as_os_str().is_empty() && a.exists());
        match existing.and_then(|a| Some((a.canonicalize().ok()?, path.strip_prefix(a).ok()?))) {
            Some((start, rest)) => start.join(rest),
            None => std::path::absolute(path).unwrap_or_else(|_| path.into()),
        }
    };
    let (real_out, real_input) = (real(out), real(input));
    if real_out.starts_with(&real_input) {
        return Err(Error::usage(format!("the output {} lies in the input {}", shown(out), shown(input))));
    }
    if real_input.starts_with(&real_out) {
        return Err(Error::usage(format!("the input {} lies in the output {}", shown(input), shown(out))));
    }
    Ok(())
}

/// Feeds a length-prefixed field, so that no two sequences of fields look alike.
fn feed(hash: &mut Sha256Hex, bytes: &[u8]) {
    hash.update(&(bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn samples<'a>(view: &TensorView<'a>) -> (&'a [u8], &'a [u8]) {
    let head = view.data.len().min(SAMPLE);
    let tail = view.data.len().saturating_sub(SAMPLE).max(head);
    (&view.data[..head], &view.data[tail..])
}

/// Returns whether a head that shall be the embedding is there beside it as something else; transformers takes it then. Looks at the ends.
fn unties(config: &Object, tensors: &TensorStore) -> bool {
    let kind = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let tied =
        config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(kind.starts_with("gemma"));
    let (head, embedding) = (tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight"));
    let Some((head, embedding)) = head.zip(embedding).filter(|_| tied) else { return false };
    let form = |view: &TensorView| (view.dtype, view.shape.to_vec());
    form(&head) == form(&embedding) && samples(&head) != samples(&embedding)
}

/// The value with the keys of every object sorted.
fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<_, _> = map.iter().collect();
            Value::Object(sorted.into_iter().map(|(k, v)| (k.clone(), canonical(v))).collect::<Object>())
        }
        Value::Array(items) => Value::Array(items.iter().map(canonical).collect()),
        other => other.clone(),
    }
}

/// Model types of transformers with their classes. Files that were published before transformers had them name the same class in `auto_map`.
const OWN_CLASSES: [(&str, &str); 8] = [
    ("llama", "LlamaForCausalLM"),
    ("mistral", "MistralForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
    ("phi3", "Phi3ForCausalLM"),
    ("gemma2", "Gemma2ForCausalLM"),
    ("gemma3_text", "Gemma3ForCausalLM"),
    ("stablelm", "StableLmForCausalLM"),
];

/// Fails (65) when a configuration asks for code that is not transformers' own: without it the weights cannot be known to mean what their
/// names say. Whoever looks at a configuration before there is a directory calls it too.
pub fn refuse_remote_code(config: &Object) -> Result<()> {
    let Some(map) = config.get("auto_map").filter(|map| !map.is_null()) else { return Ok(()) };
    let class = map.get("AutoModelForCausalLM").and_then(Value::as_str).unwrap_or_default();
    let class = class.rsplit('.').next().unwrap_or_default();
    let kind = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    if OWN_CLASSES.contains(&(kind, class)) {
        return Ok(());
    }
    Err(Error::data("\"auto_map\" asks for remote code, which is never run"))
}

fn not_a_directory(path: &Path) -> Error {
    match Map::open(path).and_then(|map| refuse_other_formats(&map)) {
        Err(e) if is_gguf(path) => Error::data(format!("{}: {e}", shown(path))).with_hint(gguf::HINT),
        Err(e) => Error::data(format!("{}: {e}", shown(path)))
            .with_hint("give a directory with config.json and safetensors weights"),
        Ok(()) => Error::new(Kind::NoInput, format!("{}: not a directory", shown(path)))
            .with_hint("give the directory that holds config.json"),
    }
}

/// Reads a JSON file of a model or adapter directory that must hold an object.
pub(crate) fn read_json(path: &Path) -> Result<Object> {
    let bytes = Map::open(path)?;
    if bytes.len() as u64 > MAX_JSON {
        return Err(Error::data(format!(
            "{}: {} bytes of JSON, at most {MAX_JSON}",
            shown(path),
            bytes.len()
        )));
    }
    refuse_other_formats(&bytes).at(shown(path))?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::data(format!("{}: not a JSON object", shown(path)))),
        Err(e) => {
            Err(Error::data(format!("{}:{}: not JSON: {}", shown(path), e.line(), escape(&e.to_string()))))
        }
    }
}

/// Opens model.safetensors, or else the shards that model.safetensors.index.json names.
fn open_weights(dir: &Path, notes: &mut Vec<String>) -> Result<TensorStore> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if std::fs::symlink_metadata(&single).is_ok() {
        TensorStore::open_file(&single)
    } else if std::fs::symlink_metadata(&index).is_ok() {
        open_shards(dir, &index, notes)
    } else {
        Err(no_weights(dir))
    }
}

/// Says what the directory holds instead of safetensors weights.
fn no_weights(dir: &Path) -> Error {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .map(|d| d.filter_map(|f| f.ok()?.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    names.sort();
    let found = |ends: &[&str]| names.iter().find(|n| ends.iter().any(|e| n.ends_with(e)));
    let dir = shown(dir);
    if let Some(name) = found(&[".bin", ".pt", ".pth", ".ckpt"]) {
        let name = escape(name);
        return Error::data(format!(
            "{dir}/{name}: pickle weights can run code when loaded; only safetensors are read"
        ));
    }
    if let Some(name) = found(&[".gguf"]) {
        return Error::data(format!("{dir}/{}: GGUF weights; only safetensors are read", escape(name)))
            .with_hint(gguf::HINT);
    }
    if names.iter().any(|n| n == "adapter_config.json") {
        return Error::data(format!("{dir}: an adapter, not a model"));
    }
    Error::new(Kind::NoInput, format!("{dir}: no model.safetensors and no model.safetensors.index.json"))
}

/// Returns the files that an index names. Errors: 66 when it is missing, 65 when it is malformed or one of the names is
/// no plain name of a safetensors file.
pub fn shards(index: &Path) -> Result<BTreeSet<String>> {
    read_weight_map(index)?.shards(index)
}

fn open_shards(dir: &Path, index: &Path, notes: &mut Vec<String>) -> Result<TensorStore> {
    let place = shown(index);
    let map = read_weight_map(index)?;
    let shards = map.shards(index)?;
    let mut store = TensorStore::empty(shown(dir));
    for shard in &shards {
        store.add(&dir.join(shard))?;
    }
    notes.extend(beyond(&store, &map));
    for (name, shard) in &map.weights {
        let found = store.file_of(name).and_then(Path::file_name);
        if found != Some(shard.as_ref()) {
            let name = escape(name);
            return Err(Error::data(format!(
                "{}: no tensor \"{name}\", which the index puts there",
                shown(&dir.join(shard))
            )));
        }
    }
    let total: u64 = store.views().map(|v| v.data.len() as u64).sum();
    if map.total_size.is_some_and(|t| t != total) {
        notes.push(format!(
            "{place}: total_size says {}, the shards hold {total}",
            map.total_size.unwrap_or(0)
        ));
    }
    Ok(store)
}

/// Returns a note of the tensors that the index does not name.
fn beyond(store: &TensorStore, map: &WeightMap) -> Option<String> {
    let mut beyond = store.names().filter(|name| !map.weights.contains_key(*name));
    let name = beyond.next()?;
    let (file, name, more) = (store.place_of(name), escape(name), beyond.count());
    let more = if more > 0 { format!(", nor are {more} others") } else { String::new() };
    Some(format!("{file}: tensor \"{name}\" is not in the index{more}; it is used"))
}

struct WeightMap {
    weights: BTreeMap<String, String>,
    total_size: Option<u64>,
}

impl WeightMap {
    fn shards(&self, index: &Path) -> Result<BTreeSet<String>> {
        let shards: BTreeSet<String> = self.weights.values().cloned().collect();
        shards.iter().try_for_each(|shard| check_shard_name(shard)).at(shown(index))?;
        Ok(shards)
    }
}

fn read_weight_map(index: &Path) -> Result<WeightMap> {
    let object = read_json(index)?;
    let bad = |what: String| Error::data(format!("{}: {what}", shown(index)));
    let Some(Value::Object(map)) = object.get("weight_map") else {
        return Err(bad("no object \"weight_map\"".into()));
    };
    if let Some(name) = listed_twice(index)? {
        return Err(bad(format!("tensor \"{}\" is listed twice", escape(&name))));
    }
    let mut weights = BTreeMap::new();
    for (name, shard) in map {
        let Value::String(shard) = shard else {
            return Err(bad(format!("the file of tensor \"{}\" is not a string", escape(name))));
        };
        weights.insert(name.clone(), shard.clone());
    }
    // Some writers give total_size as a float.
    let total_size = object.get("metadata").and_then(|m| m.get("total_size")).and_then(Value::as_u64);
    Ok(WeightMap { weights, total_size })
}

/// Returns a name that an index has more than once: of such names JSON objects keep one.
fn listed_twice(index: &Path) -> Result<Option<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Names,
    }
    let bytes = Map::open(index)?;
    // What it is made of has been looked at.
    Ok(serde_json::from_slice::<Index>(&bytes).ok().and_then(|index| index.weight_map.0))
}

/// The first key of an object that comes a second time.
struct Names(Option<String>);

impl<'de> serde::Deserialize<'de> for Names {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Names;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<M: serde::de::MapAccess<'de>>(
                self,
                mut map: M,
            ) -> std::result::Result<Names, M::Error> {
                let (mut seen, mut twice) = (BTreeSet::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    map.next_value::<serde::de::IgnoredAny>()?;
                    if !seen.insert(name.clone()) && twice.is_none() {
                        twice = Some(name);
                    }
                }
                Ok(Names(twice))
            }
        }
        from.deserialize_map(Visitor)
    }
}

/// A shard must be a plain file name: nothing that an index says may lead out of the directory.
fn check_shard_name(name: &str) -> Result<()> {
    let quoted = escape(name);
    if name.is_empty() {
        return Err(Error::data("a tensor's file name is empty"));
    }
    if name.contains(['/', '\\', '\0']) || name == ".." || name == "." {
        return Err(Error::data(format!("\"{quoted}\" points outside the model directory")));
    }
    if name.ends_with(".safetensors") {
        return Ok(());
    }
    Err(Error::data(format!("\"{quoted}\" is not a .safetensors file")))
}

#[cfg(test)]
mod tests;
