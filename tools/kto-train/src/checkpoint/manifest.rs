//! manifest.json of a checkpoint: where the run stands, of which plan it is, and size and hash of every file. It is written
//! last and seals itself, so that a directory either verifies as a whole or is passed over.
//!
//! | field | meaning |
//! |---|---|
//! | `format` | 2 |
//! | `position` | steps, tokens, lengths of the logs, the evaluations so far |
//! | `pack_rows` | rows of a pack, which the last bits of a gradient depend on |
//! | `plan` | the plan of the run, as in run.json |
//! | `files` | by path below the checkpoint: `bytes` and `sha256` |
//! | `sha256` | of the text of manifest.json without this field |

use super::Position;
use kto_cli::{
    Context, Error, Kind, Result, atomic, escape,
    hash::{Sha256Hex, sha256_hex},
    input,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Component, Path, PathBuf},
};

/// The format that is written and read.
const FORMAT: u64 = 2;
/// Its file name.
pub const MANIFEST: &str = "manifest.json";
/// What stands before the seal in the text.
const SEAL: &str = ",\"sha256\":\"";

/// Everything about a checkpoint but the numbers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    format: u64,
    /// Where the run stands.
    pub position: Position,
    /// Rows of a pack.
    pub pack_rows: usize,
    /// The plan of the run.
    pub plan: Value,
    /// By path below the directory.
    pub files: BTreeMap<String, FileSum>,
}

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSum {
    /// Its length.
    pub bytes: u64,
    /// The hash of its content, in hex.
    pub sha256: String,
}

impl FileSum {
    /// Reads a file. It is three times the adapter and is not held.
    pub fn of(path: &Path) -> Result<Self> {
        let mut hash = Sha256Hex::new();
        let mut file = input::open_file(path)?;
        let bytes = io::copy(&mut file, &mut hash).map_err(|e| Error::reading(path, &e))?;
        Ok(Self { bytes, sha256: hash.finish() })
    }
}

impl Manifest {
    /// Describes the files below `directory`.
    pub fn new(directory: &Path, position: Position, pack_rows: usize, plan: Value) -> Result<Self> {
        let mut files = BTreeMap::new();
        for name in names(directory)? {
            // Our own file, not an input: that it cannot be read back is a failure of the disk.
            let sum = FileSum::of(&directory.join(&name)).map_err(|e| e.with_kind(Kind::Io))?;
            files.insert(name, sum);
        }
        Ok(Self { format: FORMAT, position, pack_rows, plan, files })
    }

    /// Writes it into `directory`.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let text = serde_json::to_string(self).map_err(|e| Error::internal(format!("{MANIFEST}: {e}")))?;
        atomic::write(&directory.join(MANIFEST), seal(&text).as_bytes())
    }

    /// Reads the manifest of the checkpoint `directory`. Error (65) when it is not whole.
    pub fn read(directory: &Path) -> Result<Self> {
        let text = input::read_text(&directory.join(MANIFEST), 16 << 20)?;
        let bad = |what: &str| Error::data(format!("{MANIFEST} {what}"));
        let value: Value = serde_json::from_str(&text).map_err(|_| bad("is not JSON"))?;
        match value.get("format").and_then(Value::as_u64) {
            Some(FORMAT) => {}
            Some(..FORMAT) => return Err(bad("is of an older kto-train")),
            _ => return Err(bad("is of a newer kto-train, or of something else")),
        }
        if !is_sealed(&text) {
            return Err(bad("does not match its hash"));
        }
        let this: Self = serde_json::from_value(value).map_err(|e| bad(&format!("lacks something: {e}")))?;
        match this.files.keys().find(|name| !is_plain(name)) {
            Some(name) => Err(bad(&format!("names \"{}\", which is not below it", escape(name)))),
            None => Ok(this),
        }
    }

    /// Checks every file of the checkpoint `directory`. Error (65) that names the first one that is not as it was written.
    pub fn verify(&self, directory: &Path) -> Result<()> {
        for (name, sum) in &self.files {
            let path = directory.join(name);
            let found = fs::metadata(&path).map_err(|e| Error::reading(Path::new(name), &e))?.len();
            if found != sum.bytes {
                return Err(Error::data(format!("{} has {found} bytes, not {}", escape(name), sum.bytes)));
            }
            if FileSum::of(&path).at(escape(name))? != *sum {
                return Err(Error::data(format!("{} does not match its hash", escape(name))));
            }
        }
        Ok(())
    }
}

fn seal(text: &str) -> String {
    let open = text.strip_suffix('}').unwrap_or(text);
    format!("{open}{SEAL}{}\"}}\n", sha256_hex(text.as_bytes()))
}

fn is_sealed(text: &str) -> bool {
    text.rfind(SEAL).is_some_and(|at| seal(&format!("{}}}", &text[..at])) == text)
}

/// Whether a name stays below the directory that it is joined to.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Returns the files below a directory of at most two levels, sorted.
fn names(directory: &Path) -> Result<Vec<String>> {
    let list = |path: &Path| -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(path).map_err(|e| Error::reading(path, &e))?;
        entries.map(|e| e.map(|e| e.path()).map_err(|e| Error::reading(path, &e))).collect()
    };
    let mut found = Vec::new();
    for path in list(directory)? {
        if path.is_dir() { found.extend(list(&path)?) } else { found.push(path) }
    }
    let name = |p: PathBuf| Some(p.strip_prefix(directory).ok()?.to_str()?.to_string());
    let mut names: Vec<String> = found.into_iter().filter_map(name).collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Evaluated;
    use serde_json::json;

    fn example(directory: &Path) -> Manifest {
        fs::create_dir_all(directory.join("best")).unwrap();
        fs::write(directory.join("state.safetensors"), b"numbers").unwrap();
        fs::write(directory.join("best/adapter_config.json"), b"{}").unwrap();
        let evaluated = Evaluated { step: 6, best_step: 3, best_loss: 0.1 + 0.2, waited: 1 };
        let position = Position { step: 7, num_tokens: 99, evaluated, ..Position::default() };
        let plan = json!({ "lr": 5e-6, "x": 0.1 + 0.2, "sha256": "a,\"sha256\":\"b" });
        Manifest::new(directory, position, 1024, plan).unwrap()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let written = example(dir.path());
        written.write(dir.path()).unwrap();
        let read = Manifest::read(dir.path()).unwrap();
        assert_eq!(read.position, written.position);
        assert_eq!((read.plan, read.files.len()), (written.plan, 2));
        Manifest::read(dir.path()).unwrap().verify(dir.path()).unwrap();
    }

    /// Every byte matters: of the manifest and of the files.
    #[test]
    fn any_flipped_or_missing_byte_is_found() {
        let dir = tempfile::tempdir().unwrap();
        example(dir.path()).write(dir.path()).unwrap();
        let whole = |dir: &Path| Manifest::read(dir).and_then(|m| m.verify(dir)).is_ok();
        for name in [MANIFEST, "state.safetensors", "best/adapter_config.json"] {
            let path = dir.path().join(name);
            let bytes = fs::read(&path).unwrap();
            for at in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[at] ^= 1;
                fs::write(&path, &changed).unwrap();
                assert!(!whole(dir.path()), "{name}: byte {at}");
                fs::write(&path, &bytes[..at]).unwrap();
                assert!(!whole(dir.path()), "{name}: cut to {at}");
            }
            fs::remove_file(&path).unwrap();
            assert!(!whole(dir.path()), "{name} missing");
            fs::write(&path, &bytes).unwrap();
            assert!(whole(dir.path()));
        }
    }

    #[test]
    fn names_do_not_lead_out_of_the_checkpoint() {
        for name in ["../x", "/etc/passwd", "a/../../b", ""] {
            assert!(!is_plain(name), "{name}");
            let dir = tempfile::tempdir().unwrap();
            let mut manifest = example(dir.path());
            manifest.files.insert(name.into(), FileSum { bytes: 0, sha256: String::new() });
            manifest.write(dir.path()).unwrap();
            assert!(Manifest::read(dir.path()).is_err());
        }
        assert!(is_plain("best/adapter_model.safetensors"));
    }
}
