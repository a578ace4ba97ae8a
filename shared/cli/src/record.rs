//! What a run read and wrote, for its manifest (`--manifest`) and its rule of make (`--depfile`).
//!
//! A tool notes its inputs and outputs and ends with [`Record::finish`], or for a directory with [`Record::commit`].
//! Inputs are hashed at the end, when the work has gone well; an output that was given no name leaves no trace.

use crate::{
    Common, Error, Kind, Make, Result,
    atomic::{AtomicDir, AtomicFile},
    config::Resolution,
    depfile, escape,
    hash::{self, Hashed},
    manifest,
    output::Output,
    signal,
};
use serde_json::{Map, Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::SystemTime,
};

/// Name of the manifest in a directory that a tool makes.
pub(crate) const IN_DIRECTORY: &str = "manifest.json";

/// The record of a run.
pub struct Record {
    make: Make,
    resolution: Resolution,
    inputs: Vec<Input>,
    /// Outputs: the result, and what is written beside it.
    results: Vec<PathBuf>,
    sides: Vec<PathBuf>,
    /// The file by which make knows a directory without a manifest.
    marker: &'static str,
    began: SystemTime,
    /// The inputs as the manifest has them, once they have been hashed.
    described: OnceLock<Vec<Value>>,
}

/// Something that was read.
enum Input {
    /// Told by its hash.
    File(PathBuf),
    /// Weights, told by a fingerprint: reading all of them again would take as long as the work.
    Model { path: PathBuf, fingerprint: String, files: Vec<PathBuf> },
    /// No name, no second reading.
    Stdin,
}

impl Record {
    /// Starts the record of a run.
    pub fn new(common: &Common) -> Self {
        Self {
            resolution: common.make.resolution(),
            make: common.make.clone(),
            inputs: Vec::new(),
            results: Vec::new(),
            sides: Vec::new(),
            began: SystemTime::now(),
            marker: "config.json",
            described: OnceLock::new(),
        }
    }
    /// Notes an input file; `-` is standard input.
    pub fn file(&mut self, path: &Path) {
        self.inputs.push(if path == Path::new("-") { Input::Stdin } else { Input::File(path.into()) });
    }
    /// Notes input files.
    pub fn files<'a>(&mut self, paths: impl IntoIterator<Item = &'a PathBuf>) {
        paths.into_iter().for_each(|path| self.file(path));
    }
    /// Notes every file of a small directory, such as an adapter.
    pub fn directory(&mut self, path: &Path) {
        files_of(path, |_| true).iter().for_each(|file| self.file(file));
    }
    /// Notes the tokenizer and the templates in a model directory.
    pub fn tokenizer(&mut self, path: &Path) {
        let begins = ["config.json", "tokenizer", "chat_template", "special_tokens"];
        let wanted = |name: &str| begins.iter().any(|b| name.starts_with(b));
        files_of(path, wanted).iter().for_each(|file| self.file(file));
        let named = |name: &str| name.ends_with(".jinja");
        files_of(&path.join("additional_chat_templates"), named).iter().for_each(|file| self.file(file));
    }
    /// Notes a model directory. Its fingerprint is asked for when a manifest will tell it; note outputs first.
    pub fn model(&mut self, path: &Path, fingerprint: impl FnOnce() -> String) {
        let named = if self.outputs().is_empty() { None } else { Some(PathBuf::new()) };
        let fingerprint = self.manifest_path(named).map(|_| fingerprint()).unwrap_or_default();
        self.known_model(path, fingerprint);
    }
    /// Notes a model directory whose fingerprint is known.
    pub fn known_model(&mut self, path: &Path, fingerprint: String) {
        let ends = [".safetensors", ".json", ".jinja", ".model", ".txt"];
        let files = files_of(path, |name| ends.iter().any(|e| name.ends_with(e)));
        self.inputs.push(Input::Model { path: path.into(), fingerprint, files });
    }
    /// Notes an output file; one without a name, a pipe or a device is none.
    pub fn output(&mut self, path: Option<&Path>) {
        self.results.extend(named(path));
    }
    /// Names the file of a directory that says that it is whole, where that is not config.json.
    pub fn marker(&mut self, name: &'static str) {
        self.marker = name;
    }
    /// Notes an output beside the result, such as a report.
    pub fn side(&mut self, path: Option<&Path>) {
        self.sides.extend(named(path));
    }
    fn outputs(&self) -> Vec<PathBuf> {
        self.results.iter().chain(&self.sides).cloned().collect()
    }
    /// Fails (2) when the result would overwrite an input, or what is written beside it an input, the result, or another such file.
    /// Of inputs that are noted afterwards this has to be asked again.
    pub fn check_sides(&self) -> Result<()> {
        let read: Vec<&PathBuf> = self.inputs.iter().flat_map(Input::paths).collect();
        if let Some(result) =
            self.results.iter().find(|result| at_place_of(result, read.iter().copied()).is_some())
        {
            let text = format!("\"{}\" is read and would be overwritten", escape(&shown(result)));
            return Err(Error::usage(text).with_hint("another name for the output"));
        }
        let named = [self.make.depfile.clone(), self.manifest_path(None)].into_iter().flatten();
        let sides: Vec<PathBuf> = self.sides.iter().cloned().chain(named).collect();
        let inputs: Vec<&PathBuf> = read.into_iter().chain(&self.results).collect();
        for (i, side) in sides.iter().enumerate() {
            if let Some(other) = at_place_of(side, inputs.iter().copied().chain(&sides[..i])) {
                let (side, other) = (escape(&shown(side)), escape(&shown(other)));
                return Err(Error::usage(format!("\"{side}\" would overwrite \"{other}\" of the same run"))
                    .with_hint("another name for the report, manifest, rule or quarantine"));
            }
        }
        Ok(())
    }
    /// Fails before the work: with 2 when a rule is asked for and there is nothing to make, with 73 when rule or manifest
    /// cannot be written.
    pub fn check(&self) -> Result<()> {
        self.check_sides()?;
        if self.make.depfile.is_some() && self.outputs().is_empty() {
            return Err(Error::usage("--depfile needs an output with a name").with_hint("--output FILE"));
        }
        let named = [self.make.depfile.clone(), self.manifest_path(None)];
        for path in named
            .into_iter()
            .flatten()
            .filter(|p| (!p.exists() || p.is_dir()) && !crate::output::is_stdout(p))
        {
            AtomicFile::create(&path)?;
        }
        // Names that no rule can hold are found now too.
        if self.make.depfile.is_some() { self.rule(&self.outputs()).map(drop) } else { Ok(()) }
    }
    /// Ends the record of a run whose output files are in their place: manifest, then rule.
    pub fn finish(&self) -> Result<()> {
        let outputs = self.outputs();
        let sidecar = outputs.first().filter(|path| is_file(path)).map(|path| {
            let mut name = path.clone().into_os_string();
            name.push(".manifest.json");
            PathBuf::from(name)
        });
        if let Some(path) = self.manifest_path(sidecar) {
            let files: Vec<_> = outputs.iter().filter(|path| is_file(path)).cloned().collect();
            self.write_manifest(&path, self.manifest(written(&files, &files)?)?)?;
        }
        self.write_rule(&outputs)
    }
    /// Starts the directory that [`Record::commit`] makes final: who writes into it hears whether hashes of files are of use.
    pub fn begin(&self, directory: &AtomicDir) {
        directory.want_hashes(self.manifest_path(Some(PathBuf::new())).is_some());
    }
    /// Makes the directory `target` final, with the manifest in it; then writes the rule.
    pub fn commit(&self, directory: AtomicDir, target: &Path) -> Result<()> {
        let own = directory.path().join(IN_DIRECTORY);
        let manifest = match self.manifest_path(Some(own.clone())) {
            None => None,
            Some(path) => {
                let files = files_below(directory.path())?;
                let names = files.iter().filter_map(|f| f.strip_prefix(directory.path()).ok());
                let names: Vec<_> = names.map(|name| target.join(name)).collect();
                let known = directory.hashes();
                let (read, read_as): (Vec<PathBuf>, Vec<PathBuf>) = files
                    .iter()
                    .cloned()
                    .zip(names.iter().cloned())
                    .filter(|(f, _)| !known.contains_key(f))
                    .unzip();
                let mut entries = written(&read, &read_as)?.into_iter();
                let entry = |(file, name): (&PathBuf, &PathBuf)| match known.get(file) {
                    Some(sha256) => {
                        let size = fs::metadata(file).map_or(0, |m| m.len());
                        Some(json!({ "path": shown(name), "size": size, "sha256": sha256 }))
                    }
                    None => entries.next(),
                };
                let entries = files.iter().zip(&names).filter_map(entry).collect();
                Some((path, self.manifest(entries)?))
            }
        };
        match manifest {
            Some((path, text)) if path == own => {
                self.write_manifest(&path, text)?;
                directory.commit()?;
            }
            Some((path, text)) => {
                directory.commit()?;
                self.write_manifest(&path, text)?;
            }
            None => directory.commit()?,
        }
        self.write_rule(&[target.join(if self.keeps_own() { IN_DIRECTORY } else { self.marker })])
    }
    /// Returns what a manifest of another form takes over: configuration, inputs, these outputs, and the environment.
    pub fn sections(&self, outputs: &[PathBuf]) -> Result<Map<String, Value>> {
        self.manifest(written(outputs, outputs)?)
    }
    /// Writes the rule for outputs of another form, and with `--manifest FILE` a copy of their manifest.
    pub fn finish_with(&self, outputs: &[PathBuf], manifest: &Path) -> Result<()> {
        if let Some(path) = self.manifest_path(None) {
            let text = crate::input::read(manifest, 1 << 30)?;
            self.write(&path, &text)?;
        }
        self.write_rule(outputs)
    }

    fn keeps_own(&self) -> bool {
        self.make.manifest.is_none()
    }

    fn manifest_path(&self, own: Option<PathBuf>) -> Option<PathBuf> {
        match &self.make.manifest {
            Some(path) if path == Path::new("none") => None,
            Some(path) => Some(path.clone()),
            None => own,
        }
    }

    fn manifest(&self, outputs: Vec<Value>) -> Result<Map<String, Value>> {
        let mut map = manifest::begin(&self.resolution.tool, self.resolution.configuration());
        map.insert("inputs".into(), Value::Array(self.described_inputs()?));
        map.insert("outputs".into(), Value::Array(outputs));
        map.insert("environment".into(), manifest::environment(self.began));
        Ok(map)
    }

    fn described_inputs(&self) -> Result<Vec<Value>> {
        if let Some(described) = self.described.get() {
            return Ok(described.clone());
        }
        let files: Vec<PathBuf> = self.inputs.iter().filter_map(Input::hashed).cloned().collect();
        let mut hashed = entries(&files, &files)?.into_iter();
        let described = self.inputs.iter().filter_map(|input| match input {
            Input::File(_) => hashed.next(),
            Input::Stdin => Some(json!({ "path": "-" })),
            Input::Model { path, fingerprint, files } => {
                let size = |path: &PathBuf| fs::metadata(path).map_or(0, |m| m.len());
                let files: Vec<Value> =
                    files.iter().map(|f| json!({ "path": shown(f), "size": size(f) })).collect();
                Some(json!({ "path": shown(path), "fingerprint": fingerprint, "files": files }))
            }
        });
        let described: Vec<Value> = described.collect();
        Ok(self.described.get_or_init(|| described).clone())
    }

    fn write_manifest(&self, path: &Path, manifest: Map<String, Value>) -> Result<()> {
        let text = manifest::text(&manifest)?;
        let old = if self.make.if_changed { fs::read(path).ok() } else { None };
        if old.is_some_and(|old| manifest::is_same(&old, &text)) {
            return Ok(());
        }
        self.write(path, &text)
    }

    fn write_rule(&self, outputs: &[PathBuf]) -> Result<()> {
        match &self.make.depfile {
            Some(path) => self.write(path, self.rule(outputs)?.as_bytes()),
            None => Ok(()),
        }
    }

    fn rule(&self, outputs: &[PathBuf]) -> Result<String> {
        let steering = [&self.make.config, &self.make.from_manifest].into_iter().flatten().cloned();
        let mut inputs: Vec<PathBuf> = Vec::new();
        let all = self.inputs.iter().flat_map(Input::paths).cloned().chain(steering);
        for input in all.filter(|p| p != Path::new("-")) {
            if !inputs.contains(&input) {
                inputs.push(input);
            }
        }
        depfile::rule(outputs, &inputs)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut file = Output::create(Some(path))?.if_changed(self.make.if_changed);
        file.write(bytes)?;
        file.finish()
    }
}

impl Input {
    fn hashed(&self) -> Option<&PathBuf> {
        match self {
            Self::File(path) => Some(path),
            Self::Model { .. } | Self::Stdin => None,
        }
    }
    fn paths(&self) -> &[PathBuf] {
        match self {
            Self::File(path) => std::slice::from_ref(path),
            Self::Model { files, .. } => files,
            Self::Stdin => &[],
        }
    }
}

/// Returns the entries of outputs. That they cannot be read back is a failure of the disk, not of an input.
fn written(files: &[PathBuf], names: &[PathBuf]) -> Result<Vec<Value>> {
    entries(files, names).map_err(|e| if signal::is_stop(e.kind()) { e } else { e.with_kind(Kind::Io) })
}

/// Returns the entries of files that are called `names` there. A pipe that was an input has been read and is not hashed.
fn entries(files: &[PathBuf], names: &[PathBuf]) -> Result<Vec<Value>> {
    let hashes = hash::files(files)?;
    let entry = |(Hashed { size, sha256 }, name): (Hashed, &PathBuf)| match sha256 {
        Some(sha256) => json!({ "path": shown(name), "size": size, "sha256": sha256 }),
        None => json!({ "path": shown(name) }),
    };
    Ok(hashes.into_iter().zip(names).map(entry).collect())
}

/// Returns the files of a directory whose names are wanted, sorted; hidden ones and manifests are not. A directory that cannot be
/// read has none: who reads it as an input says so.
fn files_of(path: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    entries_of(path).unwrap_or_default().into_iter().filter(|path| is_ours(path, &wanted)).collect()
}

fn is_ours(path: &Path, wanted: impl Fn(&str) -> bool) -> bool {
    let ours = |name: &str| !name.starts_with('.') && name != IN_DIRECTORY && wanted(name);
    path.is_file() && path.file_name().and_then(|n| n.to_str()).is_some_and(ours)
}

/// Returns all files below a directory that a tool has made, sorted.
fn files_below(path: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in entries_of(path)? {
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else if is_ours(&path, |_| true) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn entries_of(path: &Path) -> Result<Vec<PathBuf>> {
    let read = |path: &Path| -> std::io::Result<Vec<PathBuf>> {
        fs::read_dir(path)?.map(|entry| entry.map(|e| e.path())).collect()
    };
    let mut paths = read(path).map_err(|e| Error::reading(path, &e).with_kind(Kind::Io))?;
    paths.sort();
    Ok(paths)
}

/// Returns an output that has a name.
fn named(path: Option<&Path>) -> Option<PathBuf> {
    path.filter(|p| !crate::output::is_stdout(p)).map(Path::to_path_buf)
}

/// Returns where a file is or will be; nothing for a pipe or a device, which is not overwritten.
fn place(path: &Path) -> Option<PathBuf> {
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => None,
        Ok(_) => fs::canonicalize(path).ok(),
        Err(_) => {
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Some(fs::canonicalize(parent).ok()?.join(path.file_name()?))
        }
    }
}

/// Returns the first of the others that is, or will be, the same file.
fn at_place_of<'a>(path: &Path, mut others: impl Iterator<Item = &'a PathBuf>) -> Option<&'a PathBuf> {
    let own = place(path)?;
    others.find(|other| place(other).as_ref() == Some(&own))
}

fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file())
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
