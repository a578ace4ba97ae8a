//! What the cache holds: for each model its size, when it was used, its form, and what is wrong with it.
//!
//! Reads headers of weights, never the weights. A model that cannot be read is listed with the reason, so one broken
//! folder hides no other.

use crate::{Need, cache};
use kto_cli::{Error, Kind, Result};
use kto_formats::{model_dir::ModelDir, tensors::float_size};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// Folders below a snapshot, at most: a loop of links must end.
const DEPTH: usize = 8;

/// A model in the cache.
#[derive(Clone, Debug, Default)]
pub struct CachedModel {
    /// `org/name`.
    pub name: String,
    /// Its folder in the cache.
    pub path: PathBuf,
    /// Commits in the cache with the references to each.
    pub snapshots: BTreeMap<String, Vec<String>>,
    /// The snapshot that the rest is about: that of `main`, else the newest.
    pub snapshot: Option<PathBuf>,
    /// Bytes on the disk; what several snapshots share counts once.
    pub size: u64,
    /// Of these, bytes that no snapshot uses.
    pub unused: u64,
    /// Of these, bytes of downloads that have not ended.
    pub partial: u64,
    /// When a file was read last, in seconds since 1970, as far as the file system tells.
    pub last_used: Option<i64>,
    /// When a file was fetched last.
    pub last_modified: Option<i64>,
    /// How the weights are stored: `bf16`, `bitsandbytes nf4`, `mlx 4 bits`, …; `none` for a tokenizer alone.
    pub form: String,
    /// What is wrong: a missing file, a header that cannot be read. None for a model that can be used.
    pub fault: Option<String>,
    /// Weights as pickle, which can run code when loaded.
    pub pickle: Vec<String>,
    /// Python files, and configurations that ask for such.
    pub remote_code: Vec<String>,
}

/// Lists the models of a cache, by name. No folder is an empty cache. Errors: 66 or 74 when it cannot be read.
pub fn scan(cache: &Path) -> Result<Vec<CachedModel>> {
    let entries = match fs::read_dir(cache) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::reading(cache, &e)),
    };
    let mut models = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::reading(cache, &e))?.path();
        let name =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix("models--"));
        if let Some(name) = name.filter(|_| path.is_dir()) {
            models.push(model(name.replacen("--", "/", 1), path.clone()));
        }
    }
    models.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(models)
}

fn model(name: String, path: PathBuf) -> CachedModel {
    let mut this = CachedModel { name, path, form: "none".into(), ..CachedModel::default() };
    let snapshots = this.path.join("snapshots");
    for commit in names(&snapshots) {
        this.snapshots.insert(commit, Vec::new());
    }
    for reference in below(&this.path.join("refs")) {
        if let Some(commit) = cache::reference(&this.path, &reference) {
            this.snapshots.entry(commit).or_default().push(reference);
        }
    }
    let main = this.snapshots.iter().find(|(_, refs)| refs.iter().any(|name| name == "main"));
    let main = main.map(|(commit, _)| snapshots.join(commit)).filter(|path| path.is_dir());
    let newest =
        || names(&snapshots).into_iter().map(|name| snapshots.join(name)).max_by_key(|path| changed(path));
    this.snapshot = main.or_else(newest);
    measure(&mut this, &snapshots);
    match this.snapshot.clone() {
        None => this.fault = Some("no snapshot".into()),
        Some(snapshot) => judge(&mut this, &snapshot),
    }
    this
}

/// Sizes and times.
fn measure(this: &mut CachedModel, snapshots: &Path) {
    let mut used = BTreeSet::new();
    for file in below(snapshots) {
        let file = snapshots.join(file);
        let Ok(meta) = fs::symlink_metadata(&file) else { continue };
        if meta.is_symlink() {
            used.extend(file.canonicalize());
        } else {
            // Where there were no links, the bytes lie in the snapshot.
            this.size += meta.len();
            times(this, &meta);
        }
    }
    let blobs = this.path.join("blobs");
    for name in names(&blobs) {
        let file = blobs.join(&name);
        let Ok(meta) = fs::metadata(&file) else { continue };
        this.size += meta.len();
        if name.ends_with(".incomplete") {
            this.partial += meta.len();
        } else if !file.canonicalize().is_ok_and(|file| used.contains(&file)) {
            this.unused += meta.len();
        }
        times(this, &meta);
    }
}

fn times(this: &mut CachedModel, meta: &fs::Metadata) {
    this.last_used = this.last_used.max(meta.accessed().ok().map(seconds));
    this.last_modified = this.last_modified.max(meta.modified().ok().map(seconds));
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|meta| meta.modified()).ok()
}

/// Form, faults and dangers of a snapshot.
fn judge(this: &mut CachedModel, snapshot: &Path) {
    let files = below(snapshot);
    let ends = |ends: &[&str]| -> Vec<String> {
        files.iter().filter(|name| ends.iter().any(|end| name.ends_with(end))).cloned().collect()
    };
    this.pickle = ends(&[".bin", ".pt", ".pth", ".ckpt", ".pkl"]);
    this.remote_code = ends(&[".py"]);
    for name in ["config.json", "tokenizer_config.json"] {
        if json(&snapshot.join(name)).is_some_and(|config| config.get("auto_map").is_some()) {
            this.remote_code.push(name.into());
        }
    }
    let broken = files.iter().find(|name| !snapshot.join(name).exists());
    let safetensors = !ends(&[".safetensors", "model.safetensors.index.json"]).is_empty();
    if safetensors {
        match ModelDir::open(snapshot) {
            Ok(model) => this.form = form(&model),
            Err(error) => {
                this.form = "safetensors".into();
                this.fault = Some(short(&error, snapshot));
            }
        }
    } else if !ends(&[".gguf"]).is_empty() {
        this.form = "gguf".into();
        this.fault = Some("no safetensors".into());
    } else if !this.pickle.is_empty() {
        this.form = "pickle".into();
        this.fault = Some("no safetensors".into());
    } else if let Ok(Some(name)) = Need::Tokenizer.lacking(snapshot) {
        this.fault = Some(format!("lacks the weights and {name}"));
    }
    if let Some(name) = broken {
        this.fault = Some(format!("lacks the bytes of {name}"));
    }
}

/// The error without the folder, which the list has already.
fn short(error: &Error, snapshot: &Path) -> String {
    let text = error.to_string().replace(&format!("{}/", snapshot.display()), "");
    if error.kind() == Kind::NoInput { format!("lacks {text}") } else { text }
}

/// How the weights are stored, in words.
fn form(model: &ModelDir) -> String {
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_string);
    let flag = |value: &Value, key: &str| value.get(key).and_then(Value::as_bool).unwrap_or(false);
    if let Some(quantization) = model.config.get("quantization_config").filter(|q| q.is_object()) {
        let method = text(quantization, "quant_method").unwrap_or_default();
        return match method.as_str() {
            "bitsandbytes" if flag(quantization, "load_in_4bit") => {
                let kind = text(quantization, "bnb_4bit_quant_type").unwrap_or_else(|| "4 bits".into());
                let double = if flag(quantization, "bnb_4bit_use_double_quant") { ", double" } else { "" };
                format!("bitsandbytes {kind}{double}")
            }
            "bitsandbytes" => "bitsandbytes int8".into(),
            "" => mlx(quantization).unwrap_or_else(|| "quantized".into()),
            other => format!("{other} (not read)"),
        };
    }
    if let Some(form) = model.config.get("quantization").and_then(mlx) {
        return form;
    }
    let mut bytes: BTreeMap<String, u64> = BTreeMap::new();
    for view in model.tensors.views() {
        let kind = if float_size(view.dtype).is_some() { view.dtype.to_string() } else { "other".into() };
        *bytes.entry(kind.to_lowercase()).or_default() += view.data.len() as u64;
    }
    bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or("none".into(), |(kind, _)| kind)
}

fn mlx(quantization: &Value) -> Option<String> {
    let bits = quantization.get("bits").and_then(Value::as_u64)?;
    let mode = quantization.get("mode").and_then(Value::as_str).filter(|mode| *mode != "affine");
    Some(mode.map_or_else(|| format!("mlx {bits} bits"), |mode| format!("mlx {mode}")))
}

fn json(path: &Path) -> Option<Value> {
    serde_json::from_slice(&kto_cli::input::read(path, kto_formats::model_dir::MAX_JSON).ok()?).ok()
}

/// Names in a folder; those that are no text are passed over.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Files below a folder, by their path in it.
fn below(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![(String::new(), 0)];
    while let Some((prefix, depth)) = open.pop() {
        for name in names(&folder.join(&prefix)) {
            let path = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
            let is_folder = fs::symlink_metadata(folder.join(&path)).is_ok_and(|meta| meta.is_dir());
            match is_folder && depth < DEPTH {
                true => open.push((path, depth + 1)),
                false => found.push(path),
            }
        }
    }
    found.sort();
    found
}
